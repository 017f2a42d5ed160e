"""A version folded into its base: an ordinary transformers folder, read and written one tensor at a time.

W' = W + scaling · (B A + F), computed in fp32, kept in the dtype that the base has on disk; F is what the
run's merge rule folded into the base, where it does.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edge_sdk.errors import BaseModelError, ContainerError
from edge_sdk.protocol.model import LoraModule, LoraShape, ModelShape
from edge_sdk.training.model.building import build_empty, read_config
from edge_sdk.training.model.checkpoint import Checkpoint, Entry, assign_names
from edge_sdk.updates.folders import replacing
from edge_sdk.updates.versions import VersionChain

__all__ = ["write_merged"]

_BESIDE = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "*.jinja", "chat_template.json", "vocab*", "merges.txt", "bpe.codes", "dict.txt",
    "*.model", "*.spm", "*.tiktoken", "tekken.json",
)  # fmt: skip
"""What of the base's folder goes along: the tokenizer, and what generates with the model. What else lies
there (other libraries' descriptions of how the base was made or is used) is not true of the merged model."""
_WORDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


@dataclass(frozen=True)
class _Place:
    """A tensor of the merged model: what it is made of, and how it is kept."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    entry: Entry | None = None
    part: str = ""
    """Key of the dense part that it is."""
    layer: int = 0
    module: LoraModule | None = None
    """The LoRA module whose weight it is, in ``layer``."""


def write_merged(
    folder: Path,
    base: Path,
    version: VersionChain,
    *,
    shape: ModelShape,
    lora: LoraShape,
    labels: tuple[str, ...],
    task: str,
    card: str = "",
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Writes config, weights, tokenizer and a model card; replaces an older folder at once. ``check`` is
    called between tensors; raises to end the writing, of which nothing is left then.

    Raises BaseModelError for a base that is quantized or not the version's, ContainerError for a version that
    is not whole.
    """
    checkpoint = Checkpoint.open(base)
    config = read_config(base, labels, task)
    net, _ = build_empty(config, base, task)
    places = list(_places(net, checkpoint, shape))
    with replacing(folder) as building:
        _copy(base, building)
        if labels:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
        config.use_cache = json.loads((base / "config.json").read_bytes()).get("use_cache", True)
        config.architectures = [type(net).__name__]
        config.save_pretrained(building)
        (building / "README.md").write_text(_card(str(base), type(net).__name__, task, card))
        _write(building / "model.safetensors", places, version, lora, check)
    return folder


def _places(net: nn.Module, checkpoint: Checkpoint, shape: ModelShape) -> Iterator[_Place]:
    """Every tensor of the merged model, once, in the order of the model."""
    found = assign_names(checkpoint, net, set(net.state_dict()))
    dense = {part.name: tuple(part.shape) for part in shape.dense}
    modules = {
        f"{shape.layer_path}.{layer}.{module.name}.weight": (layer, module)
        for layer in range(shape.layers)
        for module in shape.modules
    }
    kept = _kept_dtype(found)
    tied: dict[int, str] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        entry = found.get(name)
        if name in dense:
            yield _Place(name, dense[name], kept, part=f"dense.{name}")
        elif entry is None:
            tied.setdefault(id(parameter), "")  # its other name has it, or it is missing
            continue
        elif entry.tensor.shape != tuple(parameter.shape):
            raise BaseModelError(
                f"tensor {entry.tensor.name!r} of the base is {entry.tensor.shape}, its model has "
                f"{tuple(parameter.shape)}",
                "config.json belongs to another model",
            )
        elif tied.get(id(parameter)) and found[tied[id(parameter)]].digest() == entry.digest():
            continue  # tied, and the same: transformers ties it again
        else:
            layer, module = modules.pop(name, (0, None))
            dtype = entry.dtype if module is None else kept
            yield _Place(name, entry.tensor.shape, dtype, entry, layer=layer, module=module)
        tied[id(parameter)] = name
    names = dict(net.named_parameters(remove_duplicate=False))
    missing = [name for name, one in names.items() if not tied.get(id(one))]
    if missing or modules:
        raise BaseModelError(
            f"the base lacks {(missing or list(modules))[0]!r}, which the merged model needs",
            "it is not the base that the run was made with",
        )


def _kept_dtype(found: dict[str, Entry]) -> Any:
    """The dtype of the base's largest tensor."""
    largest = max(found.values(), key=lambda entry: entry.tensor.size)
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(largest.tensor.dtype, torch.float32)
    if largest.tensor.dtype not in ("F16", "BF16", "F32", "F64"):
        raise BaseModelError(
            f"the base holds its weights as {largest.tensor.dtype}: it is quantized",
            "merge into its fp32, bf16 or fp16 weights, or export the adapter alone",
        )
    return dtype


def _write(
    path: Path, places: list[_Place], version: VersionChain, lora: LoraShape, check: Callable[[], None]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for place in places:
        size = place.dtype.itemsize * _count(place.shape)
        header[place.name] = {
            "dtype": _WORDS[place.dtype], "shape": list(place.shape), "data_offsets": [at, at + size],
        }  # fmt: skip
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for place in places:
            check()
            values = _values(place, version, lora).to(place.dtype).contiguous()
            file.write(memoryview(values.view(-1).view(torch.uint8).numpy()))


def _values(place: _Place, version: VersionChain, lora: LoraShape) -> Any:
    if place.entry is None:
        return torch.from_numpy(version.tensor(place.part)).reshape(place.shape)
    values = place.entry.read()
    if place.module is None:
        return values
    key = f"{place.layer}.{place.module.name}"
    values = values.float()
    for slots in (key, f"fold.{key}"):
        if f"{slots}.A" in version.sizes or slots == key:
            a, b = (torch.from_numpy(version.tensor(f"{slots}.{factor}")) for factor in "AB")
            change = a.T @ b if place.module.transposed else b.T @ a  # B lies transposed
            if change.shape != values.shape:
                raise ContainerError(
                    f"the version changes {key!r} by {tuple(change.shape)}, the base has "
                    f"{tuple(values.shape)}"
                )
            values.add_(change, alpha=lora.scaling)
    return values


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _copy(base: Path, folder: Path) -> None:
    for pattern in _BESIDE:
        for path in base.glob(pattern):
            shutil.copyfile(path, folder / path.name)


def _card(base: str, architecture: str, task: str, more: str) -> str:
    kind = "AutoModelForSequenceClassification" if task == "classification" else "AutoModelForCausalLM"
    lines = [
        "---",
        "library_name: transformers",
        f"base_model: {json.dumps(base)}",
        f"pipeline_tag: {'text-classification' if task == 'classification' else 'text-generation'}",
        "tags: [federated-learning]",
        "---",
        "",
        "# A model fine-tuned by a fleet of devices",
        "",
        f"- {architecture}; base model `{base}`, the LoRA adapter folded into its weights",
        "",
        "```python",
        f"from transformers import AutoTokenizer, {kind}",
        "",
        f'model = {kind}.from_pretrained("path/of/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")',
        "```",
        "",
    ]
    return "\n".join(lines) + (f"\n{more.strip()}\n" if more.strip() else "")

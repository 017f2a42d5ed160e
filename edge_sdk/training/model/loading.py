"""The resident model: a sequence classifier with LoRA in every layer, whose adapter can be set and read.

The base stays in fp32 and frozen. What is tuned is named by part keys (``edge_sdk.updates``): LoRA factors
slot-major, A (rank, in) and B transposed (rank, out), and the dense parts of the head, (rows, rest).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from edge_sdk.data.base_files import weight_files
from edge_sdk.errors import BaseModelError, ContainerError
from edge_sdk.protocol.model import DensePart, LoraModule, LoraShape, ModelShape
from edge_sdk.training.model.linear import LoraLinear
from edge_sdk.training.precision.weights import Dense
from edge_sdk.updates.keys import Adapter

__all__ = ["TunableModel", "load_model"]

_HEADS = ("classifier", "pre_classifier")
"""Modules that are the task's own: trained whole, whether or not the checkpoint carries them."""


@dataclass
class TunableModel:
    """A model with its tunable parts by key. Attributes: ``parts`` maps a part key to its parameter."""

    net: Any
    shape: ModelShape
    lora: LoraShape
    layers: Any
    parts: dict[str, Any]
    device: torch.device

    def check_length(self, max_length: int) -> None:
        """Raises BaseModelError where the model has no positions for so many tokens."""
        for name, module in self.net.named_modules():
            if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
                # RoBERTa counts positions from behind the padding token's own
                longest = module.num_embeddings - (
                    0 if module.padding_idx is None else module.padding_idx + 1
                )
                if max_length > longest:
                    raise BaseModelError(
                        f"max_length is {max_length}, this base model takes {longest} tokens at most",
                        "lower training.max_length in run.toml",
                    )

    def encode(self, ids: Any, mask: Any) -> Any:
        """The head's input: the last layer's output at the first token, (batch, 1, hidden)."""
        base = getattr(self.net, self.net.base_model_prefix)
        return base(input_ids=ids, attention_mask=mask).last_hidden_state[:, :1]

    def head(self, first: Any) -> Any:
        """Logits (batch, labels) from what ``encode`` gives."""
        base = getattr(self.net, self.net.base_model_prefix)
        if getattr(base, "pooler", None) is not None:
            return self.net.classifier(base.pooler(first))
        if hasattr(self.net, "pre_classifier"):
            return self.net.classifier(torch.relu(self.net.pre_classifier(first[:, 0])))
        return self.net.classifier(first)

    def logits(self, ids: Any, mask: Any) -> Any:
        return self.head(self.encode(ids, mask))

    def set_depth(self, depth: int) -> list[str]:
        """Tunes the top ``depth`` layers and the head, freezes the rest; returns the tuned keys.

        Frozen LoRA still counts in the forward pass; without a gradient there is nothing that an
        optimizer or its weight decay could move.
        """
        if not 0 <= depth <= self.shape.layers:
            raise ValueError(f"LoRA depth {depth} is outside 0..{self.shape.layers}")
        tuned = []
        for key, parameter in self.parts.items():
            layer = _layer_of(key)
            wanted = layer is None or layer >= self.shape.layers - depth
            parameter.requires_grad_(wanted)
            parameter.grad = None
            if wanted:
                tuned.append(key)
        return tuned

    def set_adapter(self, adapter: Adapter) -> None:
        """Copies every part into the model, exactly. Raises ContainerError where parts or shapes differ."""
        if adapter.keys() != self.parts.keys():
            odd = sorted(adapter.keys() ^ self.parts.keys())
            raise ContainerError(
                f"the adapter's parts are not this model's: {len(odd)} differ, {odd[0]} first",
                "the version belongs to another base, LoRA shape or label set",
            )
        with torch.no_grad():
            for key, parameter in self.parts.items():
                value = torch.tensor(adapter[key], dtype=torch.float32)
                stored = _stored_shape(key, parameter)
                if tuple(value.shape) != stored:
                    raise ContainerError(f"part {key} is {tuple(value.shape)}, the model's is {stored}")
                parameter.copy_(value.t() if key.endswith(".B") else value.reshape(parameter.shape))

    def adapter(self, keys: list[str] | None = None) -> Adapter:
        """The model's parts as they are now, slot-major, float32, owned by the caller."""
        result: Adapter = {}
        for key in self.parts if keys is None else keys:
            value = self.parts[key].detach()
            value = value.t() if key.endswith(".B") else value.reshape(_stored_shape(key, value))
            result[key] = value.cpu().contiguous().clone().numpy()
        return result


def _layer_of(key: str) -> int | None:
    return None if key.startswith("dense.") else int(key.split(".", 1)[0])


def _stored_shape(key: str, parameter: Any) -> tuple[int, ...]:
    shape = tuple(parameter.shape)
    if key.startswith("dense."):
        return (shape[0], int(np.prod(shape[1:]))) if len(shape) > 1 else (1, shape[0])
    return shape[::-1] if key.endswith(".B") else shape


def load_model(folder: Path, labels: tuple[str, ...], lora: LoraShape, device: Any) -> TunableModel:
    """Loads the base in ``folder`` and puts LoRA into every linear of its layers.

    Raises:
        BaseModelError: no safetensors, not a sequence classifier, or of a structure that is not known.
    """
    weight_files(folder)  # refuses pickles
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            config.num_labels = len(labels)
            net, info = AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, local_files_only=True, use_safetensors=True, trust_remote_code=False,
                attn_implementation="sdpa", ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise BaseModelError(
                f"the base model in {folder} cannot be loaded as a sequence classifier: {_first_line(error)}",
                "BERT, RoBERTa and DistilBERT shapes are known to work; check config.json",
            ) from error
    # transformers keeps the checkpoint's dtype; fp32 holds fp16 and bf16 exactly
    net = net.float().eval()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    net.requires_grad_(False)

    path, layers = _find_layers(net, config.num_hidden_layers)
    modules = _lora_modules(layers, lora)
    fresh = _fresh_names(info)
    dense = _head_names(net, fresh, folder)
    shape = ModelShape(
        family=config.model_type,
        layers=len(layers),
        hidden=config.hidden_size,
        intermediate=max(m.outputs for m in _linears(layers[0])),
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        layer_path=path,
        modules=modules,
        dense=tuple(DensePart(name=name, shape=tuple(net.get_parameter(name).shape)) for name in dense),
        parameters=sum(p.numel() for p in net.parameters()),
        base_bytes=sum(p.numel() * p.element_size() for p in net.parameters()),
    )
    parts: dict[str, Any] = {}
    for i, layer in enumerate(layers):
        for m in modules:
            linear = _with_lora(layer, m.name, lora)
            parts[f"{i}.{m.name}.A"], parts[f"{i}.{m.name}.B"] = linear.A, linear.B
    net.to(device)
    for name in dense:
        parts[f"dense.{name}"] = net.get_parameter(name)
    model = TunableModel(net, shape, lora, layers, parts, torch.device(device))
    model.set_depth(0)
    _check_head(model, folder)
    return model


def _find_layers(net: Any, expected: int) -> tuple[str, Any]:
    found = [
        (name, module)
        for name, module in net.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == expected
        and len({type(child) for child in module}) == 1
        and len(_linears(module[0])) >= 4
    ]
    if len(found) != 1:
        raise BaseModelError(
            f"a {type(net).__name__} has {len(found)} lists of {expected} transformer layers, not one",
            "BERT, RoBERTa and DistilBERT shapes are known to work",
        )
    return found[0]


def _linears(layer: Any) -> tuple[LoraModule, ...]:
    return tuple(
        LoraModule(name=name, inputs=module.in_features, outputs=module.out_features)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    )


def _lora_modules(layers: Any, lora: LoraShape) -> tuple[LoraModule, ...]:
    every = _linears(layers[0])
    if any(_linears(layer) != every for layer in layers):
        raise BaseModelError(
            "the transformer layers differ in their linears", "this structure is not supported"
        )
    if lora.targets == ("all-linear",):
        return every
    chosen = tuple(m for m in every if m.name in lora.targets or m.name.rsplit(".", 1)[-1] in lora.targets)
    for target in lora.targets:
        if not any(target in (m.name, m.name.rsplit(".", 1)[-1]) for m in every):
            raise BaseModelError(
                f"no linear of a layer is called {target!r}",
                f"lora.targets may name {', '.join(m.name for m in every)}, or be all-linear",
            )
    return chosen


def _with_lora(layer: Any, name: str, lora: LoraShape) -> LoraLinear:
    linear = layer.get_submodule(name)
    made = LoraLinear(Dense(linear.weight), linear.bias, rank=lora.rank, scaling=lora.scaling)
    parent, _, last = name.rpartition(".")
    setattr(layer.get_submodule(parent), last, made)
    return made


def _fresh_names(info: dict[str, Any]) -> set[str]:
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    return set(info["missing_keys"]) | mismatched


def _head_names(net: Any, fresh: set[str], folder: Path) -> list[str]:
    pooler = f"{net.base_model_prefix}.pooler."
    names = [n for n, _ in net.named_parameters() if n.split(".", 1)[0] in _HEADS or n in fresh]
    strange = [n for n in names if n.split(".", 1)[0] not in _HEADS and not n.startswith(pooler)]
    if strange:
        raise BaseModelError(
            f"the checkpoint in {folder} lacks {len(strange)} weights of the encoder, {strange[0]} first",
            "the file is incomplete, or config.json belongs to another model",
        )
    if not any(n.split(".", 1)[0] in _HEADS for n in names):
        raise BaseModelError(f"a {type(net).__name__} has no classifier that is known here")
    return names


def _check_head(model: TunableModel, folder: Path) -> None:
    """The head must read nothing but the first token: what head-only training caches."""
    ids = torch.arange(5, 13, device=model.device).remainder(model.shape.vocabulary).unsqueeze(0)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        whole = model.net(input_ids=ids, attention_mask=mask).logits
        if not torch.allclose(whole, model.logits(ids, mask), atol=1e-5, rtol=1e-4):
            raise BaseModelError(
                f"the head of {type(model.net).__name__} in {folder} reads more than the first token",
                "BERT, RoBERTa and DistilBERT shapes are known to work",
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """A missing head is expected here and told by the shape; transformers' report of it is noise."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]

"""A version as a PEFT adapter: a folder that ``PeftModel.from_pretrained`` loads on the base model.

Every layer carries LoRA, those never trained with B zero, so that the folder is regular whatever depths
the devices had. What a merge rule folded into the base are more slots of its module, whose rank and alpha
then stand in the config's patterns.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from edge_sdk.errors import ContainerError
from edge_sdk.protocol.model import LoraShape, ModelShape
from edge_sdk.updates.codecs import Floats
from edge_sdk.updates.folders import replacing
from edge_sdk.updates.keys import Adapter, lora_keys, part_sizes

__all__ = ["write_peft"]

_PEFT_TASKS = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}


def write_peft(
    folder: Path,
    adapter: Adapter,
    *,
    shape: ModelShape,
    lora: LoraShape,
    base: str,
    labels: tuple[str, ...],
    task: str = "classification",
    card: str = "",
) -> Path:
    """Writes config, weights and a model card; replaces an older folder at once. Returns ``folder``.

    ``labels``: of classification. ``card``: what to tell of the run, Markdown, below the card's own lines.
    Raises ContainerError for an adapter that is not whole.
    """
    tensors = _tensors(adapter, shape, lora)
    with replacing(folder) as building:
        save_file(tensors, building / "adapter_model.safetensors", metadata={"format": "pt"})
        config = json.dumps(_config(shape, lora, base, task, adapter), indent=2, sort_keys=True)
        (building / "adapter_config.json").write_text(config + "\n")
        if labels:
            (building / "labels.json").write_text(json.dumps(list(labels), indent=2) + "\n")
        (building / "README.md").write_text(_card(lora, base, labels, task, card))
    return folder


def _tensors(adapter: Adapter, shape: ModelShape, lora: LoraShape) -> dict[str, Floats]:
    for key, size in part_sizes(shape, lora).items():
        found = adapter[key].shape if key in adapter else None
        if found != size:
            raise ContainerError(
                f"part {key!r} of the adapter must be {size[0]} x {size[1]}, "
                f"received {'nothing' if found is None else ' x '.join(map(str, found))}"
            )
    tensors: dict[str, Floats] = {}
    for layer in range(shape.layers):
        for key in lora_keys(shape, layer):
            module, _, factor = key.split(".", 1)[1].rpartition(".")
            slots = [adapter[key], *([adapter[fold]] if (fold := f"fold.{key}") in adapter else ())]
            rows = np.concatenate(slots)
            name = f"base_model.model.{shape.layer_path}.{layer}.{module}.lora_{factor}.weight"
            tensors[name] = np.ascontiguousarray(rows if factor == "A" else rows.T)
    for part in shape.dense:
        tensors[f"base_model.model.{part.name}"] = np.ascontiguousarray(
            adapter[f"dense.{part.name}"].reshape(part.shape)
        )
    return tensors


def _config(shape: ModelShape, lora: LoraShape, base: str, task: str, adapter: Adapter) -> dict[str, object]:
    ranks = {
        f"{shape.layer_path}.{layer}.{module.name}": lora.rank + len(adapter[fold])
        for layer in range(shape.layers)
        for module in shape.modules
        if (fold := f"fold.{layer}.{module.name}.A") in adapter
    }
    modules = "|".join(re.escape(module.name) for module in shape.modules)
    return {
        "peft_type": "LORA",
        "task_type": _PEFT_TASKS[task],
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        # the same scaling for every slot: alpha over rank
        "rank_pattern": ranks,
        "alpha_pattern": {module: lora.scaling * rank for module, rank in ranks.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(module.transposed for module in shape.modules),
        "inference_mode": True,
        # a pattern over whole paths: a name alone would hit the pooler's dense layer too
        "target_modules": rf"{re.escape(shape.layer_path)}\.\d+\.({modules})",
        "modules_to_save": _saved_modules(shape) or None,
    }


def _saved_modules(shape: ModelShape) -> list[str]:
    """Modules that hold dense parts, by the shortest path that holds no frozen weight."""
    heads = {part.name.split(".")[0] for part in shape.dense}
    base = shape.layer_path.split(".")[0]
    inner = {part.name.rsplit(".", 1)[0] for part in shape.dense if part.name.split(".")[0] == base}
    return sorted((heads - {base}) | inner)


def _card(lora: LoraShape, base: str, labels: tuple[str, ...], task: str, more: str) -> str:
    classifies = task == "classification"
    kind = "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"
    told = "causal language modelling"
    if classifies:
        told = f"sequence classification, {len(labels)} labels, in order: {', '.join(labels)}"
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {json.dumps(base)}",
        f"pipeline_tag: {'text-classification' if classifies else 'text-generation'}",
        "tags: [lora, federated-learning]",
        "---",
        "",
        "# LoRA adapter, trained by a fleet of devices",
        "",
        f"- Base model: `{base}`",
        f"- Task: {told}",
        f"- LoRA: rank {lora.rank}, alpha {lora.alpha:g}, scaling alpha / rank"
        + ("; the task head is included" if classifies else ""),
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {kind}",
        "",
        f"base = {kind}.from_pretrained(",
        f"    {json.dumps(base)}{f', num_labels={len(labels)}' if classifies else ''}",
        ")",
        'model = PeftModel.from_pretrained(base, "path/of/this/folder")',
        "```",
        "",
    ]
    return "\n".join(lines) + (f"\n{more.strip()}\n" if more.strip() else "")

"""Models of a given shape with random weights, written as local bases that the trainer loads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

__all__ = ["randomize_adapter", "write_base", "write_large_base"]


def write_base(folder: Path, shape: Mapping[str, Any], *, seed: int = 0) -> Path:
    """A base of ``shape`` (``model_type`` and whatever its transformers config takes), float32."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    fields = dict(shape)
    causal = fields.pop("causal", False)
    config = AutoConfig.for_model(**fields)
    torch.manual_seed(seed)
    with _quiet():
        model = (AutoModelForCausalLM if causal else AutoModel).from_config(config)
        model.save_pretrained(folder)
    return folder


def write_large_base(folder: Path, shape: Mapping[str, Any], *, seed: int = 0) -> Path:
    """A causal LM in bfloat16, one shard a layer: never more than one shard is held."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {name: value for name, value in shape.items() if name != "causal"}
    config = AutoConfig.for_model(**fields, dtype="bfloat16")
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shards: dict[str, list[tuple[str, Any]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in tied:
            shards.setdefault(_shard(name), []).append((name, parameter))
    generator = torch.Generator().manual_seed(seed)
    where, total = {}, 0
    for number, members in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _random(name, parameter, generator) for name, parameter in members}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        where.update(dict.fromkeys(tensors, file))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def randomize_adapter(parts: Mapping[str, Any], *, seed: int = 0) -> None:
    """Small random values in every B and A: with B at zero, as LoRA begins, A would have no gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key in sorted(parts):
            if key.endswith((".A", ".B")):
                parameter = parts[key]
                drawn = torch.randn(parameter.shape, generator=generator) * 0.02
                parameter.copy_(drawn.to(parameter.device))


def _shard(name: str) -> str:
    """One shard a layer, one for each weight outside of them."""
    pieces = name.split(".")
    numbers = [i for i, piece in enumerate(pieces) if piece.isdigit()]
    return ".".join(pieces[: numbers[0] + 1]) if numbers else name


def _random(name: str, parameter: Any, generator: Any) -> Any:
    """Norms stay at one, biases at zero; matrices normal 0.02, made a block of rows at a time."""
    values = torch.zeros(parameter.shape, dtype=torch.bfloat16)
    if values.dim() < 2:
        return values if name.endswith("bias") else values.fill_(1.0)
    rows = max(1, (1 << 22) // values.shape[1])
    for block in values.split(rows):
        block.copy_(torch.randn(block.shape, generator=generator) * 0.02)
    return values


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bar:
            logging.enable_progress_bar()

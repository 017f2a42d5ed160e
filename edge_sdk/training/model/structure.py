"""Transformer layers and their linears, found by structure: no family is known here by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from edge_sdk.errors import BaseModelError
from edge_sdk.protocol.model import LoraModule, LoraShape, ModelShape

__all__ = ["find_layers", "form_of", "is_transposed", "linears_of", "lora_modules", "turned"]

_LINEARS = 4
"""A transformer layer has at least so many: queries, keys and values apart or in one, output, two of a
feed-forward block."""


def find_layers(net: Any, expected: int, path: str = "") -> tuple[str, Any]:
    """The list of transformer layers and its path in ``net``.

    Args:
        expected: how many layers the config tells of.
        path: names the list by hand, from ``net`` or from its base model; "": it is found.

    Raises:
        BaseModelError: there is no such list, or there are several.
    """
    lists = {name: module for name, module in net.named_modules() if isinstance(module, nn.ModuleList)}
    if path:
        for name in (path, f"{net.base_model_prefix}.{path}"):
            if name in lists and len(lists[name]) and linears_of(lists[name][0]):
                return name, lists[name]
        raise BaseModelError(
            f"base.layers names {path!r}, which is no list of layers with linears in a {type(net).__name__}",
            f"the lists there are: {_told(lists)}",
        )
    found = [
        (name, module)
        for name, module in lists.items()
        if len(module) == expected
        and len({type(child) for child in module}) == 1
        and len(linears_of(module[0])) >= _LINEARS
    ]
    if len(found) != 1:
        raise BaseModelError(
            f"a {type(net).__name__} has {len(found)} lists of {expected} like transformer layers, not one",
            f"name the list in base.layers, in run.toml; the lists there are: {_told(lists)}",
        )
    return found[0]


def _told(lists: dict[str, Any]) -> str:
    told = [
        f"{name} ({len(module)} of {type(module[0]).__name__})"
        for name, module in lists.items()
        if len(module)
    ]
    return ", ".join(told[:12]) + (f" and {len(told) - 12} more" if len(told) > 12 else "") or "none"


def is_transposed(module: Any) -> bool:
    """Whether the weight is held as (in, out), as GPT-2's are."""
    return isinstance(module, Conv1D)


def turned(module: Any, weight: Any) -> Any:
    """The weight of a linear as (out, in): of a transposed one a view, so that nothing is copied."""
    return weight.t() if is_transposed(module) else weight


def linears_of(layer: Any) -> tuple[LoraModule, ...]:
    """Every linear of a layer, whichever way its weight lies."""
    found = []
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            found.append(LoraModule(name=name, inputs=module.in_features, outputs=module.out_features))
        elif is_transposed(module):
            inputs, outputs = module.weight.shape
            found.append(LoraModule(name=name, inputs=inputs, outputs=outputs, transposed=True))
    return tuple(found)


def form_of(layer: Any, linears: Sequence[LoraModule], shape: ModelShape) -> dict[str, Any]:
    """What a model's shape says of a layer besides its linears' widths: whether its feed-forward block has a
    gate, told by how many weights it has, and its norms."""
    norms = [
        module.weight.numel()
        for module in layer.modules()
        if not list(module.children())
        and isinstance(getattr(module, "weight", None), nn.Parameter)
        and module.weight.dim() == 1
    ]
    weights = sum(m.inputs * m.outputs for m in linears)
    block = weights - 2 * shape.hidden * (shape.query_width + shape.key_width)
    wide = norms.count(shape.hidden)
    return {
        "gated": round(block / (shape.hidden * shape.intermediate)) > 2,
        "norms": wide,
        "head_norms": wide < len(norms),
    }


def lora_modules(layers: Sequence[Any], lora: LoraShape) -> tuple[LoraModule, ...]:
    """The linears of a layer that carry LoRA.

    Raises:
        BaseModelError: the layers differ in their linears, or a target is not there.
    """
    every = linears_of(layers[0])
    for number, layer in enumerate(layers):
        odd = set(linears_of(layer)) ^ set(every)
        if odd:
            names = ", ".join(sorted({f"{m.name} ({m.inputs} -> {m.outputs})" for m in odd})[:4])
            raise BaseModelError(
                f"transformer layers 0 and {number} differ in their linears: {names}",
                "an adapter needs layers that are alike; take a base whose layers are",
            )
    if lora.targets == ("all-linear",):
        return every
    for target in lora.targets:
        if not any(target in _names(m) for m in every):
            raise BaseModelError(
                f"no linear of a layer is called {target!r}",
                f"lora.targets may name {', '.join(m.name for m in every)}, or be all-linear",
            )
    return tuple(m for m in every if any(target in _names(m) for target in lora.targets))


def _names(module: LoraModule) -> tuple[str, str]:
    return module.name, module.name.rsplit(".", 1)[-1]

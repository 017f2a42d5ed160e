"""What a layer keeps for its backward pass: how it is held, and what is rather made again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["PLAIN", "Form", "LayerPlan", "Recompute"]

Rounding = Literal["nearest", "stochastic"]
Recompute = Literal["none", "outputs", "inner", "layer"]
"""``none``: everything that autograd wants is kept. ``outputs``: what follows cheaply from something kept is
rebuilt: the activation function's output from its input, a norm's input from its output, the attention's
output from its queries, keys and values; the feed-forward block runs in chunks of rows. ``inner``: the
feed-forward block's inner values too, from its input. ``layer``: only the layer's input is kept, and the
layer runs again."""


@dataclass(frozen=True)
class Form:
    """How values are packed: ``bits`` 8, 4 or 2 in groups of ``group`` values of the last axis."""

    bits: int = 8
    rounding: Rounding = "nearest"
    group: int = 0
    """0: what suits the bits."""


@dataclass(frozen=True)
class LayerPlan:
    """``form`` None: what is kept is kept exact."""

    form: Form | None = None
    recompute: Recompute = "none"


PLAIN = LayerPlan()

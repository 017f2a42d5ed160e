"""The feed-forward block of a layer as one function, in chunks of rows.

    y = down(f(up(x)))   or   y = down(f(gate(x)) · up(x))

Plain training holds its inner values, four times as wide as the layer, several times over: kept for
backward, and again as temporaries of both passes. In chunks of rows no tensor of the inner width exists
whole. Kept are the inner values before f, each chunk packed as soon as it is made (``outputs``), or none
of them (``inner``: made again from the packed input); f's own output is always rebuilt. Every row goes
through the same products as in the plain block, so the result is the same to the bit; ``blocks`` checks it.

Only what a gradient needs is kept: x for the A of up and gate, and (rank, rows) for each B.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from edge_sdk.planning.memory import CHUNK_VALUES, LONGER, UNPACKED_BYTES
from edge_sdk.training.activations.nonlinear import Nonlinear
from edge_sdk.training.model.linear import LoraLinear, lora_backward, lora_forward
from edge_sdk.training.precision.weights import BLOCK_BYTES, FrozenWeight

__all__ = ["FeedForward", "Parts", "keeps_graph"]

Pairs = list[tuple[Any, Any]]

_LEAST_ROWS = 64
"""Shorter products lose speed."""

_EVEN = 8
"""Chunks begin at multiples of it."""


@dataclass(frozen=True)
class Parts:
    """Attributes: ``ups`` is (up,) or (gate, up); ``halves``: one linear gives gate and up side by side."""

    ups: tuple[LoraLinear, ...]
    down: LoraLinear
    function: Nonlinear
    halves: bool = False

    @property
    def linears(self) -> tuple[LoraLinear, ...]:
        return (*self.ups, self.down)


class FeedForward(nn.Module):
    """Attributes: ``plain`` computes the same the way the model did; ``keeper``: None: as ``plain``."""

    keeper: Any = None

    def __init__(self, plain: Any, parts: Parts) -> None:
        super().__init__()
        self.plain = plain
        self._parts = (parts,)  # in a tuple: these modules are registered in ``plain`` already
        self._dropouts = tuple(m for m in plain.modules() if isinstance(m, nn.Dropout))
        width = sum(linear.out_features for linear in parts.ups)
        self.chunk_rows = max(1, CHUNK_VALUES // width // _LEAST_ROWS) * _LEAST_ROWS

    @property
    def parts(self) -> Parts:
        return self._parts[0]

    def forward(self, x: Any) -> Any:
        keeper = self.keeper
        if keeper is None or keeper.plan.recompute == "none" or self._drops():
            return self.plain(x)
        pairs = self.pairs()
        factors = [factor for pair in pairs for factor in pair]
        if torch.is_grad_enabled() and (x.requires_grad or any(f.requires_grad for f in factors)):
            return _FeedForward.apply(x, self, keeper, *factors)
        return self.chunked(x, pairs)

    def _drops(self) -> bool:
        return any(bool(dropout.training and dropout.p) for dropout in self._dropouts)

    def pairs(self) -> Pairs:
        """A and B of each linear, in order."""
        return [linear.factors() for linear in self.parts.linears]

    def chunked(self, x: Any, pairs: Pairs, keep: _Kept | None = None) -> Any:
        """y (..., hidden), in chunks; ``keep`` takes what backward needs."""
        parts, rows = self.parts, x.reshape(-1, x.shape[-1])
        y = x.new_empty(rows.shape[0], parts.down.out_features)
        weights = _Weights(parts.linears, x.dtype)
        for part in self.chunks(rows.shape[0], weights):
            inner, products = self.inner(rows[part], pairs, weights)
            needed = keep is not None and keep.inner(part, inner)
            middle = _middle(parts, inner, needed)
            del inner
            y[part], last = lora_forward(parts.down, middle, *pairs[-1], weights(parts.down))
            if keep is not None:
                keep.narrow([*products, last])
        return y.view(*x.shape[:-1], -1)

    def inner(self, rows: Any, pairs: Pairs, weights: _Weights) -> tuple[list[Any], list[Any]]:
        """What f and the gate take, and A xᵀ of each."""
        both = [
            lora_forward(linear, rows, A, B, weights(linear))
            for linear, (A, B) in zip(self.parts.ups, pairs, strict=False)
        ]
        return [h for h, _ in both], [product for _, product in both]

    def chunks(self, rows: int, weights: _Weights) -> Iterator[slice]:
        """Of like size: products of fewer than a dozen rows go other ways, and give other last bits."""
        count = -(-rows // (self.chunk_rows * (1 if weights.cheap else LONGER)))
        bounds = [i * rows // count // _EVEN * _EVEN for i in range(count)] + [rows]
        for start, stop in itertools.pairwise(bounds):
            yield slice(start, stop)


class _Weights:
    """The frozen weights during one pass: unpacked once where that is affordable."""

    def __init__(self, linears: tuple[LoraLinear, ...], dtype: Any) -> None:
        packed = [linear for linear in linears if not _held_as(linear.frozen, dtype)]
        sizes = [linear.in_features * linear.out_features * dtype.itemsize for linear in packed]
        self.cheap = sum(sizes) <= UNPACKED_BYTES and all(size <= BLOCK_BYTES for size in sizes)
        self._unpacked = {id(linear): _Unpacked(linear.frozen, dtype) for linear in packed if self.cheap}

    def __call__(self, linear: LoraLinear) -> Any:
        return self._unpacked.get(id(linear), linear.frozen)


class _Unpacked:
    """A frozen weight as a dense one, for a moment."""

    def __init__(self, frozen: FrozenWeight, dtype: Any) -> None:
        self._weight = frozen.dense(dtype)

    def __call__(self, x: Any, bias: Any = None) -> Any:
        return nn.functional.linear(x, self._weight, bias)

    def input_grad(self, grad: Any) -> Any:
        return grad @ self._weight


def _held_as(frozen: FrozenWeight, dtype: Any) -> bool:
    """Whether the weight needs no unpacking, or has products of its own."""
    return bool(frozen.nbytes >= frozen.in_features * frozen.out_features * dtype.itemsize)


class _Kept:
    """What backward needs of each chunk. ``held``: its inner values; ``products``: A xᵀ of each linear."""

    def __init__(self, keeper: Any, *, inner: bool, narrow: list[bool]) -> None:
        self._keeper, self._wants_inner, self._wants_narrow = keeper, inner, narrow
        self.chunks: list[slice] = []
        self.held: list[list[Any]] = []
        self.products: list[list[Any]] = []

    def inner(self, chunk: slice, values: list[Any]) -> bool:
        """Whether they are kept as they are."""
        held = [self._keeper.hold(value) for value in values] if self._wants_inner else []
        self.chunks.append(chunk)
        self.held.append(held)
        return any(h.is_exact for h in held)

    def narrow(self, products: list[Any]) -> None:
        self.products.append([p if w else None for p, w in zip(products, self._wants_narrow, strict=True)])


def _middle(parts: Parts, inner: list[Any], needed: bool) -> Any:
    """What the last linear takes, to the bit; written over ``inner`` unless that is still needed."""
    over = parts.function.over
    if needed or over is None or parts.halves:
        return _combine(parts, inner, parts.function.exact)
    middle = over(inner[0])
    return middle if len(inner) == 1 else middle.mul_(inner[1])


def _combine(parts: Parts, inner: list[Any], function: Any) -> Any:
    """What the last linear takes."""
    if parts.halves:
        gate, up = inner[0].chunk(2, dim=-1)
        return function(gate) * up
    return function(inner[0]) if len(inner) == 1 else function(inner[0]) * inner[1]


def _split(parts: Parts, inner: list[Any], grad: Any) -> list[Any]:
    """Gradients of ``inner`` from that of what the last linear takes, which they may be written into."""
    function = parts.function
    if parts.halves:
        gate, up = inner[0].chunk(2, dim=-1)
        return [torch.cat((function.gradient(grad * up, gate), grad * function.value(gate)), dim=-1)]
    if len(inner) == 1:
        return [function.gradient(grad, inner[0])]
    return [function.gradient(grad * inner[1], inner[0]), grad.mul_(function.value(inner[0]))]


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, block: FeedForward, keeper: Any, *factors: Any) -> Any:
        wants_x, (*of_ups, of_down) = ctx.needs_input_grad[0], _by_two(ctx.needs_input_grad[3:])
        before = wants_x or any(a or b for a, b in of_ups)  # whether a gradient goes past f
        inner = before or of_down[0]
        again = keeper.plan.recompute == "inner"
        kept = _Kept(keeper, inner=inner and not again, narrow=[b for _, b in (*of_ups, of_down)])
        y = block.chunked(x, _by_two(factors), kept)
        ctx.block, ctx.kept, ctx.before, ctx.again = block, kept, before, again and inner
        ctx.save_for_backward(x if ctx.again or any(a for a, _ in of_ups) else None, *factors)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, *factors = ctx.saved_tensors
        block, kept, before = ctx.block, ctx.kept, ctx.before
        if kept is None:
            raise RuntimeError("what this block kept is let go of: a graph can be run backward once")
        parts, pairs = block.parts, _by_two(factors)
        wants_x, wants = ctx.needs_input_grad[0], _by_two(ctx.needs_input_grad[3:])
        rows, width = grad.reshape(-1, grad.shape[-1]), parts.down.out_features
        x = None if x is None else x.reshape(-1, width)
        grad_x = rows.new_empty(rows.shape[0], width) if wants_x else None
        weights, totals = _Weights(parts.linears, grad.dtype), _Totals(len(factors))
        for chunk, held, products in zip(kept.chunks, kept.held, kept.products, strict=True):
            some = None if x is None else x[chunk]
            inner = block.inner(some, pairs, weights)[0] if ctx.again else [h.get() for h in held]
            A, B = pairs[-1]
            of_down = partial(
                lora_backward, parts.down, rows[chunk],
                down=products[-1], A=A, B=B, frozen=weights(parts.down),
            )  # fmt: skip
            # its factors first, and its input apart: what they take of inner width is gone by then
            middle = _combine(parts, inner, parts.function.value) if wants[-1][0] else None
            totals.add(len(parts.ups), of_down(x=middle, needs=(False, *wants[-1]))[1:])
            del middle
            if not before:
                continue
            grads = _split(parts, inner, of_down(x=None, needs=(True, False, False))[0])
            del inner
            for i, linear in enumerate(parts.ups):
                below, *gained = lora_backward(
                    linear, grads.pop(0), some, products[i], *pairs[i], (wants_x, *wants[i]), weights(linear)
                )
                totals.add(i, gained)
                if grad_x is not None and i == 0:
                    grad_x[chunk] = below
                elif grad_x is not None:
                    grad_x[chunk] += below
                del below
        if not keeps_graph():
            ctx.kept = None  # the graph may outlive this node by far
        return None if grad_x is None else grad_x.view(*grad.shape[:-1], -1), None, None, *totals.sums


def _by_two(flat: Any) -> list[tuple[Any, Any]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def keeps_graph() -> bool:
    """Whether the backward pass under way was told to retain the graph."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else bool(asked())


class _Totals:
    """Sums of the factors' gradients over the chunks."""

    def __init__(self, count: int) -> None:
        self.sums: list[Any] = [None] * count

    def add(self, linear: int, gained: Sequence[Any]) -> None:
        """The gradients of a linear's A and B, None where there are none."""
        for i, value in enumerate(gained, start=2 * linear):
            if value is not None:
                self.sums[i] = value if self.sums[i] is None else self.sums[i].add_(value)

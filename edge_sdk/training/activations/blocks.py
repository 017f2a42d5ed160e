"""Finds norms and the feed-forward block in a model's layers and puts ours in their place.

By structure and by numbers, never by a model's name: what is found is taken apart, put together as ours,
and compared with the original on random input: the same result to the bit, the same gradient to rounding.
What does not match stays as it was, and the report says why.

The layers' linears are ``LoraLinear``s by then. Parameters stay the same objects; the paths to some become
longer (``mlp.plain.up_proj``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from edge_sdk.training.activations.checkpoint import ExactKeeper
from edge_sdk.training.activations.feed_forward import FeedForward
from edge_sdk.training.activations.finding import Candidate, candidates, parent_of
from edge_sdk.training.activations.norms import KeptNorm, kept_norm
from edge_sdk.training.model.linear import LoraLinear

__all__ = ["BlockReport", "install_blocks"]

_ROWS = 70
"""Rows of random input that a block is compared on, in chunks of:"""
_CHUNK = 32

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Largest difference of the gradients, of their largest value."""


@dataclass(frozen=True)
class BlockReport:
    """Attributes:
    functions: the activation functions that were found; ``autograd``: one without a derivative here.
    off: what stays as it was: layer, name and reason of each.
    """

    layers: int
    norms: int
    feed_forwards: int
    functions: tuple[str, ...]
    off: tuple[str, ...]

    def __str__(self) -> str:
        functions = f" ({', '.join(self.functions)})" if self.functions else ""
        text = f"{self.norms} norms and {self.feed_forwards} feed-forward blocks{functions}"
        return f"{text} in {self.layers} layers" + "".join(f"\n  as it was: {reason}" for reason in self.off)


def install_blocks(layers: Iterable[Any]) -> BlockReport:
    """Installs what is found in each layer; to be called once, when LoRA is in place."""
    every = list(layers)
    norms = 0
    functions: list[str] = []
    off: list[str] = []
    whole: dict[Any, int] = {}
    for i, layer in enumerate(every):
        with _evaluating(layer):
            norms += _install_norms(layer, f"layer {i}", off)
            block = _install_feed_forward(layer, f"layer {i}", off)
        if block is not None:
            functions.append(block.parts.function.name)
            _settle_chunk(block, layer, whole)
    return BlockReport(len(every), norms, len(functions), tuple(dict.fromkeys(functions)), tuple(off))


def _install_norms(layer: Any, where: str, off: list[str]) -> int:
    count = 0
    for name, module in list(layer.named_modules()):
        if not name:
            continue
        parent, last = parent_of(layer, name)
        if isinstance(module, KeptNorm) or isinstance(parent, KeptNorm):
            continue
        made = kept_norm(module)
        reason = made if isinstance(made, str) else None
        if isinstance(made, KeptNorm):
            weight = module.weight
            reason = _difference(made, made.plain, _random(weight.numel(), weight.dtype, weight.device))
        if reason is not None:
            off.append(f"{where}, {name}: {reason}")
        elif made is not None:
            setattr(parent, last, made)
            count += 1
    return count


def _install_feed_forward(layer: Any, where: str, off: list[str]) -> FeedForward | None:
    there = next((module for module in layer.modules() if isinstance(module, FeedForward)), None)
    if there is not None:
        return there
    reasons: list[str] = []
    for candidate in candidates(layer):
        reason = "its activation function is not known"
        for parts in candidate.tries:
            x = _random(parts.down.out_features, *_computes_in(layer))
            block = FeedForward(candidate.plain, parts)
            block.chunk_rows, chunk = _CHUNK, block.chunk_rows
            difference = _difference(block, candidate.plain, x)
            block.chunk_rows = chunk
            if difference is None:
                difference = _placed(layer, candidate, block, x)
            if difference is None:
                return block
            reason = difference
        reasons.append(f"{candidate.name}: {reason}")
    off.append(f"{where}, {'; '.join(reasons) or 'no feed-forward block of a form that is known'}")
    return None


def _placed(layer: Any, candidate: Candidate, block: FeedForward, x: Any) -> str | None:
    """Puts the block in; out again, with the reason, where what is around it gives something else."""
    beside = x.flip(0)

    def seen() -> list[Any]:
        around = [] if candidate.around is None else [_tried(candidate.around, x, beside)]
        return [*around, _tried(layer, x)]

    before = seen()
    candidate.put(block)
    if candidate.around is not None and before[0] is None:
        reason = "what is around it takes other arguments"
    elif not all(_same(a, b) for a, b in zip(before, seen(), strict=True)):
        reason = "the layer does more with its inner values"
    else:
        return None
    candidate.undo()
    return reason


def _difference(module: Any, plain: Any, x: Any) -> str | None:
    """What differs between a block of ours, keeping exact values in every way, and the original."""
    try:
        expected, slope = _run(plain, x)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"does not run alone on one tensor ({type(error).__name__}: {error})"
    for recompute in ("outputs", "inner"):
        module.keeper = ExactKeeper(recompute)
        try:
            given, ours = _run(module, x)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            return f"ours fails on it ({type(error).__name__}: {error})"
        finally:
            del module.keeper
        if not _same(given, expected):
            return "ours gives something else"
        if slope is not None and (ours - slope).abs().max() > _TOLERANCE[x.dtype] * slope.abs().max():
            return "ours has another gradient"
    return None


def _run(module: Any, x: Any) -> tuple[Any, Any]:
    """The result, and the gradient of the input."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y = module(x)
        direction = torch.linspace(-1, 1, y.shape[-1], dtype=x.dtype, device=x.device).expand_as(y)
        (slope,) = torch.autograd.grad(y, x, direction)
    return y.detach(), slope.float()


def _settle_chunk(block: FeedForward, layer: Any, settled: dict[Any, int]) -> None:
    """Chunks as long as it takes for the result to be the same to the bit; whole in the end."""
    shape = tuple((type(lin.frozen), lin.in_features, lin.out_features) for lin in block.parts.linears)
    dtype, device = _computes_in(layer)
    if (shape, dtype) not in settled:
        for _ in range(3):
            x = _random(block.parts.ups[0].in_features, dtype, device, rows=block.chunk_rows * 2 + 5)
            with torch.no_grad():
                if torch.equal(block.plain(x), block.chunked(x, block.pairs())):
                    break
            block.chunk_rows *= 2
        else:
            block.chunk_rows = 1 << 30
        settled[shape, dtype] = block.chunk_rows
    block.chunk_rows = settled[shape, dtype]


def _computes_in(layer: Any) -> tuple[Any, Any]:
    """dtype and device of a layer's activations: those of what is neither LoRA nor packed."""
    lora = {id(p) for m in layer.modules() if isinstance(m, LoraLinear) for p in (m.A, m.B)}
    found = [p for p in layer.parameters() if p.is_floating_point() and id(p) not in lora]
    narrow = next((p for p in found if p.dtype != torch.float32), found[0])
    return narrow.dtype, narrow.device


def _random(width: int, dtype: Any, device: Any, rows: int = _ROWS) -> Any:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(1, rows, width, generator=generator).to(device=device, dtype=dtype)


def _tried(module: Any, *args: Any) -> Any:
    """The result's first tensor; None where the module does not take these arguments alone."""
    try:
        with torch.no_grad():
            result = module(*args)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, UnboundLocalError):
        return None
    return result[0] if isinstance(result, (tuple, list)) else result


def _same(given: Any, expected: Any) -> bool:
    if given is None or expected is None:
        return given is expected
    return bool(given.shape == expected.shape and torch.equal(given, expected))


@contextmanager
def _evaluating(layer: Any) -> Iterator[None]:
    """Dropout is off within."""
    before = [(module, module.training) for module in layer.modules()]
    layer.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training

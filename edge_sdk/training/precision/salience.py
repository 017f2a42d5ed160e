"""How much each transformer block matters, and what it loses at fewer bits. Nothing of the model is changed.

A block is lowered by exchanging the frozen weights of its linears; the very same objects are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from edge_sdk.training.model import TunableModel
from edge_sdk.training.precision.holding import hold
from edge_sdk.training.precision.weights import FrozenWeight
from edge_sdk.training.tasks.loss import Output, token_loss

__all__ = ["Batch", "BlockFigures", "block_figures", "frozen_of", "loss_rises", "lowered"]

Batch = tuple[Any, Any]
"""Token ids and attention mask, (batch, length)."""
_LOWEST = "int2"


@dataclass(frozen=True)
class BlockFigures:
    """``influence``: 1 - mean cosine of input and output over the real tokens. ``added``: squared norm of
    what the block adds to its input; ``errors``: by word, squared error of its output."""

    influence: float
    added: float
    errors: dict[str, float]


def frozen_of(layer: Any) -> dict[str, FrozenWeight]:
    """The frozen weights of a layer's linears, by the linear's path."""
    return {
        name: module.frozen
        for name, module in layer.named_modules()
        if isinstance(getattr(module, "frozen", None), FrozenWeight)
    }


@contextmanager
def lowered(layer: Any, weights: dict[str, FrozenWeight]) -> Iterator[None]:
    """Within the context the layer's linears hold ``weights``; before and after, their own."""
    own = frozen_of(layer)
    try:
        for name, weight in weights.items():
            layer.get_submodule(name).frozen = weight
        yield
    finally:
        for name, weight in own.items():
            layer.get_submodule(name).frozen = weight


def _held_as(layer: Any, word: str) -> dict[str, FrozenWeight]:
    """The layer's frozen weights made anew as ``word``."""
    return {name: hold(own.dense(), word, own.device) for name, own in frozen_of(layer).items()}


def loss_rises(
    model: TunableModel, batches: Sequence[Batch], done: Callable[[int], None]
) -> tuple[float, ...]:
    """For each block what the loss rises by when it alone is held in 2 bits; below 0: it fell.

    Of a causal LM the loss is its cross entropy on the batches. A classifier's head is not trained yet, so
    that its loss would say nothing: there it is the drift of what the head reads from the full base's, the
    mean of 1 - cosine over the real tokens.

    Args:
        done: told after every block, by its number.
    """
    with torch.inference_mode():
        full = [model.hidden(*batch) for batch in batches]
        before = _mean_loss(model, batches, full, full)
        rises = []
        for number, layer in enumerate(model.layers):
            with lowered(layer, _held_as(layer, _LOWEST)):
                low = [model.hidden(*batch) for batch in batches]
            rises.append(_mean_loss(model, batches, low, full) - before)
            done(number)
    return tuple(rises)


def block_figures(
    model: TunableModel, batch: Batch, words: Sequence[str], done: Callable[[int], None]
) -> tuple[BlockFigures, ...]:
    """Influence, and the error of each block's output at each of ``words``, its input being the full base's.

    Each block is run once more per word while its input is at hand.
    """
    real = batch[1].bool()
    found: list[BlockFigures] = []
    within = False

    def measure(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal within
        if within:
            return
        within = True
        try:
            entered = (args[0] if args else kwargs["hidden_states"])[real].float()
            left = _first(output)[real].float()
            cosine = torch.cosine_similarity(entered, left, dim=-1).mean()
            errors = {}
            for word in words:
                with lowered(layer, _held_as(layer, word)):
                    errors[word] = float((_first(layer(*args, **kwargs))[real].float() - left).square().sum())
            added = float((left - entered).square().sum())
            found.append(BlockFigures(max(0.0, 1.0 - float(cosine)), added, errors))
        finally:
            within = False
        done(len(found) - 1)

    hooks = [layer.register_forward_hook(measure, with_kwargs=True) for layer in model.layers]
    try:
        with torch.inference_mode():
            model.hidden(*batch)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(found)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _mean_loss(
    model: TunableModel, batches: Sequence[Batch], hidden: Sequence[Any], full: Sequence[Any]
) -> float:
    total, count = 0.0, 0
    for (ids, mask), now, before in zip(batches, hidden, full, strict=True):
        if model.output_weight is None:
            far = 1.0 - torch.cosine_similarity(now[mask.bool()].float(), before[mask.bool()].float(), dim=-1)
            total, count = total + float(far.sum()), count + len(far)
        else:
            # what follows each token; behind the last real one nothing does
            targets = torch.full_like(ids, -100)
            targets[:, :-1] = torch.where(mask[:, 1:].bool(), ids[:, 1:], -100)
            known = int((targets >= 0).sum())
            output = Output(model.output_weight, model.output_bias, model.check)
            total, count = total + float(token_loss(now, output, targets, 1)), count + known
    return total / max(1, count)

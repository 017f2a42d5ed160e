"""What a version has folded into the base: W <- W0 + s F_Bᵀ F_A, where W0 is the base's own weight.

W0 is read from its file each time, so that a weight follows from the version alone and not from those before
it: a trainer that was started anew holds the same bits, and no second copy of the base lies in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edge_sdk.errors import ContainerError, MechanismError
from edge_sdk.training.model.checkpoint import Entry
from edge_sdk.training.model.linear import LoraLinear
from edge_sdk.training.precision.weights import Dense, FrozenWeight
from edge_sdk.updates.keys import Adapter

__all__ = ["FOLD", "BaseWeight", "Folding", "refuse_fold"]

FOLD = "fold."
"""Begins the key of a part that is folded."""


@dataclass(frozen=True)
class BaseWeight:
    """Where the weight of a linear lies in the base's files. ``transposed``: as (in, out)."""

    entry: Entry
    transposed: bool

    def read(self) -> Any:
        """(out, in), float32. Raises BaseModelError."""
        values = self.entry.read().float()
        return values.t().contiguous() if self.transposed else values


class Folding:
    """What is folded into a model's linears now. ``digest`` names it; "": nothing is."""

    def __init__(self) -> None:
        self._folded: dict[str, str] = {}

    @property
    def digest(self) -> str:
        return " ".join(f"{key}={digest}" for key, digest in sorted(self._folded.items()))

    def become(
        self, adapter: Adapter, linears: Mapping[str, LoraLinear], sources: Mapping[str, BaseWeight]
    ) -> None:
        """Folds the adapter's folded parts in, and takes out what was folded before.

        Weights whose fold is the same stay as they are.

        Raises:
            ContainerError: a fold does not belong to this model, or is not whole.
            MechanismError: the base is held in so few bits that nothing can be folded into it.
            BaseModelError: the base's files are not there any more.
        """
        wanted = {key.removeprefix(FOLD).rpartition(".")[0] for key in adapter if key.startswith(FOLD)}
        folds = {key: _pair(adapter, key, linears.get(key)) for key in sorted(wanted)}
        refuse_fold([linears[key].frozen for key in folds])
        digests = {key: _digest(*pair) for key, pair in folds.items()}
        for key in sorted({*folds, *self._folded}):
            if self._folded.get(key) == digests.get(key):
                continue
            self._folded[key] = "?"  # should this end half way, it is made anew
            _fold(linears[key], sources[key].read, folds.get(key))
            if key in digests:
                self._folded[key] = digests[key]
            else:
                del self._folded[key]


def refuse_fold(weights: Sequence[FrozenWeight]) -> None:
    """Raises MechanismError where an adapter cannot be folded into the base.

    A packed weight lies on its quantizer's grid: what a low-rank update adds is mostly smaller than a step of
    the grid, so that quantizing the sum anew rounds it away and returns another error instead.
    """
    for weight in weights:
        if not isinstance(weight, Dense):
            raise MechanismError(
                f"an adapter cannot be folded into a base held in {weight.word}: quantizing the sum anew "
                "would round most of it away",
                "keep the adapter beside the base, or fold it into the unquantized one",
            )


def _pair(adapter: Adapter, key: str, linear: LoraLinear | None) -> tuple[Any, Any]:
    """A (rows, in) and B (rows, out) of a fold."""
    a, b = (adapter.get(f"{FOLD}{key}.{factor}") for factor in "AB")
    if linear is None or a is None or b is None:
        raise ContainerError(f"the version folds {key!r}, which this model lacks, or half of it")
    if (a.shape[1], b.shape[1]) != (linear.in_features, linear.out_features) or len(a) != len(b):
        raise ContainerError(
            f"the fold of {key!r} is {a.shape} and {b.shape}, its weight "
            f"{linear.out_features} x {linear.in_features}"
        )
    return a, b


def _digest(a: Any, b: Any) -> str:
    digest = hashlib.sha256(a.tobytes())
    digest.update(b.tobytes())
    return digest.hexdigest()[:32]


def _fold(linear: LoraLinear, read: Callable[[], Any], fold: tuple[Any, Any] | None) -> None:
    held = linear.frozen.weight
    with torch.no_grad():
        weight = read().to(held.device)
        if fold is not None:
            a, b = (torch.from_numpy(factor).to(held.device) for factor in fold)
            weight.addmm_(b.t(), a, alpha=linear.scaling)
        held.copy_(weight)  # rounded once, where the base is held in 16 bits

"""How large updates have been: what an update's size is held against before it is stored.

For each layer, and for the head, the sizes of the updates that were taken in earlier rounds: their median and
the median of their distances from it. An update is too large where a layer of it is beyond ten times the
median, and beyond twenty deviations as well. Both are medians, so that a few bad updates, taken while little
was known, move neither.

Only earlier rounds count: whether an update is taken does not depend on which of its round came first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median

import msgspec
import numpy as np

from aggregator.state.base import Store
from edge_sdk.updates.codecs import Floats
from edge_sdk.updates.keys import layer_of

__all__ = ["FleetNorms", "Norms", "NormsOf"]

Norms = dict[str, float]
"""Euclidean norm of an update's change, by layer, and of the head under ``head``."""

LEAST = 16
"""So many updates must have been taken before there is a bound: until then absolute limits hold alone."""
_MOST = 256
_TIMES = 10.0
_SPREADS = 20.0
_NORMAL = 1.4826
"""A normal distribution's deviation over its median absolute deviation."""


@dataclass(frozen=True)
class Bound:
    median: float
    most: float


class FleetNorms:
    """The bounds of a run, from what its store holds: a restarted server judges as the one before."""

    def __init__(self, store: Store, run: str) -> None:
        self._store = store
        self._run = run
        self._round: int | None = None
        self._bounds: Mapping[str, Bound] = {}

    def too_large(self, norms: Norms, round: int) -> str | None:
        """What is too large about an update of a round, in words; None: nothing is."""
        bounds = self._of(round)
        for name, norm in norms.items():
            bound = bounds.get(name)
            if bound is not None and norm > bound.most:
                where = "the head" if name == "head" else f"layer {name}"
                return (
                    f"{where} changes by {norm:.3g}, the fleet's updates by {bound.median:.3g}; "
                    f"at most {bound.most:.3g} can be taken"
                )
        return None

    def _of(self, round: int) -> Mapping[str, Bound]:
        if self._round != round:
            self._bounds, self._round = _bounds(self._taken_before(round)), round
        return self._bounds

    def _taken_before(self, round: int) -> list[Norms]:
        taken: list[Norms] = []
        for number in range(round - 1, 0, -1):
            rows = self._store.participations(self._run, number)
            taken += [
                msgspec.json.decode(row.norms, type=Norms)
                for row in rows
                if row.norms is not None and row.state == "received"
            ]
            if len(taken) >= _MOST:
                break
        return taken


def _bounds(taken: Sequence[Norms]) -> dict[str, Bound]:
    bounds = {}
    for name in sorted({name for norms in taken for name in norms}):
        sizes = [norms[name] for norms in taken if name in norms]
        middle = median(sizes)
        if len(sizes) >= LEAST and middle > 0:
            spread = _NORMAL * median(abs(size - middle) for size in sizes)
            bounds[name] = Bound(middle, max(_TIMES * middle, middle + _SPREADS * spread))
    return bounds


class NormsOf:
    """Adds up an update's norms, a part at a time."""

    def __init__(self) -> None:
        self._squares: dict[str, float] = {}

    def add(self, key: str, change: Floats) -> None:
        layer = layer_of(key)
        name = "head" if layer is None else str(layer)
        square = float(np.square(change, dtype=np.float64).sum())
        self._squares[name] = self._squares.get(name, 0.0) + square

    def result(self) -> Norms:
        return {name: sqrt(square) for name, square in self._squares.items()}

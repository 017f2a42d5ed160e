"""The frontiers of a whole fleet as arrays: one entry a pair, device after device.

A fleet of 100,000 devices with 48 depths each has 4.8 million pairs. As Python objects they would take a
gigabyte, and a minute to go through; as arrays the sweep takes them in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aggregator.planner.costs import Pair

__all__ = ["Floats", "Frontiers", "Ints"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Frontiers:
    """``offsets[i]:offsets[i + 1]`` are the pairs of device i, of growing seconds, and of no less depth and
    gain than the pair before. A device without any takes no part.

    Attributes:
        depth: of each pair; small integers of any width.
        seconds: of a round with it.
        gain: what it is worth, not yet weighed by the device's samples.
    """

    offsets: Ints
    depth: npt.NDArray[np.integer]
    seconds: Floats
    gain: Floats

    @classmethod
    def of(cls, frontiers: Sequence[Sequence[Pair]], gain: Callable[[Pair], float]) -> Frontiers:
        """From lists of pairs, such as ``costs.frontier`` gives."""
        flat = [pair for pairs in frontiers for pair in pairs]
        return cls(
            offsets=np.cumsum([0, *(len(pairs) for pairs in frontiers)], dtype=np.int64),
            depth=np.array([pair.depth for pair in flat], dtype=np.int16),
            seconds=np.array([pair.seconds for pair in flat], dtype=np.float64),
            gain=np.array([gain(pair) for pair in flat], dtype=np.float64),
        )

    @property
    def devices(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> Ints:
        """Pairs of each device."""
        return np.diff(self.offsets)

    @property
    def able(self) -> npt.NDArray[np.bool_]:
        """Which devices have a pair at all."""
        return self.counts > 0

    def steps(self, values: npt.NDArray[np.generic]) -> Floats:
        """How much more each pair has of ``values`` than the device's pair before it; 0 before the first."""
        grown = np.empty(len(values), np.float64)
        grown[1:] = values[:-1]
        grown[self.offsets[:-1][self.able]] = 0.0
        np.subtract(values, grown, out=grown)
        return grown

    def within(self, target_s: float) -> Ints:
        """Index of each device's deepest pair that takes at most ``target_s``, else of its first one; -1 for
        a device without any."""
        done = np.empty(len(self.seconds) + 1, np.int64)
        done[0] = 0
        np.cumsum(self.seconds <= target_s, out=done[1:])
        count = done[self.offsets[1:]] - done[self.offsets[:-1]]
        return np.where(self.able, self.offsets[:-1] + np.maximum(count, 1) - 1, -1)

    def with_depths(self, depths: npt.NDArray[np.integer]) -> Ints:
        """Index of each device's pair of just that depth; -1 where it has none."""
        found = np.full(self.devices, -1, np.int64)
        same = np.flatnonzero(self.depth == np.repeat(depths, self.counts))
        found[np.searchsorted(self.offsets, same, side="right") - 1] = same
        return found

    def reaching(self, layers: int) -> Floats:
        """Seconds after which each device trains each layer, (layers, devices); infinite where it cannot.

        Row d - 1 is of the d-th layer from the output: of the first pair that is at least so deep.
        """
        first = np.full((layers, self.devices), np.inf)
        width = self.steps(self.depth).astype(np.int64)
        device = np.repeat(np.repeat(np.arange(self.devices), self.counts), width)
        ends = np.cumsum(width)
        # The pair covers the layers from the one after the pair before it up to its own depth.
        row = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - self.depth, width)
        first[row, device] = np.repeat(self.seconds, width)
        return first

"""Who trains how deep: the allocation mechanism of a method, and its implementations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np

from aggregator.planner.costs import DeviceCosts, Pair, Situation, frontier
from aggregator.planner.frontiers import Frontiers
from aggregator.planner.sweep import (
    Objective,
    Swept,
    covered_after,
    default_coverage,
    reference_round,
    sweep,
    uncovered,
)

__all__ = ["Allocated", "Allocation", "FullDepth", "GreedyDepth", "ReferenceTime"]


@dataclass(frozen=True)
class Allocated:
    """``pairs``: what is recommended, by device; a device for which nothing fits is not in it.

    ``uncovered``: layers that are trained by fewer devices than there should be, as the round's length was
    given; ``covering_s``: the shortest round that trains them all as often.
    """

    target_s: float
    pairs: Mapping[str, Pair]
    uncovered: int = 0
    covering_s: float | None = None


class Allocation(Protocol):
    """One way to decide depths."""

    @property
    def name(self) -> str: ...

    def allocate(self, fleet: Sequence[DeviceCosts], situation: Situation) -> Allocated:
        """The pair of every device and how long the round shall take. ``fleet`` has at least one device."""
        ...

    def options(self, costs: DeviceCosts, recommended: Pair | None) -> Sequence[tuple[int, int]]:
        """One to twelve (depth, quantized layers) to offer, the recommended one among them."""
        ...


@dataclass(frozen=True)
class FullDepth:
    """Every device trains every layer, nothing quantized: what plain federated averaging asks for."""

    name: str = "full-depth"

    def allocate(self, fleet: Sequence[DeviceCosts], situation: Situation) -> Allocated:
        layers = situation.layers
        pairs = {costs.device: costs.pair(layers, 0) for costs in fleet if costs.fits(layers, 0)}
        if situation.target_s is not None:
            target = situation.target_s
            pairs = {device: pair for device, pair in pairs.items() if pair.seconds <= target}
        else:
            slowest = pairs.values() or [costs.pair(layers, 0) for costs in fleet]
            target = max(pair.seconds for pair in slowest)
        return Allocated(target, pairs)

    def options(self, costs: DeviceCosts, recommended: Pair | None) -> Sequence[tuple[int, int]]:  # noqa: ARG002
        return ((costs.work.shape.layers, 0),)


@dataclass(frozen=True)
class GreedyDepth:
    """FedQuad: the depth that pays best per second of the round, quantizing what does not fit otherwise.

    Attributes:
        coverage: how many devices shall train each layer (m); None: by the fleet's size.
        omega: weight of waiting against gain per second.
        server_s: what a round costs besides the devices: merge, version, evaluation.
        hysteresis: depths change only for a J better by this share.
        depths: how many of them an offer holds at most.
    """

    name: str = "greedy-depth"
    coverage: int | None = None
    omega: float = 0.1
    server_s: float = 2.0
    hysteresis: float = 0.02
    depths: int = 4

    def allocate(self, fleet: Sequence[DeviceCosts], situation: Situation) -> Allocated:
        options = [frontier(costs, situation.gain) for costs in fleet]
        if situation.target_s is not None:
            return self._given(situation, situation.target_s, fleet, options)
        if not any(options):
            # The devices measure again; what they would need at least is as good a length as any.
            least = [costs.pair(1, costs.most_quantized(1)).seconds for costs in fleet]
            return Allocated(max(least), {})
        swept = self._round(
            self.objective(
                Frontiers.of(options, situation.gain), [costs.samples for costs in fleet], situation.layers
            ),
            [situation.previous.get(costs.device, -1) for costs in fleet],
        )
        pairs = [pair for one in options for pair in one]
        return Allocated(
            swept.target_s,
            {
                costs.device: pairs[index]
                for costs, index in zip(fleet, swept.chosen.tolist(), strict=True)
                if index >= 0
            },
        )

    def _given(
        self,
        situation: Situation,
        target_s: float,
        fleet: Sequence[DeviceCosts],
        options: Sequence[Sequence[Pair]],
    ) -> Allocated:
        """A round of a given length: what it has no time for is left out, and told."""
        allocated, layers = _within(target_s, fleet, options), situation.layers
        deepest = [pairs[-1].depth for pairs in options if pairs]
        coverage = self._coverage(len(deepest))
        taken = [pair.depth for pair in allocated.pairs.values()]
        lacking = uncovered(deepest, taken, layers, coverage)
        if not lacking:
            return allocated
        covering_s = covered_after(Frontiers.of(options, situation.gain), layers, coverage)
        return replace(allocated, uncovered=lacking, covering_s=covering_s)

    def _coverage(self, able: int) -> int:
        return default_coverage(able) if self.coverage is None else self.coverage

    def objective(self, frontiers: Frontiers, samples: Sequence[int], layers: int) -> Objective:
        """What a round of this fleet is measured by."""
        able = int(np.count_nonzero(frontiers.able))
        return Objective.of(
            frontiers,
            samples,
            layers,
            coverage=self._coverage(able),
            omega=self.omega,
            server_s=self.server_s,
        )

    def _round(self, objective: Objective, previous: Sequence[int]) -> Swept:
        """``previous``: of each device the depth recommended in the round before; -1: none."""
        return sweep(objective, hysteresis=self.hysteresis, previous=np.asarray(previous))

    def options(self, costs: DeviceCosts, recommended: Pair | None) -> Sequence[tuple[int, int]]:
        layers = costs.work.shape.layers
        found: list[tuple[int, int]] = []
        for depth in offered_depths(layers, recommended.depth if recommended else None, self.depths):
            # What does not fit by the last report is offered all the same, as small as it gets: the device
            # measures again before it chooses.
            for quantized in (costs.least_quantized(depth), costs.most_quantized(depth)):
                if quantized is not None and (depth, quantized) not in found:
                    found.append((depth, quantized))
        return found


def _within(target_s: float, fleet: Sequence[DeviceCosts], frontiers: Sequence[Sequence[Pair]]) -> Allocated:
    """A round of a given length: everybody's deepest pair, and where there is none, the shallowest one with
    fewer steps."""
    pairs = {}
    for costs, options in zip(fleet, frontiers, strict=True):
        best = next((pair for pair in reversed(options) if pair.seconds <= target_s), None)
        if best is None and options:
            best = costs.shortened(options[0], target_s)
        if best is not None:
            pairs[costs.device] = best
    return Allocated(target_s, pairs)


@dataclass(frozen=True)
class ReferenceTime(GreedyDepth):
    """LEGEND's way, in spirit: all keep pace with a reference device.

    It looks at one time a device rather than at every pair, and so comes to a J that is a little less; see
    ``sweep.reference_round``. Depths move with the reference: there is no hysteresis.

    Attributes:
        waiting: mean share of the round that devices may wait, where any reference allows for it.
    """

    name: str = "reference-time"
    waiting: float = 1.0

    def _round(self, objective: Objective, previous: Sequence[int]) -> Swept:  # noqa: ARG002
        return reference_round(objective, waiting=self.waiting)


def offered_depths(layers: int, recommended: int | None, most: int = 4) -> tuple[int, ...]:
    """All depths of a small model; else 1, the recommended one, the next deeper one, and all layers, filled
    up from the middle of the widest gaps."""
    if layers <= most:
        return tuple(range(1, layers + 1))
    depths = {1, layers}
    if recommended is not None:
        depths |= {recommended, min(recommended + 1, layers)}
    while len(depths) < most:
        ordered = sorted(depths)
        gap, low = max((high - low, low) for low, high in pairwise(ordered))
        if gap < 2:
            break
        depths.add(low + gap // 2)
    return tuple(sorted(depths))

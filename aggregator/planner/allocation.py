"""Who trains how deep: the allocation mechanism of a method, and its implementations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from aggregator.planner.costs import DeviceCosts, Pair, Situation, frontier
from aggregator.planner.sweep import deepest, default_coverage, sweep

__all__ = ["Allocated", "Allocation", "FullDepth", "GreedyDepth"]


@dataclass(frozen=True)
class Allocated:
    """``pairs``: what is recommended, by device; a device for which nothing fits is not in it."""

    target_s: float
    pairs: Mapping[str, Pair]


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
        frontiers = {costs.device: frontier(costs) for costs in fleet}
        able = [costs for costs in fleet if frontiers[costs.device]]
        if situation.target_s is not None:
            target = situation.target_s
            pairs = {costs.device: deepest(frontiers[costs.device], target) for costs in able}
            return Allocated(target, {d: pair for d, pair in pairs.items() if pair.seconds <= target})
        if not able:
            # The devices measure again; what they would need at least is as good a length as any.
            least = [costs.pair(1, costs.most_quantized(1)).seconds for costs in fleet]
            return Allocated(max(least), {})
        swept = sweep(
            [frontiers[costs.device] for costs in able],
            [costs.samples for costs in able],
            situation,
            coverage=default_coverage(len(able)) if self.coverage is None else self.coverage,
            omega=self.omega,
            server_s=self.server_s,
            hysteresis=self.hysteresis,
            previous={
                i: situation.previous[costs.device]
                for i, costs in enumerate(able)
                if costs.device in situation.previous
            },
        )
        return Allocated(
            swept.target_s, {costs.device: pair for costs, pair in zip(able, swept.pairs, strict=True)}
        )

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

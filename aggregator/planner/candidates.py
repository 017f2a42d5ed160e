"""What one device is offered: the allocation's pairs as candidates, with the planner's predictions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from aggregator.methods.base import Method
from aggregator.planner.costs import DeviceCosts, Pair, Situation, Work
from edge_sdk.planning.choice import STEP_DOWN_MARGIN
from edge_sdk.protocol.spec import Candidate

__all__ = ["MOST", "OTHERS", "candidates_for"]

MOST = 12
"""Candidates of an offer."""

OTHERS = 4
"""Of them, those with another lever than the method's, or with fewer steps, or the least of all."""


def candidates_for(
    costs: DeviceCosts,
    method: Method,
    situation: Situation,
    recommended: Pair | None,
    target_s: float,
) -> tuple[Candidate, ...]:
    """One to twelve candidates, the recommended pair marked; none is where nothing fits.

    A device for which nothing fits is asked all the same: the last report may be old, and it is the device
    that declines, with its figures.

    A device takes the best gain that its own figures admit. So nothing is offered that it would rather take
    than what is recommended and should not: because of what earlier rounds taught, or because its depth is
    kept as it was. What does not fit by its last report is offered: it measures again before it chooses.

    Args:
        target_s: what the device will hold its predicted seconds against.
    """
    work = costs.work
    pairs = {_id(pair, work): pair for pair in _pairs(costs, method, recommended)}
    candidates = {
        name: _candidate(name, pair, costs, method, situation, pair == recommended)
        for name, pair in pairs.items()
    }
    best = next((one for one in candidates.values() if one.recommended), None)
    kept = [
        one
        for name, one in candidates.items()
        if one is best or not _misleads(one, best, pairs[name], costs, target_s)
    ]
    return tuple(kept or [min(candidates.values(), key=lambda one: one.peak_mb)])


def _pairs(costs: DeviceCosts, method: Method, recommended: Pair | None) -> list[Pair]:
    pairs = [costs.pair(*option) for option in method.allocation.options(costs, recommended)]
    others = list(_others(costs, recommended))
    if recommended is not None and recommended not in pairs:
        others = [recommended, *(pair for pair in others if pair != recommended)]
    least = _least(costs, recommended, [*pairs, *others])
    others = [*others[: OTHERS - len(least)], *least]
    return pairs[: MOST - len(others)] + others


def _others(costs: DeviceCosts, recommended: Pair | None) -> Iterator[Pair]:
    """Where memory binds, how deep each other way reaches; where time does, half of the steps."""
    work = costs.work
    reached = _deepest(costs, 0)
    if reached is None or reached.depth < work.shape.layers:
        for number in range(1, len(work.ways)):
            pair = _deepest(costs, number)
            if pair is not None and (reached is None or pair.depth > reached.depth):
                yield pair
    if len(work.ways) > 1 and recommended is not None and recommended.depth == 1:
        half = costs.shortened(recommended, recommended.seconds - 0.5 * recommended.train_s)
        if half is not None:
            yield half


def _least(costs: DeviceCosts, recommended: Pair | None, offered: Sequence[Pair]) -> list[Pair]:
    """One layer in the way that takes least, to step down to, where nothing else on offer takes as little.

    Not for those who have memory for all layers and are recommended more than the smallest: they have others.
    """
    work = costs.work
    if len(work.ways) == 1:
        return []
    if recommended is not None and recommended.depth > 1 and costs.fits(work.shape.layers, 0):
        return []
    known = [costs.pair(1, a, way) for way in work.ways for a in (0, 1) if costs.knows(1, a, way)]
    least = min(known, key=lambda pair: pair.peak_mb, default=None)
    if least is None or least.peak_mb > (1 - STEP_DOWN_MARGIN) * min(pair.peak_mb for pair in offered):
        return []
    return [least]


def _deepest(costs: DeviceCosts, number: int) -> Pair | None:
    """The deepest pair that fits in one of the ways; memory grows with depth."""
    way, layers = costs.work.ways[number], costs.work.shape.layers
    depth = bisect_left(range(1, layers + 1), True, key=lambda d: costs.least_quantized(d, way) is None)
    quantized = costs.least_quantized(depth, way) if depth else None
    return None if quantized is None else costs.pair(depth, quantized, way)


def _misleads(
    one: Candidate, best: Candidate | None, pair: Pair, costs: DeviceCosts, target_s: float
) -> bool:
    """Whether the device would take the candidate, and should not. Where nothing keeps within the target, it
    takes what is quickest."""
    if not costs.own_room(pair):
        return False
    in_time = costs.own_seconds(pair) <= target_s
    if best is None:
        return not costs.has_room(pair) or (in_time and pair.seconds > target_s)
    return in_time and (-one.gain, one.seconds, one.id) < (-best.gain, best.seconds, best.id)


def _candidate(
    name: str, pair: Pair, costs: DeviceCosts, method: Method, situation: Situation, recommended: bool
) -> Candidate:
    way = pair.way
    return Candidate(
        id=name,
        depth=pair.depth,
        quantized_layers=pair.quantized,
        activation_bits=way.levers.activation_bits,
        activation_rounding=way.levers.activation_rounding,
        recompute=way.levers.recompute,
        base_precision=method.base_precision or costs.base_precision,
        codec=method.codec,
        micro_batch=way.micro_batch,
        accumulation=way.accumulation,
        steps=way.steps,
        max_length=costs.work.max_length,
        peak_mb=pair.peak_mb,
        seconds=pair.seconds,
        bytes_up=pair.bytes_up,
        bytes_down=pair.bytes_down,
        gain=situation.gain(pair),
        recommended=recommended,
    )


def _id(pair: Pair, work: Work) -> str:
    """Depth and quantized layers, and whatever is not the method's own."""
    way, own = pair.way, work.own
    name = f"d{pair.depth}a{pair.quantized}"
    if pair.quantized and way.levers.activation_bits != own.levers.activation_bits:
        name += f"b{way.levers.activation_bits}"
    if way.micro_batch != own.micro_batch:
        name += f"m{way.micro_batch}"
    if way.steps != own.steps:
        name += f"s{way.steps}"
    if way.levers.recompute != own.levers.recompute:
        name += f"-{way.levers.recompute.replace('.', '_')}"
    return name

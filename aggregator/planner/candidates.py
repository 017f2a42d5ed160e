"""What one device is offered: the allocation's pairs as candidates, with the planner's predictions."""

from __future__ import annotations

from aggregator.methods.base import Method
from aggregator.planner.costs import DeviceCosts, Pair, Situation
from edge_sdk.protocol.spec import Candidate

__all__ = ["candidates_for"]


def candidates_for(
    costs: DeviceCosts, method: Method, situation: Situation, recommended: Pair | None
) -> tuple[Candidate, ...]:
    """One to twelve candidates, the recommended pair marked; none is where nothing fits.

    A device for which nothing fits is asked all the same: the last report may be old, and it is the device
    that declines, with its figures.
    """
    work = costs.work
    candidates = []
    for depth, quantized in method.allocation.options(costs, recommended):
        pair = costs.pair(depth, quantized)
        candidates.append(
            Candidate(
                id=f"d{depth}a{quantized}",
                depth=depth,
                quantized_layers=quantized,
                activation_bits=method.levers.activation_bits,
                activation_rounding=method.levers.activation_rounding,
                recompute=method.levers.recompute,
                base_precision=method.base_precision or costs.base_precision,
                codec=method.codec,
                micro_batch=work.micro_batch,
                accumulation=work.accumulation,
                steps=work.steps,
                max_length=work.max_length,
                peak_mb=pair.peak_mb,
                seconds=pair.seconds,
                bytes_up=pair.bytes_up,
                bytes_down=pair.bytes_down,
                gain=situation.gain(depth, quantized),
                recommended=recommended is not None
                and (depth, quantized) == (recommended.depth, recommended.quantized),
            )
        )
    return tuple(candidates)

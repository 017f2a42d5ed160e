"""A round's plan: who is offered what, what the round aims at, and when it closes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aggregator.methods.base import Method
from aggregator.planner.allocation import Allocated
from aggregator.planner.candidates import candidates_for
from aggregator.planner.costs import DeviceCosts, Situation, Work, device_costs, layer_gains
from aggregator.planner.lessons import Lessons
from edge_sdk.config.run import RunConfig
from edge_sdk.protocol.spec import Candidate
from edge_sdk.protocol.wire import Run, Status

__all__ = ["ALLOWANCE_S", "LONGEST_S", "SLACK", "TOLERANCE", "RoundPlan", "plan_round"]

SLACK = 1.2
"""Deadline over target: what predictions may be off by."""

TOLERANCE = 1.05
"""Target over the sweep's T, which is exactly the time of the device that sets the pace: without it, that
device would refuse its own recommendation as soon as its link is measured a little slower."""

ALLOWANCE_S = 60.0
"""The least time between target and deadline: starting a trainer, reading data, reconnecting. Costs nothing
while nobody is late, as a round closes with its last update."""

LONGEST_S = 86_400.0
"""The longest deadline that is made of what devices say of themselves: one that errs, or lies, must not hold
a run for ever. Whoever wants longer rounds sets ``rounds.deadline_s``."""


@dataclass(frozen=True)
class RoundPlan:
    """``target_s``: what predicted times must stay within; ``deadline_s``: when the round closes.

    ``excluded``: devices that get no offer, and why: without a fit for this run there is nothing to predict.
    ``warning``: what a fixed deadline leaves out; empty: nothing.
    """

    deadline_s: float
    target_s: float
    candidates: dict[str, tuple[Candidate, ...]]
    excluded: dict[str, str]
    warning: str = ""


def plan_round(
    run: Run,
    method: Method,
    statuses: Sequence[Status],
    *,
    config: RunConfig,
    utilities: Sequence[float] | None = None,
    round: int = 1,
    previous: Mapping[str, int] | None = None,
    lessons: Mapping[str, Lessons] | None = None,
) -> RoundPlan:
    """The offers of a round, from what the devices last reported.

    ``rounds.deadline_s``, where the operator fixed it, takes the sweep's place: target = deadline / SLACK.
    Otherwise target = TOLERANCE · T and deadline = max(SLACK · target, target + ALLOWANCE_S), with at most
    LONGEST_S for the deadline.

    Args:
        utilities: of each layer, from the input up; None: uniform. See ``costs.layer_gains``.
        previous: depth recommended to each device in the round before, for hysteresis.
        lessons: what earlier rounds taught of each device.
    """
    work = Work.of(
        run,
        steps=config.training.steps,
        levers=method.levers,
        codec=method.codec,
        accumulation=config.training.accumulation,
        others=method.other_levers,
    )
    fleet, excluded = [], {}
    for status in sorted(statuses, key=lambda s: s.device):
        try:
            fleet.append(device_costs(status, work, (lessons or {}).get(status.device)))
        except ValueError as error:
            excluded[status.device] = str(error)
    waiting = {costs.device: costs.lessons.waits(round, costs.reported_mb) for costs in fleet}
    if not all(waiting.values()):  # if only those are left, they are asked after all
        fleet = [costs for costs in fleet if not waiting[costs.device]]
        excluded |= {device: why for device, why in waiting.items() if why}
    fixed = config.rounds.deadline_s
    situation = Situation(
        layers=run.shape.layers,
        gains=layer_gains(run.shape.layers, utilities),
        round=round,
        target_s=None if fixed is None else fixed / SLACK,
        previous=previous or {},
    )
    if not fleet:
        deadline = ALLOWANCE_S if fixed is None else fixed
        return RoundPlan(deadline, deadline / SLACK, {}, excluded)
    allocated = method.allocation.allocate(fleet, situation)
    if allocated.target_s > LONGEST_S / SLACK and fixed is None:
        # Who would take longer than any round lasts must not set the pace for the others.
        slow = _too_slow(fleet, method)
        if len(slow) < len(fleet):
            excluded |= slow
            fleet = [costs for costs in fleet if costs.device not in slow]
            allocated = method.allocation.allocate(fleet, situation)
    if fixed is not None:
        target, deadline = fixed / SLACK, fixed
    else:
        target = min(TOLERANCE * max(allocated.target_s, 1e-3), LONGEST_S / SLACK)
        deadline = max(SLACK * target, target + ALLOWANCE_S)
    candidates = {
        costs.device: candidates_for(costs, method, situation, allocated.pairs.get(costs.device), target)
        for costs in fleet
    }
    return RoundPlan(deadline, target, candidates, excluded, _left_out(allocated, fixed))


def _left_out(allocated: Allocated, fixed: float | None) -> str:
    if not allocated.uncovered or allocated.covering_s is None or fixed is None:
        return ""
    lacking = "1 layer is" if allocated.uncovered == 1 else f"{allocated.uncovered} layers are"
    enough = math.ceil(SLACK * allocated.covering_s)
    return (
        f"rounds.deadline_s is {fixed:g}: {lacking} trained by fewer devices than "
        f"should, or by none; from {enough} s on there is time for all of them"
    )


def _too_slow(fleet: Sequence[DeviceCosts], method: Method) -> dict[str, str]:
    """Those for whom the quickest of all that they can be offered takes longer than a round may last."""
    longest, found = LONGEST_S / SLACK, {}
    for costs in fleet:
        quickest = min(costs.pair(*one).seconds for one in method.allocation.options(costs, None))
        if quickest > longest:
            found[costs.device] = (
                f"its quickest round would take {quickest:.3g} s, and {longest:.0f} s are the most"
            )
    return found

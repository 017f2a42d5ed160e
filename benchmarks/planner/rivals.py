"""The J of the best round by simpler means. Both get the fleet as they like it, made beforehand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from aggregator.planner.frontiers import Floats
from aggregator.planner.sweep import Objective

__all__ = ["Lists", "as_lists", "as_tables", "naive_value", "plain_value"]

Lists = list[list[tuple[float, float]]]
"""(seconds, gain) of each device's pairs, in Python objects."""


def as_lists(objective: Objective) -> Lists:
    frontiers = objective.frontiers
    flat = list(zip(frontiers.seconds.tolist(), frontiers.gain.tolist(), strict=True))
    ends = frontiers.offsets.tolist()
    return [flat[low:high] for low, high in pairwise(ends)]


def plain_value(objective: Objective, lists: Lists) -> float:
    """The same sweep, as a loop over sorted events."""
    start, server, omega = objective.start_s, objective.server_s, objective.omega
    events: list[tuple[float, float, float]] = []
    for share, pairs in zip(objective.shares.tolist(), lists, strict=True):
        before_s = before = 0.0
        for seconds, gain in pairs:
            events.append((seconds, share * (gain - before), seconds - before_s))
            before_s, before = seconds, gain
    events.sort()
    devices, best, rewards, busy = sum(map(bool, lists)), float("-inf"), 0.0, 0.0
    for place, (seconds, gained, added) in enumerate(events):
        rewards += gained
        busy += added
        if seconds < start or (place + 1 < len(events) and events[place + 1][0] == seconds):
            continue
        waiting = 1.0 - busy / (devices * seconds)
        best = max(best, (start + server) / (seconds + server) * rewards - omega * waiting)
    return best


def as_tables(objective: Objective, layers: int) -> tuple[Floats, Floats]:
    """Seconds and gain of each device's pairs as (devices, layers): for fleets in which all reach all."""
    frontiers = objective.frontiers
    return frontiers.seconds.reshape(-1, layers), frontiers.gain.reshape(-1, layers)


def naive_value(objective: Objective, seconds: Floats, gain: Floats) -> float:
    """Every possible length, for each the deepest pair of every device."""
    rows, best = np.arange(len(seconds)), float("-inf")
    for length in np.unique(seconds[seconds >= objective.start_s]):
        deepest = (seconds <= length).sum(axis=1) - 1
        waiting = 1.0 - seconds[rows, deepest].sum() / (len(rows) * length)
        speed = (objective.start_s + objective.server_s) / (length + objective.server_s)
        best = max(best, float(speed * (objective.shares @ gain[rows, deepest]) - objective.omega * waiting))
    return best

"""FedQuad's greedy configuration: one sweep over the round's length T, coverage as a constraint.

    r_i(d, a)  = p_i · G(d) · (1 − err(a))            p_i: the device's share of all samples
    J(T)       = (T_0 + t_server) / (T + t_server) · sum_i r_i(deepest pair with t_i <= T)
                 − omega · mean_i (T − t_i) / T

J is gain per second less waiting. T_0, the first T swept, only makes the two terms comparable: it is the
same for all T. On a frontier, gain and time both grow with depth, so at a given T the deepest pair is the
best of every device, and the sweep is exact: O(N L log(N L)).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aggregator.planner.frontiers import Floats, Frontiers, Ints

__all__ = [
    "Objective",
    "Swept",
    "coverage_time",
    "covered_after",
    "default_coverage",
    "reference_round",
    "sweep",
    "uncovered",
]


@dataclass(frozen=True)
class Swept:
    """A round: how long it takes, the index of each device's pair (-1: it takes no part), and its J."""

    target_s: float
    chosen: Ints
    value: float


def default_coverage(devices: int) -> int:
    """By how many devices each layer shall be trained: 3, in small fleets a quarter of them, at least 1.

    More would force the slow ones of a small fleet to full depth and let them set the pace.
    """
    return max(1, min(3, devices // 4))


def coverage_time(frontiers: Frontiers, layers: int, coverage: int) -> float:
    """The smallest T at which every device has a pair and the deepest ones reach every layer
    min(coverage, number of devices that can reach it) times."""
    first = float(frontiers.seconds[frontiers.offsets[:-1][frontiers.able]].max())
    return max(first, covered_after(frontiers, layers, coverage))


def covered_after(frontiers: Frontiers, layers: int, coverage: int) -> float:
    """The same of layers alone: whoever is not needed may be left out."""
    start = 0.0
    for times in frontiers.reaching(layers):
        needed = min(coverage, int(np.isfinite(times).sum()))
        if needed:
            start = max(start, float(np.partition(times, needed - 1)[needed - 1]))
    return start


def uncovered(deepest: npt.ArrayLike, taken: npt.ArrayLike, layers: int, coverage: int) -> int:
    """How many layers are trained by fewer than min(coverage, number of devices that can reach them).

    Args:
        deepest, taken: depths, from 0 to ``layers``: what devices can reach, and what they shall train.
    """
    # by how many at depth d or deeper, for d = layers .. 1
    could, do = (
        np.cumsum(np.bincount(np.asarray(depths, np.int64), minlength=layers + 1)[:0:-1])
        for depths in (deepest, taken)
    )
    return int(np.count_nonzero(do < np.minimum(coverage, could)))


@dataclass(frozen=True)
class Objective:
    """J for one fleet: everything in it but T and what the devices do.

    ``shares``: of each device's samples among those of all that can take part.
    """

    frontiers: Frontiers
    shares: Floats
    layers: int
    coverage: int
    start_s: float
    server_s: float
    omega: float

    @classmethod
    def of(
        cls,
        frontiers: Frontiers,
        samples: npt.ArrayLike,
        layers: int,
        *,
        coverage: int,
        omega: float,
        server_s: float,
    ) -> Objective:
        """Raises ValueError where no device has a pair."""
        if not len(frontiers.seconds):
            raise ValueError("no device has anything that it could do")
        counted = np.where(frontiers.able, np.asarray(samples, np.float64), 0.0)
        start = coverage_time(frontiers, layers, coverage)
        return cls(frontiers, counted / counted.sum(), layers, coverage, start, server_s, omega)

    def at(self, target_s: Floats, rewards: Floats, busy: Floats) -> Floats:
        """J(T) of summed rewards and the summed seconds of all devices."""
        target = np.maximum(target_s, 1e-9)
        waiting = 1.0 - busy / (np.count_nonzero(self.frontiers.able) * target)
        speed = (self.start_s + self.server_s) / np.maximum(target + self.server_s, 1e-9)
        return np.asarray(speed * rewards - self.omega * waiting, dtype=np.float64)

    def covers(self, chosen: Ints) -> bool:
        """Whether every layer is trained min(coverage, number of devices that can reach it) times."""
        frontiers, able = self.frontiers, self.frontiers.able
        deepest = frontiers.depth[frontiers.offsets[1:][able] - 1]
        return not uncovered(deepest, frontiers.depth[chosen[able]], self.layers, self.coverage)

    def value(self, target_s: float, chosen: Ints) -> float:
        """J of a round in which the devices take these pairs."""
        able = self.frontiers.able
        taken = chosen[able]
        rewards = self.shares[able] @ self.frontiers.gain[taken]
        busy = self.frontiers.seconds[taken].sum()
        return float(self.at(*(np.array([figure]) for figure in (target_s, rewards, busy)))[0])

    def waiting(self, swept: Swept) -> float:
        """Mean share of the round that the devices wait."""
        taken = self.frontiers.seconds[swept.chosen[self.frontiers.able]]
        return 1.0 - float(taken.mean()) / max(swept.target_s, 1e-9)

    def round(self, target_s: float) -> Swept:
        """The round of that length, everybody as deep as it allows."""
        chosen = self.frontiers.within(target_s)
        return Swept(target_s, chosen, self.value(target_s, chosen))


def sweep(
    objective: Objective,
    *,
    hysteresis: float = 0.0,
    previous: npt.NDArray[np.integer] | None = None,
) -> Swept:
    """The round of the best J; of equal ones the shortest.

    Args:
        hysteresis, previous: keep the depths in ``previous`` (of each device, -1: none) while they cover and
            come within this share of the best J. See ``_kept``.
    """
    swept = objective.round(_best_target(objective))
    if previous is None:
        return swept
    kept = _kept(objective, previous)
    if kept is None or not objective.covers(kept.chosen):
        return swept
    return kept if swept.value - kept.value <= hysteresis * abs(swept.value) else swept


def _best_target(objective: Objective) -> float:
    """Each pair is an event at its time: the device leaves the pair before it for this one."""
    frontiers, start = objective.frontiers, objective.start_s
    gained = frontiers.steps(frontiers.gain)
    gained *= np.repeat(objective.shares, frontiers.counts)
    added = frontiers.steps(frontiers.seconds)
    # What happens up to the first T needs no order.
    before = frontiers.seconds <= start
    after = ~before
    times = frontiers.seconds[after]
    order = np.argsort(times)
    targets = np.concatenate(([start], times[order]))
    rewards = np.concatenate(([gained[before].sum()], gained[after][order]))
    busy = np.concatenate(([added[before].sum()], added[after][order]))
    np.cumsum(rewards, out=rewards)
    np.cumsum(busy, out=busy)
    last = np.append(targets[1:] > targets[:-1], True)
    targets = targets[last]
    return float(targets[np.argmax(objective.at(targets, rewards[last], busy[last]))])


def _kept(objective: Objective, previous: npt.NDArray[np.integer]) -> Swept | None:
    """The round before, at today's costs; None where nobody can do what it did.

    Who has no depth of the round before, or cannot train so deep any more, goes as deep as those who keep
    theirs leave time for: a device that joins, or lost memory, is no reason for all others to change.
    """
    frontiers = objective.frontiers
    chosen = frontiers.with_depths(previous)
    keeps = chosen >= 0
    if not keeps.any():
        return None
    changes = frontiers.able & ~keeps
    first = frontiers.seconds[frontiers.offsets[:-1][changes]]
    target = float(max(frontiers.seconds[chosen[keeps]].max(), first.max(initial=0.0)))
    chosen = np.where(keeps, chosen, frontiers.within(target))
    return Swept(target, chosen, objective.value(target, chosen))


def reference_round(objective: Objective, *, waiting: float = 1.0, references: int = 24) -> Swept:
    """The round that keeps pace with one device: everybody as deep as its time allows.

    What a device takes for all that it can do is a reference, from the fastest one's on, and so is the least
    that coverage asks for. Of those at which the devices wait for no more than ``waiting`` of the round on
    average, of all where there are none, the one of the best J is taken.

    Args:
        references: how many are looked at, at most; evenly among the devices by pace.
    """
    frontiers = objective.frontiers
    full = frontiers.seconds[frontiers.offsets[1:][frontiers.able] - 1]
    times = np.unique(np.maximum(full, objective.start_s))
    some = times[np.unique(np.linspace(0, len(times) - 1, references).astype(int))]
    best: tuple[bool, Swept] | None = None
    for time in [objective.start_s, *some.tolist()]:
        swept = objective.round(time)
        calm = objective.waiting(swept) <= waiting
        if best is None or (calm, swept.value) > (best[0], best[1].value):
            best = calm, swept
    assert best is not None  # noqa: S101 - for the type checker: start_s is a reference
    return best[1]

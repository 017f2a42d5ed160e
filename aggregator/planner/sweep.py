"""FedQuad's greedy configuration: one sweep over the round's length T, coverage as a constraint.

    r_i(d, a)  = p_i · G(d) · (1 − err(a))            p_i: the device's share of all samples
    J(T)       = (T_0 + t_server) / (T + t_server) · sum_i r_i(deepest pair with t_i <= T)
                 − omega · mean_i (T − t_i) / T

J is gain per second less waiting. T_0, the first T swept, only makes the two terms comparable: it is the
same for all T. On a frontier, gain and time both grow with depth, so at a given T the deepest pair is the
best of every device, and the sweep is exact: O(N L log(N L)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aggregator.planner.costs import Pair, Situation

__all__ = ["Swept", "coverage_time", "default_coverage", "objective", "sweep"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Swept:
    """The best round: how long it takes, what each device does, and its J."""

    target_s: float
    pairs: tuple[Pair, ...]
    value: float


def default_coverage(devices: int) -> int:
    """By how many devices each layer shall be trained: 3, in small fleets a quarter of them, at least 1.

    More would force the slow ones of a small fleet to full depth and let them set the pace.
    """
    return max(1, min(3, devices // 4))


def coverage_time(frontiers: Sequence[Sequence[Pair]], layers: int, coverage: int) -> float:
    """The smallest T at which every device has a pair and the deepest ones reach every layer
    min(coverage, number of devices that can reach it) times."""
    first = np.full((len(frontiers), layers + 1), np.inf)
    for i, pairs in enumerate(frontiers):
        reached = 0
        for pair in pairs:
            first[i, reached : pair.depth + 1] = pair.seconds
            reached = pair.depth + 1
    first.sort(axis=0)
    needed = np.minimum(np.isfinite(first).sum(axis=0), coverage)
    nobody_left_out = max(pairs[0].seconds for pairs in frontiers)
    times = [first[need - 1, depth] for depth, need in enumerate(needed) if need]
    return float(max([nobody_left_out, *times]))


def objective(
    target_s: float | Floats,
    rewards: float | Floats,
    waiting: float | Floats,
    *,
    start_s: float,
    server_s: float,
    omega: float,
) -> Floats:
    """J(T) of summed rewards and mean waiting (as a share of T)."""
    speed = (start_s + server_s) / np.maximum(np.asarray(target_s) + server_s, 1e-9)
    return np.asarray(speed * rewards - omega * np.asarray(waiting), dtype=np.float64)


def sweep(
    frontiers: Sequence[Sequence[Pair]],
    samples: Sequence[int],
    situation: Situation,
    *,
    coverage: int,
    omega: float,
    server_s: float,
    hysteresis: float = 0.0,
    previous: Mapping[int, int] | None = None,
) -> Swept:
    """The T of the best J, and each device's pair at it.

    Args:
        frontiers: of each device, at least one pair; see ``costs.frontier``.
        samples: of each device.
        hysteresis, previous: keep the depths in ``previous`` (by the device's index) while they are on the
            frontiers, cover, and come within this share of the best J.
    """
    shares = np.asarray(samples, dtype=np.float64) / sum(samples)
    start = coverage_time(frontiers, situation.layers, coverage)
    count = len(frontiers)

    # Each pair is an event at its time: the device leaves the pair before it for this one.
    times, gained, waited = [], [], []
    for share, pairs in zip(shares, frontiers, strict=True):
        reward = seconds = 0.0
        for pair in pairs:
            now = share * situation.gain(pair.depth, pair.quantized)
            times.append(pair.seconds)
            gained.append(now - reward)
            waited.append(pair.seconds - seconds)
            reward, seconds = now, pair.seconds
    order = np.argsort(times, kind="stable")
    targets = np.asarray(times)[order]
    rewards = np.cumsum(np.asarray(gained)[order])
    busy = np.cumsum(np.asarray(waited)[order])
    last = np.append(targets[1:] > targets[:-1], True) & (targets >= start)
    targets, rewards, busy = targets[last], rewards[last], busy[last]
    values = objective(
        targets,
        rewards,
        1.0 - busy / (count * np.maximum(targets, 1e-9)),
        start_s=start,
        server_s=server_s,
        omega=omega,
    )
    best = int(np.argmax(values))
    target = float(targets[best])
    swept = Swept(target, tuple(deepest(pairs, target) for pairs in frontiers), float(values[best]))
    kept = _kept(frontiers, previous or {}, situation.layers, coverage)
    if kept is None:
        return swept
    target = max(pair.seconds for pair in kept)
    value = float(
        objective(
            target,
            sum(s * situation.gain(p.depth, p.quantized) for s, p in zip(shares, kept, strict=True)),
            sum((target - p.seconds) / max(target, 1e-9) for p in kept) / count,
            start_s=start,
            server_s=server_s,
            omega=omega,
        )
    )
    if swept.value - value <= hysteresis * abs(swept.value):
        return Swept(target, kept, value)
    return swept


def deepest(pairs: Sequence[Pair], target_s: float) -> Pair:
    """The deepest pair within ``target_s``; the shallowest one where none is."""
    within = [pair for pair in pairs if pair.seconds <= target_s]
    return within[-1] if within else pairs[0]


def _kept(
    frontiers: Sequence[Sequence[Pair]], previous: Mapping[int, int], layers: int, coverage: int
) -> tuple[Pair, ...] | None:
    """The round before, at today's costs; None where a depth does not fit any more, or a layer is left."""
    pairs = []
    for i, options in enumerate(frontiers):
        same = [pair for pair in options if pair.depth == previous.get(i)]
        if not same:
            return None
        pairs.append(same[0])
    for depth in range(1, layers + 1):
        able = sum(options[-1].depth >= depth for options in frontiers)
        if sum(pair.depth >= depth for pair in pairs) < min(coverage, able):
            return None
    return tuple(pairs)

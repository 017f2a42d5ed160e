"""The best round of a small fleet, by trying every combination; and fleets to try it on.

Shares nothing with the planner but the meaning of J, which is written out here once more.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

__all__ = ["Case", "Pair", "best_value", "random_case"]

Pair = tuple[int, float, float]
"""Depth, seconds, gain."""


@dataclass(frozen=True)
class Case:
    """A fleet, and what is asked of its round."""

    kind: str
    layers: int
    frontiers: tuple[tuple[Pair, ...], ...]
    samples: tuple[int, ...]
    coverage: int
    omega: float
    server_s: float


def best_value(case: Case) -> float:
    """The greatest J over all choices of all devices that cover, and over all lengths that hold them."""
    able = [pairs for pairs in case.frontiers if pairs]
    counted = [n for n, pairs in zip(case.samples, case.frontiers, strict=True) if pairs]
    shares = np.array(counted) / sum(counted)
    chosen = np.array(list(product(*(range(len(pairs)) for pairs in able))))
    depth, seconds, gain = (
        np.stack(
            [
                np.array([pair[what] for pair in pairs])[row]
                for pairs, row in zip(able, chosen.T, strict=True)
            ],
            1,
        )
        for what in range(3)
    )
    covered = np.ones(len(chosen), bool)
    for layer in range(1, case.layers + 1):
        could = sum(pairs[-1][0] >= layer for pairs in able)
        covered &= (depth >= layer).sum(axis=1) >= min(case.coverage, could)
    seconds, gain = seconds[covered], gain[covered]
    longest = seconds.max(axis=1)
    start = longest.min()
    lengths = np.unique([pair[1] for pairs in able for pair in pairs])
    length = np.where(lengths >= longest[:, None], lengths, np.nan)
    waiting = ((length[:, :, None] - seconds[:, None, :]) / length[:, :, None]).mean(axis=2)
    value = (start + case.server_s) / (length + case.server_s) * (gain @ shares)[
        :, None
    ] - case.omega * waiting
    return float(np.nanmax(value))


def random_case(random_: random.Random, devices: int, layers: int) -> Case:
    """Fleets of every kind: with equal times, equal devices, one device, devices that can do nothing, that
    can train so deep in two ways, and of which one has most of the samples."""
    kind = random_.choice(["spread", "ties", "alike", "some unable", "one rich", "two ways"])
    count, deep = random_.randint(1, devices), random_.randint(1, layers)
    utilities = random_.choice([[1.0] * deep, [random_.random() for _ in range(deep)]])
    penalty = random_.choice([0.0, 0.01])
    frontiers = [_frontier(random_, kind, utilities, penalty) for _ in range(count)]
    if kind == "alike":
        frontiers = [frontiers[0]] * count
    if kind == "some unable":
        frontiers = [() if i and random_.random() < 0.4 else pairs for i, pairs in enumerate(frontiers)]
        random_.shuffle(frontiers)
    samples = [random_.randint(1, 50) for _ in range(count)]
    if kind == "one rich":
        samples[0] = 10 ** random_.randint(3, 7)
    return Case(
        kind,
        deep,
        tuple(frontiers),
        tuple(samples),
        coverage=random_.randint(1, 4),
        omega=random_.choice([0.0, 0.1, 1.0]),
        server_s=random_.choice([0.0, 2.0]),
    )


def _frontier(
    random_: random.Random, kind: str, utilities: Sequence[float], penalty: float
) -> tuple[Pair, ...]:
    layers = len(utilities)
    most = (layers + 1) // 2 if kind == "two ways" else layers  # pairs are what every combination grows with
    depths = sorted(random_.sample(range(1, layers + 1), random_.randint(1, most)))
    if kind == "ties":
        times = sorted(random_.sample([0.5 * t for t in range(1, 10)], len(depths)))
    else:
        pace = 10 ** random_.uniform(-1, 1)
        times = sorted(pace * (0.1 + random_.random()) for _ in depths)
    pairs: list[Pair] = []
    for depth, seconds in zip(depths, times, strict=True):
        worth = sum(utilities[layers - depth :]) / sum(utilities)
        gain = worth * (1.0 - penalty * random_.randint(0, depth))
        quicker = (depth, 0.9 * seconds, 0.95 * gain)  # another way of training so deep
        for pair in (quicker, (depth, seconds, gain)) if kind == "two ways" else ((depth, seconds, gain),):
            if not pairs or (pair[2] > pairs[-1][2] and pair[1] > pairs[-1][1]):
                pairs.append(pair)
    return tuple(pairs)

"""The sweep against all combinations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product

import pytest

from aggregator.planner.costs import Pair, Situation, layer_gains
from aggregator.planner.sweep import Swept, coverage_time, default_coverage, sweep

Frontier = tuple[Pair, ...]


def a_pair(depth: int, seconds: float, quantized: int = 0) -> Pair:
    return Pair(depth, quantized, peak_mb=1.0, seconds=seconds, bytes_up=1, bytes_down=1)


def random_frontier(random_: random.Random, layers: int) -> Frontier:
    depths = sorted(random_.sample(range(1, layers + 1), random_.randint(1, layers)))
    # few distinct times, so that devices tie
    times = sorted(random_.sample([0.5 * t for t in range(1, 20)], len(depths)))
    return tuple(a_pair(d, t, random_.randint(0, d)) for d, t in zip(depths, times, strict=True))


def covers(chosen: Sequence[Pair], frontiers: Sequence[Frontier], layers: int, coverage: int) -> bool:
    for depth in range(1, layers + 1):
        able = sum(pairs[-1].depth >= depth for pairs in frontiers)
        if sum(pair.depth >= depth for pair in chosen) < min(coverage, able):
            return False
    return True


def brute_force(
    frontiers: Sequence[Frontier],
    samples: Sequence[int],
    situation: Situation,
    *,
    coverage: int,
    omega: float,
    server_s: float,
) -> float:
    start = min(
        (
            t
            for t in sorted({p.seconds for pairs in frontiers for p in pairs})
            if any(
                covers(chosen, frontiers, situation.layers, coverage)
                for chosen in product(*([p for p in pairs if p.seconds <= t] for pairs in frontiers))
            )
        ),
    )
    best = float("-inf")
    for chosen in product(*frontiers):
        if not covers(chosen, frontiers, situation.layers, coverage):
            continue
        reward = sum(
            n / sum(samples) * situation.gain(p.depth, p.quantized)
            for n, p in zip(samples, chosen, strict=True)
        )
        for target in {p.seconds for pairs in frontiers for p in pairs}:
            if target >= max(p.seconds for p in chosen):
                waiting = sum((target - p.seconds) / target for p in chosen) / len(chosen)
                best = max(best, (start + server_s) / (target + server_s) * reward - omega * waiting)
    return best


def test_the_sweep_finds_the_best_of_all_combinations() -> None:
    random_ = random.Random(11)
    for case in range(1500):
        layers, devices = random_.randint(1, 4), random_.randint(1, 3)
        frontiers = [random_frontier(random_, layers) for _ in range(devices)]
        samples = [random_.randint(1, 50) for _ in range(devices)]
        utilities = random_.choice([None, [random_.uniform(0, 1) for _ in range(layers)]])
        situation = Situation(layers, layer_gains(layers, utilities))
        terms = {
            "coverage": random_.randint(1, 3),
            "omega": random_.choice([0.0, 0.1, 1.0]),
            "server_s": random_.choice([0.0, 2.0]),
        }
        swept = sweep(frontiers, samples, situation, **terms)
        assert swept.value == pytest.approx(brute_force(frontiers, samples, situation, **terms), abs=1e-9), (
            case
        )
        assert covers(swept.pairs, frontiers, layers, terms["coverage"])
        assert all(p in pairs for p, pairs in zip(swept.pairs, frontiers, strict=True))
        assert max(p.seconds for p in swept.pairs) <= swept.target_s
        assert swept.target_s >= coverage_time(frontiers, layers, terms["coverage"])


def swept_two(**changed: object) -> Swept:
    fast = tuple(a_pair(d, 1.0 + 0.2 * d) for d in range(1, 7))
    slow = tuple(a_pair(d, 4.0 + 8.0 * d) for d in range(1, 7))
    situation = Situation(6, layer_gains(6, None))
    terms: dict[str, object] = {"coverage": 1, "omega": 0.1, "server_s": 2.0, **changed}
    return sweep([fast, slow], [100, 100], situation, **terms)  # type: ignore[arg-type]


def test_a_slow_device_does_not_hold_the_round() -> None:
    fast, slow = swept_two().pairs
    assert fast.depth == 6
    assert slow.depth < 6


def test_coverage_may_ask_more_of_it() -> None:
    assert [pair.depth for pair in swept_two(coverage=2).pairs] == [6, 6]


def test_depths_are_kept_while_little_is_lost() -> None:
    best = swept_two()
    other = best.pairs[1].depth + 1
    kept = swept_two(previous={0: 6, 1: other}, hysteresis=0.9)
    assert [pair.depth for pair in kept.pairs] == [6, other]
    assert kept.value < best.value
    assert swept_two(previous={0: 6, 1: other}, hysteresis=1e-6) == best


def test_a_round_that_does_not_fit_or_cover_any_more_is_not_kept() -> None:
    best = swept_two()
    assert swept_two(previous={0: 7, 1: best.pairs[1].depth}, hysteresis=0.9) == best
    assert swept_two(previous={0: 5, 1: 1}, hysteresis=0.9) == best
    assert swept_two(previous={0: 6}, hysteresis=0.9) == best


def test_small_fleets_are_not_held_to_full_depth() -> None:
    assert [default_coverage(n) for n in (1, 3, 7, 8, 12, 1000)] == [1, 1, 1, 2, 3, 3]

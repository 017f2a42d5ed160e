"""The sweep against all combinations."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from aggregator.planner.frontiers import Frontiers
from aggregator.planner.sweep import Objective, Swept, default_coverage, reference_round, sweep
from benchmarks.planner.brute import Case, Pair, best_value, random_case


def arrays(frontiers: Sequence[Sequence[Pair]]) -> Frontiers:
    flat = [pair for pairs in frontiers for pair in pairs]
    return Frontiers(
        offsets=np.cumsum([0, *map(len, frontiers)]),
        depth=np.array([depth for depth, _, _ in flat]),
        seconds=np.array([seconds for _, seconds, _ in flat]),
        gain=np.array([gain for _, _, gain in flat]),
    )


def objective(case: Case) -> Objective:
    return Objective.of(
        arrays(case.frontiers), case.samples, case.layers,
        coverage=case.coverage, omega=case.omega, server_s=case.server_s,
    )  # fmt: skip


def test_the_sweep_finds_the_best_of_all_combinations() -> None:
    random_ = random.Random(11)
    for number in range(1000):
        case = random_case(random_, devices=4 if number % 10 else 5, layers=4 if number % 10 else 6)
        j = objective(case)
        swept = sweep(j)
        assert swept.value == pytest.approx(best_value(case), abs=1e-9), case
        assert j.covers(swept.chosen)
        for index, pairs, offset in zip(swept.chosen, case.frontiers, j.frontiers.offsets, strict=False):
            assert (index == -1) == (not pairs)
            assert not pairs or 0 <= index - offset < len(pairs)
        taken = swept.chosen[swept.chosen >= 0]
        assert j.frontiers.seconds[taken].max() <= swept.target_s
        assert swept.target_s >= j.start_s
        assert swept.value >= reference_round(j).value - 1e-12


FAST = tuple((d, 1.0 + 0.2 * d, d / 6) for d in range(1, 7))
SLOW = tuple((d, 4.0 + 8.0 * d, d / 6) for d in range(1, 7))


def swept_two(
    previous: Sequence[int] | None = None,
    hysteresis: float = 0.0,
    coverage: int = 1,
    more: Sequence[Pair] = (),
) -> tuple[Swept, list[int]]:
    """A fast and a slow device: the round, and their depths."""
    frontiers = [FAST, SLOW, *([tuple(more)] if more else [])]
    j = objective(Case("two", 6, tuple(frontiers), (100,) * len(frontiers), coverage, 0.1, 2.0))
    swept = sweep(j, hysteresis=hysteresis, previous=None if previous is None else np.array(previous))
    return swept, j.frontiers.depth[swept.chosen].tolist()


def test_a_slow_device_does_not_hold_the_round() -> None:
    _, (fast, slow) = swept_two()
    assert fast == 6
    assert slow < 6


def test_coverage_may_ask_more_of_it() -> None:
    assert swept_two(coverage=2)[1] == [6, 6]


def test_depths_are_kept_while_little_is_lost() -> None:
    best, (_, slow) = swept_two()
    kept, depths = swept_two([6, slow + 1], hysteresis=0.9)
    assert depths == [6, slow + 1]
    assert kept.value < best.value
    assert swept_two([6, slow + 1], hysteresis=1e-6)[0].target_s == best.target_s


def test_a_round_that_does_not_cover_any_more_is_not_kept() -> None:
    best, _ = swept_two()
    assert swept_two([5, 1], hysteresis=0.9)[0].target_s == best.target_s
    assert swept_two([-1, -1], hysteresis=0.9)[0].target_s == best.target_s


def test_who_joins_or_lost_memory_is_no_reason_for_the_others_to_change() -> None:
    _, (_, slow) = swept_two()
    newcomer = [(d, 2.0 + 1.0 * d, d / 6) for d in range(1, 4)]
    assert swept_two([6, slow + 1, -1], hysteresis=0.9, more=newcomer)[1] == [6, slow + 1, 3]
    # it trained 5 layers in the round before
    assert swept_two([6, slow + 1, 5], hysteresis=0.9, more=newcomer)[1] == [6, slow + 1, 3]


def test_devices_that_can_do_nothing_take_no_part_and_weigh_nothing() -> None:
    both = objective(Case("", 6, (FAST, SLOW), (100, 100), 1, 0.1, 2.0))
    idle = objective(Case("", 6, ((), FAST, (), SLOW, ()), (7, 100, 10**6, 100, 7), 1, 0.1, 2.0))
    alone, among = sweep(both), sweep(idle)
    assert among.value == pytest.approx(alone.value)
    assert (among.chosen >= 0).tolist() == [False, True, False, True, False]
    with pytest.raises(ValueError, match="no device"):
        objective(Case("", 6, ((), ()), (1, 1), 1, 0.1, 2.0))


def test_small_fleets_are_not_held_to_full_depth() -> None:
    assert [default_coverage(n) for n in (1, 3, 7, 8, 12, 1000)] == [1, 1, 1, 2, 3, 3]


def test_reference_times_come_within_a_few_per_cent_of_the_sweep() -> None:
    random_, short = random.Random(3), []
    for _ in range(150):
        devices, layers, spread = (
            random_.choice([1, 3, 10, 40]),
            random_.choice([6, 12, 24]),
            random_.choice([0.3, 1.0]),
        )
        frontiers = [linear_frontier(random_, layers, spread) for _ in range(devices)]
        samples = tuple(random_.randint(20, 500) for _ in range(devices))
        j = objective(Case("linear", layers, tuple(frontiers), samples, default_coverage(devices), 0.1, 2.0))
        best, referred = sweep(j), reference_round(j)
        assert j.covers(referred.chosen)
        short.append((best.value - referred.value) / abs(best.value))
    assert min(short) >= -1e-12
    assert np.mean(short) < 0.01
    assert np.quantile(short, 0.95) < 0.04


def test_a_bound_on_waiting_is_met_where_it_can_be() -> None:
    random_ = random.Random(4)
    for _ in range(30):
        frontiers = tuple(linear_frontier(random_, 12, 0.6) for _ in range(10))
        j = objective(Case("linear", 12, frontiers, (100,) * 10, 2, 0.1, 2.0))
        free, bound = reference_round(j), reference_round(j, waiting=0.1)
        longest = j.round(max(pairs[-1][1] for pairs in frontiers))
        assert bound.value <= free.value
        if min(j.waiting(free), j.waiting(longest)) <= 0.1:
            assert j.waiting(bound) <= 0.1


def linear_frontier(random_: random.Random, layers: int, spread: float) -> tuple[Pair, ...]:
    """As devices have them: of one pace and one link, with quantized layers where memory ends."""
    pace, link = 10 * math.exp(random_.gauss(0, spread)), random_.choice([0.0, random_.uniform(0, 3)])
    top = random_.choice([layers, layers, random_.randint(1, layers)])
    plain = random_.randint(0, top)
    return tuple(
        (
            d,
            pace * (0.03 * layers + 0.036 * d + 0.02 * max(0, d - plain)) + link * (0.1 + d / layers),
            d / layers,
        )
        for d in range(1, top + 1)
    )

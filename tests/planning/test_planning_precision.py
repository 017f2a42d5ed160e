"""Bits per block under a byte budget: as good as trying every plan."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import MechanismError
from edge_sdk.planning.precision import BlockCosts, Option, allocate, greedy, held_bytes, objective

BITS = (16, 8, 4, 2)


def blocks_of(saliences, errors, sizes):
    return [
        BlockCosts(s, tuple(Option(b, size * b, e) for b, e in zip(BITS, sorted(each), strict=True)))
        for s, each, size in zip(saliences, errors, sizes, strict=True)
    ]


def exhaustive(blocks, budget):
    plans = itertools.product(*(block.options for block in blocks))
    fitting = [plan for plan in plans if sum(option.bytes for option in plan) <= budget]
    return min((objective(blocks, plan) for plan in fitting), default=None)


cost = st.floats(0, 100, allow_nan=False)


@st.composite
def instances(draw):
    count = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, 50), min_size=count, max_size=count))
    saliences = draw(st.lists(cost, min_size=count, max_size=count))
    errors = draw(st.lists(st.tuples(cost, cost, cost, cost), min_size=count, max_size=count))
    blocks = blocks_of(saliences, errors, sizes)
    return blocks, draw(st.integers(2 * sum(sizes), 17 * sum(sizes)))


@settings(max_examples=120, deadline=None)
@given(instances())
def test_up_to_six_blocks_no_plan_is_better(instance):
    blocks, budget = instance
    chosen = allocate(blocks, budget)
    assert sum(option.bytes for option in chosen) <= budget
    assert objective(blocks, chosen) == pytest.approx(exhaustive(blocks, budget), rel=1e-12, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(instances())
def test_greedy_alone_fits_and_is_never_better(instance):
    blocks, budget = instance
    rough = greedy(blocks, budget)
    assert sum(option.bytes for option in rough) <= budget
    assert objective(blocks, rough) >= objective(blocks, allocate(blocks, budget)) - 1e-12


def test_greedy_alone_may_miss_the_best():
    # the cheap step first leaves no use for the room that it makes
    blocks = [
        BlockCosts(1.0, (Option(16, 10, 0.0), Option(8, 4, 1.0))),
        BlockCosts(1.0, (Option(16, 30, 0.0), Option(8, 10, 4.0))),
    ]
    assert objective(blocks, greedy(blocks, 20)) == 5.0
    assert objective(blocks, allocate(blocks, 20)) == 4.0


def test_a_budget_below_the_least_names_it():
    blocks = blocks_of([1.0, 1.0], [(0, 1, 2, 3)] * 2, [1_000_000, 500_000])
    with pytest.raises(MechanismError, match=r"below the 3000000 \(3\.0 MB\).*2 bits"):
        allocate(blocks, 2_999_999)
    assert [option.bits for option in allocate(blocks, 3_000_000)] == [2, 2]


def test_with_room_for_all_every_block_keeps_sixteen_bits():
    blocks = blocks_of([0.0, 1.0], [(0, 1, 2, 3)] * 2, [5, 5])
    assert [option.bits for option in allocate(blocks, 160)] == [16, 16]


@pytest.mark.parametrize("alike", [True, False])
def test_eighty_blocks_are_planned_no_worse_than_greedily(alike):
    draw = random.Random(3)
    sizes = [1000 if alike else draw.randrange(900, 1100) for _ in range(80)]
    errors = [tuple(draw.random() * 4.0**-k for k in (6, 4, 2, 1)) for _ in sizes]
    blocks = blocks_of([draw.random() for _ in sizes], errors, sizes)
    budget = 5 * sum(sizes)
    chosen = allocate(blocks, budget)
    assert sum(option.bytes for option in chosen) <= budget
    assert objective(blocks, chosen) <= objective(blocks, greedy(blocks, budget))


def test_more_budget_never_costs():
    draw = random.Random(5)
    blocks = blocks_of([draw.random() for _ in range(6)], [(0, 0.01, 0.1, 1)] * 6, [7, 9, 7, 8, 7, 9])
    found = [objective(blocks, allocate(blocks, budget)) for budget in range(94, 760, 13)]
    assert found == sorted(found, reverse=True)


def test_bytes_of_a_weight():
    # (100, 96): two blocks of 64 a row
    assert held_bytes("fp32", 100, 96) == 38400 and held_bytes("bf16", 100, 96) == 19200
    assert held_bytes("int8", 100, 96) == 100 * (128 + 4)
    assert held_bytes("nf4", 100, 96) == 100 * (64 + 4)
    assert held_bytes("int2", 100, 96) == 100 * (32 + 4 + 4)

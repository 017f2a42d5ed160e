"""The rules beside the mean, each against dense arithmetic on the product BA."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_cases import A, B, adapter, contribute, fleet, mean_product, product
from updates_fakes import LORA, SHAPE, moved

from aggregator.merging.layer_mean import LayerMean
from aggregator.merging.product_svd import ProductSvd
from aggregator.merging.products import ProductSum
from aggregator.merging.rank_one import RankOne
from aggregator.merging.stacking import Stacking
from aggregator.merging.streaming import merge_adapter
from aggregator.methods.merging import find_rule
from edge_sdk.errors import ConfigError, ContainerError
from edge_sdk.updates.initial import initial_adapter, initial_slots

RULES = [LayerMean(), RankOne(), ProductSvd(), Stacking()]


def fresh(key, size):
    return initial_slots(key, size, 0, 1)


def merged(rule, current, made, **how):
    return merge_adapter(rule, current, made, fresh if rule.reinit != "none" else None, **how)


# In any order, twice, in blocks of any size


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_no_rule_looks_at_the_order_of_arrival_or_at_the_size_of_blocks(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fleet")
    rule = data.draw(st.sampled_from(RULES))
    current = initial_adapter(SHAPE, LORA, 0)
    made = []
    for number in range(data.draw(st.integers(1, 5))):
        changes = moved({key: np.zeros_like(rows) for key, rows in current.items()}, current, number)
        made.append(contribute(folder, changes, f"d{number}", data.draw(st.integers(1, 99)), codec="int8"))
    one = merged(rule, current, made)
    other = merged(
        rule, current, data.draw(st.permutations(made)), block_bytes=data.draw(st.sampled_from([1, 9999]))
    )
    assert one.keys() == other.keys()
    for key, rows in one.items():
        assert rows.tobytes() == other[key].tobytes()
    with pytest.raises(ContainerError, match="would both count"):
        merged(rule, current, [*made, made[0]])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_nobody_came_and_nothing_changes(rule):
    current = adapter()
    assert {key: rows.tobytes() for key, rows in merged(rule, current, []).items()} == {
        key: rows.tobytes() for key, rows in current.items()
    }


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_updates_of_no_weight_change_nothing_that_is_computed(rule, tmp_path):
    current = adapter(b=rule.reinit == "none")
    before = product(current)
    after = merged(rule, current, fleet(tmp_path, current, weight=0.0))
    np.testing.assert_allclose(product(after), before, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_is_found_by_its_name(rule):
    assert type(find_rule(rule.name)) is type(rule)


def test_a_rule_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(
        ConfigError, match="there is no 'layer-men'; there are layer-mean, product-svd"
    ) as error:
        find_rule("layer-men")
    assert "did you mean 'layer-mean'" in error.value.hint


# Rank-1


def test_a_pair_is_averaged_over_those_who_trained_it_and_no_zeros_dilute_it(tmp_path):
    current = adapter(rank=4)
    rows = {"x": (0, 1), "y": (1, 3)}
    made = [
        contribute(
            tmp_path, {A: np.full((2, 7), value, np.float32), B: np.full((2, 5), value, np.float32)},
            device, samples, slots=rows[device],
        )
        for device, samples, value in (("x", 30, 1.0), ("y", 10, 5.0))
    ]  # fmt: skip
    after = merge_adapter(RankOne(), current, made)
    for key in (A, B):
        change = (after[key] - current[key]).mean(axis=1)
        np.testing.assert_allclose(change, [1.0, 2.0, 0.0, 5.0], atol=1e-6)
        assert after[key][2].tobytes() == current[key][2].tobytes()


def test_all_pairs_by_all_devices_is_the_mean_to_the_bit(tmp_path):
    current = adapter()
    made = fleet(tmp_path, current)
    one, other = merge_adapter(RankOne(), current, made), merge_adapter(LayerMean(), current, made)
    assert all(one[key].tobytes() == other[key].tobytes() for key in current)


def test_a_pair_is_trained_whole_or_by_one_factor_alone(tmp_path):
    current = adapter(rank=2)
    merge_adapter(
        RankOne(), current, [contribute(tmp_path, {A: np.ones((1, 7), np.float32)}, "x", slots=(0,))]
    )
    rows = {A: np.ones((1, 7), np.float32), B: np.ones((1, 5), np.float32)}
    made = contribute(tmp_path, rows, "y", slots={A: (0,), B: (1,)})
    with pytest.raises(ContainerError, match=r"holds the slots \(0,\), its B \(1,\)"):
        merge_adapter(RankOne(), current, [made])


# Product-space SVD


@pytest.mark.parametrize("devices", [1, 4, 40], ids=["stacked", "some", "dense"])
def test_the_best_approximation_of_the_mean_product(tmp_path, devices):
    current = adapter(rank=3, inputs=9, outputs=6)
    made = fleet(tmp_path, current, devices)
    dense = mean_product(current, made)
    u, values, v = np.linalg.svd(dense)
    best = (u[:, :3] * values[:3]) @ v[:3]
    after = merge_adapter(ProductSvd(), current, made)
    np.testing.assert_allclose(product(after), best, atol=1e-5 * values[0])
    np.testing.assert_allclose(np.linalg.norm(after[A], axis=1), np.linalg.norm(after[B], axis=1), rtol=1e-5)


def test_at_full_rank_it_is_the_mean_product_itself(tmp_path):
    current = adapter(rank=5, inputs=7, outputs=5)
    made = fleet(tmp_path, current, 6)
    np.testing.assert_allclose(
        product(merge_adapter(ProductSvd(), current, made)), mean_product(current, made), atol=1e-5
    )


def test_what_no_device_filled_can_still_be_trained(tmp_path):
    """B is zero at first: a slot of zeros on both sides would never get a gradient."""
    current = adapter(b=False)
    one = {A: np.zeros_like(current[A]), B: np.zeros_like(current[B])}
    one[B][0] = 1.0
    after = merge_adapter(ProductSvd(), current, [contribute(tmp_path, one, "x")])
    np.testing.assert_allclose(product(after), one[B].T @ current[A], atol=1e-6)
    assert (np.abs(after[A]).sum(axis=1) > 0).all()
    assert (after[B][1:] == 0).all()


def test_a_sum_of_products_takes_no_more_room_than_the_dense_matrix():
    total = ProductSum(8, 6)
    draw = np.random.default_rng(0)
    dense = np.zeros((6, 8))
    for _ in range(50):
        a, b = draw.normal(size=(2, 8)), draw.normal(size=(2, 6))
        total.add(a, b, 2.0)
        dense += 2.0 * b.T @ a
        assert sum(rows.size for rows in [*total._a, *total._b]) <= 48
    a, b, values = total.factors(0.5, 6)
    np.testing.assert_allclose((b * values[:, None]).T @ a, 0.5 * dense, atol=1e-9)
    assert (b[np.arange(6), np.abs(b).argmax(axis=1)] > 0).all()


BITS = """
import sys, hashlib
sys.path[:0] = sys.argv[1:]
from pathlib import Path
import tempfile
from merging_cases import adapter, fleet
from aggregator.merging.product_svd import ProductSvd
from aggregator.merging.streaming import merge_adapter
current = adapter(rank=8, inputs=64, outputs=48)
after = merge_adapter(ProductSvd(), current, fleet(Path(tempfile.mkdtemp()), current, 40))
print(hashlib.sha256(b"".join(after[key].tobytes() for key in sorted(after))).hexdigest())
"""


def test_the_svd_gives_the_same_bytes_in_another_process(tmp_path):
    words = [sys.executable, "-c", BITS, *[path for path in sys.path if "tests" in path]]
    there = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    current = adapter(rank=8, inputs=64, outputs=48)
    after = merge_adapter(ProductSvd(), current, fleet(tmp_path, current, 40))
    assert hashlib.sha256(b"".join(after[key].tobytes() for key in sorted(after))).hexdigest() == there


# Stacking


def test_the_sum_is_exact_in_the_fold_and_the_slots_begin_anew(tmp_path):
    current = adapter(rank=2, inputs=9, outputs=8, b=False)
    made = fleet(tmp_path, current, 3)
    after = merged(Stacking(), current, made)
    np.testing.assert_allclose(product(after, "fold."), mean_product(current, made), atol=1e-5)
    assert after["fold." + A].shape == (6, 9)
    assert not after[B].any() and after[A].tobytes() == fresh(A, (2, 9)).tobytes()


def test_folds_add_up_over_rounds_and_never_outgrow_their_module(tmp_path):
    current = adapter(rank=2, inputs=9, outputs=5, b=False)
    whole = np.zeros((5, 9))
    for round in range(1, 4):
        made = fleet(tmp_path, {key: current[key] for key in (A, B)}, 2, seed=round, round=round)
        whole += mean_product({key: current[key] for key in (A, B)}, made)
        current = merged(Stacking(), current, made)
        np.testing.assert_allclose(product(current, "fold."), whole, atol=1e-4)
        assert current["fold." + B].shape[0] <= 5


def test_stacking_needs_both_factors(tmp_path):
    current = adapter(b=False)
    made = contribute(tmp_path, {B: np.ones((3, 5), np.float32)}, "x")
    with pytest.raises(ContainerError, match="without its other factor"):
        merged(Stacking(), current, [made])

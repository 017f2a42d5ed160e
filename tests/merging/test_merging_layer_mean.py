"""The per-layer mean against dense arithmetic, in any order, to the bit."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from updates_fakes import FINGERPRINT, LORA, SHAPE, moved

from aggregator.merging.base import Contribution
from aggregator.merging.layer_mean import LayerMean
from aggregator.merging.streaming import merge_adapter
from edge_sdk.errors import ContainerError
from edge_sdk.updates.container import header_for, read_container, write_container
from edge_sdk.updates.delta import write_update
from edge_sdk.updates.initial import initial_adapter
from edge_sdk.updates.keys import all_keys, tuned_keys


def contribute(folder, start, device, depth, samples, *, codec="int8", weight=1.0, seed=None):
    keys = tuned_keys(SHAPE, depth)
    end = moved(start, keys, seed=hash_of(device) if seed is None else seed)
    path = folder / device
    write_update(
        path, run="r", round=1, fingerprint=FINGERPRINT, builds_on=0, start=start, end=end, keys=keys,
        codec=codec, residual=None,
    )  # fmt: skip
    return Contribution(path=path, device=device, samples=samples, weight=weight)


def hash_of(device):
    return sum(map(ord, device))


def deltas(contribution):
    with read_container(contribution.path, "update") as container:
        return {key: container.tensor(key) for key in container.parts}


@pytest.fixture
def start():
    return initial_adapter(SHAPE, LORA, 0)


def test_ragged_depths_are_averaged_over_those_who_trained_the_layer(tmp_path, start):
    made = [
        contribute(tmp_path, start, "a", 1, 100),
        contribute(tmp_path, start, "b", 2, 300),
        contribute(tmp_path, start, "c", 2, 50, weight=2.0),
    ]
    before = {key: rows.copy() for key, rows in start.items()}
    merged = merge_adapter(LayerMean(), start, made)
    sent = {one.device: deltas(one) for one in made}
    for key, rows in merged.items():
        np.testing.assert_array_equal(start[key], before[key])
        holders = [one for one in made if key in sent[one.device]]
        if not holders:
            np.testing.assert_array_equal(rows, start[key])
            continue
        weights = [one.samples * one.weight for one in holders]
        mean = np.average([sent[one.device][key] for one in holders], axis=0, weights=weights)
        np.testing.assert_allclose(rows, start[key] + mean, rtol=0, atol=1e-7)
    assert any(key.startswith("0.") for key in merged)


def test_equal_depths_are_fedavg(tmp_path, start):
    made = [contribute(tmp_path, start, name, 3, n, codec="fp32") for name, n in (("a", 10), ("b", 30))]
    merged = merge_adapter(LayerMean(), start, made)
    ends = [moved(start, all_keys(SHAPE), hash_of(name)) for name in ("a", "b")]
    for key, rows in merged.items():
        np.testing.assert_allclose(rows, 0.25 * ends[0][key] + 0.75 * ends[1][key], atol=1e-6)


def test_the_order_of_arrival_changes_no_bit(tmp_path, start):
    made = [contribute(tmp_path, start, f"d{i}", 1 + i % 3, 7 + i) for i in range(7)]
    first = merge_adapter(LayerMean(), start, made)
    for seed in range(5):
        shuffled = made[:]
        random.Random(seed).shuffle(shuffled)
        again = merge_adapter(LayerMean(), start, shuffled)
        for key, rows in first.items():
            assert rows.tobytes() == again[key].tobytes()


def test_nobody_came_and_nothing_changes(start):
    merged = merge_adapter(LayerMean(), start, [])
    for key, rows in merged.items():
        np.testing.assert_array_equal(rows, start[key])


def test_slots_are_averaged_over_those_who_trained_the_slot(tmp_path, start):
    key = "2.output.dense.A"
    made = []
    for device, slots, value in (("a", (0, 2), 1.0), ("b", (2, 3), 3.0)):
        rows = {key: np.full((2, 32), value, np.float32)}
        header = header_for("update", rows, "fp32", run="r", round=1, fingerprint=FINGERPRINT, builds_on=0)
        part = msgspec.structs.replace(header.parts[0], slots=slots)
        write_container(tmp_path / device, msgspec.structs.replace(header, parts=(part,)), rows)
        made.append(Contribution(tmp_path / device, device, samples=10))
    change = merge_adapter(LayerMean(), start, made)[key] - start[key]
    np.testing.assert_allclose(change.mean(axis=1), [1.0, 0.0, 2.0, 3.0], atol=1e-6)


def test_a_part_that_the_adapter_has_not_is_refused(tmp_path, start):
    rows = {"7.output.dense.A": np.ones((4, 32), np.float32)}
    header = header_for("update", rows, "fp32", run="r", round=1, fingerprint=FINGERPRINT, builds_on=0)
    write_container(tmp_path / "x", header, rows)
    with pytest.raises(ContainerError, match="x has a part"):
        merge_adapter(LayerMean(), start, [Contribution(tmp_path / "x", "x", 1)])


def one_part(
    path, key, values, *, device="a", round=1, slots=None, samples=10, weight=1.0, fingerprint=FINGERPRINT
):
    rows = {key: np.asarray(values, np.float32)}
    header = header_for("update", rows, "fp32", run="r", round=round, fingerprint=fingerprint, builds_on=0)
    if slots is not None:
        part = msgspec.structs.replace(header.parts[0], slots=slots)
        header = msgspec.structs.replace(header, parts=(part,))
    write_container(path, header, rows)
    return Contribution(path, device, samples, weight)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_fleet_in_any_order_is_the_weighted_mean_of_each_row(tmp_path_factory, data):
    """An oracle that fills a dense table of every device and row, against the merge, to the last bits."""
    folder = tmp_path_factory.mktemp("fleet")
    key, rank, width = "0.m.A", 4, 3
    current = {key: np.linspace(-1, 1, rank * width, dtype=np.float32).reshape(rank, width)}
    table = np.zeros((rank, width))
    weights = np.zeros(rank)
    made = []
    for number in range(data.draw(st.integers(1, 5))):
        slots = data.draw(
            st.none() | st.sets(st.integers(0, rank - 1), min_size=1).map(lambda s: tuple(sorted(s)))
        )
        samples, weight = data.draw(st.integers(1, 1000)), data.draw(st.sampled_from([0.0, 0.25, 1.0]))
        held = list(range(rank)) if slots is None else list(slots)
        values = np.random.default_rng(number).normal(size=(len(held), width)).astype(np.float32)
        for slot, row in zip(held, values, strict=True):
            table[slot] += samples * weight * row.astype(np.float64)
            weights[slot] += samples * weight
        made.append(
            one_part(
                folder / str(number),
                key,
                values,
                device=f"d{number}",
                slots=slots,
                samples=samples,
                weight=weight,
            )
        )
    merged = merge_adapter(LayerMean(), current, made)[key]
    for slot in range(rank):
        if weights[slot] == 0:
            assert merged[slot].tobytes() == current[key][slot].tobytes()
        else:
            want = current[key][slot] + table[slot] / weights[slot]
            np.testing.assert_allclose(merged[slot], want, rtol=0, atol=3e-7)
    shuffled = data.draw(st.permutations(made))
    assert merge_adapter(LayerMean(), current, shuffled)[key].tobytes() == merged.tobytes()


def test_a_row_that_nobody_trained_keeps_its_bits(tmp_path):
    current = {"0.m.A": np.full((2, 3), -0.0, np.float32)}
    made = [one_part(tmp_path / "a", "0.m.A", [[1, 1, 1]], slots=(1,))]
    merged = merge_adapter(LayerMean(), current, made)["0.m.A"]
    assert merged[0].tobytes() == current["0.m.A"][0].tobytes()


def test_a_late_update_counts_beside_the_devices_newer_one_in_any_order(tmp_path):
    current = {"0.m.A": np.zeros((1, 3), np.float32)}
    late = one_part(tmp_path / "late", "0.m.A", [[1, 1, 1]], round=1, weight=0.5)
    new = one_part(tmp_path / "new", "0.m.A", [[4, 4, 4]], round=2)
    one = merge_adapter(LayerMean(), current, [late, new])["0.m.A"]
    np.testing.assert_allclose(one, 3.0)
    assert one.tobytes() == merge_adapter(LayerMean(), current, [new, late])["0.m.A"].tobytes()


def test_no_update_counts_twice(tmp_path):
    current = {"0.m.A": np.zeros((1, 3), np.float32)}
    made = one_part(tmp_path / "a", "0.m.A", [[1, 1, 1]])
    with pytest.raises(ContainerError, match="two updates of a for round 1"):
        merge_adapter(LayerMean(), current, [made, made])


def test_updates_of_other_fingerprints_are_not_mixed(tmp_path):
    current = {"0.m.A": np.zeros((1, 3), np.float32)}
    made = [
        one_part(tmp_path / "a", "0.m.A", [[1, 1, 1]], device="a"),
        one_part(tmp_path / "b", "0.m.A", [[1, 1, 1]], device="b", fingerprint="cd" * 32),
    ]
    with pytest.raises(ContainerError, match="2 different fingerprints"):
        merge_adapter(LayerMean(), current, made)


@pytest.mark.parametrize(
    ("values", "slots"),
    [([[1, 1, 1]], None), ([[1, 1]] * 2, None), ([[1, 1, 1]], (2,)), ([[1, 1, 1]] * 3, None)],
)
def test_parts_of_another_size_are_refused_and_never_broadcast(tmp_path, values, slots):
    current = {"0.m.A": np.zeros((2, 3), np.float32)}
    with pytest.raises(ContainerError, match=r"a part '0\.m\.A'"):
        merge_adapter(LayerMean(), current, [one_part(tmp_path / "a", "0.m.A", values, slots=slots)])


@pytest.mark.parametrize(
    ("samples", "weight"), [(0, 1.0), (-5, 1.0), (5, -1.0), (5, float("nan")), (5, float("inf"))]
)
def test_a_weight_that_makes_no_mean_is_refused(tmp_path, samples, weight):
    with pytest.raises(ContainerError, match="cannot count"):
        Contribution(tmp_path / "a", "a", samples, weight)


def test_a_damaged_update_is_told_and_nothing_is_merged(tmp_path, start):
    made = [contribute(tmp_path, start, "a", 1, 10), contribute(tmp_path, start, "b", 1, 10)]
    data = made[1].path.read_bytes()
    made[1].path.write_bytes(data[:-1])
    with pytest.raises(ContainerError, match="b is no container"):
        merge_adapter(LayerMean(), start, made)


def test_the_mean_of_factors_is_what_it_says_and_not_the_mean_of_products(tmp_path):
    """A and B are averaged apart: the product that comes out differs from the mean product, by this much."""
    current = {"0.m.A": np.zeros((1, 2), np.float32), "0.m.B": np.zeros((1, 2), np.float32)}
    ends = {"a": ([[1.0, 0.0]], [[1.0, 0.0]]), "b": ([[0.0, 1.0]], [[0.0, 1.0]])}
    made = []
    for device, (a, b) in ends.items():
        rows = {"0.m.A": np.asarray(a, np.float32), "0.m.B": np.asarray(b, np.float32)}
        header = header_for("update", rows, "fp32", run="r", round=1, fingerprint=FINGERPRINT, builds_on=0)
        write_container(tmp_path / device, header, rows)
        made.append(Contribution(tmp_path / device, device, 10))
    merged = merge_adapter(LayerMean(), current, made)
    product = merged["0.m.B"].T @ merged["0.m.A"]
    mean_product = sum(np.asarray(b).T @ np.asarray(a) for a, b in ends.values()) / 2
    np.testing.assert_allclose(product, np.full((2, 2), 0.25))
    np.testing.assert_allclose(mean_product, np.eye(2) / 2)

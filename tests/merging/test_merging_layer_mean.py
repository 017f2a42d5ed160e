"""The per-layer mean against dense arithmetic, in any order, to the bit."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest
from updates_fakes import FINGERPRINT, LORA, SHAPE, moved

from aggregator.merging.base import Contribution
from aggregator.merging.layer_mean import LayerMean
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
    merged = LayerMean().merge(start, made)
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
    merged = LayerMean().merge(start, made)
    ends = [moved(start, all_keys(SHAPE), hash_of(name)) for name in ("a", "b")]
    for key, rows in merged.items():
        np.testing.assert_allclose(rows, 0.25 * ends[0][key] + 0.75 * ends[1][key], atol=1e-6)


def test_the_order_of_arrival_changes_no_bit(tmp_path, start):
    made = [contribute(tmp_path, start, f"d{i}", 1 + i % 3, 7 + i) for i in range(7)]
    first = LayerMean().merge(start, made)
    for seed in range(5):
        shuffled = made[:]
        random.Random(seed).shuffle(shuffled)
        again = LayerMean().merge(start, shuffled)
        for key, rows in first.items():
            assert rows.tobytes() == again[key].tobytes()


def test_nobody_came_and_nothing_changes(start):
    merged = LayerMean().merge(start, [])
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
    change = LayerMean().merge(start, made)[key] - start[key]
    np.testing.assert_allclose(change.mean(axis=1), [1.0, 0.0, 2.0, 3.0], atol=1e-6)


def test_a_part_that_the_adapter_has_not_is_refused(tmp_path, start):
    rows = {"7.output.dense.A": np.ones((4, 32), np.float32)}
    header = header_for("update", rows, "fp32", run="r", round=1, fingerprint=FINGERPRINT, builds_on=0)
    write_container(tmp_path / "x", header, rows)
    with pytest.raises(ContainerError, match="x has a part"):
        LayerMean().merge(start, [Contribution(tmp_path / "x", "x", 1)])

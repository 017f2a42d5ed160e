"""Deltas, error feedback, what is owed, version chains."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from updates_fakes import FINGERPRINT, LORA, SHAPE, moved

from edge_sdk.errors import ContainerError
from edge_sdk.planning.cost import update_bytes, version_bytes
from edge_sdk.protocol.model import DensePart, LoraModule, LoraShape
from edge_sdk.updates.container import header_for, read_container, write_container
from edge_sdk.updates.delta import write_update
from edge_sdk.updates.initial import initial_adapter
from edge_sdk.updates.keys import all_keys, tuned_keys
from edge_sdk.updates.residual import add_owed, read_residual, write_residual
from edge_sdk.updates.versions import read_adapter, write_version


def update(path, start, end, keys, *, codec="int8", residual=None, round=1):
    return write_update(
        path,
        run="r",
        round=round,
        fingerprint=FINGERPRINT,
        builds_on=round - 1,
        start=start,
        end=end,
        keys=keys,
        codec=codec,
        residual=residual,
    )


def decoded(path):
    with read_container(path, "update") as container:
        return {key: container.tensor(key) for key in container.parts}


def test_update_and_residual_add_up_to_the_change(tmp_path):
    start = initial_adapter(SHAPE, LORA, 0)
    keys = tuned_keys(SHAPE, 2)
    end = moved(start, keys, seed=1)
    residual = update(tmp_path / "u", start, end, keys, residual={})
    sent = decoded(tmp_path / "u")
    assert sent.keys() == set(keys) == residual.keys()
    for key in keys:
        np.testing.assert_allclose(sent[key] + residual[key], end[key] - start[key], atol=1e-8)
        assert np.abs(residual[key]).max() > 0


def test_without_error_feedback_there_is_no_residual(tmp_path):
    start = initial_adapter(SHAPE, LORA, 0)
    keys = tuned_keys(SHAPE, 1)
    assert update(tmp_path / "u", start, moved(start, keys, 1), keys, codec="fp32", residual=None) is None


def test_a_residual_joins_the_next_update_and_stays_where_nothing_was_trained(tmp_path):
    start = initial_adapter(SHAPE, LORA, 0)
    deep, shallow = tuned_keys(SHAPE, 3), tuned_keys(SHAPE, 1)
    first = update(tmp_path / "a", start, moved(start, deep, 1), deep, residual={})
    second = update(tmp_path / "b", start, start, shallow, residual=first, round=2)
    sent = decoded(tmp_path / "b")
    assert sent.keys() == set(shallow) and second.keys() == set(deep)
    for key in deep:
        np.testing.assert_allclose(sent.get(key, 0) + second[key], first[key], atol=1e-9)


def test_error_feedback_stays_bounded_and_reaches_the_optimum_of_a_quadratic(tmp_path):
    target = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    here = {"dense.w": np.zeros_like(target)}
    residual: dict[str, np.ndarray] = {}
    largest = 0.0
    for round in range(1, 201):
        end = {"dense.w": here["dense.w"] + 0.1 * (target - here["dense.w"])}
        residual = update(tmp_path / "u", here, end, ["dense.w"], residual=residual, round=round)
        here = {"dense.w": here["dense.w"] + decoded(tmp_path / "u")["dense.w"]}
        largest = max(largest, float(np.abs(residual["dense.w"]).max()))
    assert np.abs(here["dense.w"] - target).max() < 1e-4
    assert largest < 0.01 * np.abs(target).max()


def test_residuals_survive_the_disk_exactly(tmp_path):
    start = initial_adapter(SHAPE, LORA, 0)
    keys = tuned_keys(SHAPE, 2)
    residual = update(tmp_path / "u", start, moved(start, keys, 1), keys, residual={})
    write_residual(tmp_path / "r", run="r", round=1, fingerprint=FINGERPRINT, residual=residual)
    back = read_residual(tmp_path / "r")
    assert back.keys() == residual.keys()
    for key, rows in residual.items():
        np.testing.assert_array_equal(back[key], rows)


def test_what_is_owed_joins_the_residual_whole(tmp_path):
    start = initial_adapter(SHAPE, LORA, 0)
    keys = tuned_keys(SHAPE, 1)
    residual = update(tmp_path / "u", start, moved(start, keys, 1), keys, residual={})
    owed = add_owed(residual, [tmp_path / "u"])
    sent = decoded(tmp_path / "u")
    for key in keys:
        np.testing.assert_array_equal(owed[key], residual[key] + sent[key])
    assert add_owed({}, [tmp_path / "u"]).keys() == set(keys)


def test_lower_layers_of_what_is_owed_outlive_a_shallow_round(tmp_path):
    start = initial_adapter(SHAPE, LORA, 0)
    deep, shallow = tuned_keys(SHAPE, 3), tuned_keys(SHAPE, 1)
    end = moved(start, deep, 1)
    owed = add_owed(update(tmp_path / "a", start, end, deep, residual={}), [tmp_path / "a"])
    after = update(tmp_path / "b", start, start, shallow, residual=owed, round=2)
    update(tmp_path / "c", start, start, deep, residual=after, codec="fp32", round=3)
    sent = [decoded(tmp_path / "b"), decoded(tmp_path / "c")]
    for key in deep:
        total = sum(one[key] for one in sent if key in one)
        np.testing.assert_allclose(total, end[key] - start[key], atol=1e-7)


def test_an_update_names_only_parts_of_the_adapter(tmp_path):
    start = initial_adapter(SHAPE, LORA, 0)
    with pytest.raises(ContainerError, match="no part of this adapter"):
        update(tmp_path / "u", start, start, ["9.output.dense.A"], residual={})


def version(path, number, adapter, parent=None):
    return write_version(
        path, run="r", round=number, number=number, fingerprint=FINGERPRINT, adapter=adapter, parent=parent,
        codec="fp16" if parent is None else "int8",
    )  # fmt: skip


def test_every_holder_of_a_version_has_the_writers_bits(tmp_path):
    first = initial_adapter(SHAPE, LORA, 0)
    v0 = version(tmp_path / "0", 0, first)
    v1 = version(tmp_path / "1", 1, moved(v0, all_keys(SHAPE), 1), parent=(0, v0))
    v2 = version(tmp_path / "2", 2, moved(v1, all_keys(SHAPE), 2), parent=(1, v1))
    read = read_adapter([tmp_path / "0", tmp_path / "1", tmp_path / "2"])
    for key, rows in v2.items():
        np.testing.assert_array_equal(read[key], rows)
    np.testing.assert_array_equal(
        read_adapter([tmp_path / "0"])["dense.classifier.weight"], v0["dense.classifier.weight"]
    )


def test_broken_chains_are_refused(tmp_path):
    v0 = version(tmp_path / "0", 0, initial_adapter(SHAPE, LORA, 0))
    v1 = version(tmp_path / "1", 1, v0, parent=(0, v0))
    version(tmp_path / "2", 2, v1, parent=(1, v1))
    with pytest.raises(ContainerError, match="builds on version 1, the chain has reached 0"):
        read_adapter([tmp_path / "0", tmp_path / "2"])
    with pytest.raises(ContainerError, match="builds on version 0"):
        read_adapter([tmp_path / "1"])
    with pytest.raises(ContainerError, match="no versions"):
        read_adapter([])


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_predicted_bytes_are_those_of_the_file(tmp_path, codec, depth):
    start = initial_adapter(SHAPE, LORA, 0)
    update(tmp_path / "u", start, start, tuned_keys(SHAPE, depth), codec=codec)
    real = (tmp_path / "u").stat().st_size
    assert abs(update_bytes(SHAPE, LORA, depth, codec) - real) <= max(0.02 * real, 64)


def test_predicted_bytes_of_a_version_are_those_of_the_file(tmp_path):
    version(tmp_path / "0", 0, initial_adapter(SHAPE, LORA, 0))
    real = (tmp_path / "0").stat().st_size
    assert abs(version_bytes(SHAPE, LORA) - real) <= max(0.02 * real, 64)


@pytest.mark.parametrize("which", ["end", "residual"])
def test_shapes_that_differ_are_refused_and_never_broadcast(tmp_path, which):
    start = {"dense.w": np.zeros((2, 3), np.float32)}
    odd = {"dense.w": np.zeros((1, 3), np.float32)}
    end, residual = (odd, {}) if which == "end" else (start, odd)
    with pytest.raises(ContainerError, match="have the shapes"):
        update(tmp_path / "u", start, end, ["dense.w"], residual=residual)


def test_nothing_that_was_handed_in_is_changed(tmp_path):
    start = initial_adapter(SHAPE, LORA, 0)
    keys = tuned_keys(SHAPE, 1)
    end = moved(start, keys, 1)
    residual = update(tmp_path / "a", start, end, keys, residual={})
    copies = [{key: rows.copy() for key, rows in one.items()} for one in (start, end, residual)]
    update(tmp_path / "b", start, end, keys, codec="fp32", residual=residual, round=2)
    add_owed(residual, [tmp_path / "a"])
    kept = version(tmp_path / "v", 0, start)
    read_adapter([tmp_path / "v"])["dense.classifier.weight"][:] = 7
    kept["dense.classifier.weight"][:] = 7
    for one, copy in zip((start, end, residual), copies, strict=True):
        for key, rows in copy.items():
            np.testing.assert_array_equal(one[key], rows)


def slots_update(path, key, values, slots):
    rows = {key: np.asarray(values, np.float32)}
    header = header_for("update", rows, "fp32", run="r", round=1, fingerprint=FINGERPRINT, builds_on=0)
    part = msgspec.structs.replace(header.parts[0], slots=slots)
    write_container(path, msgspec.structs.replace(header, parts=(part,)), rows)
    return path


def test_owed_slots_join_the_rows_that_they_are_of(tmp_path):
    path = slots_update(tmp_path / "u", "0.m.A", [[1, 1], [2, 2]], (1, 3))
    total = add_owed({"0.m.A": np.ones((4, 2), np.float32)}, [path])
    np.testing.assert_array_equal(total["0.m.A"], [[1, 1], [2, 2], [1, 1], [3, 3]])
    with pytest.raises(ContainerError, match="owes slots"):
        add_owed({}, [path])
    with pytest.raises(ContainerError, match="what it adds to is 3 x 2"):
        add_owed({"0.m.A": np.ones((3, 2), np.float32)}, [path])


def test_a_chain_of_two_runs_is_refused(tmp_path):
    v0 = version(tmp_path / "0", 0, initial_adapter(SHAPE, LORA, 0))
    write_version(
        tmp_path / "1",
        run="r",
        round=1,
        number=1,
        fingerprint="cd" * 32,
        adapter=v0,
        parent=(0, v0),
        codec="int8",
    )
    with pytest.raises(ContainerError, match="is of run"):
        read_adapter([tmp_path / "0", tmp_path / "1"])
    with pytest.raises(ContainerError, match="with cdcdcdcdcdcd"):
        read_adapter([tmp_path / "0"], "cd" * 32)


def test_a_delta_of_a_part_that_its_parent_has_not_is_refused(tmp_path):
    v0 = version(tmp_path / "0", 0, initial_adapter(SHAPE, LORA, 0))
    more = {"dense.more": np.ones((1, 2), np.float32)}
    version(tmp_path / "1", 1, more, parent=(0, more))
    with pytest.raises(ContainerError, match=r"dense\.more.*not in its parent"):
        read_adapter([tmp_path / "0", tmp_path / "1"])
    assert "dense.more" not in v0


def test_predicted_bytes_hold_for_a_base_of_real_size(tmp_path):
    modules = (
        LoraModule(name="attention.self.query", inputs=384, outputs=384),
        LoraModule(name="attention.self.key", inputs=384, outputs=384),
        LoraModule(name="attention.self.value", inputs=384, outputs=384),
        LoraModule(name="attention.output.dense", inputs=384, outputs=384),
        LoraModule(name="intermediate.dense", inputs=384, outputs=1536),
        LoraModule(name="output.dense", inputs=1536, outputs=384),
    )
    head = (
        DensePart(name="classifier.weight", shape=(10, 384)),
        DensePart(name="classifier.bias", shape=(10,)),
    )
    shape = msgspec.structs.replace(
        SHAPE, layers=6, hidden=384, intermediate=1536, modules=modules, dense=head
    )
    lora = LoraShape(rank=8)
    start = initial_adapter(shape, lora, 0)
    for depth in (1, 4, 6):
        for codec in ("int8", "fp32"):
            update(tmp_path / "u", start, start, tuned_keys(shape, depth), codec=codec)
            real = (tmp_path / "u").stat().st_size
            assert update_bytes(shape, lora, depth, codec) == pytest.approx(real, rel=0.002)

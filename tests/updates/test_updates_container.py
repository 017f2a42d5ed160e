"""Container v1: the same bytes, exact decoding, and a ContainerError for anything else."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from updates_fakes import FINGERPRINT, LORA, SHAPE

from edge_sdk.errors import ContainerError, MechanismError
from edge_sdk.protocol.container import METADATA_KEY
from edge_sdk.updates.codecs import CODECS
from edge_sdk.updates.container import Forms, header_for, read_container, write_container
from edge_sdk.updates.initial import initial_adapter
from edge_sdk.updates.keys import all_keys, check_shape, dense_keys, lora_keys, tuned_keys
from edge_sdk.updates.writer import ContainerWriter


def header(adapter, codec="int8", kind="update"):
    return header_for(kind, adapter, codec, run="r", round=1, fingerprint=FINGERPRINT, builds_on=0)


@pytest.fixture
def adapter():
    return initial_adapter(SHAPE, LORA, seed=3)


@pytest.fixture
def written(tmp_path, adapter):
    path = tmp_path / "update"
    decoded = write_container(path, header(adapter), adapter)
    return path, decoded


def rewrite(path, change):
    """Alters the container's JSON header in the file, keeping the file's lengths right."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    head = json.loads(data[8 : 8 + length])
    inner = json.loads(head["__metadata__"][METADATA_KEY])
    change(head, inner)
    if METADATA_KEY in head.get("__metadata__", {}):
        head["__metadata__"][METADATA_KEY] = json.dumps(inner)
    raw = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_the_same_input_gives_the_same_bytes_and_decodes_as_promised(tmp_path, adapter, codec):
    first = write_container(tmp_path / "a", header(adapter, codec), adapter)
    backwards = dict(reversed(adapter.items()))
    write_container(tmp_path / "b", header(backwards, codec), backwards)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with read_container(tmp_path / "a", "update") as container:
        container.verify()
        assert container.parts.keys() == adapter.keys()
        for key, rows in first.items():
            np.testing.assert_array_equal(container.tensor(key), rows)


def test_int8_is_within_half_a_step_of_each_row(adapter, written):
    _, decoded = written
    for key, rows in adapter.items():
        step = np.abs(rows).max(axis=1, keepdims=True) / 127
        assert (np.abs(decoded[key] - rows) <= 0.5001 * step + 1e-12).all()


def test_zero_rows_and_the_smallest_floats_survive(tmp_path):
    rows = {"dense.w": np.zeros((2, 3), np.float32)}
    rows["dense.w"][1] = 1e-44
    decoded = write_container(tmp_path / "z", header(rows), rows)
    assert np.isfinite(decoded["dense.w"]).all()
    assert (decoded["dense.w"][0] == 0).all()


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_payload_bytes_are_the_formula(tmp_path, adapter, codec):
    write_container(tmp_path / "a", header(adapter, codec), adapter)
    data = (tmp_path / "a").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert len(data) - 8 - length == sum(
        CODECS[codec].form.payload_bytes(*rows.shape) for rows in adapter.values()
    )


def test_values_that_are_not_finite_are_not_written(tmp_path, adapter):
    adapter["0.output.dense.A"][1, 1] = np.nan
    with pytest.raises(ContainerError, match=r"0\.output\.dense\.A.*not finite"):
        write_container(tmp_path / "a", header(adapter), adapter)
    assert list(tmp_path.iterdir()) == []


def test_what_fp16_cannot_hold_is_refused_not_clipped(tmp_path):
    rows = {"dense.w": np.full((1, 2), 1e6, np.float32)}
    with pytest.raises(ContainerError, match="does not fit 16 bits"):
        write_container(tmp_path / "a", header(rows, "fp16"), rows)


def test_an_unknown_codec_is_named(adapter):
    with pytest.raises(MechanismError, match="int3"):
        header(adapter, "int3")


@pytest.mark.parametrize("key", ["output.dense.A", "0.A", "0.output.dense.C", "x.y.B"])
def test_a_key_of_no_known_form_is_refused(key):
    with pytest.raises(ContainerError, match="no key of a part"):
        header({key: np.ones((1, 2), np.float32)})


CHANGES = {
    "no container at all": lambda head, inner: head["__metadata__"].pop(METADATA_KEY),
    "another format": lambda head, inner: inner.update(format=2),
    "a field missing": lambda head, inner: inner.pop("fingerprint"),
    "no parts": lambda head, inner: inner.update(parts=[]),
    "a part twice": lambda head, inner: inner["parts"].append(inner["parts"][0]),
    "a part too few": lambda head, inner: inner["parts"].pop(),
    "a shape that the tensor has not": lambda head, inner: inner["parts"][0].update(rows=5),
    "a huge shape": lambda head, inner: inner["parts"][0].update(rows=1 << 60),
    "bits of another codec": lambda head, inner: inner["parts"][0].update(bits=4),
    "a codec that is not here": lambda head, inner: inner.update(codec="int3"),
    "another codec than was used": lambda head, inner: inner.update(codec="fp16"),
    "slots that do not match": lambda head, inner: inner["parts"][0].update(slots=[0]),
    "another kind": lambda head, inner: inner.update(kind="version"),
    "a run that cannot be a name": lambda head, inner: inner.update(run="a/b"),
    "offsets beyond the file": lambda head, inner: next(
        v for k, v in head.items() if k != "__metadata__"
    ).update(data_offsets=[0, 1 << 40]),
}


@pytest.mark.parametrize("what", sorted(CHANGES))
def test_an_altered_header_is_refused(written, what):
    path, _ = written
    rewrite(path, CHANGES[what])
    with pytest.raises(ContainerError):
        read_container(path, "update")


def test_scales_that_are_not_finite_are_refused(tmp_path, adapter):
    path = tmp_path / "a"
    write_container(path, header(adapter), adapter)
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    head = json.loads(bytes(data[8 : 8 + length]))
    begin = head["dense.classifier.weight.scale"]["data_offsets"][0] + 8 + length
    for value in (float("nan"), float("inf"), -1.0):
        data[begin : begin + 4] = struct.pack("<f", value)
        path.write_bytes(data)
        with read_container(path) as container, pytest.raises(ContainerError, match="scale"):
            container.verify()


def test_other_safetensors_files_and_other_files_are_told_apart(tmp_path):
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "plain")
    with pytest.raises(ContainerError, match="no key 'edge'"):
        read_container(tmp_path / "plain")
    (tmp_path / "text").write_text("hello, this is not a container at all")
    with pytest.raises(ContainerError, match="no container"):
        read_container(tmp_path / "text")
    with pytest.raises(ContainerError, match="cannot be read"):
        read_container(tmp_path / "absent")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_truncated_file_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "a"
    adapter = initial_adapter(SHAPE, LORA, seed=3)
    write_container(path, header(adapter), adapter)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ContainerError):
        read_container(path, "update")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_flipped_bytes_in_the_header_never_do_worse_than_a_refusal(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "a"
    adapter = initial_adapter(SHAPE, LORA, seed=3)
    write_container(path, header(adapter), adapter)
    whole = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", whole[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, 8 + length - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    try:
        with read_container(path, "update") as container:
            container.verify()
    except ContainerError:
        pass


def test_keys_of_a_depth():
    assert tuned_keys(SHAPE, 0) == dense_keys(SHAPE)
    assert tuned_keys(SHAPE, 1) == lora_keys(SHAPE, 2) + dense_keys(SHAPE)
    assert set(all_keys(SHAPE)) == set(initial_adapter(SHAPE, LORA, 0))


def test_the_run_decides_which_parts_there_are(adapter):
    check_shape(header(adapter), SHAPE, LORA)
    top = {key: adapter[key] for key in tuned_keys(SHAPE, 1)}
    check_shape(header(top), SHAPE, LORA, depth=1)
    with pytest.raises(ContainerError, match="missing"):
        check_shape(header(top), SHAPE, LORA, depth=2)
    with pytest.raises(ContainerError, match="too many"):
        check_shape(header(adapter), SHAPE, LORA, depth=1)
    wrong = dict(top)
    wrong["2.output.dense.A"] = np.ones((4, 31), np.float32)
    with pytest.raises(ContainerError, match="4 x 31"):
        check_shape(header(wrong), SHAPE, LORA, depth=1)


def test_the_first_adapter_depends_on_seed_and_key_alone():
    one, two, other = (initial_adapter(SHAPE, LORA, seed) for seed in (1, 1, 2))
    for key, rows in one.items():
        np.testing.assert_array_equal(rows, two[key])
    assert (one["0.output.dense.A"] != other["0.output.dense.A"]).any()
    assert (one["0.output.dense.A"] != one["1.output.dense.A"]).any()
    assert not one["0.output.dense.B"].any()
    assert not one["dense.classifier.bias"].any()
    assert one["dense.classifier.weight"].any()
    assert np.abs(one["0.output.dense.A"]).max() <= 1 / np.sqrt(32)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_the_bytes_are_those_of_the_library(tmp_path, adapter, codec):
    from safetensors.numpy import load_file, save

    adapter = {**adapter, "0.größe\n.A": adapter["0.output.dense.A"]}
    write_container(tmp_path / "a", header(adapter, codec), adapter)
    data = (tmp_path / "a").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    assert save(load_file(tmp_path / "a"), metadata=metadata) == data


def test_a_container_is_written_whole_or_not_at_all(tmp_path, adapter):
    with (
        pytest.raises(ContainerError, match="never written"),
        ContainerWriter(tmp_path / "a", header(adapter)) as one,
    ):
        one.write("0.output.dense.A", adapter["0.output.dense.A"])
    with (
        pytest.raises(ContainerError, match="not waited for"),
        ContainerWriter(tmp_path / "a", header(adapter)) as one,
    ):
        one.write("0.output.dense.A", adapter["0.output.dense.A"])
        one.write("0.output.dense.A", adapter["0.output.dense.A"])
    assert list(tmp_path.iterdir()) == []


def test_forms_that_were_met_are_checked_by_their_bytes(tmp_path, adapter):
    forms = Forms(most=1)
    for name in ("a", "b"):
        write_container(tmp_path / name, header(adapter), adapter)
    one, other = (read_container(tmp_path / name, "update", forms) for name in ("a", "b"))
    assert one.header is other.header
    np.testing.assert_array_equal(other.load().tensor("0.output.dense.A"), one.tensor("0.output.dense.A"))
    data = (tmp_path / "b").read_bytes()
    (tmp_path / "b").write_bytes(data[:-1])
    with pytest.raises(ContainerError):
        read_container(tmp_path / "b", "update", forms)

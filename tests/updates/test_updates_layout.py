"""The outer form of the file: hostile bytes meet a ContainerError before anything is allocated."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file
from updates_fakes import FINGERPRINT, LORA, SHAPE

from edge_sdk.errors import ContainerError
from edge_sdk.protocol.container import METADATA_KEY
from edge_sdk.updates.codecs import CODECS
from edge_sdk.updates.container import header_for, read_container, write_container
from edge_sdk.updates.initial import initial_adapter

ROWS = {
    "0.output.dense.A": np.arange(8, dtype=np.float32).reshape(2, 4),
    "dense.classifier.weight": np.ones((3, 4), np.float32),
}


def write(path, adapter, codec="fp16"):
    header = header_for("update", adapter, codec, run="r", round=1, fingerprint=FINGERPRINT, builds_on=0)
    return write_container(path, header, adapter)


@pytest.fixture
def taken_apart(tmp_path):
    """A file's path, its index as a dict, and its payload."""
    path = tmp_path / "update"
    write(path, ROWS)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return path, json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(path, index, payload):
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)
    return path


def refused(path, match):
    with pytest.raises(ContainerError, match=match):
        read_container(path)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_the_library_reads_what_we_write(tmp_path, codec):
    adapter = initial_adapter(SHAPE, LORA, 0)
    write(tmp_path / "a", adapter, codec)
    container = read_container(tmp_path / "a")
    theirs = load_file(tmp_path / "a")
    for key, part in container.parts.items():
        assert theirs[key].shape == (part.rows, part.width)
        scale = theirs[f"{key}.scale"][:, None] if f"{key}.scale" in theirs else np.float32(1)
        np.testing.assert_array_equal(container.tensor(key), theirs[key].astype(np.float32) * scale)


FORMS = {
    "gap": (lambda i: i["0.output.dense.A"].update(data_offsets=[8, 24]), "leaves a gap"),
    "overlap": (lambda i: i["dense.classifier.weight"].update(data_offsets=[0, 24]), "overlaps"),
    "huge": (lambda i: i["0.output.dense.A"].update(shape=[1 << 62, 4]), "and 16 bytes"),
    "negative": (lambda i: i["0.output.dense.A"].update(shape=[-2, -4]), "has shape"),
    "real": (lambda i: i["0.output.dense.A"].update(shape=[2.0, 4]), "has shape"),
    "true": (lambda i: i["0.output.dense.A"].update(shape=[True, 8]), "has shape"),
    "empty": (lambda i: i["0.output.dense.A"].update(shape=[0, 4], data_offsets=[0, 0]), "has shape"),
    "deep": (lambda i: i["0.output.dense.A"].update(shape=[2, 2, 2]), "has shape"),
    "dtype": (lambda i: i["0.output.dense.A"].update(dtype="BF16"), "dtype 'BF16'"),
    "list": (lambda i: i["0.output.dense.A"].update(dtype=["F16"]), "dtype"),
    "other field": (lambda i: i["0.output.dense.A"].update(more=1), "not described by"),
    "no entry": (lambda i: i.update({"0.output.dense.A": 3}), "not described by"),
    "backwards": (lambda i: i["0.output.dense.A"].update(data_offsets=[16, 0]), "-16 bytes"),
    "metadata": (lambda i: i["__metadata__"].update(author="me"), "metadata 'author'"),
    "number": (lambda i: i["__metadata__"].update(edge=3), "no mapping of strings"),
}


@pytest.mark.parametrize("what", sorted(FORMS))
def test_an_index_of_another_form_is_refused(taken_apart, what):
    path, index, payload = taken_apart
    change, match = FORMS[what]
    change(index)
    refused(put_together(path, index, payload), match)


def test_a_name_that_stands_twice_is_refused(taken_apart):
    path, index, payload = taken_apart
    again = json.dumps({"0.output.dense.A": index["0.output.dense.A"]})
    text = json.dumps(index)[:-1] + "," + again[1:]
    refused(put_together(path, text.encode(), payload), "stands there twice")


@pytest.mark.parametrize("text", [b"[" * 200_000, b"[]", b"{}", b"\xff\xfe", b"nul", b'{"a":NaN}'])
def test_what_is_no_index_is_refused(taken_apart, text):
    path, _, payload = taken_apart
    refused(put_together(path, text, payload), "no container")


def test_what_stands_behind_the_tensors_is_refused(taken_apart):
    path, index, payload = taken_apart
    refused(put_together(path, index, payload + b"more"), "the file at byte")


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 17 << 20])
def test_a_huge_header_is_refused_before_it_is_read(tmp_path, length):
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(18 << 20)
    tracemalloc.start()
    refused(path, "header of")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_only_a_regular_file_is_read(tmp_path):
    refused(tmp_path, "no regular file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "no regular file")


@pytest.mark.parametrize(("slots", "match"), [([1, 1], "ascend"), ([2, 0], "ascend"), ([0], "names 1 slots")])
def test_slots_ascend_and_are_as_many_as_the_rows(taken_apart, slots, match):
    path, index, payload = taken_apart
    inner = json.loads(index["__metadata__"][METADATA_KEY])
    inner["parts"][0]["slots"] = slots
    index["__metadata__"][METADATA_KEY] = json.dumps(inner)
    refused(put_together(path, index, payload), match)


def test_a_value_that_is_not_finite_is_told_by_its_part(taken_apart):
    path, index, payload = taken_apart
    put_together(path, index, struct.pack("<e", float("inf")) + payload[2:])
    with pytest.raises(ContainerError, match=r"0\.output\.dense\.A.*not finite"):
        read_container(path).tensor("0.output.dense.A")


def test_a_file_that_shrinks_while_it_is_open_is_an_error(tmp_path):
    path = tmp_path / "a"
    write(path, ROWS)
    with read_container(path) as container:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(ContainerError, match="became shorter"):
            container.tensor("dense.classifier.weight")


def test_one_part_at_a_time_is_in_memory(tmp_path):
    big = {f"{layer}.m.A": np.full((8, 32768), 0.5, np.float32) for layer in range(12)}
    write(tmp_path / "a", big)
    del big
    tracemalloc.start()
    read_container(tmp_path / "a").verify()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 20  # of 6 MiB in the file, 12 decoded

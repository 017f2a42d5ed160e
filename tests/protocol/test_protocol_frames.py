"""Chunk frames, and the frames between agent and trainer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.frames import (
    HEADER_BYTES,
    MAX_CHUNK_BYTES,
    decode_chunk,
    encode_chunk,
    is_chunk,
    transfer_id,
)
from edge_sdk.protocol.pipe import Unframer, frame
from edge_sdk.protocol.trainer import MAX_MESSAGE_BYTES

ID = bytes(range(16))


def test_the_header_is_forty_bytes_as_written_down() -> None:
    data = encode_chunk(ID, 3, 3 * 1024, b"\xab" * 1024)
    assert HEADER_BYTES == 40
    assert data[:8] == b"EDGC\x01\x00\x00\x00"
    assert data[8:12] == (3).to_bytes(4, "little")
    assert data[12:28] == ID
    assert data[28:36] == (3072).to_bytes(8, "little")
    assert len(data) == 40 + 1024


@given(index=st.integers(0, 2**32 - 1), offset=st.integers(0, 2**64 - 1), payload=st.binary(min_size=1))
@settings(max_examples=50, deadline=None)
def test_what_was_encoded_is_decoded(index: int, offset: int, payload: bytes) -> None:
    data = encode_chunk(ID, index, offset, payload)
    chunk = decode_chunk(data)
    assert is_chunk(data)
    assert (chunk.transfer, chunk.index, chunk.offset, bytes(chunk.payload)) == (ID, index, offset, payload)


@given(data=st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_anything_else_is_a_protocol_error(data: bytes) -> None:
    for candidate in (data, b"EDGC\x01\x00\x00\x00" + data):
        with pytest.raises(ProtocolError):
            decode_chunk(candidate)


@given(position=st.integers(40, 139), flip=st.integers(1, 255))
@settings(max_examples=50, deadline=None)
def test_an_altered_payload_is_noticed(position: int, flip: int) -> None:
    data = bytearray(encode_chunk(ID, 0, 0, bytes(100)))
    data[position] ^= flip
    with pytest.raises(ProtocolError, match="altered"):
        decode_chunk(data)


def test_limits_of_a_chunk() -> None:
    full = encode_chunk(ID, 0, 0, bytes(MAX_CHUNK_BYTES))
    assert len(decode_chunk(full).payload) == MAX_CHUNK_BYTES
    for payload in (b"", bytes(MAX_CHUNK_BYTES + 1)):
        with pytest.raises(ProtocolError):
            encode_chunk(ID, 0, 0, payload)
    with pytest.raises(ProtocolError, match="above"):
        decode_chunk(full + b"x")
    assert not is_chunk(b'{"type":"run"}')


def test_a_transfer_is_the_same_for_the_same_bytes_only() -> None:
    one = transfer_id("ns", "dev", "up/run/1", "a" * 64)
    assert len(one) == 16
    assert one == transfer_id("ns", "dev", "up/run/1", "a" * 64)
    others = {
        transfer_id(*other)
        for other in (
            ("ns2", "dev", "up/run/1", "a" * 64),
            ("ns", "dev2", "up/run/1", "a" * 64),
            ("ns", "dev", "up/run/2", "a" * 64),
            ("ns", "dev", "down", "a" * 64),
            ("ns", "dev", "up/run/1", "b" * 64),
        )
    }
    assert len(others | {one}) == 6


@given(messages=st.lists(st.binary(max_size=50), max_size=8), data=st.data())
@settings(max_examples=60, deadline=None)
def test_frames_come_out_whole_however_they_are_cut(messages: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(frame, messages))
    unframer, out = Unframer(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        out += unframer.feed(stream[:size])
        stream = stream[size:]
    assert out == messages


def test_a_length_above_the_limit_is_refused_before_it_is_awaited() -> None:
    with pytest.raises(ProtocolError, match="announces"):
        Unframer().feed((MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(ProtocolError, match="above"):
        frame(bytes(MAX_MESSAGE_BYTES + 1))

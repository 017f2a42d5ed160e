"""Which chunks of an object: how many there are, and those held, as a byte each or as ranges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.frames import MAX_CHUNK_BYTES
from edge_sdk.protocol.wire import MAX_OBJECT_BYTES

__all__ = ["chunk_count", "mark", "ranges_of"]


def chunk_count(size: int, chunk_bytes: int) -> int:
    """How many chunks an object has. Raises ProtocolError for sizes outside the contract."""
    if not 0 < size <= MAX_OBJECT_BYTES or not 0 < chunk_bytes <= MAX_CHUNK_BYTES:
        raise ProtocolError(f"an object of {size} bytes in chunks of {chunk_bytes} is outside the contract")
    return -(-size // chunk_bytes)


def ranges_of(held: bytearray) -> Iterator[tuple[int, int]]:
    """The chunks whose byte is 1, as half-open ranges in order."""
    first = held.find(1)
    while first >= 0:
        after = held.find(0, first)
        if after < 0:
            after = len(held)
        yield first, after
        first = held.find(1, after)


def mark(ranges: Sequence[tuple[int, int]], count: int) -> bytearray:
    """The chunks in ``ranges``. Raises ProtocolError for ranges out of order, empty or beyond the end."""
    held, end = bytearray(count), 0
    for first, after in ranges:
        if not end <= first < after <= count:
            raise ProtocolError(f"chunks [{first}, {after}) are no range of an object of {count} chunks")
        held[first:after] = b"\x01" * (after - first)
        end = after
    return held

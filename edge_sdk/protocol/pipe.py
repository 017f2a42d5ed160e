"""Framing between host and trainer process: 4-byte big-endian length, then one JSON record. No I/O here."""

from __future__ import annotations

import struct

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.trainer import MAX_MESSAGE_BYTES

__all__ = ["Unframer", "frame"]

_LENGTH = struct.Struct(">I")


def frame(message: bytes) -> bytes:
    if len(message) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a trainer message of {len(message)} bytes is above {MAX_MESSAGE_BYTES}")
    return _LENGTH.pack(len(message)) + message


class Unframer:
    """Takes bytes as they come and gives whole messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Messages completed by ``data``. Raises ProtocolError for a length above the limit."""
        self._buffer += data
        messages = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_MESSAGE_BYTES:
                raise ProtocolError(f"a trainer message announces {length} bytes, above {MAX_MESSAGE_BYTES}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(bytes(self._buffer[_LENGTH.size : end]))
            del self._buffer[:end]
        return messages

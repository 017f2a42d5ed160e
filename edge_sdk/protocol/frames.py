"""The chunk frame: a fixed 40-byte little-endian header, then raw bytes.

    magic 4 | version 1 | flags 1 | reserved 2 | chunk index 4 | transfer id 16 | byte offset 8 | crc32 4

The crc is that of the payload. Whose bytes these are is told by the topic, never by the frame.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass

from edge_sdk.errors import ProtocolError

__all__ = [
    "HEADER_BYTES",
    "MAX_CHUNK_BYTES",
    "Chunk",
    "decode_chunk",
    "encode_chunk",
    "is_chunk",
    "link_transfer",
    "transfer_id",
]

_HEADER = struct.Struct("<4sBBHI16sQI")
_MAGIC = b"EDGC"
_VERSION = 1
HEADER_BYTES = _HEADER.size
MAX_CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True)
class Chunk:
    """One chunk of an object in transfer. ``payload`` is a view into the received message."""

    transfer: bytes
    index: int
    offset: int
    payload: memoryview


def transfer_id(namespace: str, device: str, channel: str, object_digest: str) -> bytes:
    """First 16 bytes of a sha256: the same bytes sent again are the same transfer.

    ``channel`` is ``up/{run}/{round}`` for an update and ``down`` for an object fetched by the device.
    """
    key = "\n".join((namespace, device, channel, object_digest)).encode()
    return hashlib.sha256(key).digest()[:16]


def link_transfer(namespace: str, device: str) -> bytes:
    """Of the frames that measure a device's link, both ways; they belong to no object."""
    return transfer_id(namespace, device, "link", "")


def encode_chunk(transfer: bytes, index: int, offset: int, payload: bytes | memoryview) -> bytes:
    """One frame. Raises ProtocolError for an empty payload or one above ``MAX_CHUNK_BYTES``."""
    if not 0 < len(payload) <= MAX_CHUNK_BYTES:
        raise ProtocolError(f"a chunk of {len(payload)} bytes is outside 1..{MAX_CHUNK_BYTES}")
    header = _HEADER.pack(_MAGIC, _VERSION, 0, 0, index, transfer, offset, zlib.crc32(payload))
    return b"".join((header, payload))


def is_chunk(data: bytes | memoryview) -> bool:
    """Whether a message is a frame rather than a JSON record."""
    return bytes(data[:4]) == _MAGIC


def decode_chunk(data: bytes | memoryview) -> Chunk:
    """The chunk in a frame. Raises ProtocolError for anything but an intact one."""
    view = memoryview(data)
    if len(view) <= HEADER_BYTES:
        raise ProtocolError(f"a chunk frame of {len(view)} bytes holds no payload")
    magic, version, flags, reserved, index, transfer, offset, crc = _HEADER.unpack_from(view)
    payload = view[HEADER_BYTES:]
    if magic != _MAGIC:
        raise ProtocolError(f"not a chunk frame: begins with {magic!r}")
    if version != _VERSION or flags or reserved:
        raise ProtocolError(f"chunk frame of version {version}, flags {flags} is not spoken here")
    if len(payload) > MAX_CHUNK_BYTES:
        raise ProtocolError(f"a chunk of {len(payload)} bytes is above {MAX_CHUNK_BYTES}")
    if zlib.crc32(payload) != crc:
        raise ProtocolError(f"chunk {index} was altered on its way: its crc does not match")
    return Chunk(transfer, index, offset, payload)

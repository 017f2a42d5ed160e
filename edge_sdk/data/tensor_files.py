"""The header of a safetensors file, read by hand: 8 bytes of length (little-endian), then JSON.

Everything is checked against the file's size before it is believed. Format: huggingface/safetensors, README.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from edge_sdk.errors import BaseModelError

__all__ = ["Tensor", "TensorFile", "read_header"]

_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_Size = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]


_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_entry_decoder = msgspec.json.Decoder(_Entry)


@dataclass(frozen=True)
class Tensor:
    """``begin`` and ``size``: where the bytes lie in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int


@dataclass(frozen=True)
class TensorFile:
    path: Path
    tensors: tuple[Tensor, ...]


def read_header(path: Path) -> TensorFile:
    """The tensors of a safetensors file. Raises BaseModelError for anything but an intact one."""
    with path.open("rb") as file:
        total = path.stat().st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, total - 8):
            raise _damaged(path, f"announces a header of {length} bytes in a file of {total}")
        header = file.read(length)
    first = 8 + length
    tensors = []
    try:
        for name, raw in _decoder.decode(header).items():
            if name == "__metadata__":
                continue
            entry = _entry_decoder.decode(raw)
            begin, end = entry.data_offsets
            tensors.append(Tensor(name, entry.dtype, entry.shape, first + begin, end - begin))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read: {error}") from None
    end = first
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.size)):
        bits = _BITS.get(tensor.dtype)
        if bits is None:
            raise _damaged(path, f"tensor {tensor.name!r} is of the unknown dtype {tensor.dtype!r}")
        if tensor.begin != end or tensor.size * 8 != math.prod(tensor.shape) * bits:
            raise _damaged(
                path, f"the bytes of tensor {tensor.name!r} are not where or as many as its header says"
            )
        end += tensor.size
    if end != total:
        raise _damaged(path, f"holds {total} bytes, its header tells of {end}")
    return TensorFile(path, tuple(tensors))


def _damaged(path: Path, what: str) -> BaseModelError:
    return BaseModelError(f"base model {path}: {what}", "the file is cut short or damaged; fetch it again")

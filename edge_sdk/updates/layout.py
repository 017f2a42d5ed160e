"""The outer form of a safetensors file, read by hand: nothing is believed before it is checked.

    8 bytes little-endian length | JSON index, padded with spaces | tensors, end to end

Stricter than the format asks: no name twice, no gap between tensors, nothing behind them. Reading takes
the index alone; a tensor is read when it is asked for, so a file never lies in memory as a whole, and one
that shrinks while it is open is an error and not a signal, as it would be with a memory map.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from edge_sdk.errors import ContainerError

__all__ = ["AGAIN", "MAX_INDEX_BYTES", "Layout", "Stored", "parse_layout", "read_index"]

MAX_INDEX_BYTES = 16 << 20
AGAIN = "it was truncated or altered; it has to be sent again"
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_ITEM_BYTES = {"F32": 4, "F16": 2, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: bytes ``begin`` to ``end`` of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Layout:
    metadata: dict[str, str]
    tensors: dict[str, Stored]


def read_index(path: Path) -> tuple[bytes, int]:
    """The index as it stands in the file, and the file's size: what its form follows from.

    Raises ContainerError for a file that cannot be read, or ends before its index does.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ContainerError(f"{path.name} is no container: it is no regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            room = size - _LENGTH_BYTES
            if room < 2 or length > room:
                _refuse(path, f"{size} bytes with a header of {length}")
            if length > MAX_INDEX_BYTES:
                _refuse(path, f"its header of {length} bytes is above {MAX_INDEX_BYTES}")
            text = file.read(length)
    except OSError as error:
        raise ContainerError(f"{path} cannot be read: {error.strerror}") from error
    if len(text) != length:
        _refuse(path, f"it ends {length - len(text)} bytes before its header does")
    return text, size


def parse_layout(path: Path, text: bytes, size: int) -> Layout:
    """Raises ContainerError for a file that is not, to the byte, of this form."""
    start = _LENGTH_BYTES + len(text)
    try:
        index = json.loads(text.decode("utf-8"), object_pairs_hook=_no_name_twice)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its header is no JSON of this kind: {error}")
    if not isinstance(index, dict):
        _refuse(path, "its header is no JSON object")
    metadata = index.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "its metadata is no mapping of strings")
    tensors = {name: _stored(path, name, entry, start) for name, entry in index.items()}
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != at:
            what = "overlaps the one before" if tensor.begin < at else "leaves a gap before it"
            _refuse(path, f"tensor {name!r} {what}")
        at = tensor.end
    if at != size:
        _refuse(path, f"its tensors end at byte {at}, the file at byte {size}")
    return Layout(metadata, tensors)


def _stored(path: Path, name: str, entry: Any, start: int) -> Stored:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        _refuse(path, f"tensor {name!r} has dtype {dtype!r}, not one of {', '.join(_ITEM_BYTES)}")
    if not _sizes(shape) or not 1 <= len(shape) <= 2 or 0 in shape:
        _refuse(path, f"tensor {name!r} has shape {shape!r}")
    if not _sizes(offsets) or len(offsets) != 2:
        _refuse(path, f"tensor {name!r} has offsets {offsets!r}")
    begin, end = offsets
    if end - begin != prod(shape) * _ITEM_BYTES[dtype]:
        _refuse(path, f"tensor {name!r} is {dtype} {shape}, and {end - begin} bytes")
    return Stored(dtype, tuple(shape), start + begin, start + end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return found


def _refuse(path: Path, what: str) -> NoReturn:
    raise ContainerError(f"{path.name} is no container: {what[:300]}", AGAIN)

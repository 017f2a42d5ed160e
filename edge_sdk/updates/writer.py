"""Writing a container part by part: where each tensor lies follows from the header, before any is there.

What is held at a time is one part, however large the file. The bytes are those that the safetensors library
writes of the same tensors: widest type first, then by name, and an index padded to whole words.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from edge_sdk.errors import ContainerError
from edge_sdk.protocol.container import METADATA_KEY, CodecForm, ContainerHeader
from edge_sdk.updates.codecs import Floats, codec_named

__all__ = ["SCALE", "ContainerWriter", "file_bytes"]

SCALE = ".scale"
"""Ends the name of the tensor that holds a part's scales."""
_WIDEST_FIRST = {"F32": 0, "F16": 1, "I8": 2}
_WORD = 8
_DIVERGED = "training has diverged: lower the learning rates"


class ContainerWriter:
    """Writes every part of ``header`` once, in any order; the file is there, durable, when the block ends.

    An error within the block leaves nothing behind. Raises ContainerError for a block that ends without
    having written every part.
    """

    def __init__(self, path: Path, header: ContainerHeader) -> None:
        self._path = path
        self._codec = codec_named(header.codec)
        self._parts = {part.key: part for part in header.parts}
        self._missing = set(self._parts)
        index, self._places = _plan(header, self._codec.form)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor, self._name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            self._put(0, index)
        except BaseException:
            self._give_up()
            raise

    def __enter__(self) -> ContainerWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._give_up()
            return
        try:
            if self._missing:
                raise ContainerError(f"part {min(self._missing)!r} of {self._path.name} was never written")
            os.fsync(self._descriptor)
            Path(self._name).replace(self._path)
        except BaseException:
            self._give_up()
            raise
        os.close(self._descriptor)

    def write(self, key: str, rows: Floats | None) -> Floats:
        """Writes one part; returns it as a reader decodes it.

        Raises ContainerError for a part that is missing, ill-shaped, not finite, or of no use here.
        """
        part = self._parts.get(key)
        if part is None or key not in self._missing:
            raise ContainerError(f"part {key!r} is not waited for in {self._path.name}")
        if rows is None or rows.shape != (part.rows, part.width):
            raise ContainerError(
                f"part {key!r} must be {part.rows} x {part.width}, "
                f"received {'nothing' if rows is None else 'x'.join(map(str, rows.shape))}"
            )
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        if not np.isfinite(rows).all():
            raise ContainerError(f"part {key!r} holds values that are not finite", _DIVERGED)
        encoded = self._codec.encode(rows)
        with np.errstate(over="ignore"):
            decoded = self._codec.decode(encoded)
        if not np.isfinite(decoded).all():
            raise ContainerError(
                f"part {key!r} holds values too large for the codec {self._codec.name}", _DIVERGED
            )
        self._put(self._places[key], np.ascontiguousarray(encoded.values).data)
        if encoded.scales is not None:
            self._put(self._places[key + SCALE], np.ascontiguousarray(encoded.scales).data)
        self._missing.discard(key)
        return decoded

    def _put(self, at: int, data: Any) -> None:
        left = memoryview(data).cast("B")
        while left:
            written = os.pwrite(self._descriptor, left, at)
            at, left = at + written, left[written:]

    def _give_up(self) -> None:
        os.close(self._descriptor)
        Path(self._name).unlink(missing_ok=True)


def file_bytes(header: ContainerHeader) -> int:
    """Size of the file that a container with this header is."""
    form = codec_named(header.codec).form
    index, _ = _plan(header, form)
    return len(index) + sum(form.payload_bytes(part.rows, part.width) for part in header.parts)


def _plan(header: ContainerHeader, form: CodecForm) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, up to the tensors, and where each tensor begins."""
    tensors: list[tuple[str, str, list[int], int]] = []
    for part in header.parts:
        size = part.rows * part.width * form.bits // 8
        tensors.append((form.dtype, part.key, [part.rows, part.width], size))
        if form.row_scales:
            tensors.append(("F32", part.key + SCALE, [part.rows], 4 * part.rows))
    tensors.sort(key=lambda one: (_WIDEST_FIRST[one[0]], one[1].encode()))
    metadata = msgspec.json.encode(header, order="deterministic").decode()
    index: dict[str, Any] = {"__metadata__": {METADATA_KEY: metadata}}
    at = 0
    for dtype, name, shape, size in tensors:
        index[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(index, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _WORD)
    start = _WORD + len(text)
    places = {name: start + index[name]["data_offsets"][0] for _, name, _, _ in tensors}
    return len(text).to_bytes(_WORD, "little") + text, places

"""Container v1: one safetensors file whose metadata key ``edge`` holds a ContainerHeader as JSON.

The same input gives the same bytes. Reading checks every length, shape, count and type before it
allocates, and decodes one part at a time.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec
import numpy as np

from edge_sdk.errors import ContainerError
from edge_sdk.protocol.container import METADATA_KEY, Bits, ContainerHeader, ContainerKind, Part
from edge_sdk.updates.codecs import (
    CODECS,
    SAFE_SCALE,
    Codec,
    Encoded,
    Floats,
    codec_named,
    largest_scale,
)
from edge_sdk.updates.layout import AGAIN, Layout, Stored, parse_layout, read_index
from edge_sdk.updates.writer import SCALE, ContainerWriter

__all__ = [
    "Container",
    "Forms",
    "fits",
    "header_for",
    "header_of",
    "part_for",
    "read_container",
    "rows_of",
    "write_container",
]

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I8": np.dtype("i1")}
_SMALL = 4 << 20
_decoder = msgspec.json.Decoder(ContainerHeader)


def write_container(path: Path, header: ContainerHeader, adapter: Mapping[str, Floats]) -> dict[str, Floats]:
    """Writes ``header``'s parts of ``adapter``, durably and at once; returns them as a reader decodes them.

    Raises ContainerError for a part that is missing, ill-shaped or not finite.
    """
    with ContainerWriter(path, header) as writer:
        return {part.key: writer.write(part.key, adapter.get(part.key)) for part in header.parts}


def part_for(key: str, shape: tuple[int, ...], bits: Bits) -> Part:
    """The part that a key and its shape stand for. Raises ContainerError for a key of no known form."""
    folded = key.startswith("fold.")
    name, _, factor = key.removeprefix("fold.").rpartition(".")
    layer, _, module = name.partition(".")
    if len(shape) != 2 or 0 in shape:
        raise ContainerError(f"part {key!r} must be rows x width, received shape {shape}")
    if key.startswith("dense."):
        return Part(
            layer=None, module=key.removeprefix("dense."), factor="dense", role="dense",
            rows=shape[0], width=shape[1], bits=bits,
        )  # fmt: skip
    if layer.isdecimal() and module and factor in ("A", "B"):
        return Part(
            layer=int(layer), module=module, factor="A" if factor == "A" else "B",
            role="fold" if folded else "slot", rows=shape[0], width=shape[1], bits=bits,
        )  # fmt: skip
    raise ContainerError(
        f"{key!r} is no key of a part", "LAYER.MODULE.A, LAYER.MODULE.B, fold. before one, or dense.NAME"
    )


def header_for(
    kind: ContainerKind,
    adapter: Mapping[str, Floats],
    codec: str,
    *,
    run: str,
    round: int,
    fingerprint: str,
    version: int | None = None,
    builds_on: int | None = None,
) -> ContainerHeader:
    """A header over all of ``adapter``, its parts in the order of their keys."""
    return header_of(
        kind, {key: rows.shape for key, rows in adapter.items()}, codec,
        run=run, round=round, fingerprint=fingerprint, version=version, builds_on=builds_on,
    )  # fmt: skip


def header_of(
    kind: ContainerKind,
    shapes: Mapping[str, tuple[int, ...]],
    codec: str,
    *,
    run: str,
    round: int,
    fingerprint: str,
    version: int | None = None,
    builds_on: int | None = None,
) -> ContainerHeader:
    """A header over parts of these shapes, in the order of their keys, before any of them is there."""
    bits = codec_named(codec).form.bits
    return ContainerHeader(
        kind=kind,
        run=run,
        round=round,
        version=version,
        builds_on=builds_on,
        fingerprint=fingerprint,
        codec=codec,
        parts=tuple(part_for(key, shapes[key], bits) for key in sorted(shapes)),
    )


def rows_of(part: Part) -> slice | list[int]:
    """The rows of a whole tensor that the part holds; an index for numpy."""
    return slice(None) if part.slots is None else list(part.slots)


def fits(part: Part, shape: tuple[int, ...]) -> bool:
    """Whether the part is a whole tensor of ``shape``, or slots of one."""
    if len(shape) != 2 or part.width != shape[1]:
        return False
    return part.rows == shape[0] if part.slots is None else part.slots[-1] < shape[0]


class Container:
    """A container whose form was checked. Its tensors are read one at a time.

    As a context manager it keeps the file open; without, every read opens it, so that a merge of any number
    of containers needs one open file.
    """

    def __init__(self, path: Path, form: _Form) -> None:
        self.path = path
        self.header = form.header
        self._layout = form.layout
        self._codec = form.codec
        self._parts = form.parts
        self._size = form.size
        self._file: BinaryIO | None = None
        self._data: bytes | None = None

    def __enter__(self) -> Container:
        self._file = self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def parts(self) -> Mapping[str, Part]:
        return self._parts

    @property
    def loaded_bytes(self) -> int:
        return 0 if self._data is None else len(self._data)

    def load(self) -> Container:
        """Reads a small file at once, for who wants most of it. Of a large one, parts are read singly."""
        if self._size <= _SMALL:
            with self._open() as file:
                self._data = _bytes(file, self.path, 0, self._size)
        return self

    def digest(self) -> str:
        """sha256 of the whole file, in hex; of what ``load`` read, where it did."""
        if self._data is not None:
            return hashlib.sha256(self._data).hexdigest()
        digest = hashlib.sha256()
        with self._open() as file:
            for begin in range(0, self._size, _SMALL):
                digest.update(_bytes(file, self.path, begin, min(_SMALL, self._size - begin)))
        return digest.hexdigest()

    def tensor(self, key: str) -> Floats:
        """One part decoded, float32 (rows, width), owned by the caller. Raises ContainerError."""
        if key not in self._parts:
            raise ContainerError(f"{self.path.name} has no part {key!r}")
        if self._data is not None or self._file is not None:
            encoded = self._read(self._file, key)
        else:
            with self._open() as file:
                encoded = self._read(file, key)
        if encoded.scales is not None:
            most = largest_scale(encoded.scales)
            if most is None:
                raise ContainerError(
                    f"part {key!r} of {self.path.name} has a scale that is negative or not finite"
                )
            if most <= SAFE_SCALE:
                return self._codec.decode(encoded)
        with np.errstate(over="ignore"):  # a code times a large scale: told just below
            rows = self._codec.decode(encoded)
        if not np.isfinite(rows).all():
            raise ContainerError(f"part {key!r} of {self.path.name} holds values that are not finite")
        return rows

    def add_to(self, rows: np.ndarray[Any, Any], key: str, weight: float | None = None) -> None:
        """Adds the part, times ``weight``, to ``rows`` in place, at its slots.

        Raises ContainerError where it does not fit.
        """
        part = self._parts[key]
        if not fits(part, rows.shape):
            raise ContainerError(
                f"part {key!r} of {self.path.name} is {part.rows} x {part.width}, "
                f"what it adds to is {' x '.join(map(str, rows.shape))}"
            )
        change = self.tensor(key)
        rows[rows_of(part)] += change if weight is None else change.astype(rows.dtype) * weight

    def verify(self) -> None:
        """Decodes every part once. Raises ContainerError for the first that is not finite."""
        for key in self._parts:
            self.tensor(key)

    def _open(self) -> BinaryIO:
        try:
            return self.path.open("rb", buffering=0)
        except OSError as error:
            raise ContainerError(f"{self.path} cannot be read: {error.strerror}") from error

    def _read(self, file: BinaryIO | None, key: str) -> Encoded:
        values = self._array(file, self._layout.tensors[key])
        scaled = self._codec.form.row_scales
        return Encoded(values, self._array(file, self._layout.tensors[key + SCALE]) if scaled else None)

    def _array(self, file: BinaryIO | None, tensor: Stored) -> np.ndarray[Any, Any]:
        dtype, size = _DTYPES[tensor.dtype], tensor.end - tensor.begin
        if self._data is not None:
            array = np.frombuffer(self._data, dtype, size // dtype.itemsize, tensor.begin)
        else:
            assert file is not None  # noqa: S101 - one of the two is there
            array = np.frombuffer(_bytes(file, self.path, tensor.begin, size), dtype)
        return array.reshape(tensor.shape)


@dataclass(frozen=True)
class _Form:
    layout: Layout
    header: ContainerHeader
    codec: Codec
    parts: Mapping[str, Part]
    size: int


class Forms:
    """The forms last met, by the index that they were read from.

    A fleet's updates share a few: what is the same to the byte is checked once, and lies in memory once.
    """

    def __init__(self, most: int = 32) -> None:
        self._most = most
        self._forms: OrderedDict[tuple[bytes, int], _Form] = OrderedDict()

    def read(self, path: Path) -> _Form:
        """Raises ContainerError."""
        place = read_index(path)
        form = self._forms.pop(place, None) or _read_form(path, *place)
        self._forms[place] = form
        if len(self._forms) > self._most:
            self._forms.popitem(last=False)
        return form


def read_container(path: Path, kind: ContainerKind | None = None, forms: Forms | None = None) -> Container:
    """Checks a container's form; its tensors are not read yet.

    ``forms``: those that need no second check. Raises ContainerError for a file that is truncated, altered in
    its structure, of another format or codec, whose tensors are not those that its header tells, or that is
    no ``kind``.
    """
    form = _read_form(path, *read_index(path)) if forms is None else forms.read(path)
    if kind is not None and form.header.kind != kind:
        raise ContainerError(f"{path.name} holds a {form.header.kind}, not a {kind}")
    return Container(path, form)


def _read_form(path: Path, index: bytes, size: int) -> _Form:
    layout = parse_layout(path, index, size)
    header = _header(path, layout)
    codec = CODECS.get(header.codec)
    if codec is None:
        raise ContainerError(
            f"{path.name} is written in the codec {header.codec[:32]!r}",
            f"this party has {', '.join(CODECS)}",
        )
    _check_tensors(path, layout, header, codec)
    return _Form(layout, header, codec, {part.key: part for part in header.parts}, size)


def _header(path: Path, layout: Layout) -> ContainerHeader:
    if METADATA_KEY not in layout.metadata:
        raise ContainerError(
            f"{path.name} is no container: its metadata has no key {METADATA_KEY!r}",
            "it is some other safetensors file",
        )
    if len(layout.metadata) > 1:
        odd = min(layout.metadata.keys() - {METADATA_KEY})
        raise ContainerError(f"{path.name} has metadata {odd!r}, which no container has", AGAIN)
    try:
        return _decoder.decode(layout.metadata[METADATA_KEY])
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError) as error:
        raise ContainerError(f"the header of {path.name} cannot be read: {error}", AGAIN) from error


def _check_tensors(path: Path, layout: Layout, header: ContainerHeader, codec: Codec) -> None:
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for part in header.parts:
        if part.key in expected:
            raise ContainerError(f"{path.name} names part {part.key!r} twice")
        _check_part(path, part, codec)
        expected[part.key] = (codec.form.dtype, (part.rows, part.width))
        if codec.form.row_scales:
            expected[part.key + SCALE] = ("F32", (part.rows,))
    if layout.tensors.keys() != expected.keys():
        odd = min(layout.tensors.keys() ^ expected.keys())
        raise ContainerError(f"{path.name}: its header and its tensors differ in {odd!r}", AGAIN)
    for key, (dtype, shape) in expected.items():
        tensor = layout.tensors[key]
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise ContainerError(
                f"tensor {key!r} of {path.name} is {tensor.dtype} {tensor.shape}, "
                f"its header says {dtype} {shape}",
                AGAIN,
            )


def _check_part(path: Path, part: Part, codec: Codec) -> None:
    if (part.factor == "dense") != (part.layer is None):
        raise ContainerError(f"{path.name}: part {part.key!r} has layer {part.layer}, factor {part.factor}")
    if part.bits != codec.form.bits:
        raise ContainerError(
            f"part {part.key!r} has {part.bits} bits, codec {codec.name} has {codec.form.bits}"
        )
    if part.slots is None:
        return
    if part.layer is None or len(part.slots) != part.rows:
        raise ContainerError(f"part {part.key!r} has {part.rows} rows and names {len(part.slots)} slots")
    if any(first >= second for first, second in pairwise(part.slots)):
        raise ContainerError(f"part {part.key!r} names slots that do not ascend")


def _bytes(file: BinaryIO, path: Path, begin: int, size: int) -> bytes:
    try:
        data = os.pread(file.fileno(), size, begin)
    except OSError as error:
        raise ContainerError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) != size:
        raise ContainerError(f"{path.name} became shorter while it was read", AGAIN)
    return data

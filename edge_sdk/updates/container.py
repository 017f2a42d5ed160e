"""Container v1: one safetensors file whose metadata key ``edge`` holds a ContainerHeader as JSON.

The same input gives the same bytes. Reading checks every length, shape, count and type before it
allocates, and decodes one part at a time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from edge_sdk.errors import ContainerError
from edge_sdk.protocol.container import METADATA_KEY, Bits, ContainerHeader, ContainerKind, Part
from edge_sdk.updates.codecs import Codec, Encoded, Floats, codec_named

__all__ = ["Container", "header_for", "part_for", "read_container", "write_container"]

MAX_HEADER_BYTES = 16 << 20
_SCALE = ".scale"
_decoder = msgspec.json.Decoder(ContainerHeader)


def write_container(path: Path, header: ContainerHeader, adapter: Mapping[str, Floats]) -> dict[str, Floats]:
    """Writes ``header``'s parts of ``adapter``, durably and at once; returns them as a reader decodes them.

    Raises ContainerError for a part that is missing, ill-shaped or not finite.
    """
    codec = codec_named(header.codec)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    decoded: dict[str, Floats] = {}
    for part in header.parts:
        rows = adapter.get(part.key)
        if rows is None or rows.shape != (part.rows, part.width):
            raise ContainerError(
                f"part {part.key!r} must be {part.rows} x {part.width}, "
                f"received {'nothing' if rows is None else 'x'.join(map(str, rows.shape))}"
            )
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        if not np.isfinite(rows).all():
            raise ContainerError(
                f"part {part.key!r} holds values that are not finite",
                "training has diverged: lower the learning rates",
            )
        encoded = codec.encode(rows)
        tensors[part.key] = np.ascontiguousarray(encoded.values)
        if encoded.scales is not None:
            tensors[part.key + _SCALE] = encoded.scales
        decoded[part.key] = codec.decode(encoded)
    metadata = msgspec.json.encode(header, order="deterministic").decode()
    _replace(path, serialize(tensors, metadata={METADATA_KEY: metadata}))
    return decoded


def part_for(key: str, rows: Floats, bits: Bits) -> Part:
    """The part that a key and its rows stand for. Raises ContainerError for a key of no known form."""
    name, _, factor = key.rpartition(".")
    layer, _, module = name.partition(".")
    if rows.ndim != 2 or not rows.size:
        raise ContainerError(f"part {key!r} must be rows x width, received shape {rows.shape}")
    if key.startswith("dense."):
        return Part(
            layer=None, module=key.removeprefix("dense."), factor="dense", role="dense",
            rows=rows.shape[0], width=rows.shape[1], bits=bits,
        )  # fmt: skip
    if layer.isdecimal() and module and factor in ("A", "B"):
        return Part(
            layer=int(layer), module=module, factor="A" if factor == "A" else "B",
            rows=rows.shape[0], width=rows.shape[1], bits=bits,
        )  # fmt: skip
    raise ContainerError(f"{key!r} is no key of a part", "LAYER.MODULE.A, LAYER.MODULE.B or dense.NAME")


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
    bits = codec_named(codec).bits
    return ContainerHeader(
        kind=kind,
        run=run,
        round=round,
        version=version,
        builds_on=builds_on,
        fingerprint=fingerprint,
        codec=codec,
        parts=tuple(part_for(key, adapter[key], bits) for key in sorted(adapter)),
    )


class Container:
    """An open container. Close it, or use it as a context manager."""

    def __init__(self, path: Path, file: Any, header: ContainerHeader, codec: Codec) -> None:
        self.path = path
        self.header = header
        self._file = file
        self._codec = codec
        self._parts = {part.key: part for part in header.parts}

    def __enter__(self) -> Container:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.__exit__(None, None, None)

    @property
    def parts(self) -> Mapping[str, Part]:
        return self._parts

    def tensor(self, key: str) -> Floats:
        """One part decoded, float32 (rows, width), owned by the caller. Raises ContainerError."""
        if key not in self._parts:
            raise ContainerError(f"{self.path.name} has no part {key!r}")
        scales = self._file.get_tensor(key + _SCALE) if self._codec.has_scales else None
        if scales is not None and not (np.isfinite(scales).all() and (scales >= 0).all()):
            raise ContainerError(f"part {key!r} of {self.path.name} has a negative or non-finite scale")
        rows = self._codec.decode(Encoded(self._file.get_tensor(key), scales))
        if not np.isfinite(rows).all():
            raise ContainerError(f"part {key!r} of {self.path.name} holds values that are not finite")
        return rows

    def verify(self) -> None:
        """Decodes every part once. Raises ContainerError for the first that is not finite."""
        for key in self._parts:
            self.tensor(key)


def read_container(path: Path, kind: ContainerKind | None = None) -> Container:
    """Opens a container; its tensors are not read yet.

    Raises ContainerError for a file that is truncated, altered in its structure, of another format or
    codec, whose tensors are not those that its header tells, or that is no ``kind``.
    """
    _check_length(path)
    try:
        file: Any = safe_open(path, framework="np")
    except (SafetensorError, OSError, ValueError) as error:
        raise ContainerError(f"{path.name} is no container: {_first_line(error)}", _AGAIN) from error
    try:
        header = _header(path, file.metadata() or {})
        if kind is not None and header.kind != kind:
            raise ContainerError(f"{path.name} holds a {header.kind}, not a {kind}")
        codec = codec_named(header.codec)
        _check_tensors(path, file, header, codec)
    except BaseException:
        file.__exit__(None, None, None)
        raise
    return Container(path, file, header, codec)


_AGAIN = "it was truncated or altered; it has to be sent again"


def _check_length(path: Path) -> None:
    """The length of the JSON header, before anybody allocates that much."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ContainerError(f"{path} cannot be read: {error.strerror}") from error
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise ContainerError(f"{path.name} is no container: {size} bytes with a header of {length}", _AGAIN)


def _header(path: Path, metadata: Mapping[str, str]) -> ContainerHeader:
    text = metadata.get(METADATA_KEY)
    if text is None:
        raise ContainerError(
            f"{path.name} is no container: its metadata has no key {METADATA_KEY!r}",
            "it is some other safetensors file",
        )
    try:
        return _decoder.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ContainerError(f"the header of {path.name} cannot be read: {error}", _AGAIN) from error


def _check_tensors(path: Path, file: Any, header: ContainerHeader, codec: Codec) -> None:
    expected: dict[str, tuple[str, list[int]]] = {}
    for part in header.parts:
        if part.key in expected:
            raise ContainerError(f"{path.name} names part {part.key!r} twice")
        if part.bits != codec.bits:
            raise ContainerError(
                f"part {part.key!r} has {part.bits} bits, codec {codec.name} has {codec.bits}"
            )
        if part.slots is not None and len(part.slots) != part.rows:
            raise ContainerError(f"part {part.key!r} has {part.rows} rows and names {len(part.slots)} slots")
        expected[part.key] = (codec.dtype, [part.rows, part.width])
        if codec.has_scales:
            expected[part.key + _SCALE] = ("F32", [part.rows])
    found = set(file.keys())
    if found != expected.keys():
        odd = min(found ^ expected.keys())
        raise ContainerError(f"{path.name}: its header and its tensors differ in {odd!r}", _AGAIN)
    for key, (dtype, shape) in expected.items():
        tensor = file.get_slice(key)
        if tensor.get_dtype() != dtype or tensor.get_shape() != shape:
            raise ContainerError(
                f"tensor {key!r} of {path.name} is {tensor.get_dtype()} {tensor.get_shape()}, "
                f"its header says {dtype} {shape}",
                _AGAIN,
            )


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

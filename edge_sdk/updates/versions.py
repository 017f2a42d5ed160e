"""Versions of the global adapter: a full one, or a delta to its parent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edge_sdk.errors import ContainerError
from edge_sdk.protocol.container import ContainerHeader
from edge_sdk.updates.codecs import Floats
from edge_sdk.updates.container import (
    Container,
    Forms,
    header_for,
    header_of,
    read_container,
    write_container,
)
from edge_sdk.updates.keys import Adapter
from edge_sdk.updates.writer import ContainerWriter

__all__ = [
    "DELTA_CODEC",
    "FULL_CODEC",
    "VersionChain",
    "VersionWriter",
    "read_adapter",
    "version_header",
    "write_version",
]

FULL_CODEC = "fp16"
DELTA_CODEC = "int8"
_LARGEST = float(np.finfo(np.float16).max)


class VersionChain:
    """What a chain of files leads to: a full version first, then deltas in order. Read one part at a time.

    Raises ContainerError for a chain that is empty, broken, mixed of runs, begins with a delta, or, where one
    is given, has another ``fingerprint``.
    """

    def __init__(
        self, paths: Sequence[Path], fingerprint: str | None = None, forms: Forms | None = None
    ) -> None:
        if not paths:
            raise ContainerError("a chain of no versions leads to no adapter")
        self._containers: list[Container] = []
        self._sizes: dict[str, tuple[int, int]] = {}
        self._held: int | None = None
        self._origin: tuple[str, str] | None = None
        for path in paths:
            self._append(read_container(path, "version", forms), fingerprint)

    @property
    def number(self) -> int:
        """The version that the chain leads to."""
        assert self._held is not None  # noqa: S101 - a version without a number was refused
        return self._held

    @property
    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """Rows and width of every part."""
        return self._sizes

    def tensor(self, key: str) -> Floats:
        """One part, float32, owned by the caller. Raises ContainerError."""
        first, *deltas = self._containers
        rows = first.tensor(key)
        for delta in deltas:
            if key in delta.parts:
                delta.add_to(rows, key)
        return rows

    def _append(self, container: Container, fingerprint: str | None) -> None:
        header, name = container.header, container.path.name
        if header.builds_on != self._held:
            raise ContainerError(
                f"{name} builds on version {header.builds_on}, the chain has reached {self._held}",
                "fetch the versions between them",
            )
        origin = self._origin = self._origin or (header.run, fingerprint or header.fingerprint)
        if (header.run, header.fingerprint) != origin:
            raise ContainerError(
                f"{name} is of run {header.run!r} with fingerprint {header.fingerprint[:12]}, "
                f"what it belongs to of {origin[0]!r} with {origin[1][:12]}",
                "a version serves only the run that made it",
            )
        if header.version is None:
            raise ContainerError(f"{name} is a version without a number")
        for key, part in container.parts.items():
            size = part.rows, part.width
            if part.slots is not None or (self._containers and self._sizes.get(key) != size):
                raise ContainerError(f"part {key!r} of {name} is not whole, or not in its parent")
            self._sizes[key] = size
        self._containers.append(container)
        self._held = header.version


def version_header(
    sizes: Mapping[str, tuple[int, int]],
    *,
    run: str,
    round: int,
    number: int,
    fingerprint: str,
    parent: int | None = None,
) -> ContainerHeader:
    """The header of a version: a full one at 16 bits, or, with a ``parent``, a delta at 8.

    ``sizes``: of the parts that the file holds: all, or, of a delta, those that changed.
    """
    return header_of(
        "version", sizes, FULL_CODEC if parent is None else DELTA_CODEC,
        run=run, round=round, fingerprint=fingerprint, version=number, builds_on=parent,
    )  # fmt: skip


class VersionWriter:
    """Writes a version part by part; what it hands back is what every reader decodes."""

    def __init__(self, path: Path, header: ContainerHeader) -> None:
        self._delta = header.builds_on is not None
        self._writer = ContainerWriter(path, header)

    def __enter__(self) -> VersionWriter:
        self._writer.__enter__()
        return self

    def __exit__(self, *what: object) -> None:
        self._writer.__exit__(*what)  # type: ignore[arg-type]

    def write(self, key: str, before: Floats | None, after: Floats) -> Floats:
        """``before``: the part as the parent has it; None where there is no such part."""
        if not self._delta:
            return self._writer.write(key, after)
        if before is None:
            raise ContainerError(f"a delta cannot bring the part {key!r}, which its parent has not")
        rows: Floats = before + self._writer.write(key, after - before)
        largest = float(np.abs(rows).max(initial=0.0))
        if largest > _LARGEST:
            raise ContainerError(
                f"part {key!r} reaches {largest:.3g}; the next full version holds {_LARGEST:g} at most",
                "training has diverged: lower the learning rates",
            )
        return rows


def write_version(
    path: Path,
    *,
    run: str,
    round: int,
    number: int,
    fingerprint: str,
    adapter: Adapter,
    parent: tuple[int, Adapter] | None = None,
    codec: str = FULL_CODEC,
) -> Adapter:
    """Writes a version that lies in memory and returns it as every reader decodes it.

    ``parent``: number and decoded adapter that a delta version builds on; None: a full version.
    """
    header = header_for(
        "version", adapter, codec, run=run, round=round, fingerprint=fingerprint,
        version=number, builds_on=None if parent is None else parent[0],
    )  # fmt: skip
    if parent is None:
        return write_container(path, header, adapter)
    before = parent[1]
    decoded = write_container(path, header, {key: adapter[key] - before[key] for key in adapter})
    return {key: before[key] + decoded[key] for key in adapter}


def read_adapter(paths: Sequence[Path], fingerprint: str | None = None) -> Adapter:
    """The adapter that a chain of files leads to. Raises ContainerError, as ``VersionChain`` does."""
    chain = VersionChain(paths, fingerprint)
    return {key: chain.tensor(key) for key in chain.sizes}

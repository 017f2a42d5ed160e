"""Versions of the global adapter: a full one, or a delta to its parent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_sdk.errors import ContainerError
from edge_sdk.updates.container import header_for, read_container, write_container
from edge_sdk.updates.keys import Adapter

__all__ = ["read_adapter", "write_version"]


def write_version(
    path: Path,
    *,
    run: str,
    round: int,
    number: int,
    fingerprint: str,
    adapter: Adapter,
    parent: tuple[int, Adapter] | None = None,
    codec: str = "fp16",
) -> Adapter:
    """Writes a version and returns it as every reader decodes it: the server goes on from that.

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
    """The adapter that a chain leads to: a full version first, then deltas in order.

    Raises ContainerError for a chain that is empty, broken, mixed of runs, begins with a delta, or, where
    one is given, has another ``fingerprint``.
    """
    if not paths:
        raise ContainerError("a chain of no versions leads to no adapter")
    adapter: Adapter = {}
    held: int | None = None
    origin: tuple[str, str] | None = None
    for path in paths:
        with read_container(path, "version") as container:
            header = container.header
            if header.builds_on != held:
                raise ContainerError(
                    f"{path.name} builds on version {header.builds_on}, the chain has reached {held}",
                    "fetch the versions between them",
                )
            origin = origin or (header.run, fingerprint or header.fingerprint)
            if (header.run, header.fingerprint) != origin:
                raise ContainerError(
                    f"{path.name} is of run {header.run!r} with fingerprint {header.fingerprint[:12]}, "
                    f"what it belongs to of {origin[0]!r} with {origin[1][:12]}",
                    "a version serves only the run that made it",
                )
            if header.version is None:
                raise ContainerError(f"{path.name} is a version without a number")
            for key, part in container.parts.items():
                if held is not None and key in adapter:
                    container.add_to(adapter[key], key)
                elif held is None and part.slots is None:
                    adapter[key] = container.tensor(key)
                else:
                    raise ContainerError(f"part {key!r} of {path.name} is not whole, or not in its parent")
            held = header.version
    return adapter

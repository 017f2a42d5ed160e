"""The merge: what a round's updates make of the current adapter. One file a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Protocol

from edge_sdk.errors import ContainerError
from edge_sdk.updates.container import Container, fits, read_container
from edge_sdk.updates.keys import Adapter

__all__ = ["Contribution", "MergeRule", "Opened", "open_all"]


@dataclass(frozen=True)
class Contribution:
    """One device's stored update. ``weight`` multiplies its samples: staleness, importance."""

    path: Path
    device: str
    samples: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.samples < 1 or not isfinite(self.weight) or self.weight < 0:
            raise ContainerError(
                f"the update of {self.device} cannot count: {self.samples} samples, weight {self.weight}"
            )


class MergeRule(Protocol):
    """The same updates give the same bytes, in whatever order they came."""

    @property
    def name(self) -> str: ...

    def merge(self, current: Adapter, contributions: Sequence[Contribution]) -> Adapter:
        """The new adapter; ``current`` stays as it is. Raises ContainerError for a damaged update."""
        ...


@dataclass(frozen=True)
class Opened:
    """A contribution whose container was checked against the adapter. Its tensors are still on disk."""

    device: str
    container: Container
    weight: float
    """samples · weight: what it weighs in a mean."""


def open_all(current: Adapter, contributions: Sequence[Contribution]) -> list[Opened]:
    """The contributions in the one order that every rule uses: by device, then by round.

    Raises ContainerError for one that does not fit ``current`` or the others, or comes twice.
    """
    opened: dict[tuple[str, int], Opened] = {}
    for one in contributions:
        container = read_container(one.path, "update")
        place = (one.device, container.header.round)
        if place in opened:
            raise ContainerError(f"two updates of {one.device} for round {place[1]} would both count")
        _check(one, container, current)
        opened[place] = Opened(one.device, container, one.samples * one.weight)
    fingerprints = {one.container.header.fingerprint for one in opened.values()}
    if len(fingerprints) > 1:
        raise ContainerError(f"updates of {len(fingerprints)} different fingerprints cannot be merged")
    return [opened[place] for place in sorted(opened)]


def _check(one: Contribution, container: Container, current: Adapter) -> None:
    for key, part in container.parts.items():
        rows = current.get(key)
        if rows is None or not fits(part, rows.shape):
            raise ContainerError(f"the update of {one.device} has a part {key!r} that the adapter has not")

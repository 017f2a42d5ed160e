"""The merge: what a round's updates make of the current adapter. One file a rule.

A rule sees one group of parts at a time, the two factors of a module or one dense part, and one update after
the other, in an order that does not depend on how they came. It never sees files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import ContainerError
from edge_sdk.protocol.container import Part
from edge_sdk.updates.codecs import Floats
from edge_sdk.updates.container import rows_of

__all__ = ["Change", "Contribution", "Doubles", "Gathering", "MergeRule", "Sizes", "groups_of", "pair"]

Doubles = npt.NDArray[np.float64]
Sizes = Mapping[str, tuple[int, int]]
"""Rows and width of parts, by key."""


@dataclass(frozen=True)
class Contribution:
    """One device's stored update. ``weight`` multiplies its samples: staleness, importance.

    ``digest``: the sha256 that its file has as long as it is whole; None: that is not looked at.
    """

    path: Path
    device: str
    samples: int
    weight: float = 1.0
    digest: str | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or not isfinite(self.weight) or self.weight < 0:
            raise ContainerError(
                f"the update of {self.device} cannot count: {self.samples} samples, weight {self.weight}"
            )


class Change(NamedTuple):
    """What an update changes of one part: rows as its device decoded them, and which rows they are."""

    part: Part
    rows: Floats

    @property
    def at(self) -> slice | list[int]:
        return rows_of(self.part)


class Gathering(Protocol):
    """One group of parts, while updates are added to it."""

    def add(self, changes: Mapping[str, Change], weight: float) -> None:
        """One update's changes of this group, by key; ``weight`` is its samples times what it counts."""
        ...

    def result(self) -> Mapping[str, Doubles]:
        """The parts as they become. Rows that nobody changed have the values that they had."""
        ...


class MergeRule:
    """The same updates give the same bytes, in whatever order they came.

    Attributes:
        name: what ``merge.rule`` calls it.
        keeps_slots: a slot goes on where it was. Otherwise what refers to a slot of the last version (a
            residual, a server optimizer's state) means nothing in the next one, and is refused.
        reinit, fold: what the rule asks of devices, by the words of ``TrainSpec``.
    """

    name: str
    keeps_slots: bool = True
    reinit: str = "none"
    fold: str = "none"

    def begin(self, before: Mapping[str, Floats]) -> Gathering:
        """``before``: the group's parts as they are, with the fold of its module where there is one."""
        raise NotImplementedError

    def check(self, parts: Mapping[str, Part]) -> None:
        """Raises ContainerError for an update that this rule cannot merge, before it is stored."""

    def room(self, sizes: Sizes) -> int:
        """Bytes that a gathering of a group of these sizes takes at most."""
        return 3 * 8 * sum(rows * width for rows, width in sizes.values())

    def sizes_after(self, sizes: Sizes, trained: Mapping[str, int]) -> Sizes:  # noqa: ARG002 - those who grow do
        """A group's sizes after the merge; ``trained``: rows of each part, summed over the updates."""
        return sizes


def groups_of(sizes: Sizes) -> list[tuple[str, ...]]:
    """The keys in groups: what belongs to one module, or one dense part. Input's layers first, dense last."""
    groups: dict[tuple[bool, int, str], list[str]] = {}
    for key in sizes:
        name = key.removeprefix("fold.")
        if name.startswith("dense."):
            groups.setdefault((True, 0, name), []).append(key)
        else:
            layer, _, module = name.rpartition(".")[0].partition(".")
            groups.setdefault((False, int(layer), module), []).append(key)
    return [tuple(sorted(groups[place])) for place in sorted(groups)]


def pair(keys: Iterable[str]) -> tuple[str, str] | None:
    """The keys of A and B of a group's slots; None: a dense part."""
    slots = [key for key in keys if not key.startswith(("fold.", "dense."))]
    if not slots:
        return None
    a, b = sorted(slots)
    return a, b

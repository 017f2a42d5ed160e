"""The merge: what a round's updates make of the current adapter. One file a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_sdk.updates.keys import Adapter

__all__ = ["Contribution", "MergeRule"]


@dataclass(frozen=True)
class Contribution:
    """One device's stored update. ``weight`` multiplies its samples: staleness, importance."""

    path: Path
    device: str
    samples: int
    weight: float = 1.0


class MergeRule(Protocol):
    """The same updates give the same bytes, in whatever order they came."""

    @property
    def name(self) -> str: ...

    def merge(self, current: Adapter, contributions: Sequence[Contribution]) -> Adapter:
        """The new adapter; ``current`` stays as it is. Raises ContainerError for a damaged update."""
        ...

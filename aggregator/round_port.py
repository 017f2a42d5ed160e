"""What the rounds need of the server around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aggregator.planner.plan import RoundPlan
from aggregator.state.base import ParticipationRow, VersionRow
from edge_sdk.protocol.wire import Offer, Status

__all__ = ["Made", "RoundsPort"]


@dataclass(frozen=True)
class Made:
    """A version that was made, and is durable, but that no row names yet."""

    object: str
    bytes: int
    parent: int | None = None
    """The version that it is a delta to; None: it is a full one."""
    optimizer: str | None = None
    """Of the server optimizer: its state's objects, by name, as JSON."""
    layer_changes: tuple[float, ...] = ()
    """How far the product of each layer's slots moved, from layer 0 on."""


class RoundsPort(Protocol):
    """What the rounds need of the server around them."""

    def plan(self, round: int, devices: Sequence[Status], previous: Mapping[str, int]) -> RoundPlan:
        """``previous``: the depth recommended to each device in the round before."""
        ...

    def initial_version(self) -> Made: ...

    def merged_version(
        self, number: int, round: int, chain: Sequence[VersionRow], updates: Sequence[ParticipationRow]
    ) -> Made:
        """Durable. Raises OSError where the disk refuses it, and whatever else where it cannot be made."""
        ...

    def faults(
        self, number: int, chain: Sequence[VersionRow], updates: Sequence[ParticipationRow]
    ) -> Mapping[ParticipationRow, str]:
        """Which of the updates of a merge that failed cannot be merged, and why.

        Raises where it is none of their fault.
        """
        ...

    def utilities(self, before: VersionRow, made: Made, updates: Sequence[ParticipationRow]) -> str | None:
        """What each layer is worth after the merge that led from ``before`` to what was made, as JSON."""
        ...

    def evaluate(self, chain: Sequence[VersionRow]) -> None:
        """Begins; ``Rounds.on_evaluated`` gets the answer."""
        ...

    def send_offer(self, device: str, offer: Offer) -> None: ...

    def position_changed(self) -> None:
        """The round, the newest version or the end of the run: all devices are to know."""
        ...

    def given_up(self, devices: Sequence[str]) -> None:
        """No update of these devices is awaited any more."""
        ...

    def round_over(self) -> None:
        """What the round's updates were kept for is done."""
        ...

    def emit(self, name: str, **fields: Any) -> None: ...

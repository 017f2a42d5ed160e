"""What the rounds are told by the operator, and what they need of the server around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aggregator.planner.plan import RoundPlan
from aggregator.state.base import ParticipationRow, VersionRow
from edge_sdk.protocol.wire import Offer, Status

__all__ = ["RoundsPort", "Terms"]


@dataclass(frozen=True)
class Terms:
    """What the operator set for all rounds."""

    total: int
    min_devices: int
    evaluate_every: int | None
    """None: there is nothing to evaluate on."""
    chunk_bytes: int
    window: int


class RoundsPort(Protocol):
    """What the rounds need of the server around them."""

    def plan(self, round: int, devices: Sequence[Status], previous: Mapping[str, int]) -> RoundPlan:
        """``previous``: the depth recommended to each device in the round before."""
        ...

    def initial_version(self) -> tuple[str, int]:
        """Digest and bytes of version 0's object."""
        ...

    def merged_version(
        self, number: int, round: int, chain: Sequence[VersionRow], updates: Sequence[ParticipationRow]
    ) -> tuple[str, int]: ...

    def utilities(
        self, chain: Sequence[VersionRow], version: VersionRow, updates: Sequence[ParticipationRow]
    ) -> str | None:
        """What each layer is worth after the merge that led from ``chain`` to ``version``, as JSON."""
        ...

    def evaluate(self, chain: Sequence[VersionRow]) -> None:
        """Begins; ``Rounds.on_evaluated`` gets the answer."""
        ...

    def send_offer(self, device: str, offer: Offer) -> None: ...

    def position_changed(self) -> None:
        """The round, the newest version or the end of the run: all devices are to know."""
        ...

    def round_closed(self, missed: Sequence[str]) -> None:
        """Nothing more is taken for this round; these devices did not deliver."""
        ...

    def round_over(self) -> None:
        """What the round's updates were kept for is done."""
        ...

    def emit(self, name: str, **fields: Any) -> None: ...

"""When work is offered, and when a round has enough: one interface, two schedules.

Both drive the same state machine. What differs is who is waited for: a synchronous round waits for the
devices that it selected; a buffered one takes whatever arrives, of whatever round, until its buffer is full.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt
from typing import Protocol

from aggregator.state.base import ClosedBy

__all__ = ["Buffered", "Schedule", "Standing", "Synchronous", "staleness_weight"]


@dataclass(frozen=True)
class Standing:
    """How an open round stands."""

    open_s: float
    """Up-time of the server since it opened."""
    deadline_s: float
    quorum: int
    received: int
    """Updates of the devices that it selected."""
    waited_for: int
    """Of those, how many may still deliver."""
    uncounted: int
    """Updates that would be merged now, those of earlier rounds included."""
    at_work: int
    """Devices of any round that may still deliver."""


class Schedule(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def offers_while_open(self) -> bool:
        """Whoever is free gets work, also in the middle of a round."""
        ...

    def quorum(self, share: float, wanted: int) -> int:
        """How many updates are enough for a round of ``wanted`` devices."""
        ...

    def closes(self, standing: Standing) -> ClosedBy | None:
        """Why an open round closes now; None: it stays open."""
        ...


class Synchronous:
    """A round closes when nobody more can deliver, at its quorum, or at its deadline."""

    name = "synchronous"
    offers_while_open = False

    def quorum(self, share: float, wanted: int) -> int:
        return max(1, ceil(share * wanted - 1e-9))

    def closes(self, standing: Standing) -> ClosedBy | None:
        if standing.waited_for == 0:
            return "all"
        if standing.received >= standing.quorum:
            return "quorum"
        return "deadline" if standing.open_s >= standing.deadline_s else None


@dataclass(frozen=True)
class Buffered:
    """A round closes when its buffer is full, whoever filled it.

    After Federated Learning with Buffered Asynchronous Aggregation, Nguyen et al., 2022 (FedBuff). Ours: it
    also closes, with what it has, at its deadline, or when nobody is at work any more; and an update is
    weighed within its buffer, by samples and staleness, where FedBuff divides by the buffer's size.
    """

    size: int = 10
    name = "buffered"
    offers_while_open = True

    def quorum(self, share: float, wanted: int) -> int:  # noqa: ARG002
        return self.size

    def closes(self, standing: Standing) -> ClosedBy | None:
        if standing.uncounted >= standing.quorum:
            return "buffer"
        if standing.at_work == 0:
            return "all"
        return "deadline" if standing.open_s >= standing.deadline_s else None


def staleness_weight(staleness: int) -> float:
    """What an update is worth after so many versions: FedBuff's 1 / sqrt(1 + staleness)."""
    return 1.0 / sqrt(1.0 + staleness)

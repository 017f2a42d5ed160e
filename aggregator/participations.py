"""Who takes part in a round, and how far each device is: every step a row, written before anybody is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from aggregator.fleet import Fleet
from aggregator.state.base import ParticipationRow, ParticipationState, RoundRow, Store
from edge_sdk.clock import Clock
from edge_sdk.errors import StateError
from edge_sdk.protocol.wire import Announce, Choice, Decline, Offer, Receipt, Refusal

__all__ = ["DONE", "Participations", "critical_path", "deepest_of", "to_json"]

DONE: frozenset[ParticipationState] = frozenset({"received", "declined", "refused"})
"""States from which nothing more comes in this round."""


class Participations:
    """The participations of a run; those of the present round change while it is open, others never.

    Args:
        present: the present round's row.
    """

    def __init__(
        self, store: Store, run: str, fleet: Fleet, clock: Clock, present: Callable[[], RoundRow]
    ) -> None:
        self._store = store
        self._name = run
        self._fleet = fleet
        self._clock = clock
        self._present = present

    def present(self) -> Sequence[ParticipationRow]:
        """Those of the present round, by device."""
        return self._store.participations(self._name, self._present().number)

    def find(self, round: int, device: str) -> ParticipationRow | None:
        return self._store.participation(self._name, round, device)

    def open(self, round: int, device: str) -> ParticipationRow | None:
        """The participation, if its round is open."""
        present = self._present()
        return self.find(round, device) if present.state == "open" and round == present.number else None

    def recommended(self, round: int) -> dict[str, int]:
        """The depth that was recommended to each device of the round."""
        depths = {}
        for row in self._store.participations(self._name, round):
            for candidate in msgspec.json.decode(row.offer, type=Offer).candidates:
                if candidate.recommended:
                    depths[row.device] = candidate.depth
        return depths

    def on_choice(self, choice: Choice) -> bool:
        """Notes a choice; False where it is of no open participation, or comes after a later word."""
        row = self.open(choice.round, choice.device)
        if row is None:
            return False
        if row.state in ("offered", "chosen"):
            self._set(row, state="chosen", choice=to_json(choice))
        elif row.choice is None:  # the first one was lost, and this one comes after the update's announce
            self._set(row, choice=to_json(choice))
        else:
            return False
        return True

    def on_decline(self, decline: Decline) -> bool:
        row = self.open(decline.round, decline.device)
        if row is None or row.state in DONE:
            return False
        self._set(row, state="declined", decline=to_json(decline))
        return True

    def on_sending(self, announce: Announce) -> None:
        """The update is on its way. Should a crash come between its last byte and its row, this row tells."""
        row = self.open(announce.round, announce.device)
        if row is not None and (row.state != "sending" or row.object != announce.object):
            self._set(row, state="sending", announce=to_json(announce), object=announce.object)

    def on_received(self, announce: Announce, duplicate_bytes: int, upload_s: float | None) -> Receipt:
        """The update is durable: from now on it counts. Returns what to tell the device.

        Raises StateError where the device has no open participation: callers check before they store.
        """
        row = self.open(announce.round, announce.device)
        if row is None or row.state in DONE:
            raise StateError(f"an update of round {announce.round} was stored that is not waited for")
        receipt = Receipt(
            device=announce.device,
            run=announce.run,
            round=announce.round,
            object=announce.object,
            duplicate_bytes=duplicate_bytes,
        )
        self._set(
            row,
            state="received",
            announce=to_json(announce),
            object=announce.object,
            bytes=announce.bytes,
            samples=announce.samples,
            train_s=announce.measured.train_s,
            upload_s=upload_s,
            shaped_s=self._shaped_s(announce, upload_s),
            duplicate_bytes=duplicate_bytes,
            receipt=to_json(receipt),
            received_at=self._clock.wall(),
        )
        return receipt

    def on_refused(self, announce: Announce, refusal: Refusal) -> None:
        """The device's update of this round was refused for good."""
        row = self.open(announce.round, announce.device)
        if row is not None and row.state not in DONE:
            self._set(
                row,
                state="refused",
                announce=to_json(announce),
                object=announce.object,
                refusal=to_json(refusal),
            )

    def _shaped_s(self, announce: Announce, upload_s: float | None) -> float:
        """Seconds of an upload that its device's limit accounts for; 0: its link is not limited.

        A token bucket lets the first bytes through at once, so it may be less than bytes over rate.
        """
        status = self._fleet.reported(announce.device)
        kbps = 0.0 if status is None else status.limits.get("uplink_kbps", 0.0)
        if kbps <= 0:
            return 0.0
        at_rate = 8.0 * announce.bytes / (1000.0 * kbps)
        return at_rate if upload_s is None else min(at_rate, upload_s)

    def _set(self, row: ParticipationRow, **values: Any) -> None:
        self._store.set_participation(self._name, row.round, row.device, **values)


def critical_path(received: Sequence[ParticipationRow]) -> dict[str, float | None]:
    """What the round could not do without: the longest training and shaped upload of one device."""
    paths = []
    for one in received:
        train, shaped = one.train_s or 0.0, one.shaped_s or 0.0
        paths.append((train + shaped, train, shaped))
    if not paths:
        return {}
    critical, _, shaped = max(paths)
    return {
        "slowest_train_s": max(train for _, train, _ in paths),
        "shaped_upload_s": shaped,
        "critical_s": critical,
    }


def deepest_of(received: Sequence[ParticipationRow]) -> int:
    """The greatest depth that was trained."""
    announces = (msgspec.json.decode(one.announce, type=Announce) for one in received if one.announce)
    return max((announce.candidate.depth for announce in announces), default=0)


def to_json(record: msgspec.Struct) -> str:
    """A record as it lies in a row."""
    return msgspec.json.encode(record).decode()

"""Who takes part in a round, and how far each device is: every step a row, written before anybody is told.

A device has one participation at most from which an update may still come. It may come after its round
closed: then it is late, and counts in whatever round closes next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from math import inf
from typing import Any

import msgspec

from aggregator.fleet import Fleet
from aggregator.scheduling.progress import Progress
from aggregator.scheduling.schedule import Standing, staleness_weight
from aggregator.state.base import AWAITED, ParticipationRow, ParticipationState, RoundRow, Store
from edge_sdk.clock import Clock
from edge_sdk.errors import StateError
from edge_sdk.faults import reached
from edge_sdk.protocol.wire import Announce, Choice, Decline, Offer, Receipt, Refusal, Status

__all__ = ["Participations", "critical_path", "deepest_of", "empty_in_a_row", "to_json"]


class Participations:
    """The participations of a run. One changes as long as it is awaited, and once more when it is counted.

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
        self.progress = Progress(clock)

    def find(self, round: int, device: str) -> ParticipationRow | None:
        return self._store.participation(self._name, round, device)

    def states(self, round: int) -> Mapping[str, ParticipationState]:
        """How far each device of the round is."""
        return self._store.states(self._name, round)

    def awaited(self, device: str | None = None) -> Sequence[ParticipationRow]:
        """Those of any round, of one device or all, whose update may still come."""
        return self._store.awaited(self._name, device)

    def uncounted(self) -> Sequence[ParticipationRow]:
        """Those whose update is part of no merge yet."""
        return self._store.uncounted(self._name)

    def counted(self, round: int) -> Sequence[ParticipationRow]:
        """Those whose updates the round merges, in the order in which it does."""
        return self._store.counted(self._name, round)

    def newest_received(self) -> Mapping[str, ParticipationRow]:
        return self._store.newest_received(self._name)

    def standing(self, all_rounds: bool) -> Standing:
        """How the present round stands. ``all_rounds``: with what those of earlier rounds do."""
        row = self._present()
        states = list(self.states(row.number).values())
        return Standing(
            open_s=row.open_s,
            deadline_s=inf if row.deadline_s is None else row.deadline_s,
            quorum=len(states) if row.quorum is None else row.quorum,
            received=states.count("received"),
            waited_for=sum(state in AWAITED for state in states),
            uncounted=len(self.uncounted()) if all_rounds else 0,
            at_work=len(self.awaited()) if all_rounds else 0,
        )

    def expected(self, round: int, device: str) -> ParticipationRow | None:
        """The participation, if its update may still come."""
        row = self.find(round, device)
        return row if row is not None and row.state in AWAITED else None

    def add(self, offers: Mapping[str, Offer], wall: float) -> None:
        """The devices take part from now on, and in nothing before."""
        for device, offer in offers.items():
            for row in self.awaited(device):
                self._set(row, state="missed")
            self._store.add_participation(
                ParticipationRow(
                    self._name,
                    offer.round,
                    device,
                    "offered",
                    to_json(offer),
                    wall,
                    builds_on=offer.versions[-1].number,
                )
            )
            self._fleet.offered(device)
            self.progress.moved(device)

    def count(self, builds_on: int) -> list[ParticipationRow]:
        """What is there counts in the present round, by its staleness; as it stood before, by device."""
        rows = sorted(self.uncounted(), key=lambda row: (row.device, row.round))
        for row in rows:
            staleness = max(0, builds_on - (builds_on if row.builds_on is None else row.builds_on))
            weight = staleness_weight(staleness)
            self._set(row, counts_in=self._present().number, staleness=staleness, weight=weight)
        return rows

    def set_aside(self, bad: Mapping[ParticipationRow, str]) -> None:
        """The merge goes on without these, and says why. Durable when it returns."""
        with self._store.transaction():
            for row, cause in bad.items():
                self._set(row, state="set-aside", set_aside=cause)

    def give_up(self, least_version: int | None = None) -> list[ParticipationRow]:
        """Awaits nothing more of those who build on an older version; None: of anybody. Returns them."""
        rows = [
            row
            for row in self.awaited()
            if least_version is None or row.builds_on is None or row.builds_on < least_version
        ]
        for row in rows:
            self._set(row, state="missed")
        return rows

    def give_up_the_still(self, *, also_present: bool) -> tuple[list[ParticipationRow], float | None]:
        """Awaits nothing more of late ones whose work has not moved for as long as their deadline was.

        Args:
            also_present: those of the present round too, as nothing else ends their time.

        Returns:
            Who they were, and after how many seconds the next one may follow.
        """
        gone, left = [], []
        for row in self.awaited():
            if row.round >= self._present().number and not also_present:
                continue
            rest = msgspec.json.decode(row.offer, type=Offer).deadline_s - self.progress.still_s(row.device)
            if rest > 0:
                left.append(rest)
                continue
            self._set(row, state="missed")
            gone.append(row)
        return gone, min(left, default=None)

    def on_status(self, status: Status) -> list[ParticipationRow]:
        """A device says where it stands: what it has forgotten does not come. Returns what is given up."""
        lost = []
        position = status.position
        for row in self.awaited(status.device):
            if position is not None and position.round == row.round:
                if status.permission == "running":
                    self.progress.moved(status.device)
            elif row.round < self._present().number and row.state != "offered":
                self._set(row, state="missed")
                lost.append(row)
        return lost

    def recommended(self, round: int) -> dict[str, int]:
        """The depth that was recommended to each device of the round."""
        depths = {}
        for row in self._store.participations(self._name, round):
            for candidate in msgspec.json.decode(row.offer, type=Offer).candidates:
                if candidate.recommended:
                    depths[row.device] = candidate.depth
        return depths

    def on_choice(self, choice: Choice) -> bool:
        """Notes a choice; False where nothing was offered, or it comes after a later word."""
        row = self.find(choice.round, choice.device)
        if row is None:
            return False
        if row.state in ("offered", "chosen"):
            self._set(row, state="chosen", choice=to_json(choice))
        elif row.choice is None and row.state in ("sending", "received"):
            # The first one was lost, and this one comes after the update's announce.
            self._set(row, choice=to_json(choice))
        else:
            return False
        self.progress.moved(choice.device)
        reached("choice.noted")
        return True

    def on_decline(self, decline: Decline) -> bool:
        row = self.expected(decline.round, decline.device)
        if row is None:
            return False
        self._set(row, state="declined", decline=to_json(decline))
        reached("decline.noted")
        return True

    def on_sending(self, announce: Announce) -> None:
        """The update is on its way. Should a crash come between its last byte and its row, this row tells."""
        row = self.expected(announce.round, announce.device)
        if row is not None and (row.state != "sending" or row.object != announce.object):
            self._set(row, state="sending", announce=to_json(announce), object=announce.object)
        self.progress.moved(announce.device)
        reached("update.awaited")

    def on_received(self, announce: Announce, duplicate_bytes: int, upload_s: float | None) -> Receipt:
        """The update is durable: from now on it counts. Returns what to tell the device.

        Raises StateError where nothing is expected of the device: callers check before they store.
        """
        row = self.expected(announce.round, announce.device)
        if row is None:
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
        row = self.expected(announce.round, announce.device)
        if row is not None:
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


def empty_in_a_row(rounds: Sequence[RoundRow]) -> int:
    """How many of the last closed rounds nobody delivered to."""
    closed = (row.outcome for row in reversed(rounds) if row.state == "closed")
    return sum(1 for _ in takewhile(lambda outcome: outcome == "empty", closed))


def deepest_of(received: Sequence[ParticipationRow]) -> int:
    """The greatest depth that was trained."""
    announces = (msgspec.json.decode(one.announce, type=Announce) for one in received if one.announce)
    return max((announce.candidate.depth for announce in announces), default=0)


def to_json(record: msgspec.Struct) -> str:
    """A record as it lies in a row."""
    return msgspec.json.encode(record).decode()

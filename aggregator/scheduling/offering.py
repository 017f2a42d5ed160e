"""Who is offered what, now: those who are free, selected, and planned for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import msgspec

from aggregator.fleet import Fleet, Member
from aggregator.participations import Participations
from aggregator.round_port import RoundsPort
from aggregator.scheduling.lot import Lot
from aggregator.scheduling.selection import Applicant, how_many
from aggregator.scheduling.terms import Terms
from aggregator.state.base import ParticipationRow, VersionRow
from edge_sdk.protocol.wire import Announce, Choice, Offer, Run

__all__ = ["Draft", "Offering"]


@dataclass(frozen=True)
class Draft:
    """Offers that are not sent yet, by device."""

    offers: dict[str, Offer]
    wanted: int
    """How many of them are to deliver; more may be asked."""
    deadline_s: float


class Offering:
    """Makes the offers of a round.

    Args:
        chain: the versions to read to get one, a full one first.
    """

    def __init__(
        self,
        run: Run,
        terms: Terms,
        fleet: Fleet,
        participations: Participations,
        port: RoundsPort,
        chain: Callable[[int], list[VersionRow]],
    ) -> None:
        self._run = run
        self._terms = terms
        self._fleet = fleet
        self._participations = participations
        self._port = port
        self._chain = chain
        self._told_none: set[tuple[int, str, str]] = set()
        self._told_short = False

    def free(self, round: int) -> list[Member]:
        """Those who can be offered work in the round: ready, not in it yet, nor at work for another one."""
        ready = self._fleet.ready()
        if not ready:
            return []
        at_work = {row.device: row for row in self._participations.awaited()}
        taking_part = self._participations.states(round)
        return [
            member
            for member in ready
            if member.device not in taking_part and not self._busy(member, at_work.get(member.device))
        ]

    def places(self, at_work: int) -> int:
        """How many devices are wanted, beside those ``at_work``."""
        return how_many(self._terms.devices_per_round, len(self._fleet.ready())) - at_work

    def draft(self, round: int, builds_on: int, free: Sequence[Member], places: int) -> Draft | None:
        """Offers for those of ``free`` who are selected; None: there is nothing that they could do."""
        terms = self._terms
        wanted = min(places, len(free))
        count = min(len(free), ceil(wanted * terms.over_select - 1e-9))
        chosen = set(terms.selection.select(self._applicants(free), count, Lot(terms.seed, round)))
        statuses = [
            status for member in free if member.device in chosen and (status := member.planned()) is not None
        ]
        plan = self._port.plan(round, statuses, self._participations.recommended(round - 1))
        left_out = {(round, device, why) for device, why in plan.excluded.items()}
        for number, device, why in sorted(left_out - self._told_none):
            self._port.emit("offer.none", round=number, device=device, reason=why)
        self._told_none = left_out
        # a buffered round's offers go to a few at a time, of whom nobody asks that they train all layers
        if plan.warning and not (self._told_short or terms.schedule.offers_while_open):
            self._port.emit("round.uncovered", round=round, message=plan.warning)
        self._told_short = bool(plan.warning)
        if not plan.candidates:
            return None
        chain = tuple(version.ref for version in self._chain(builds_on))
        offers = {
            device: Offer(
                run=self._run.run,
                round=round,
                nonce=self._run.nonce,
                deadline_s=plan.deadline_s,
                target_s=plan.target_s,
                spec=self._run.spec,
                versions=chain,
                candidates=candidates,
                chunk_bytes=terms.chunk_bytes,
                window=terms.window,
            )
            for device, candidates in sorted(plan.candidates.items())
        }
        return Draft(offers, min(wanted, len(offers)), plan.deadline_s)

    def _busy(self, member: Member, row: ParticipationRow | None) -> bool:
        """Whether the device is at work for another round, or may be."""
        if row is None:
            return False
        if row.state != "offered" or self._terms.schedule.offers_while_open:
            return True
        position = None if member.status is None else member.status.position
        return position is not None and position.round == row.round

    def _applicants(self, free: Sequence[Member]) -> list[Applicant]:
        if not self._terms.selection.asks_history:
            return [Applicant(member.device) for member in free]
        last = self._participations.newest_received()
        return [_applicant(member.device, last.get(member.device)) for member in free]


def _applicant(device: str, last: ParticipationRow | None) -> Applicant:
    """What a device's last update told of it."""
    if last is None or last.announce is None:
        return Applicant(device)
    measured = msgspec.json.decode(last.announce, type=Announce).measured
    seconds = None if last.train_s is None else last.train_s + (last.upload_s or 0.0)
    if last.choice is not None:
        # What it predicts covers the download too, and what it measured is the truth of the rest.
        predicted = msgspec.json.decode(last.choice, type=Choice).candidate.seconds
        seconds = max(seconds or 0.0, predicted)
    return Applicant(
        device,
        samples=last.samples,
        loss=sqrt((measured.loss_first**2 + measured.loss_last**2) / 2),
        seconds=seconds,
        last_round=last.round,
    )

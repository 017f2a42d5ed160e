"""The rounds of a run, as one durable state machine.

    waiting -> open -> merging -> evaluating -> closed -> the next one's waiting ... -> the run is finished

Where a round stands is a row of the store, and every step is one transaction that moves it on, written
before anybody is told. ``advance`` looks at the row and does what it asks for, so a server that was killed
goes on by the same path as one that never stopped. Round 0 has no devices: its merge is the making of
version 0, which is evaluated like any other.

While a round is open, only the server's up-time counts against its deadline. Which updates count in it, and
with what weight, is decided once, by the transaction that moves the round from open to merging: all that are
there and counted in no round before, of whatever round they are. When that is, the schedule says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from aggregator import round_events as events
from aggregator.fleet import Fleet
from aggregator.participations import Participations, critical_path, empty_in_a_row
from aggregator.round_merge import RoundMerge
from aggregator.round_port import RoundsPort
from aggregator.scheduling.offering import Draft, Offering
from aggregator.scheduling.patience import Patience
from aggregator.scheduling.terms import Terms
from aggregator.state.base import AWAITED, ClosedBy, ParticipationRow, RoundRow, Store, VersionRow, chain_of
from edge_sdk.clock import Clock
from edge_sdk.errors import StateError
from edge_sdk.faults import reached
from edge_sdk.protocol.trainer import Died, Evaluated, Failed
from edge_sdk.protocol.wire import Offer, Run, Status

__all__ = ["Rounds"]

_SAVE_S = 2.0
"""How often the time that a round has been open is written down: what a crash may give back to it."""
_LEAST_REST_S, _MOST_REST_S = 5.0, 300.0
"""Pause after a round in which nobody delivered; doubles with every one in a row."""
_LEAST_OFFER_S = 1.0


class Rounds:
    """Moves the run's rounds on. Driven by ``advance`` and the ``on_*`` calls, by one thread."""

    def __init__(
        self, store: Store, run: Run, terms: Terms, fleet: Fleet, port: RoundsPort, clock: Clock
    ) -> None:
        self._store = store
        self._name = run.run
        self._terms = terms
        self._fleet = fleet
        self._port = port
        self._clock = clock
        self._last = clock.monotonic()
        self._saved = self._last
        self._not_before = self._last
        self._evaluating, self._evaluation_began = False, self._last
        self._told_waiting: tuple[int, int] | None = None
        self._buffered = terms.schedule.offers_while_open
        row = store.last_round(self._name)
        if row is None:
            row = RoundRow(self._name, 0, "merging")
            store.add_round(row)
        self._row = row
        self.participations = Participations(store, self._name, fleet, clock, lambda: self._row)
        self._offering = Offering(run, terms, fleet, self.participations, port, self.chain)
        self._merging = RoundMerge(self.participations, port, clock)
        self._patience = Patience(self.participations, port, clock, buffered=self._buffered)
        if row.state == "waiting":
            self._not_before += self._rest_s()

    # What is so

    @property
    def row(self) -> RoundRow:
        return self._row

    @property
    def finished(self) -> bool:
        return self._row.state == "closed" and self._row.number >= self._terms.total

    def newest(self) -> VersionRow | None:
        versions = self._store.versions(self._name)
        return versions[-1] if versions else None

    def chain(self, number: int) -> list[VersionRow]:
        """The versions to read, a full one first, to get version ``number``."""
        return chain_of(self._store.versions(self._name), number)

    def is_late(self, round: int) -> bool:
        """Whether an update of that round, should it come now, comes after the round."""
        return round < self._row.number or self._row.state not in ("waiting", "open")

    def on_evaluated(self, reply: Evaluated | Failed | Died) -> None:
        row = self._row
        if row.state != "evaluating" or row.version is None:
            return
        reached("evaluation.come")
        self._evaluating = False
        wall, took = self._clock.wall(), self._clock.monotonic() - self._evaluation_began
        found = events.found(reply) if isinstance(reply, Evaluated) else {}
        with self._store.transaction():
            if isinstance(reply, Evaluated):
                self._store.set_version(self._name, row.version, **found, evaluation_error=None)
                self._move(evaluating_s=took, evaluation_s=min(took, reply.seconds))
            else:
                self._store.set_version(self._name, row.version, evaluation_error=reply.message)
            self._move(state="closed", evaluated_at=wall)
        told = {"version": row.version, "round": row.number}
        if isinstance(reply, Evaluated):
            self._port.emit("version.evaluated", **told, **found, seconds=reply.seconds)
        else:
            self._port.emit("version.not_evaluated", **told, message=reply.message)
        self._emit_closed()

    def on_status(self, status: Status) -> None:
        """A device says where it stands."""
        self._patience.on_status(status)

    # What time and the state bring

    def advance(self) -> float | None:
        """Takes every step whose conditions hold.

        Returns after how many seconds to look again; None: only news can change anything.
        """
        self._count_time()
        while self._step():
            self._count_time()
        row, now = self._row, self._clock.monotonic()
        waits = []
        if row.state == "open" and row.deadline_s is not None:
            waits += [row.deadline_s - row.open_s, _SAVE_S]
        if row.state == "waiting" or (row.state == "open" and self._buffered):
            still = self._patience.wait_s()
            waits += [] if still is None else [still]
            waits += [self._not_before - now] if self._not_before > now else []
        if row.state == "merging" and self._merging.wait_s is not None:
            waits.append(self._merging.wait_s)
        return max(0.0, min(waits)) if waits else None

    def save(self) -> None:
        """Writes down how long the round has been open."""
        self._count_time()
        self._store.set_round(self._name, self._row.number, wait_s=self._row.wait_s, open_s=self._row.open_s)

    def offer_again(self, device: str) -> None:
        """The device may have missed its offer: it gets it again, with the time that is left."""
        here = self._row
        for row in self.participations.awaited(device):
            if row.state == "sending":
                continue
            offer = msgspec.json.decode(row.offer, type=Offer)
            if not self._buffered:
                if here.state != "open" or row.round != here.number or here.deadline_s is None:
                    continue  # it is late, and offered something else as soon as there is
                left = max(_LEAST_OFFER_S, here.deadline_s - here.open_s)
                offer = msgspec.structs.replace(offer, deadline_s=left)
            self._port.send_offer(device, offer)

    def _step(self) -> bool:
        match self._row.state:
            case "waiting":
                return self._open_if_ready()
            case "open":
                return self._close_if_done()
            case "merging":
                return self._merge()
            case "evaluating":
                return self._evaluate()
            case "closed":
                return self._next()

    def _open_if_ready(self) -> bool:
        now = self._clock.monotonic()
        self._patience.look()
        ready = len(self._fleet.ready())
        if ready < self._terms.min_devices or now < self._not_before:
            state = self._row.number, ready
            if self._told_waiting != state:
                self._told_waiting = state
                self._port.emit(
                    "round.waiting", round=self._row.number, ready=ready, needed=self._terms.min_devices
                )
            return False
        newest = self.newest()
        if newest is None:
            raise StateError("a round waits for devices, and there is no version 0")
        draft = self._draft(newest.number)
        if draft is not None:
            self._open(draft, newest.number)
        return draft is not None

    def _draft(self, builds_on: int) -> Draft | None:
        """Offers for whoever is free; None: nobody is, or there is nothing to offer for a while."""
        at_work = len(self.participations.awaited()) if self._buffered else 0
        places = self._offering.places(at_work)
        free = self._offering.free(self._row.number) if places > 0 else []
        if not free:
            return None
        draft = self._offering.draft(self._row.number, builds_on, free, places)
        if draft is None:
            self._not_before = self._clock.monotonic() + _LEAST_REST_S
        return draft

    def _open(self, draft: Draft, builds_on: int) -> None:
        wall, terms = self._clock.wall(), self._terms
        with self._store.transaction():
            self._move(
                state="open",
                builds_on=builds_on,
                deadline_s=draft.deadline_s,
                wait_s=self._row.wait_s,
                selection=terms.selection.name,
                schedule=terms.schedule.name,
                wanted=draft.wanted,
                quorum=terms.schedule.quorum(terms.quorum, draft.wanted),
                opened_at=wall,
            )
            self.participations.add(draft.offers, wall)
        reached("round.open")
        self._port.emit("round.opened", **events.opened(self._row, terms.total, sorted(draft.offers)))
        self._port.position_changed()
        self._send(draft)
        reached("round.offered")

    def _send(self, draft: Draft) -> None:
        for device, offer in draft.offers.items():
            self._port.send_offer(device, offer)

    def _close_if_done(self) -> bool:
        if self._buffered:
            self._patience.look()
        closes, standing = self._terms.schedule.closes, self.participations.standing
        why = closes(standing(self._buffered))
        if self._buffered and why in (None, "all") and self._offer_more():
            why = closes(standing(True))
        if why is not None:
            self._close(why)
        return why is not None

    def _offer_more(self) -> bool:
        """Whoever became free gets work; whether there was anybody."""
        rests = self._clock.monotonic() < self._not_before
        draft = None if rests else self._draft(self._built_on())
        if draft is not None:
            with self._store.transaction():
                self.participations.add(draft.offers, self._clock.wall())
            self._send(draft)
        return draft is not None

    def _close(self, why: ClosedBy) -> None:
        row, terms = self._row, self._terms
        with self._store.transaction():
            counted = self.participations.count(self._built_on())
            missed: list[ParticipationRow] = []
            if not terms.merge_late or row.number >= terms.total:
                missed = self.participations.give_up()
            self._move(
                state="merging",
                open_s=row.open_s,
                closed_by=why,
                closed_at=self._clock.wall(),
                **critical_path([one for one in counted if one.round == row.number]),
            )
            late = [one for one in counted if one.round != row.number]
            # Who was too slow for the deadline is slow, whatever becomes of its update.
            slow = why == "deadline" and not self._buffered
            present = [
                replace(one, state="missed") if slow and one.state in AWAITED else one
                for one in self._store.participations(self._name, row.number)
            ]
            self._fleet.learn([*present, *late], row.open_s)
        reached("round.closed")
        awaited = self.participations.awaited()
        self._port.emit("round.closed", **events.closed(self._row, counted, missed, awaited))
        self._port.given_up([one.device for one in missed])

    def _merge(self) -> bool:
        row, began = self._row, self._clock.monotonic()
        reached("merge.begun")
        received = self.participations.counted(row.number)
        if row.number > 0 and not received:
            self._close_empty()
            return True
        if row.number == 0:
            number, made = 0, self._port.initial_version()
        else:
            builds_on = self._built_on()
            number = builds_on + 1
            chain = self.chain(builds_on)
            merged = self._merging.made(number, row.number, chain)
            if merged is None:
                if self._row.held != self._merging.held:
                    self._move(held=self._merging.held)
                return False
            made, received = merged
        reached("version.durable")
        wall = self._clock.wall()
        version = VersionRow(
            self._name, number, row.number, made.object, made.bytes, made.parent, "global", wall,
            optimizer=made.optimizer,
        )  # fmt: skip
        if row.number > 0:
            version = replace(version, utilities=self._port.utilities(chain[-1], made, received))
        with self._store.transaction():
            self._store.add_version(version)
            tell_who_is_too_old = self._patience.too_old(number - self._terms.max_staleness)
            self._move(
                state="evaluating",
                version=number,
                outcome="merged",
                held=None,
                merge_s=self._clock.monotonic() - began,
                merged_at=wall,
            )
        reached("version.stored")
        self._port.emit("version.made", **events.made(self._row, version, len(received)))
        self._port.position_changed()
        tell_who_is_too_old()
        reached("version.told")
        return True

    def _built_on(self) -> int:
        if self._row.builds_on is None:
            raise StateError(f"round {self._row.number} merges, and nobody knows on what it builds")
        return self._row.builds_on

    def _close_empty(self) -> None:
        self._move(state="closed", outcome="empty", version=self._row.builds_on)
        self._port.emit("round.empty", round=self._row.number, version=self._row.builds_on)
        self._emit_closed()

    def _evaluate(self) -> bool:
        row, every = self._row, self._terms.evaluate_every
        if self._evaluating:
            return False
        if row.version is None:
            raise StateError(f"round {row.number} evaluates no version")
        due = every is not None and (row.number % every == 0 or row.number >= self._terms.total)
        if not due:
            self._move(state="closed")
            self._emit_closed()
            return True
        self._evaluating, self._evaluation_began = True, self._clock.monotonic()
        self._port.evaluate(self.chain(row.version))
        reached("evaluation.begun")
        return False

    def _next(self) -> bool:
        """A closed round is followed by the next one, or by the end of the run."""
        if self.finished:
            run = self._store.run(self._name)
            if run is not None and not run.finished:
                self._store.set_run(self._name, finished=True)
                reached("run.finished")
                self._port.round_over()
                self._port.emit("run.finished", rounds=self._row.number, version=self._row.version)
                self._port.position_changed()
            return False
        row = RoundRow(self._name, self._row.number + 1, "waiting")
        self._store.add_round(row)
        reached("round.next")
        rest = self._rest_s() if self._row.outcome == "empty" else 0.0
        self._row = row
        self._port.round_over()
        reached("round.swept")
        self._not_before = self._clock.monotonic() + rest
        return True

    # How

    def _rest_s(self) -> float:
        """Seconds to wait after rounds in which nobody delivered, so that they do not chase one another."""
        empty = empty_in_a_row(self._store.rounds(self._name))
        return min(_MOST_REST_S, _LEAST_REST_S * 2.0 ** min(empty - 1, 16)) if empty else 0.0

    def _emit_closed(self) -> None:
        reached("round.done")
        row = self._row
        if row.number == 0:
            return
        self._port.emit("round.done", **events.done(row))

    def _move(self, **values: Any) -> None:
        self._store.set_round(self._name, self._row.number, **values)
        self._row = replace(self._row, **values)

    def _count_time(self) -> None:
        now = self._clock.monotonic()
        passed, self._last = max(0.0, now - self._last), now
        if self._row.state == "open":
            self._row = replace(self._row, open_s=self._row.open_s + passed)
        elif self._row.state == "waiting":
            self._row = replace(self._row, wait_s=self._row.wait_s + passed)
        if self._row.state == "open" and now - self._saved >= _SAVE_S:
            self._saved = now
            self._store.set_round(self._name, self._row.number, open_s=self._row.open_s)

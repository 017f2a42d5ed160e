"""The rounds of a run, as one durable state machine.

    waiting -> open -> merging -> evaluating -> closed -> the next one's waiting ... -> the run is finished

Where a round stands is a row of the store, and every step is one transaction that moves it on, written
before anybody is told. ``advance`` looks at the row and does what it asks for, so a server that was killed
goes on by the same path as one that never stopped. Round 0 has no devices: its merge is the making of
version 0, which is evaluated like any other.

While a round is open, only the server's up-time counts against its deadline. Whether an update came in time
is decided once, by the transaction that moves the round from open to merging.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from aggregator.fleet import Fleet
from aggregator.participations import DONE, Participations, critical_path, to_json
from aggregator.planner.plan import RoundPlan
from aggregator.round_port import RoundsPort, Terms
from aggregator.state.base import ParticipationRow, RoundRow, Store, VersionRow
from edge_sdk.clock import Clock
from edge_sdk.errors import ContainerError, StateError
from edge_sdk.protocol.trainer import Died, Evaluated, Failed
from edge_sdk.protocol.wire import Offer, Run

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
        self._run = run
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
        self._told_none: set[tuple[int, str, str]] = set()
        row = store.last_round(self._name)
        if row is None:
            row = RoundRow(self._name, 0, "merging")
            store.add_round(row)
        self._row = row
        self.participations = Participations(store, self._name, fleet, clock, lambda: self._row)
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
        versions = {version.number: version for version in self._store.versions(self._name)}
        chain: list[VersionRow] = []
        at: int | None = number
        while at is not None:
            if at not in versions or len(chain) > len(versions):
                raise StateError(f"version {number} refers to version {at}, which there is not")
            chain.insert(0, versions[at])
            at = versions[at].parent
        return chain

    def on_evaluated(self, reply: Evaluated | Failed | Died) -> None:
        row = self._row
        if row.state != "evaluating" or row.version is None:
            return
        self._evaluating = False
        wall, took = self._clock.wall(), self._clock.monotonic() - self._evaluation_began
        with self._store.transaction():
            if isinstance(reply, Evaluated):
                self._store.set_version(
                    self._name,
                    row.version,
                    accuracy=reply.accuracy,
                    loss=reply.loss,
                    examples=reply.examples,
                    f1=reply.f1,
                    perplexity=reply.perplexity,
                    tokens=reply.tokens,
                    evaluation_error=None,
                )
                self._move(evaluating_s=took, evaluation_s=min(took, reply.seconds))
            else:
                self._store.set_version(self._name, row.version, evaluation_error=reply.message)
            self._move(state="closed", evaluated_at=wall)
        if isinstance(reply, Evaluated):
            self._port.emit(
                "version.evaluated",
                version=row.version,
                round=row.number,
                accuracy=reply.accuracy,
                loss=reply.loss,
                examples=reply.examples,
                f1=reply.f1,
                perplexity=reply.perplexity,
                tokens=reply.tokens,
                seconds=reply.seconds,
            )
        else:
            self._port.emit(
                "version.not_evaluated", version=row.version, round=row.number, message=reply.message
            )
        self._emit_closed()

    # What time and the state bring

    def advance(self) -> float | None:
        """Takes every step whose conditions hold.

        Returns after how many seconds to look again; None: only news can change anything.
        """
        self._count_time()
        while self._step():
            self._count_time()
        row = self._row
        if row.state == "open" and row.deadline_s is not None:
            return max(0.0, min(_SAVE_S, row.deadline_s - row.open_s))
        if row.state == "waiting":
            rest = self._not_before - self._clock.monotonic()
            return rest if rest > 0 else None
        return None

    def save(self) -> None:
        """Writes down how long the round has been open."""
        self._count_time()
        self._store.set_round(self._name, self._row.number, wait_s=self._row.wait_s, open_s=self._row.open_s)

    def offer_again(self, device: str) -> None:
        """The device may have missed its offer: it gets it again, with the time that is left."""
        row = self.participations.open(self._row.number, device)
        if row is None or row.state not in ("offered", "chosen") or self._row.deadline_s is None:
            return
        offer = msgspec.json.decode(row.offer, type=Offer)
        left = max(_LEAST_OFFER_S, self._row.deadline_s - self._row.open_s)
        self._port.send_offer(device, msgspec.structs.replace(offer, deadline_s=left))

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
        ready, now = self._fleet.ready(), self._clock.monotonic()
        if len(ready) < self._terms.min_devices or now < self._not_before:
            state = self._row.number, len(ready)
            if self._told_waiting != state:
                self._told_waiting = state
                self._port.emit(
                    "round.waiting", round=self._row.number, ready=len(ready), needed=self._terms.min_devices
                )
            return False
        newest = self.newest()
        if newest is None:
            raise StateError("a round waits for devices, and there is no version 0")
        statuses = [status for member in ready if (status := member.planned()) is not None]
        plan = self._port.plan(
            self._row.number, statuses, self.participations.recommended(self._row.number - 1)
        )
        left_out = {(self._row.number, device, why) for device, why in plan.excluded.items()}
        for number, device, why in sorted(left_out - self._told_none):
            self._port.emit("offer.none", round=number, device=device, reason=why)
        self._told_none = left_out
        if not plan.candidates:
            self._not_before = now + _LEAST_REST_S
            return False
        self._open(plan, newest)
        return True

    def _open(self, plan: RoundPlan, newest: VersionRow) -> None:
        number, wall = self._row.number, self._clock.wall()
        chain = tuple(version.ref for version in self.chain(newest.number))
        offers = {
            device: Offer(
                run=self._name,
                round=number,
                nonce=self._run.nonce,
                deadline_s=plan.deadline_s,
                target_s=plan.target_s,
                spec=self._run.spec,
                versions=chain,
                candidates=candidates,
                chunk_bytes=self._terms.chunk_bytes,
                window=self._terms.window,
            )
            for device, candidates in sorted(plan.candidates.items())
        }
        with self._store.transaction():
            self._move(
                state="open",
                builds_on=newest.number,
                deadline_s=plan.deadline_s,
                wait_s=self._row.wait_s,
                opened_at=wall,
            )
            for device, offer in offers.items():
                self._store.add_participation(
                    ParticipationRow(self._name, number, device, "offered", to_json(offer), wall)
                )
        self._port.emit(
            "round.opened",
            round=number,
            rounds=self._terms.total,
            version=newest.number,
            devices=sorted(offers),
            deadline_s=plan.deadline_s,
        )
        self._port.position_changed()
        for device, offer in offers.items():
            self._port.send_offer(device, offer)

    def _close_if_done(self) -> bool:
        row, taking_part = self._row, self.participations.present()
        left = [one for one in taking_part if one.state not in DONE]
        if left and row.deadline_s is not None and row.open_s < row.deadline_s:
            return False
        received = [one for one in taking_part if one.state == "received"]
        with self._store.transaction():
            for one in left:
                self._store.set_participation(self._name, row.number, one.device, state="missed")
            for one in received:
                self._store.set_participation(
                    self._name, row.number, one.device, counts_in=row.number, staleness=0, weight=1.0
                )
            self._move(
                state="merging",
                open_s=row.open_s,
                closed_at=self._clock.wall(),
                **critical_path(received),
            )
            self._fleet.learn(self.participations.present(), row.open_s)
        self._port.emit(
            "round.closed",
            round=row.number,
            received=[one.device for one in received],
            missed=[one.device for one in left],
            open_s=row.open_s,
        )
        self._port.round_closed([one.device for one in left])
        return True

    def _merge(self) -> bool:
        row, began = self._row, self._clock.monotonic()
        received = [one for one in self.participations.present() if one.state == "received"]
        if row.number > 0 and not received:
            self._close_empty()
            return True
        if row.number == 0:
            number, made = 0, self._port.initial_version()
        else:
            builds_on = self._built_on()
            number = builds_on + 1
            chain = self.chain(builds_on)
            try:
                made = self._port.merged_version(number, row.number, chain, received)
            except ContainerError as error:
                # The same files would give the same error at every start: the run goes on without them.
                self._port.emit(
                    "round.not_merged", round=row.number, updates=len(received), message=error.message
                )
                self._close_empty()
                return True
        wall = self._clock.wall()
        version = VersionRow(
            self._name, number, row.number, made.object, made.bytes, made.parent, "global", wall,
            optimizer=made.optimizer,
        )  # fmt: skip
        if row.number > 0:
            version = replace(version, utilities=self._port.utilities(chain, version, received))
        with self._store.transaction():
            self._store.add_version(version)
            self._move(
                state="evaluating",
                version=number,
                outcome="merged",
                merge_s=self._clock.monotonic() - began,
                merged_at=wall,
            )
        self._port.emit(
            "version.made",
            version=number,
            round=row.number,
            bytes=made.bytes,
            full=made.parent is None,
            updates=len(received),
            seconds=self._row.merge_s,
        )
        self._port.position_changed()
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
        return False

    def _next(self) -> bool:
        """A closed round is followed by the next one, or by the end of the run."""
        if self.finished:
            run = self._store.run(self._name)
            if run is not None and not run.finished:
                self._store.set_run(self._name, finished=True)
                self._port.round_over()
                self._port.emit("run.finished", rounds=self._row.number, version=self._row.version)
                self._port.position_changed()
            return False
        row = RoundRow(self._name, self._row.number + 1, "waiting")
        self._store.add_round(row)
        self._port.round_over()
        rest = self._rest_s() if self._row.outcome == "empty" else 0.0
        self._row = row
        self._not_before = self._clock.monotonic() + rest
        return True

    # How

    def _rest_s(self) -> float:
        """Seconds to wait after rounds in which nobody delivered, so that they do not chase one another."""
        empty = 0
        for row in reversed(self._store.rounds(self._name)):
            if row.state == "closed" and row.outcome == "empty":
                empty += 1
            elif row.state == "closed":
                break
        return min(_MOST_REST_S, _LEAST_REST_S * 2.0 ** min(empty - 1, 16)) if empty else 0.0

    def _emit_closed(self) -> None:
        row = self._row
        if row.number == 0:
            return
        self._port.emit(
            "round.done",
            round=row.number,
            outcome=row.outcome,
            version=row.version,
            open_s=row.open_s,
            merge_s=row.merge_s,
            evaluation_s=row.evaluation_s,
            slowest_train_s=row.slowest_train_s,
            overhead_s=row.overhead_s,
        )

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

"""The aggregator: one actor, one inbox, one thread. What it decides is in the rooms it holds together.

``handle`` takes one event, ``tick`` does what is due; ``run_forever`` feeds both until the run is over, and
a simulator may do so in its place. Nothing waits: a message, a trainer's answer or time moves things on.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from aggregator.adapters import Adapters
from aggregator.brokerage import Brokerage
from aggregator.evaluation import Evaluator, failure, setup_of
from aggregator.fleet import Fleet
from aggregator.intake import Intake
from aggregator.methods.base import find_method
from aggregator.planner.plan import RoundPlan, plan_round
from aggregator.preparing import check_same, make_run, mathematics, run_fingerprint
from aggregator.reception import Reception
from aggregator.rounds import Rounds, Terms
from aggregator.state.base import ParticipationRow, RunRow, Store, VersionRow
from aggregator.state.folder import StateFolder, check_objects, open_store
from aggregator.transfers import Downloads, Ledger, Uploads
from edge_sdk.clock import Clock, SystemClock
from edge_sdk.config.run import RunConfig
from edge_sdk.data.base_files import find_base
from edge_sdk.errors import BrokerError, EdgeError, StateError
from edge_sdk.events import Event, EventBus
from edge_sdk.protocol.base import Record
from edge_sdk.protocol.topics import Topics
from edge_sdk.protocol.trainer import Described, Died, Failed, Progress, TrainerHost, TrainerReply
from edge_sdk.protocol.wire import AggregatorState, Offer, Run, Status, encode
from edge_sdk.transport.base import Connection, Inbound, Transport, Will
from edge_sdk.transport.objects import ObjectStore

__all__ = ["Aggregator", "Stop"]

_LONGEST_S = 60.0
_SAVE_S = 2.0
_BATCH = 256
"""Events handled before time is looked at again: a flood does not stop the clock."""
_GIVE_UP_S = 30.0
"""A broker that was never reached is an error after so long; one that was is waited for for ever."""


@dataclass(frozen=True)
class Stop:
    """End the server; everything stays where it is, and the same command goes on."""


@dataclass
class _Running:
    """The rooms that exist once the run's record does."""

    run: Run
    base: Path
    fleet: Fleet
    adapters: Adapters
    rounds: Rounds
    uploads: Uploads
    downloads: Downloads
    intake: Intake
    reception: Reception


class Aggregator:
    """Runs one run to its end.

    Args:
        config: as ``load_run_config`` gives it.
        transport: None: MQTT, to the broker of the config, which is started where it is embedded.
        trainer: None: a trainer process of its own.
        clock: None: the machine's.
        on_event: called with every Event, in the server's thread.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        transport: Transport | None = None,
        trainer: TrainerHost | None = None,
        clock: Clock | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.config = config
        self.events = EventBus()
        if on_event is not None:
            self.events.subscribe(on_event)
        self.error: EdgeError | None = None
        self.done = False
        self._clock = clock or SystemClock()
        self._topics = Topics(config.broker.namespace)
        self._folder = StateFolder(Path(config.run.state_dir))
        self._brokerage = Brokerage(config.broker, self._folder, transport)
        self._trainer = trainer
        self._epoch = uuid.uuid4().hex
        self._inbox: queue.SimpleQueue[Inbound | Connection | TrainerReply | Stop] = queue.SimpleQueue()
        self._running: _Running | None = None
        self._opened = self._closed = False
        self._store_or_none: Store | None = None
        self._ever_connected = False
        self._linger_until: float | None = None
        self._thread: threading.Thread | None = None

    # Life

    def start(self) -> None:
        """Opens here, so that errors are raised here, and runs in a thread of its own."""
        self.open()
        self._thread = threading.Thread(target=self._run_quietly, name="aggregator", daemon=True)
        self._thread.start()

    def ask_to_stop(self) -> None:
        """``run_forever`` ends in order, soon. From any thread, and from a signal's handler."""
        self._inbox.put(Stop())

    def stop(self) -> None:
        """Asks, and waits until the thread that ``start`` began has ended. May be called twice."""
        self.ask_to_stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the server that ``start`` began has ended. Raises what it ended with."""
        if self._thread is not None:
            self._thread.join(timeout)
        if self.error is not None:
            raise self.error
        return self.done

    def run_forever(self) -> None:
        """Until the run is over, ``stop``, or an error, which is raised."""
        try:
            self.open()
            while not self.done:
                self.step(self.tick())
        finally:
            self.close()
        if self.error is not None:
            raise self.error

    def _run_quietly(self) -> None:
        with contextlib.suppress(EdgeError):
            self.run_forever()

    def open(self) -> None:
        """Takes the state folder, goes on where it stands, and connects. Does nothing the second time.

        Raises EdgeError for whatever makes the run impossible.
        """
        if self._opened:
            return
        self._opened = True
        self._began = self._saved = self._clock.monotonic()
        self._folder.lock()
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        shutil.rmtree(self._folder.work, ignore_errors=True)
        self._folder.work.mkdir()
        self._store_or_none = open_store(self._folder)
        self._objects = ObjectStore(self._folder.objects)
        check_objects(self._store, self._objects)
        self._ledger = Ledger(self._store, self.config.run.name)
        self._method = find_method(self.config.run.method)
        if self._trainer is None:
            self._trainer = _own_trainer(self._folder.trainer)
        self._trainer.start(self._inbox.put)
        self._evaluator = Evaluator(self._trainer, self._on_progress)
        row = self._store.run(self.config.run.name)
        if row is None:
            self._begin()
        else:
            base = check_same(row, self.config, self._folder.path)
            self._store.set_run(row.run, rounds=self.config.rounds.total, finished=False)
            self._resume(msgspec.json.decode(row.record, type=Run), base)
        transport = self._brokerage.open(self._emit)
        for topic in (self._topics.control("+"), self._topics.bulk("+"), self._topics.presence("+")):
            transport.subscribe(topic)
        transport.start(self._inbox.put, Will(self._topics.aggregator, encode(self._state(ready=False))))

    def close(self) -> None:
        """Says goodbye and lets go of everything. May be called twice."""
        self.done = True
        if self._closed or not self._opened:
            return
        self._closed = True
        with contextlib.suppress(EdgeError):
            self._publish(self._topics.aggregator, encode(self._state(ready=False)), retain=True)
        self._brokerage.close()
        if self._trainer is not None:
            self._trainer.close()
        if self._running is not None:
            self._running.uploads.close()
            with contextlib.suppress(EdgeError):
                self._save()
        if self._store_or_none is not None:
            self._store_or_none.close()
        self._folder.release()

    # The first start, and every other

    def _begin(self) -> None:
        """No such run yet: the trainer tells the model's shape, and then the run is made."""
        base = find_base(self.config.base.path)
        fingerprint = run_fingerprint(self.config, base, self._folder.path)
        spec = self._method.spec(self.config)

        def described(reply: Described | Failed | Died) -> None:
            if not isinstance(reply, Described):
                raise failure(reply)
            run = make_run(self.config, self._method, reply.shape, fingerprint)
            encode(run)  # too large a record is the operator's to know before anything is written
            self._store.add_run(
                RunRow(
                    run=run.run,
                    method=self.config.run.method,
                    mathematics=msgspec.json.encode(mathematics(self.config)).decode(),
                    record=msgspec.json.encode(run).decode(),
                    base_folder=str(base),
                    fingerprint=run.fingerprint.digest,
                    rounds=self.config.rounds.total,
                    finished=False,
                    created_at=self._clock.wall(),
                )
            )
            self._resume(run, base)
            self._greet()

        self._emit("run.preparing", run=self.config.run.name, base=str(base))
        self._evaluator.describe(setup_of(self.config, spec, str(base)), described)

    def _resume(self, run: Run, base: Path) -> None:
        """The run's rooms, as the store has them."""
        config, namespace = self.config, self.config.broker.namespace
        fleet = Fleet(self._store, run)
        adapters = Adapters(run, self._method.merge, self._objects, self._folder.work, config.run.seed)
        terms = Terms(
            total=config.rounds.total,
            min_devices=config.rounds.min_devices,
            evaluate_every=None if config.evaluation is None else config.evaluation.every,
            chunk_bytes=config.transfer.chunk_kib * 1024,
            window=config.transfer.window,
        )
        rounds = Rounds(self._store, run, terms, fleet, self, self._clock)
        uploads = Uploads(namespace, self._folder.partials, self._objects, self._ledger, self._say)
        downloads = Downloads(namespace, self._objects, self._ledger, self._version_of, self._send_frame)
        intake = Intake(
            run,
            self._store,
            self._objects,
            uploads,
            self._ledger,
            rounds,
            fleet,
            limit_bytes=int(config.transfer.max_update_mb * 1e6),
            window=config.transfer.window,
            check=adapters.check,
            send=self._say,
            emit=self._emit,
        )
        reception = Reception(
            self._topics,
            fleet,
            rounds,
            intake,
            uploads,
            downloads,
            self._ledger,
            self._clock,
            self._say,
            self._emit,
        )
        self._running = _Running(run, base, fleet, adapters, rounds, uploads, downloads, intake, reception)
        intake.recover()
        self._emit(
            "run.ready",
            run=run.run,
            method=config.run.method,
            round=rounds.row.number,
            rounds=config.rounds.total,
            state=rounds.row.state,
            fingerprint=run.fingerprint.digest,
        )

    # Events and time

    def step(self, wait_s: float = 0.0) -> bool:
        """Handles what is in the inbox, waiting at most ``wait_s`` for the first; whether there was any."""
        handled = 0
        with contextlib.suppress(queue.Empty):
            event = self._inbox.get(timeout=wait_s) if wait_s > 0 else self._inbox.get_nowait()
            while not self.done:
                handled += 1
                self.handle(event)
                if handled >= _BATCH:
                    break
                event = self._inbox.get_nowait()
        return handled > 0

    def handle(self, event: Inbound | Connection | TrainerReply | Stop) -> None:
        """Takes one event. Never raises for what a device sent; an error of our own ends the server."""
        try:
            match event:
                case Inbound():
                    self._on_message(event)
                case Connection():
                    self._on_connection(event)
                case Stop():
                    self.done = True
                    self._emit("run.stopped", run=self.config.run.name)
                case _:
                    self._evaluator.on_reply(event)
        except EdgeError as error:
            self._fail(error)

    def tick(self) -> float:
        """Does what is due. Returns after how many seconds, at most, to call again."""
        now = self._clock.monotonic()
        waits = [_LONGEST_S]
        try:
            if not self._ever_connected:
                waits.append(self._patience(now))
            if self._running is not None and not self.done:
                waits += self._drive(self._running, now)
            if now - self._saved >= _SAVE_S:
                self._saved = now
                self._ledger.save()
        except EdgeError as error:
            self._fail(error)
        return 0.0 if self.done else max(0.0, min(waits))

    def _drive(self, running: _Running, now: float) -> list[float]:
        waits = []
        running.intake.settle(now)
        wait = running.rounds.advance()
        if wait is not None:
            waits.append(wait)
        running.downloads.pump(now)
        due = running.downloads.due(now)
        if due is not None:
            waits.append(due - now)
        if running.rounds.finished:
            waits.append(self._linger(running, now))
        return waits

    def _linger(self, running: _Running, now: float) -> float:
        """After the last round: until everybody who took part has the final version, or long enough."""
        if self._linger_until is None:
            self._linger_until = now + self.config.rounds.linger_s
        final = running.rounds.row.version
        took_part = {row.device for row in self._store.participations(running.run.run)}
        lacking = [device for device in sorted(took_part) if not _holds(running.fleet[device].status, final)]
        if not lacking or now >= self._linger_until:
            self._emit("run.over", run=running.run.run, version=final, lacking=lacking)
            self.done = True
        return self._linger_until - now

    def _patience(self, now: float) -> float:
        left = self._began + _GIVE_UP_S - now
        if left <= 0:
            raise BrokerError(
                f"no connection to the broker {self._brokerage.description} for {_GIVE_UP_S:g} s",
                "check broker.url, and that the broker runs",
            )
        return left

    def _fail(self, error: EdgeError) -> None:
        if self.error is None:
            self.error = error
            self._emit("run.failed", error=type(error).__name__, message=error.message, hint=error.hint)
        self.done = True

    def _on_connection(self, event: Connection) -> None:
        if event.up:
            self._ever_connected = True
            self._emit("broker.up", broker=self._brokerage.description)
            self._greet()
            return
        if event.final and isinstance(event.error, EdgeError):
            raise event.error
        self._emit("broker.down", broker=self._brokerage.description, error=str(event.error or ""))
        if self._running is not None:
            self._running.downloads.mark_lost()
        self._brokerage.revive(self._emit)

    def _greet(self) -> None:
        """The connection is there, or the run: everybody learns of both."""
        running = self._running
        if running is None or not self._publish(self._topics.run, encode(running.run), retain=True):
            return
        self.position_changed()
        for row in running.rounds.present():
            if row.state == "offered":
                running.rounds.offer_again(row.device)

    def _on_message(self, message: Inbound) -> None:
        if self._running is not None:
            self._running.reception.on_message(message)

    def _on_progress(self, progress: Progress) -> None:
        self._emit("trainer.progress", stage=progress.stage, done=progress.done, total=progress.total)

    # What the rounds need (RoundsPort)

    def plan(self, round: int, devices: Sequence[Status], previous: Mapping[str, int]) -> RoundPlan:
        return plan_round(
            self._ready.run, self._method, devices, config=self.config, round=round, previous=previous
        )

    def initial_version(self) -> tuple[str, int]:
        return self._ready.adapters.initial()

    def merged_version(
        self, number: int, round: int, chain: Sequence[VersionRow], updates: Sequence[ParticipationRow]
    ) -> tuple[str, int]:
        return self._ready.adapters.merged(number, round, chain, updates)

    def evaluate(self, chain: Sequence[VersionRow]) -> None:
        running = self._ready
        setup = setup_of(self.config, running.run.spec, str(running.base))
        paths = [self._objects.path(version.object) for version in chain]
        self._evaluator.evaluate(setup, paths, running.rounds.on_evaluated)

    def send_offer(self, device: str, offer: Offer) -> None:
        self._say(device, offer)
        self._emit("round.offer", device=device, round=offer.round, candidates=len(offer.candidates))

    def position_changed(self) -> None:
        self._publish(self._topics.aggregator, encode(self._state(ready=True)), retain=True)

    def round_closed(self, missed: Sequence[str]) -> None:
        self._ready.intake.on_missed(list(missed))

    def round_over(self) -> None:
        self._ready.uploads.keep_only(set())
        self._objects.sweep(self._store.objects())
        self._save()

    def emit(self, name: str, **fields: Any) -> None:
        self._emit(name, **fields)

    # How

    @property
    def _ready(self) -> _Running:
        if self._running is None:
            raise StateError("the run is not made yet")
        return self._running

    @property
    def _store(self) -> Store:
        if self._store_or_none is None:
            raise StateError("the server is not open")
        return self._store_or_none

    def _state(self, ready: bool) -> AggregatorState:
        running = self._running
        if running is None:
            return AggregatorState(ready=False, epoch=self._epoch, run=self.config.run.name)
        newest, row = running.rounds.newest(), running.rounds.row
        return AggregatorState(
            ready=ready,
            epoch=self._epoch,
            run=running.run.run,
            round=row.number,
            rounds=self.config.rounds.total,
            version=None if newest is None else newest.ref,
            finished=running.rounds.finished,
        )

    def _version_of(self, digest: str) -> VersionRow | None:
        versions = self._store.versions(self.config.run.name)
        return next((version for version in versions if version.object == digest), None)

    def _say(self, device: str, record: Record) -> bool:
        return self._publish(self._topics.reply(device), encode(record))

    def _send_frame(self, device: str, frame: bytes) -> bool:
        return self._publish(self._topics.reply(device), frame)

    def _publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        transport = self._brokerage.transport
        return transport is not None and transport.publish(topic, payload, retain=retain)

    def _save(self) -> None:
        self._ledger.save()
        if self._running is not None:
            self._running.rounds.save()

    def _emit(self, name: str, **fields: Any) -> None:
        self.events.emit(Event(name, fields, self._clock.wall()))


def _holds(status: Status | None, version: int | None) -> bool:
    return status is not None and version in status.holds


def _own_trainer(folder: Path) -> TrainerHost:
    from edge_sdk.agent.process_trainer import ProcessTrainer

    return ProcessTrainer(folder)

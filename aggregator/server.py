"""The aggregator: an actor that holds the rooms together in which everything is decided.

Nothing waits: a message, a trainer's answer or time moves things on.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from aggregator.actor import Actor, ServerEvent, Stop
from aggregator.brokerage import Brokerage
from aggregator.evaluation import Evaluator
from aggregator.methods.merging import method_of
from aggregator.preparing import begin_run, check_same
from aggregator.running import Running
from aggregator.state.base import Store
from aggregator.state.folder import StateFolder, check_objects, open_store
from aggregator.storage import Storage, folder_error, out_of_room
from edge_sdk.clock import Clock, SystemClock
from edge_sdk.config.run import RunConfig
from edge_sdk.errors import BrokerError, EdgeError, StateError
from edge_sdk.events import Event, EventBus
from edge_sdk.protocol.topics import Topics
from edge_sdk.protocol.trainer import Progress, TrainerHost
from edge_sdk.protocol.wire import AggregatorState, Run, encode
from edge_sdk.transport.base import Connection, Inbound, Transport, Will
from edge_sdk.transport.objects import ObjectStore

if TYPE_CHECKING:
    from aggregator.metrics import Metrics

__all__ = ["Aggregator"]

_LONGEST_S = 60.0
_SAVE_S = 2.0
_PAUSED_S = 1.0
"""How often a pause looks for room."""
_GIVE_UP_S = 30.0
"""A broker that was never reached is an error after so long; one that was is waited for for ever."""


class Aggregator(Actor):
    """Runs one run to its end.

    Args:
        config: as ``load_run_config`` gives it.
        transport: None: MQTT, to the broker of the config, which is started where it is embedded.
        trainer: None: a trainer process of its own.
        clock: None: the machine's.
        on_event: called with every Event, in the server's thread.
        disk_free: tells the room below a folder; None: the file system does.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        transport: Transport | None = None,
        trainer: TrainerHost | None = None,
        clock: Clock | None = None,
        on_event: Callable[[Event], None] | None = None,
        disk_free: Callable[[Path], float] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.events = EventBus()
        if on_event is not None:
            self.events.subscribe(on_event)
        self.traffic: Counter[str] = Counter()
        self._clock = clock or SystemClock()
        self._topics = Topics(config.broker.namespace)
        self._folder = StateFolder(Path(config.run.state_dir))
        self._storage = Storage(self._folder.path, config.storage.keep_free_mb, self._clock, disk_free)
        self._brokerage = Brokerage(config.broker, self._folder, transport)
        self._trainer = trainer
        self._epoch = uuid.uuid4().hex
        self._running: Running | None = None
        self._paused: tuple[Run, Path, AggregatorState] | None = None
        """What to go on with, and what is said until then, while the rounds pause."""
        self._metrics: Metrics | None = None
        self._opened = self._closed = False
        self._store_or_none: Store | None = None
        self._ever_connected = False

    # Life

    def open(self) -> None:
        """Takes the state folder, goes on where it stands, and connects. Does nothing the second time.

        Raises EdgeError for whatever makes the run impossible.
        """
        if self._opened:
            return
        self._opened = True
        try:
            self._folder.lock()
            self._open()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise folder_error(error) from error
            raise
        # Only now: reading a large base for its digest is no fault of the broker's.
        self._began = self._saved = self._clock.monotonic()

    def _open(self) -> None:
        self._storage.open()
        self._serve_metrics()
        shutil.rmtree(self._folder.work, ignore_errors=True)
        self._folder.work.mkdir()
        self._store_or_none = open_store(self._folder)
        self._objects = ObjectStore(self._folder.objects)
        check_objects(self._store, self._objects)
        self._method = method_of(self.config)
        if self._trainer is None:
            self._trainer = _own_trainer(self._folder.trainer, self.config)
        self._trainer.start(self._inbox.put)
        self._evaluator = Evaluator(self._trainer, self._clock, self._on_progress)
        row = self._store.run(self.config.run.name)
        if row is None:
            self._begin()
        else:
            base = check_same(row, self.config, self._folder.path)
            self._store.set_run(row.run, rounds=self.config.rounds.total, finished=False)
            self._resume(msgspec.json.decode(row.record, type=Run), base)
        transport = self._brokerage.open(self.emit)
        if self._running is not None:
            self._listen()
        transport.start(self._inbox.put, Will(self._topics.aggregator, self._away()))

    def _serve_metrics(self) -> None:
        listen = self.config.metrics.listen
        if listen is not None:
            from aggregator.metrics import Metrics

            self._metrics = Metrics(self.config, self.traffic, self._storage.free)
            self.events.subscribe(self._metrics)
            self.emit("metrics.served", url=self._metrics.serve(listen))

    def _listen(self) -> None:
        """Only once the run is made: who came before it is told by the retained presence."""
        transport = self._brokerage.transport
        if transport is not None:
            for topic in (self._topics.control("+"), self._topics.bulk("+"), self._topics.presence("+")):
                transport.subscribe(topic)

    def close(self) -> None:
        """Says goodbye and lets go of everything. May be called twice."""
        self.done = True
        if self._closed or not self._opened:
            return
        self._closed = True
        with contextlib.suppress(EdgeError):
            self.publish(self._topics.aggregator, self._away(), retain=True)
        self._brokerage.close()
        if self._trainer is not None:
            self._trainer.close()
        if self._running is not None:
            self._running.close()
            with contextlib.suppress(EdgeError):
                self._running.save()
        if self._store_or_none is not None:
            self._store_or_none.close()
        if self._metrics is not None:
            self._metrics.close()
        self._storage.close()
        self._folder.release()

    # The first start, and every other

    def _begin(self) -> None:
        def made(run: Run, base: Path) -> None:
            self._resume(run, base)
            self._listen()
            if self._running is not None:
                self._running.greet()

        self.emit("run.preparing", run=self.config.run.name, base=self.config.base.path)
        begin_run(
            self.config,
            self._method,
            self._folder.path,
            store=self._store,
            evaluator=self._evaluator,
            clock=self._clock,
            done=made,
        )

    def _resume(self, run: Run, base: Path) -> None:
        self._running = Running(
            self.config,
            run,
            base,
            self._method,
            epoch=self._epoch,
            store=self._store,
            folder=self._folder,
            objects=self._objects,
            evaluator=self._evaluator,
            clock=self._clock,
            server=self,
        )

    # Events and time

    def handle(self, event: ServerEvent) -> None:
        """Takes one event. Never raises for what a device sent; an error of our own ends the server."""
        try:
            match event:
                case Inbound():
                    if self._running is not None:
                        self._running.on_message(event)
                case Connection():
                    self._on_connection(event)
                case Stop():
                    self.done = True
                    self.emit("run.stopped", run=self.config.run.name)
                case _:
                    self._evaluator.on_reply(event)
        except (EdgeError, OSError) as error:
            self._meet(error)

    def tick(self) -> float:
        """Does what is due. Returns after how many seconds, at most, to call again."""
        now = self._clock.monotonic()
        waits = [_LONGEST_S]
        try:
            if not self._ever_connected:
                waits.append(self._patience(now))
            if not self.done:
                self._watch_room(now, waits)
            hung = self._evaluator.watch()
            if hung is not None:
                waits.append(hung)
            if self._running is not None and not self.done:
                waits += self._running.drive(now)
                if self._running.rounds.finished:
                    left = self._running.linger(now)
                    self.done = left is None
                    waits.append(left or 0.0)
                if now - self._saved >= _SAVE_S:
                    self._saved = now
                    self._running.ledger.save()
        except (EdgeError, OSError) as error:
            self._meet(error)
            waits.append(0.0)
        return 0.0 if self.done else max(0.0, min(waits))

    def _patience(self, now: float) -> float:
        left = self._began + _GIVE_UP_S - now
        if left <= 0:
            raise BrokerError(
                f"no connection to the broker {self._brokerage.description} for {_GIVE_UP_S:g} s",
                "check broker.url, and that the broker runs",
            )
        return left

    # Room

    def _watch_room(self, now: float, waits: list[float]) -> None:
        """Pauses where the room runs out, and goes on where there is room again."""
        if self._paused is None:
            low = "" if self._running is None else self._storage.too_low(now)
            if low:
                self._pause(low)
        elif self._storage.may_go_on(now):
            self._go_on(*self._paused)
        if self._paused is not None:
            waits.append(_PAUSED_S)

    def _pause(self, reason: str, error: BaseException | None = None) -> None:
        """Lets go of the run's rooms: what they hold may be ahead of what could be written."""
        if self._running is not None:
            running, self._running = self._running, None
            self._evaluator.give_up()
            running.close()
            state = AggregatorState(ready=False, epoch=self._epoch, run=running.run.run)
            with contextlib.suppress(EdgeError):
                state = running.state(ready=False)
                running.save()
            state = msgspec.structs.replace(state, reason="storage")
            self._paused = running.run, running.base, state
        if not self._storage.paused:
            self.emit("storage.paused", reason=reason, free_mb=self._storage.free() / 1e6)
        self._storage.pause(reason, error)
        self._tell_pause()

    def _go_on(self, run: Run, base: Path, _said: AggregatorState) -> None:
        """From what is stored, as after a crash; devices report and announce again."""
        self._resume(run, base)
        self._paused = None
        self._storage.go_on()
        self.emit("storage.resumed", free_mb=self._storage.free() / 1e6)
        if self._running is not None:
            self._running.greet()

    def _tell_pause(self) -> None:
        if self._paused is not None:
            self.publish(self._topics.aggregator, encode(self._paused[2]), retain=True)

    # Errors

    def _meet(self, error: EdgeError | OSError) -> None:
        """A disk without room is waited for; every other error of our own ends the server."""
        has_run = self._running is not None or self._paused is not None
        if has_run and out_of_room(error, self._storage.free()):
            message = str(error.strerror if isinstance(error, OSError) else error)
            self._pause(message, error)
        else:
            self._fail(error)

    def _fail(self, error: EdgeError | OSError) -> None:
        if isinstance(error, OSError):
            error = folder_error(error)
        if self.error is None:
            self.error = error
            self.emit("run.failed", error=type(error).__name__, message=error.message, hint=error.hint)
        self.done = True

    def _on_connection(self, event: Connection) -> None:
        if event.up:
            self._ever_connected = True
            self.emit("broker.up", broker=self._brokerage.description)
            if self._running is not None:
                self._running.greet()
            self._tell_pause()
            return
        if event.final and isinstance(event.error, EdgeError) and not self._ever_connected:
            raise event.error  # later it may pass: a certificate is renewed, an account comes back
        self.emit("broker.down", broker=self._brokerage.description, error=str(event.error or ""))
        if self._running is not None:
            self._running.lost()
        self._brokerage.revive(self.emit)

    def _on_progress(self, progress: Progress) -> None:
        self.emit("trainer.progress", stage=progress.stage, done=progress.done, total=progress.total)

    # What a run needs (ServerPort)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """False: not connected. Raises ProtocolError for a payload above what any broker takes."""
        transport = self._brokerage.transport
        return transport is not None and transport.publish(topic, payload, retain=retain)

    def emit(self, name: str, **fields: Any) -> None:
        self.events.emit(Event(name, fields, self._clock.wall()))

    # How

    @property
    def _store(self) -> Store:
        if self._store_or_none is None:
            raise StateError("the server is not open")
        return self._store_or_none

    def _away(self) -> bytes:
        """The will, and the goodbye."""
        if self._running is not None:
            return encode(self._running.state(ready=False))
        return encode(AggregatorState(ready=False, epoch=self._epoch, run=self.config.run.name))


def _own_trainer(folder: Path, config: RunConfig) -> TrainerHost:
    from edge_sdk.agent.process_trainer import ProcessTrainer

    return ProcessTrainer(
        folder, offline=Path(config.base.path).is_absolute(), allocator=config.trainer.allocator
    )

"""The agent for apps and commands: one class, started and stopped from any thread."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from types import TracebackType
from typing import Any

from edge_sdk.agent.context import BaseFiles, Context, Machine
from edge_sdk.agent.core import Core
from edge_sdk.agent.desk import Desk
from edge_sdk.agent.gating import Check
from edge_sdk.agent.inbox import ExportRequest, GatesAltered, Pause, Resume, Stop
from edge_sdk.agent.lock import AGENT, FolderLock, check_owner
from edge_sdk.agent.process_trainer import ProcessTrainer
from edge_sdk.agent.record import AgentRecord, disk_error
from edge_sdk.agent.reporting import folder_status
from edge_sdk.agent.traffic import Traffic
from edge_sdk.clock import Clock, SystemClock, boot_id
from edge_sdk.config.agent import AgentConfig
from edge_sdk.data import base_files as real_base_files
from edge_sdk.data.rows import check_rows
from edge_sdk.device import machine as real_machine
from edge_sdk.errors import StateError, TrainerError
from edge_sdk.events import Event, EventBus
from edge_sdk.protocol.trainer import TrainerHost
from edge_sdk.transport.base import Transport
from edge_sdk.transport.objects import ObjectStore
from edge_sdk.transport.shaping import TokenBucket

__all__ = ["Agent", "open_core"]

_BURST_BYTES = 8 * 1024
_STOP_S = 30.0


class Agent:
    """A device's part in a run: it joins, trains when offered work, and sends what it learnt.

    ::

        with Agent("agent.toml") as agent:
            agent.on(print)
            agent.wait()

    Args:
        config: an ``AgentConfig``, or the path of an ``agent.toml``.
        trainer: trains in place of a process of its own; the agent starts and closes it.
        transport: in place of MQTT to ``broker.url``.
        clock: in place of the machine's.
        give_up_s: end with BrokerError after so long without a broker; None: try for ever.

    Raises ConfigError and its like for a config that cannot be used.
    """

    def __init__(
        self,
        config: AgentConfig | str | Path,
        *,
        trainer: TrainerHost | None = None,
        transport: Transport | None = None,
        clock: Clock | None = None,
        give_up_s: float | None = None,
    ) -> None:
        if not isinstance(config, AgentConfig):
            from edge_sdk.config.loading import load_agent_config

            config = load_agent_config(Path(config))
        self.config = config
        self._trainer, self._transport = trainer, transport
        self._clock = clock or SystemClock()
        self._give_up_s = give_up_s
        self._bus = EventBus()
        self._gates: dict[str, Check] = {}
        self._core: Core | None = None
        self._lock: FolderLock | None = None
        self._thread: threading.Thread | None = None
        self._crash: BaseException | None = None

    def start(self) -> None:
        """Takes the state folder and begins; returns at once.

        Raises DataError or BaseModelError for files that no run can use, StateError when another agent runs
        on the folder, ConfigError when that is an aggregator's, and BrokerError or CredentialsError for a
        broker that must not be used. A broker that is merely away is tried again.
        """
        if self.running:
            raise StateError("the agent runs already")
        self._check_files()
        folder = Path(self.config.agent.state_dir)
        self._lock = FolderLock(folder)
        try:
            transport = self._transport
            if transport is None:
                from edge_sdk.transport.mqtt import MqttTransport

                broker = self.config.broker
                transport = MqttTransport(broker, f"{broker.namespace}-{self.config.agent.id}")
            trainer = self._trainer or ProcessTrainer(
                folder,
                offline=Path(self.config.base.path).is_absolute(),
                allocator=self.config.allocator(),
            )
            core = open_core(
                self.config, transport=transport, trainer=trainer, clock=self._clock, bus=self._bus,
                give_up_s=self._give_up_s, gates=self._gates,
            )  # fmt: skip
            # Known before it speaks: who is called back, or signalled, may stop it already.
            self._core, self._crash = core, None
            try:
                core.start()
            except BaseException:
                core.close()
                raise
        except BaseException:
            self._lock.release()
            raise
        self._thread = threading.Thread(target=self._live, args=(core,), name="edge-agent", daemon=True)
        self._thread.start()

    def _check_files(self) -> None:
        """What can be told before there is a run: every row reads, and the base is there."""
        check_rows(self.config.data)
        if self._trainer is None and Path(self.config.base.path).is_absolute():
            real_base_files.find_base(self.config.base.path)

    def stop(self, *, wait: bool = True) -> None:
        """Ends the agent and its trainer; what is unfinished goes on at the next start.

        With ``wait`` false it returns at once, and may be called from an event callback or a signal handler.
        """
        if self._core is not None:
            self._core.inbox.put(Stop())
        if wait:
            self._join(_STOP_S)

    def pause(self) -> None:
        """Starts no new work and interrupts training, whose round is trained again after ``resume``.

        Offers are declined meanwhile. Uploads go on: what is already learnt costs little to send.
        """
        self._tell(Pause())

    def resume(self) -> None:
        """Works again."""
        self._tell(Resume())

    def on(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Calls ``callback`` with every event, in the agent's thread; returns what ends that."""
        return self._bus.subscribe(callback)

    def gate(self, name: str, check: Callable[[], object]) -> Callable[[], None]:
        """Works only while ``check`` returns what is true; returns what takes the gate away.

        ``agent.gate("user", lambda: not editor_is_open())``: a training is interrupted within a step once it
        does not pass, and goes on from its start, as after ``pause``. The check is called in the agent's
        thread every ``gates.check_s`` seconds and must return at once; one that raises counts as closed.
        ``name`` is what the server and the owner are told.
        """
        self._gates[name] = check
        self._look_at_gates()

        def take_away() -> None:
            if self._gates.get(name) is check:
                del self._gates[name]
                self._look_at_gates()

        return take_away

    def _look_at_gates(self) -> None:
        if self._core is not None and self.running:
            self._core.inbox.put(GatesAltered())

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the agent ended; False when it still runs after ``timeout`` seconds.

        Raises the EdgeError that it ended with.
        """
        if not self._join(timeout):
            return False
        if self._crash is not None:
            raise self._crash
        if self._core is not None and self._core.error is not None:
            raise self._core.error
        return True

    join = wait

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def status(self) -> dict[str, Any]:
        """What ``edge-agent status --json`` shows: plain values."""
        return folder_status(self.config)

    def adapter(self, timeout: float | None = None) -> Path:
        """A PEFT folder with the newest adapter that this device holds.

        It stays as it is; the two newest are kept. While the device trains, this waits for the end of it.

        Raises:
            StateError: the agent is not running, or holds no version yet.
            TrainerError: the trainer could not write it, or not within ``timeout`` seconds.
        """
        if threading.current_thread() is self._thread:
            raise StateError(
                "adapter() was called from an event callback, in the agent's own thread",
                "call it from another thread",
            )
        request: ExportRequest = ExportRequest(Future())
        self._tell(request)
        left = float("inf") if timeout is None else timeout
        while True:
            try:
                return request.result.result(min(0.5, left))
            except CancelledError:
                break
            except FutureTimeoutError:
                left -= 0.5
                if left <= 0:
                    raise TrainerError(
                        f"no adapter within {timeout:g} s", "the trainer is busy; wait longer"
                    ) from None
                if not self.running:
                    break
        raise StateError("the agent ended before the adapter was written", "start it again")

    def __enter__(self) -> Agent:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _tell(self, event: Pause | Resume | ExportRequest) -> None:
        if self._core is None or not self.running:
            raise StateError("the agent is not running", "call start() first")
        self._core.inbox.put(event)

    def _live(self, core: Core) -> None:
        try:
            core.run()
        except BaseException as error:
            self._crash = error
        finally:
            core.close()
            if self._lock is not None:
                self._lock.release()

    def _join(self, timeout: float | None) -> bool:
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(timeout)
        if thread.is_alive():
            return False
        self._thread = None
        return True


def open_core(
    config: AgentConfig,
    *,
    transport: Transport,
    trainer: TrainerHost,
    clock: Clock,
    bus: EventBus | None = None,
    machine: Machine = real_machine,
    base_files: BaseFiles = real_base_files,
    boot: str | None = None,
    give_up_s: float | None = None,
    gates: Mapping[str, Check] | None = None,
) -> Core:
    """An agent's core on its state folder, for who drives it without threads: a simulation, a test.

    Neither locks the folder nor connects: ``core.start()`` does the latter. Raises StateError for a folder
    that cannot be used, and ConfigError for one that is an aggregator's.
    """
    folder = Path(config.agent.state_dir)
    check_owner(folder, AGENT)
    record: AgentRecord | None = None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        record = AgentRecord(folder / "agent.db")
        session = record.next_session()
        store = ObjectStore(folder / "objects")
        store.sweep(record.objects())
    except (OSError, sqlite3.Error, StateError) as error:
        if record is not None:
            record.close()
        if isinstance(error, StateError):
            raise
        raise disk_error(folder, error) from error
    limit = config.limits.uplink_kbps
    context = Context(
        config=config,
        folder=folder,
        clock=clock,
        boot=boot_id() if boot is None else boot,
        session=session,
        record=record,
        store=store,
        transport=transport,
        desk=Desk(trainer, clock, config.agent.idle_unload_s, first_id=session << 20),
        machine=machine,
        base_files=base_files,
        bus=bus or EventBus(),
        bucket=TokenBucket(None if limit is None else limit * 1000, clock, _BURST_BYTES),
        traffic=Traffic(record, clock, config.gates.traffic_mb_per_day),
    )
    return Core(context, give_up_s=give_up_s, gates=gates)

"""What the agent's parts share: where things are kept, how to speak, and what may be said now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from edge_sdk.agent.desk import Desk
from edge_sdk.agent.record import AgentRecord
from edge_sdk.agent.states import Permission
from edge_sdk.agent.traffic import Traffic
from edge_sdk.clock import Clock
from edge_sdk.config.agent import AgentConfig
from edge_sdk.events import Event, EventBus
from edge_sdk.protocol.base import Record
from edge_sdk.protocol.measure import Profile
from edge_sdk.protocol.model import Fingerprint, LoraShape
from edge_sdk.protocol.topics import Topics
from edge_sdk.protocol.wire import encode
from edge_sdk.transport.base import Transport
from edge_sdk.transport.objects import ObjectStore
from edge_sdk.transport.shaping import TokenBucket

__all__ = ["BaseFiles", "Context", "Machine"]


class Machine(Protocol):
    """This machine, read; ``edge_sdk.device.machine`` is one."""

    def read_profile(self, *, disk: Path | None = None, gpus: bool = False) -> Profile: ...

    def free_memory_mb(self) -> float | None: ...

    def process_rss_mb(self, pid: int) -> float | None: ...

    def gpu_free_mb(self, index: int, uuid: str = "") -> float | None: ...


class BaseFiles(Protocol):
    """The base model's files, without torch; ``edge_sdk.data.base_files`` is one."""

    def find_base(self, path: str) -> Path: ...

    def check_whole(self, folder: Path) -> None: ...

    def fingerprint_of(
        self,
        folder: Path,
        *,
        labels: Sequence[str],
        task: str,
        max_length: int,
        template: str,
        lora: LoraShape,
        cache: Path | None,
    ) -> Fingerprint: ...


@dataclass
class Context:
    config: AgentConfig
    folder: Path
    clock: Clock
    boot: str
    session: int
    record: AgentRecord
    store: ObjectStore
    transport: Transport
    desk: Desk
    machine: Machine
    base_files: BaseFiles
    bus: EventBus
    bucket: TokenBucket
    traffic: Traffic
    permission: Permission = "running"
    gate: str | None = None
    """Why the gates do not pass; None: they do."""
    reachable: bool = False
    """Connected, the run is known, and its aggregator is there: what is said now is heard."""
    topics: Topics = field(init=False)
    _waits_until: float = float("-inf")

    def __post_init__(self) -> None:
        self.topics = Topics(self.config.broker.namespace)

    @property
    def device(self) -> str:
        return self.config.agent.id

    @property
    def nonce(self) -> str:
        """Of the run that the record is about; empty before the first."""
        run = self.record.run
        return "" if run is None else run.nonce

    def emit(self, name: str, **fields: Any) -> None:
        self.bus.emit(Event(name, fields, self.clock.wall()))

    def say(self, record: Record) -> bool:
        """Sends one record to the aggregator; small ones never wait, and bulk pays for them later.

        False: nobody would hear it. What matters is said again once somebody does.
        """
        return self.reachable and self.publish(self.topics.control(self.device), encode(record))

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, **counters: int) -> bool:
        """Sends and counts what goes out, also into ``counters`` of the ledger."""
        if not self.transport.publish(topic, payload, retain=retain):
            return False
        self.bucket.spend(len(payload))
        self.traffic.count(self.nonce, bytes_up=len(payload), **counters)
        return True

    def may_move(self, size: int) -> bool:
        """Whether the day's allowance has room for so much bulk; tells the owner once a day where not."""
        if size <= self.traffic.left:
            return True
        used, until = self.traffic.used, self.clock.wall() + self.traffic.tomorrow_s
        if abs(until - self._waits_until) > 60.0:
            self._waits_until = until
            self.emit("traffic.spent", bytes=used, mb_per_day=self.traffic.most_mb, until=until)
        return False

"""One device under a memory limit, whole: the real agent, its real trainer process, the planner's own offers.

Only the wire is short: an in-memory broker, and an aggregator that knows two moves. A status is answered
with the offer that ``plan_round`` makes of it, and the end of a round with nothing.
"""

from __future__ import annotations

import queue
import time
from pathlib import Path
from typing import Any

from aggregator.methods.base import find_method
from aggregator.planner.plan import plan_round
from aggregator.preparing import make_run, run_fingerprint
from edge_sdk.agent.api import open_core
from edge_sdk.agent.core import Core
from edge_sdk.agent.process_trainer import ProcessTrainer
from edge_sdk.clock import SystemClock
from edge_sdk.config.agent import (
    AgentConfig,
    AgentSection,
    BaseSection,
    DataSection,
    LimitsSection,
    TrainerSection,
)
from edge_sdk.config.broker import BrokerConfig
from edge_sdk.config.run import RunConfig
from edge_sdk.events import Event, EventBus
from edge_sdk.protocol.model import LoraShape, ModelShape
from edge_sdk.protocol.topics import Topics
from edge_sdk.protocol.trainer import Describe, Described, Progress, Setup, TrainerReply
from edge_sdk.protocol.wire import AggregatorState, Offer, Run, Status, VersionRef, decode, encode
from edge_sdk.transport.base import Connection, Inbound
from edge_sdk.transport.memory import MemoryBroker, MemoryTransport

__all__ = ["Device", "describe", "run_of"]

_LONGEST_S = 240.0


def describe(config: RunConfig, trainer: ProcessTrainer, data: Path) -> Described:
    """Shape and memory at rest, told by the trainer that is used afterwards."""
    replies: queue.Queue[TrainerReply] = queue.Queue()
    trainer.start(replies.put)
    method = find_method(config.run.method)
    setup = Setup(
        base=config.base.path,
        task=config.run.task,
        labels=config.run.labels,
        template=config.run.row_template,
        max_length=config.training.max_length,
        micro_batch=config.training.batch,
        lora=LoraShape(rank=config.lora.rank, alpha=config.lora.alpha),
        spec=method.spec(config),
        device="cpu",
        data=DataSection(path=str(data)).source(),
    )
    trainer.request(Describe(id=1, setup=setup))
    while isinstance(reply := replies.get(timeout=_LONGEST_S), Progress):
        pass
    if not isinstance(reply, Described):
        raise RuntimeError(f"the base cannot be described: {reply}")
    return reply


def run_of(config: RunConfig, shape: ModelShape, cache: Path) -> Run:
    fingerprint = run_fingerprint(config, Path(config.base.path), cache)
    return make_run(config, find_method(config.run.method), shape, fingerprint)


class Device:
    """The agent of one state folder, driven in this thread.

    Args:
        memory_mb: ``limits.memory_mb``; None: none.
        version: an object of version 0, which the device holds already.
    """

    def __init__(
        self, folder: Path, config: RunConfig, run: Run, trainer: ProcessTrainer, *, data: Path,
        version: Path, memory_mb: float | None,
    ) -> None:  # fmt: skip
        self.folder, self.config, self.run, self.trainer = folder, config, run, trainer
        self.agent_config = AgentConfig(
            agent=AgentSection(id="one", state_dir=str(folder), idle_unload_s=3600),
            broker=BrokerConfig(url="mqtt://127.0.0.1:1883"),
            base=BaseSection(path=config.base.path),
            data=DataSection(path=str(data)),
            trainer=TrainerSection(device="cpu"),
            limits=LimitsSection(memory_mb=memory_mb),
        )
        self.events: list[Event] = []
        self.said: list[Any] = []
        self._version = version
        self._broker = MemoryBroker()
        self._topics = Topics("edge")
        self._aggregator = MemoryTransport(self._broker, "aggregator")
        self._aggregator.subscribe(self._topics.control("+"))
        self._aggregator.start(self._hear)
        self.core: Core = self._open()

    def _open(self) -> Core:
        bus = EventBus()
        bus.subscribe(self.events.append)
        transport = MemoryTransport(self._broker, "agent")
        core = open_core(
            self.agent_config, transport=transport, trainer=self.trainer, clock=SystemClock(), bus=bus
        )
        core.start()
        return core

    def close(self) -> None:
        """The trainer stays, for the next device: what it holds is loaded anew only for another base."""
        context = self.core.context
        context.transport.stop()
        self.core.downloads.close()
        context.record.close()

    def begin(self) -> None:
        """The run is announced: the device joins."""
        self._publish(self._topics.run, self.run)
        self._publish(
            self._topics.aggregator,
            AggregatorState(ready=True, epoch="e1", run=self.run.run, rounds=3),
        )

    def offer(self, number: int, status: Status, **changes: Any) -> Offer:
        """What the planner makes of the status. Raises RuntimeError where it offers nothing."""
        method = find_method(self.config.run.method)
        plan = plan_round(self.run, method, [status], config=self.config)
        if status.device not in plan.candidates:
            raise RuntimeError(f"nothing was offered: {plan.excluded}")
        fields: dict[str, Any] = {
            "run": self.run.run, "round": number, "nonce": self.run.nonce, "deadline_s": 3600.0,
            "spec": self.run.spec, "versions": (self._hold(),), "candidates": plan.candidates[status.device],
        }  # fmt: skip
        offer = Offer(**{**fields, **changes})
        self._publish(self._topics.reply("one"), offer)
        return offer

    def _hold(self) -> VersionRef:
        """The device has version 0 already: nothing is fetched."""
        copy = self.folder / "version-0"
        copy.write_bytes(self._version.read_bytes())
        digest, size = self.core.context.store.adopt(copy)
        return VersionRef(number=0, object=digest, bytes=size)

    def until(self, *names: str, seconds: float = _LONGEST_S) -> Event | None:
        """Lives until one of these events came after now, or None: too long, or the agent has ended."""
        seen, deadline = len(self.events), time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.core.pump()
            self.core.tick(time.monotonic())
            for event in self.events[seen:]:
                if event.name in names:
                    return event
            seen = len(self.events)
            if self.core.done:
                return None
            time.sleep(0.01)
        return None

    def heard(self, kind: type) -> list[Any]:
        return [record for record in self.said if isinstance(record, kind)]

    def _publish(self, topic: str, record: Any) -> None:
        self._aggregator.publish(topic, encode(record), retain="reply" not in topic)

    def _hear(self, event: Inbound | Connection) -> None:
        if isinstance(event, Inbound):
            self.said.append(decode(event.payload))

"""Fakes at the agent's edges: a trainer that writes real files, a machine, base files, an aggregator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edge_sdk.agent.api import open_core
from edge_sdk.agent.core import Core
from edge_sdk.clock import ManualClock
from edge_sdk.config.agent import (
    AgentConfig,
    AgentSection,
    BaseSection,
    DataSection,
    GatesSection,
    LimitsSection,
)
from edge_sdk.config.broker import BrokerConfig
from edge_sdk.events import Event, EventBus
from edge_sdk.protocol.frames import decode_chunk, encode_chunk, is_chunk, transfer_id
from edge_sdk.protocol.measure import Fit, Measured, ProbePoint, Profile
from edge_sdk.protocol.model import DensePart, Fingerprint, LoraModule, LoraShape, ModelShape
from edge_sdk.protocol.spec import Candidate, TrainSpec
from edge_sdk.protocol.topics import Topics
from edge_sdk.protocol.trainer import (
    Describe,
    Described,
    Died,
    Export,
    Exported,
    Failed,
    Probe,
    Probed,
    Progress,
    Train,
    Trained,
    TrainerReply,
    TrainerRequest,
)
from edge_sdk.protocol.wire import (
    AggregatorState,
    Announce,
    Have,
    Offer,
    Receipt,
    Run,
    VersionRef,
    decode,
    encode,
)
from edge_sdk.transport.base import Connection, Inbound, Transport
from edge_sdk.transport.memory import MemoryBroker, MemoryTransport

SHAPE = ModelShape(
    family="bert", layers=4, hidden=16, intermediate=32, heads=2, vocabulary=100,
    layer_path="bert.encoder.layer", modules=(LoraModule(name="query", inputs=16, outputs=16),),
    dense=(DensePart(name="classifier.weight", shape=(2, 16)),), parameters=10_000, base_bytes=40_000,
)  # fmt: skip
LORA = LoraShape(rank=2, alpha=4.0)
MECHANISMS = tuple(sorted(TrainSpec().needs() | Candidate(id="x", depth=1, quantized_layers=1).needs()))
PRINT = Fingerprint(
    base="a" * 64, tokenizer="b" * 64, labels="c" * 64, head="classification:2", max_length=32,
    template="d" * 64, targets=("all-linear",), rank=2, alpha=4.0,
)  # fmt: skip
POINTS = (
    ProbePoint(depth=4, quantized_layers=0, peak_mb=50, step_s=0.1),
    ProbePoint(depth=4, quantized_layers=4, peak_mb=30, step_s=0.1),
)
FIT = Fit(
    micro_batch=8, max_length=32, rest_mb=100, head_mb=10, layer_mb=10, saved_mb=5, work_mb=0, forward_s=0.05,
    layer_s=0.01, quantize_s=0.001, probes=POINTS,
)  # fmt: skip
"""peak(4) = 50, peak(2) = 30, peak(1) = 20 MB above rest."""


def a_run(nonce: str = "run-1", **changes: Any) -> Run:
    fields: dict[str, Any] = {
        "run": "demo", "nonce": nonce, "base": "tiny", "labels": ("no", "yes"), "max_length": 32,
        "micro_batch": 8, "lora": LORA, "spec": TrainSpec(), "shape": SHAPE, "fingerprint": PRINT,
    }  # fmt: skip
    return Run(**{**fields, **changes})


def a_candidate(depth: int, **changes: Any) -> Candidate:
    fields: dict[str, Any] = {
        "id": f"d{depth}", "depth": depth, "micro_batch": 8, "max_length": 32, "steps": 5,
        "gain": float(depth),
    }  # fmt: skip
    return Candidate(**{**fields, **changes})


class FakeTrainer:
    """A TrainerHost that answers when told to (``finish``), or at once (``auto``), with real files."""

    def __init__(self, auto: bool = True) -> None:
        self.auto = auto
        self.requests: list[TrainerRequest] = []
        self.pending: TrainerRequest | None = None
        self.interrupts = 0
        self.unloads = 0
        self.loaded = False
        self._deliver: Callable[[TrainerReply], None] | None = None

    def start(self, deliver: Callable[[TrainerReply], None]) -> None:
        self._deliver = deliver

    def request(self, request: TrainerRequest) -> None:
        assert self.pending is None
        self.loaded, self.pending = True, request
        self.requests.append(request)
        if self.auto or not isinstance(request, Train):
            self.finish()

    def interrupt(self) -> None:
        self.interrupts += 1
        if self.pending is not None:
            self.reply(Failed(id=self.pending.id, cause="interrupted", message="interrupted"))

    def unload(self) -> None:
        self.unloads += 1
        self.loaded = False

    def close(self) -> None:
        self.loaded, self._deliver, self.pending = False, None, None

    # -- for tests --

    @property
    def trained(self) -> list[Train]:
        return [request for request in self.requests if isinstance(request, Train)]

    def reply(self, reply: TrainerReply) -> None:
        if not isinstance(reply, Progress):
            self.pending = None
        if self._deliver is not None:
            self._deliver(reply)

    def finish(self) -> None:
        assert self.pending is not None
        self.reply(answer(self.pending))

    def die(self, *, memory: bool = False, exit: int = -11) -> None:
        assert self.pending is not None
        self.loaded = False
        self.reply(Died(id=self.pending.id, memory=memory, exit=exit, message=f"ended with {exit}"))

    def fail(self, cause: str, message: str = "broken") -> None:
        assert self.pending is not None
        self.reply(Failed(id=self.pending.id, cause=cause, message=message))  # type: ignore[arg-type]


def answer(request: TrainerRequest) -> TrainerReply:
    match request:
        case Describe():
            return Described(
                id=request.id, base="/base", shape=SHAPE, rest_mb=100, samples=50, device="cpu",
                mechanisms=MECHANISMS, torch="0",
            )  # fmt: skip
        case Probe():
            return Probed(id=request.id, fit=FIT)
        case Train():
            folder = Path(request.folder)
            seed = f"{request.run} {request.round} {request.candidate.id} {request.residual} {request.owed}"
            update, residual = folder / "update", folder / "residual"
            update.write_bytes(hashlib.sha256(seed.encode()).digest() * 300)
            residual.write_bytes(hashlib.sha256(f"residual {seed}".encode()).digest())
            measured = Measured(
                rest_mb=100, peak_mb=29, train_s=1, step_s=0.1, steps=5, loss_first=2, loss_last=1
            )
            return Trained(
                id=request.id, update=str(update), residual=str(residual), samples=50, measured=measured
            )
        case Export():
            Path(request.folder).mkdir()
            return Exported(id=request.id, folder=request.folder)
    raise AssertionError(request)


class FakeMachine:
    def __init__(self, free_mb: float = 10_000) -> None:
        self.free_mb = free_mb
        self.gpu_mb: float | None = None
        self.rss_mb: float | None = None
        self.facts: dict[str, Any] = {}
        """Of the profile, besides: battery_percent, on_ac, temperature_c."""

    def read_profile(self, *, disk: Path | None = None, gpus: bool = False) -> Profile:
        return Profile(machine="fake", cores=2, memory_mb=16_000, free_mb=self.free_mb, **self.facts)

    def free_memory_mb(self) -> float | None:
        return self.free_mb

    def process_rss_mb(self, pid: int) -> float | None:
        return self.rss_mb

    def gpu_free_mb(self, index: int, uuid: str = "") -> float | None:
        return self.gpu_mb


class FakeBase:
    def __init__(self, fingerprint: Fingerprint = PRINT) -> None:
        self.fingerprint = fingerprint

    def find_base(self, path_or_hub_id: str) -> Path:
        return Path("/base")

    def check_whole(self, folder: Path) -> None: ...

    def fingerprint_of(
        self, folder: Path, *, labels: Sequence[str], task: str, max_length: int, template: str,
        lora: LoraShape, cache: Path | None = None,
    ) -> Fingerprint:  # fmt: skip
        return self.fingerprint


def version_object(number: int, size: int = 5000) -> tuple[VersionRef, bytes]:
    data = hashlib.sha256(f"version {number}".encode()).digest() * (size // 32)
    ref = VersionRef(number=number, object=hashlib.sha256(data).hexdigest(), bytes=len(data))
    return ref, data


class FakeAggregator:
    """The aggregator's side of the wire, by hand: what arrives is kept, and answered when ``serving``."""

    def __init__(self, transport: Transport, device: str = "one", namespace: str = "edge") -> None:
        self.device = device
        self.namespace = namespace
        self.topics = Topics(namespace)
        self.transport = transport
        self.records: list[Any] = []
        self.queue: list[Inbound] = []
        self.objects: dict[str, bytes] = {}
        self.received: dict[str, dict[int, bytes]] = {}
        self.window = 2
        self.serving = True
        self.receipts = True
        self.announces: dict[str, Announce] = {}

    def start(self) -> None:
        for topic in (self.topics.control("+"), self.topics.bulk("+"), self.topics.presence("+")):
            self.transport.subscribe(topic)
        self.transport.start(self._take)

    def _take(self, event: Inbound | Connection) -> None:
        if isinstance(event, Inbound):
            self.queue.append(event)

    def hello(self, run: Run | None = None, **state: Any) -> None:
        self.transport.publish(self.topics.run, encode(run or a_run()), retain=True)
        self.state(**state)

    def state(self, **state: Any) -> None:
        fields: dict[str, Any] = {"ready": True, "epoch": "e1", "run": "demo", "rounds": 3}
        self.transport.publish(
            self.topics.aggregator, encode(AggregatorState(**{**fields, **state})), retain=True
        )

    def say(self, record: Any) -> None:
        self.transport.publish(self.topics.reply(self.device), encode(record))

    def offer(self, round: int = 1, depths: Sequence[int] = (4, 2, 1), **changes: Any) -> Offer:
        if "versions" not in changes:
            ref, data = version_object(round - 1)
            self.objects[ref.object] = data
            changes["versions"] = (ref,)
        fields: dict[str, Any] = {
            "run": "demo", "round": round, "nonce": "run-1", "deadline_s": 100.0, "spec": TrainSpec(),
            "candidates": tuple(a_candidate(depth) for depth in depths),
            "chunk_bytes": 1024, "window": 2,
        }  # fmt: skip
        offer = Offer(**{**fields, **changes})
        self.say(offer)
        return offer

    def got(self, kind: type) -> list[Any]:
        return [record for record in self.records if isinstance(record, kind)]

    def pump(self) -> bool:
        worked = False
        while self.queue:
            message, worked = self.queue.pop(0), True
            if is_chunk(message.payload):
                self._on_chunk(message.payload)
                continue
            record = decode(message.payload)
            self.records.append(record)
            if not self.serving:
                continue
            if isinstance(record, Announce):
                self.announces[record.object] = record
                self.received.setdefault(record.object, {})
                self._credit(record)
            elif isinstance(record, Have):
                self._serve(record)
        return worked

    def _on_chunk(self, payload: bytes) -> None:
        chunk = decode_chunk(payload)
        for digest, announce in self.announces.items():
            if chunk.transfer == transfer_id(
                self.namespace, self.device, f"up/demo/{announce.round}", digest
            ):
                self.received[digest][chunk.index] = bytes(chunk.payload)
                if self.serving:
                    self._credit(announce)

    def _credit(self, announce: Announce) -> None:
        held = self.received[announce.object]
        ranges = tuple((index, index + 1) for index in sorted(held))
        self.say(
            Have(device=self.device, object=announce.object, bytes=announce.bytes,
                 chunk_bytes=announce.chunk_bytes, ranges=ranges, window=self.window)
        )  # fmt: skip
        data = b"".join(held[index] for index in sorted(held))
        if self.receipts and len(data) == announce.bytes:
            assert hashlib.sha256(data).hexdigest() == announce.object
            self.say(Receipt(device=self.device, run="demo", round=announce.round, object=announce.object))

    def _serve(self, have: Have) -> None:
        data = self.objects[have.object]
        held = {index for first, after in have.ranges for index in range(first, after)}
        missing = [index for index in range(-(-len(data) // have.chunk_bytes)) if index not in held]
        name = transfer_id(self.namespace, self.device, "down", have.object)
        for index in missing[: have.window]:
            at = index * have.chunk_bytes
            frame = encode_chunk(name, index, at, data[at : at + have.chunk_bytes])
            self.transport.publish(self.topics.reply(self.device), frame)


class World:
    """A broker, a fake aggregator, and an agent that can be killed and started again on its folder."""

    def __init__(self, folder: Path, *, gates: GatesSection | None = None, **limits: Any) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "rows.jsonl").write_text('{"text": "a", "label": "no"}\n')
        self.config = AgentConfig(
            agent=AgentSection(id="one", state_dir=str(folder / "state"), idle_unload_s=300),
            broker=BrokerConfig(url="mqtt://127.0.0.1:1883"),
            base=BaseSection(path="/base"),
            data=DataSection(path=str(folder / "rows.jsonl")),
            limits=LimitsSection(**limits),
            gates=gates or GatesSection(),
        )
        self.clock = ManualClock(1000.0)
        self.broker = MemoryBroker()
        self.aggregator = FakeAggregator(MemoryTransport(self.broker, "aggregator"))
        self.aggregator.start()
        self.machine = FakeMachine()
        self.base = FakeBase()
        self.trainer = FakeTrainer()
        self.events: list[Event] = []
        self.boot = "boot-1"
        self.core: Core = None  # type: ignore[assignment]

    def start(self, **options: Any) -> Core:
        bus = EventBus()
        bus.subscribe(self.events.append)
        self.core = open_core(
            self.config, transport=MemoryTransport(self.broker, "agent-one"), trainer=self.trainer,
            clock=self.clock, bus=bus, machine=self.machine, base_files=self.base, boot=self.boot, **options,
        )  # fmt: skip
        self.core.start()
        return self.core

    def kill(self, trainer: FakeTrainer | None = None) -> None:
        """The agent vanishes: nothing is said, closed or cleaned; its trainer goes with it."""
        self.core.context.transport.stop()
        self.core.context.record.close()
        self.trainer.close()
        self.trainer = trainer or FakeTrainer(auto=self.trainer.auto)

    def settle(self, seconds: float = 0.0) -> None:
        """Lets everybody do what they have to, without time passing; then, time passing."""
        for _ in range(200):
            self.core.pump()
            self.core.tick(self.clock.now)
            if not self.aggregator.pump() and self.core.inbox.empty():
                break
        while seconds > 0:
            step = min(0.5, seconds)
            seconds -= step
            self.clock.advance(step)
            self.settle()

    def names(self) -> list[str]:
        return [event.name for event in self.events]

    def event(self, name: str) -> Event:
        return next(event for event in reversed(self.events) if event.name == name)

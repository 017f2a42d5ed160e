"""A device that speaks the real protocol and trains nothing, and a server around it on a clock of its own."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from safetensors.numpy import save_file

from aggregator.methods.fedquad import METHOD as FEDQUAD
from aggregator.server import Aggregator
from edge_sdk.clock import ManualClock
from edge_sdk.config.agent import DataSection
from edge_sdk.config.run import (
    EvaluationSection,
    LoraSection,
    RoundsSection,
    RunBaseSection,
    RunConfig,
    RunSection,
    TrainingSection,
    TransferSection,
)
from edge_sdk.events import Event
from edge_sdk.protocol.frames import decode_chunk, is_chunk, transfer_id
from edge_sdk.protocol.measure import Fit, Link, Measured, Memory, ProbePoint, Profile
from edge_sdk.protocol.model import DensePart, LoraModule, ModelShape
from edge_sdk.protocol.topics import Topics
from edge_sdk.protocol.trainer import (
    Describe,
    Described,
    Died,
    Evaluate,
    Evaluated,
    Failed,
    TrainerReply,
    TrainerRequest,
)
from edge_sdk.protocol.wire import (
    AggregatorState,
    Announce,
    Choice,
    Decline,
    Have,
    Offer,
    Presence,
    Receipt,
    Refusal,
    RoundPosition,
    Run,
    Status,
    VersionRef,
    decode,
    encode,
)
from edge_sdk.transport.base import Connection, Inbound, Will
from edge_sdk.transport.memory import MemoryBroker, MemoryTransport
from edge_sdk.transport.objects import ObjectStore
from edge_sdk.transport.receiving import ObjectReceiver
from edge_sdk.transport.sending import ObjectSender
from edge_sdk.updates.delta import write_update
from edge_sdk.updates.keys import Adapter, tuned_keys
from edge_sdk.updates.versions import read_adapter

SHAPE = ModelShape(
    family="bert",
    layers=4,
    hidden=16,
    intermediate=32,
    heads=2,
    vocabulary=100,
    layer_path="bert.encoder.layer",
    modules=(LoraModule(name="query", inputs=16, outputs=16),),
    dense=(DensePart(name="classifier.weight", shape=(2, 16)),),
    parameters=10_000,
    base_bytes=40_000,
)
TOPICS = Topics("edge")


def a_config(folder: Path, **rounds: Any) -> RunConfig:
    """A run of two rounds for one device, on a base of one tensor."""
    base = folder / "base"
    if not base.exists():
        base.mkdir(parents=True)
        (base / "config.json").write_text("{}")
        (base / "tokenizer.json").write_text("{}")
        save_file({"weight": np.zeros(4, np.float32)}, base / "model.safetensors")
        (folder / "rows.jsonl").write_text(json.dumps({"text": "a", "label": "no"}) + "\n")
    return RunConfig(
        run=RunSection(name="demo", labels=("no", "yes"), state_dir=str(folder / "state")),
        base=RunBaseSection(path=str(base)),
        lora=LoraSection(rank=2, alpha=4.0),
        training=TrainingSection(steps=5, batch=8, max_length=32),
        rounds=RoundsSection(**{"total": 2, "min_devices": 1, "linger_s": 30.0, **rounds}),
        evaluation=EvaluationSection(data=DataSection(path=str(folder / "rows.jsonl"))),
        transfer=TransferSection(chunk_kib=1, window=2),
    )


def a_fit(**changes: Any) -> Fit:
    points = (
        ProbePoint(depth=4, quantized_layers=0, peak_mb=50, step_s=0.09),
        ProbePoint(depth=4, quantized_layers=4, peak_mb=30, step_s=0.1),
    )
    fields: dict[str, Any] = {
        "micro_batch": 8,
        "max_length": 32,
        "levers": FEDQUAD.levers,
        "rest_mb": 100,
        "head_mb": 10,
        "layer_mb": 10,
        "saved_mb": 5,
        "work_mb": 0,
        "forward_s": 0.05,
        "layer_s": 0.01,
        "quantize_s": 0.001,
        "probes": points,
    }
    return Fit(**{**fields, **changes})


class FakeServerTrainer:
    """Describes and evaluates when told to (``finish``), or at once (``auto``)."""

    def __init__(self, auto: bool = True) -> None:
        self.auto = auto
        self.requests: list[TrainerRequest] = []
        self.fetched: str | None = None
        self.pending: TrainerRequest | None = None
        self.loaded = self.unloaded = False
        self._deliver: Callable[[TrainerReply], None] = lambda reply: None

    def start(self, deliver: Callable[[TrainerReply], None]) -> None:
        self._deliver = deliver

    def request(self, request: TrainerRequest) -> None:
        self.requests.append(request)
        self.pending = request
        if self.auto:
            self.finish()

    def finish(self) -> None:
        request, self.pending = self.pending, None
        match request:
            case Describe():
                self._deliver(
                    Described(
                        id=request.id,
                        base=self.fetched or request.setup.base,
                        shape=SHAPE,
                        rest_mb=100,
                        samples=1,
                        device="cpu",
                        mechanisms=(),
                        torch="0",
                    )
                )
            case Evaluate():
                accuracy = 0.1 * sum(isinstance(one, Evaluate) for one in self.requests)
                self._deliver(Evaluated(id=request.id, accuracy=accuracy, loss=1.0, examples=10, seconds=0.5))

    def fail(self, message: str = "broken") -> None:
        assert self.pending is not None
        request, self.pending = self.pending, None
        self._deliver(Failed(id=request.id, cause="internal", message=message))

    def die(self) -> None:
        assert self.pending is not None
        request, self.pending = self.pending, None
        self._deliver(Died(id=request.id, memory=False, exit=-9, message="killed"))

    def interrupt(self) -> None: ...

    def unload(self) -> None:
        self.unloaded = True

    def close(self) -> None:
        self._deliver = lambda reply: None


@dataclass
class FakeDevice:
    """Follows the flow of a round as far as ``until`` says: offer, choice, announce, or receipt."""

    name: str
    broker: MemoryBroker
    clock: ManualClock
    folder: Path
    samples: int = 100
    session: int = 1
    until: str = "receipt"
    decline: str | None = None
    fit: Fit | None = field(default_factory=a_fit)
    limits: dict[str, float] = field(default_factory=dict)
    alter_announce: Callable[[Announce], Announce] = lambda announce: announce
    change: float = 0.01
    """What training adds to every value."""
    frames_left: int | None = None
    """Chunks that may still go out; None: any number."""
    updates_left: int | None = None
    """Updates that may still be announced; None: any number. What is more is held back."""

    def __post_init__(self) -> None:
        self.inbox: deque[Inbound | Connection] = deque()
        self.records: list[Any] = []
        self.transport = MemoryTransport(self.broker, self.name)
        self.store = ObjectStore(self.folder / self.name / "objects")
        self.run: Run | None = None
        self.state: AggregatorState | None = None
        self.sender: ObjectSender | None = None
        self.receiver: ObjectReceiver | None = None
        self.offer: Offer | None = None
        self.announce: Announce | None = None
        self.working = False
        self.answer: Choice | Decline | None = None
        self.holds: set[int] = set()
        self.receipts: list[Receipt] = []
        self.refusals: list[Refusal] = []
        for topic in (TOPICS.run, TOPICS.aggregator, TOPICS.reply(self.name)):
            self.transport.subscribe(topic)

    # What a test does

    def start(self) -> FakeDevice:
        self.transport.start(self.inbox.append, Will(TOPICS.presence(self.name), self._presence(False)))
        return self

    def leave(self) -> None:
        self.broker.drop(self.name)

    def come_back(self) -> None:
        self.session += 1
        self.broker.restore(self.name)

    def report(self, **changes: Any) -> None:
        assert self.run is not None
        status = Status(
            device=self.name,
            run=self.run.run,
            session=self.session,
            device_class="jetson-nano",
            emulated=True,
            fingerprint=self.run.fingerprint,
            mechanisms=(),
            samples=self.samples,
            profile=Profile(),
            fit=self.fit,
            memory=Memory(budget_mb=100, rest_mb=100),
            link=Link(),
            holds=tuple(sorted(self.holds)),
            limits=self.limits,
            position=self.position,
        )
        self.say(replace(status, **changes))

    @property
    def position(self) -> RoundPosition | None:
        """Where it stands: it keeps an offer until the update is receipted or refused, or it declines."""
        if self.announce is not None:
            return RoundPosition(round=self.announce.round, state="sending")
        return (
            RoundPosition(round=self.offer.round, state="training") if self.working and self.offer else None
        )

    def say(self, record: Any) -> None:
        self.transport.publish(TOPICS.control(self.name), encode(record))

    def send_announce(self) -> None:
        assert self.announce is not None
        if self.updates_left:
            self.updates_left -= 1
        self.say(self.announce)

    # What it does by itself

    def pump(self) -> bool:
        handled = False
        while self.inbox:
            handled = True
            event = self.inbox.popleft()
            if isinstance(event, Connection):
                if event.up:
                    self.transport.publish(TOPICS.presence(self.name), self._presence(True), retain=True)
                continue
            if is_chunk(event.payload):
                self._on_chunk(event.payload)
            else:
                self._on_record(decode(event.payload))
        return self._send_frames() or handled

    def _on_record(self, record: Any) -> None:
        self.records.append(record)
        match record:
            case Run():
                self.run = record
                if self.state is not None and self.state.ready:
                    self._greet()
            case AggregatorState():
                before, self.state = self.state, record
                new = before is None or before.epoch != record.epoch or not before.ready
                if record.ready and self.run is not None and new:
                    self._greet()
                if record.finished and record.version is not None:
                    self._fetch_next([*record.chain, record.version])
            case Offer():
                self._on_offer(record)
            case Have() if self.sender is not None and self.announce is not None:
                if record.object == self.announce.object:
                    self.sender.on_have(record, self.clock.monotonic())
            case Receipt():
                self.receipts.append(record)
                if self.announce is not None and record.object == self.announce.object:
                    self.announce = self.sender = None
                    self.working = False
            case Refusal():
                self.refusals.append(record)
                if record.reason == "storage":
                    return  # kept, and announced again when the server is ready again
                if self.announce is not None and record.object == self.announce.object:
                    self.announce = self.sender = None

    def _greet(self) -> None:
        self.report()
        if self.announce is not None:
            if self.sender is not None:
                self.sender.mark_lost()
            self.send_announce()

    def _on_offer(self, offer: Offer) -> None:
        if self.offer is not None and offer.round == self.offer.round and self.until == "receipt":
            if self.answer is not None:
                self.say(self.answer)
            if self.receiver is not None:  # what it asked for may not have been heard
                self.say(self.receiver.have(self.name, 4))
            return
        self.offer, self.working = offer, True
        if self.until == "offer":
            return
        if self.decline is not None:
            self.working = False
            self.answer = Decline(
                device=self.name, run=offer.run, round=offer.round, reason="memory", message="no"
            )
            self.say(self.answer)
            return
        candidate = next((one for one in offer.candidates if one.recommended), offer.candidates[0])
        self.answer = Choice(
            device=self.name, run=offer.run, round=offer.round, candidate=candidate, binding="none"
        )
        self.say(self.answer)
        if self.until == "choice":
            return
        if not self._fetch_next(offer.versions):
            self._train()

    def _fetch_next(self, versions: Sequence[VersionRef]) -> bool:
        """Begins to fetch the first of them that is not held; False: all are."""
        for ref in versions:
            if not self.store.has(ref.object):
                self._fetch(ref.object, ref.bytes)
                return True
        return False

    def _fetch(self, digest: str, size: int) -> None:
        self.receiver = ObjectReceiver.open(self.folder / self.name / "incoming", digest, size, 1024)
        self.say(self.receiver.have(self.name, 4))

    def _on_chunk(self, payload: bytes) -> None:
        chunk = decode_chunk(payload)
        if self.receiver is None or chunk.transfer != transfer_id(
            "edge", self.name, "down", self.receiver.digest
        ):
            return
        self.receiver.accept(chunk)
        self.say(self.receiver.have(self.name, 4))
        if self.receiver.complete:
            receiver, self.receiver = self.receiver, None
            receiver.finish(self.store)
            assert self.state is not None
            final = () if self.state.version is None else (*self.state.chain, self.state.version)
            wanted = self.offer.versions if self.offer is not None and not self.state.finished else final
            self.holds |= {ref.number for ref in wanted if ref.object == receiver.digest}
            if not self._fetch_next(wanted) and wanted is not final:
                self._train()
            self.report()

    def make_update(self, **changes: Any) -> Path:
        """A container as training would have written it; ``changes`` go to ``write_update``."""
        assert self.run is not None and self.offer is not None
        offer = self.offer
        candidate = next((one for one in offer.candidates if one.recommended), offer.candidates[0])
        start = read_adapter([self.store.path(ref.object) for ref in offer.versions])
        end: Adapter = {key: rows + np.float32(self.change) for key, rows in start.items()}
        path = self.folder / self.name / "update.safetensors"
        fields: dict[str, Any] = {
            "run": offer.run,
            "round": offer.round,
            "fingerprint": self.run.fingerprint.digest,
            "builds_on": offer.versions[-1].number,
            "start": start,
            "end": end,
            "keys": tuned_keys(SHAPE, candidate.depth),
            "codec": candidate.codec,
            "residual": None,
        }
        write_update(path, **{**fields, **changes})
        return path

    def prepare(self, path: Path) -> Announce:
        """Adopts a container and makes its announce, not yet sent."""
        assert self.run is not None and self.offer is not None
        digest, size = self.store.adopt(path)
        offer = self.offer
        candidate = next((one for one in offer.candidates if one.recommended), offer.candidates[0])
        announce = Announce(
            device=self.name,
            run=offer.run,
            round=offer.round,
            nonce=offer.nonce,
            fingerprint=self.run.fingerprint.digest,
            object=digest,
            bytes=size,
            chunk_bytes=offer.chunk_bytes,
            builds_on=offer.versions[-1].number,
            samples=self.samples,
            candidate=candidate,
            measured=Measured(
                rest_mb=100,
                peak_mb=candidate.peak_mb,
                train_s=2.0,
                step_s=0.4,
                steps=5,
                loss_first=2.0,
                loss_last=1.0,
            ),
        )
        self.announce = self.alter_announce(announce)
        self.sender = self.sender_of(announce)
        return self.announce

    def sender_of(self, announce: Announce) -> ObjectSender:
        name = transfer_id("edge", self.name, f"up/{announce.run}/{announce.round}", announce.object)
        path = self.store.path(announce.object)
        return ObjectSender(name, path, announce.bytes, announce.chunk_bytes)

    def _train(self) -> None:
        self.prepare(self.make_update())
        if self.until != "announce" and self.updates_left != 0:
            self.send_announce()

    def _send_frames(self) -> bool:
        sent = False
        while self.sender is not None and self.frames_left != 0:
            frame = self.sender.next_frame(self.clock.monotonic())
            if frame is None:
                break
            sent = True
            if self.frames_left is not None:
                self.frames_left -= 1
            self.transport.publish(TOPICS.bulk(self.name), frame)
        return sent

    def _presence(self, online: bool) -> bytes:
        return encode(Presence(device=self.name, online=online, session=self.session))


class World:
    """A server and its devices on one in-memory broker and one clock that stands still unless told."""

    def __init__(self, folder: Path, **rounds: Any) -> None:
        self.folder = folder
        self.clock = ManualClock(1000.0)
        self.broker = MemoryBroker()
        self.config = a_config(folder, **rounds)
        self.devices: list[FakeDevice] = []
        self.events: list[Event] = []
        self.trainer = FakeServerTrainer()
        self.server: Aggregator | None = None

    def device(self, name: str = "one", **values: Any) -> FakeDevice:
        device = FakeDevice(name, self.broker, self.clock, self.folder, **values)
        self.devices.append(device)
        return device.start()

    def open(self, auto: bool = True, **changes: Any) -> Aggregator:
        self.config = replace(self.config, **changes)
        self.trainer = FakeServerTrainer(auto)
        self.server = Aggregator(
            self.config,
            transport=MemoryTransport(self.broker, "server"),
            trainer=self.trainer,
            clock=self.clock,
            on_event=self.events.append,
        )
        self.server.open()
        return self.server

    def kill(self) -> None:
        """As kill -9 does: nothing is said, nothing more is written."""
        assert self.server is not None
        self.broker.drop("server")
        if self.server._running is not None:
            self.server._running.close()
        self.server._store.close()
        self.server._folder.release()
        self.server = None
        self.broker._clients.pop("server", None)
        self.broker._cut.discard("server")

    def pump(self) -> None:
        """Until nobody has anything to say."""
        for _ in range(10_000):
            busy = False
            if self.server is not None and not self.server.done:
                busy = self.server.step()
                self.server.tick()
            for device in self.devices:
                busy = device.pump() or busy
            if not busy and (self.server is None or self.server.done or self.server._inbox.empty()):
                return
        raise AssertionError("it never comes to rest")

    def pass_time(self, seconds: float, step: float = 1.0) -> None:
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.advance(min(step, end - self.clock.now))
            self.pump()

    def names(self) -> list[str]:
        return [event.name for event in self.events]

    def last(self, name: str) -> dict[str, Any]:
        return dict(next(event for event in reversed(self.events) if event.name == name).fields)

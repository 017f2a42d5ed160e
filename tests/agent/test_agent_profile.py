"""``edge-agent profile``: every value with how and when, or why not; the link beside an agent and without."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from test_agent_cli import edge_agent, free_port

from aggregator.broker.embedded import EmbeddedBroker
from aggregator.echo import Echo
from edge_sdk.agent.link import Found, _Call, find_link, keep_link, kept_link
from edge_sdk.agent.lock import FolderLock
from edge_sdk.agent.profiling import measure_machine, readings
from edge_sdk.agent.record import AgentRecord
from edge_sdk.cli.profiling import _table
from edge_sdk.clock import ManualClock, SystemClock
from edge_sdk.config.agent import AgentConfig, AgentSection, BaseSection, DataSection, LimitsSection
from edge_sdk.config.broker import BrokerConfig
from edge_sdk.protocol.frames import decode_chunk, is_chunk
from edge_sdk.protocol.measure import Link, Reading, Throughput
from edge_sdk.protocol.topics import Topics
from edge_sdk.protocol.trainer import Died, Failed, Measure, Timed, TrainerReply, TrainerRequest
from edge_sdk.protocol.wire import AggregatorState, decode, encode
from edge_sdk.transport.base import Connection, Inbound, Transport
from edge_sdk.transport.memory import MemoryBroker, MemoryTransport
from edge_sdk.transport.mqtt import MqttTransport

pytestmark = pytest.mark.alone
NAMESPACE = "profile"
THROUGHPUT = Throughput(
    device="cpu", name="Some CPU", at=5.0, gflops={"fp32": 40.0}, gb_s={"copy": 9.5}, spread={"fp32": 0.25},
    reasons={"int8": "torch: cannot"},
)  # fmt: skip


class Trainer:
    """Answers a Measure as it is told."""

    loaded = False

    def __init__(self, reply: TrainerReply) -> None:
        self.reply, self.closed = reply, False

    def start(self, deliver: Callable[[TrainerReply], None]) -> None:
        self._deliver = deliver

    def request(self, request: TrainerRequest) -> None:
        assert isinstance(request, Measure)
        self._deliver(self.reply)

    def interrupt(self) -> None: ...

    def unload(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def config(folder: Path, url: str = "mqtt://127.0.0.1:1", **agent: object) -> AgentConfig:
    return AgentConfig(
        agent=AgentSection(id="dev-a", state_dir=str(folder / "state"), **agent),  # type: ignore[arg-type]
        broker=BrokerConfig(url=url, namespace=NAMESPACE),
        base=BaseSection(path="base"),
        data=DataSection(path="rows.jsonl"),
    )


def serve(server: Transport, **state: object) -> None:
    """An aggregator that answers measurements, and nothing else."""
    topics = Topics(NAMESPACE)
    reply = topics.reply("dev-a")
    echo = Echo(
        NAMESPACE, SystemClock(), lambda device, record: server.publish(reply, encode(record)),
        lambda device, frame: server.publish(reply, frame), lambda name, **fields: None,
    )  # fmt: skip
    known: dict[str, object] = {"ready": True, "epoch": "e", "link_bytes": 200_000, **state}

    def deliver(event: Inbound | Connection) -> None:
        if isinstance(event, Connection):
            if event.up:
                server.publish(topics.aggregator, encode(AggregatorState(**known)), retain=True)  # type: ignore[arg-type]
        elif is_chunk(event.payload):
            echo.on_chunk("dev-a", decode_chunk(event.payload))
        else:
            echo.on_ping("dev-a", decode(event.payload))

    server.subscribe(topics.control("+"))
    server.subscribe(topics.bulk("+"))
    server.start(deliver)


@pytest.fixture(params=["memory", "mqtt"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Transport, Transport]]:
    """The server's end and the device's."""
    if request.param == "memory":
        broker = MemoryBroker()
        yield MemoryTransport(broker, "aggregator"), MemoryTransport(broker, "dev-a")
        return
    real: EmbeddedBroker = request.getfixturevalue("embedded_broker")
    address = BrokerConfig(url=f"mqtt://127.0.0.1:{real.port}", namespace=NAMESPACE)
    server, device = MqttTransport(address, f"{NAMESPACE}-s"), MqttTransport(address, f"{NAMESPACE}-d")
    yield server, device
    device.stop()
    server.stop()


def test_the_link_is_measured_and_kept_for_the_agent(
    ends: tuple[Transport, Transport], tmp_path: Path
) -> None:
    serve(ends[0])
    found = find_link(config(tmp_path), transport=ends[1])
    assert found.reasons == {} and found.at > 0
    assert found.link.source == "measured"
    assert found.link.up_bps and found.link.down_bps and found.link.rtt_ms
    record = AgentRecord(tmp_path / "state" / "agent.db")
    kept, at = kept_link(record)
    record.close()
    assert (round(found.link.up_bps), at) == (kept.up_bps, found.at)
    assert kept.down_bps == round(found.link.down_bps)


def test_beside_a_running_agent_its_own_figures_are_told(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "state")
    record = AgentRecord(tmp_path / "state" / "agent.db")
    device = MemoryTransport(MemoryBroker(), "dev-a")
    nothing = find_link(config(tmp_path), transport=device)
    assert "the agent runs" in nothing.reasons["up_bps"] and nothing.link.source == "unknown"
    keep_link(record, Link(up_bps=1e6, rtt_ms=20.5, source="measured"), at=77.0)
    found = find_link(config(tmp_path), transport=device)
    record.close()
    lock.release()
    assert found.link == Link(up_bps=1e6, rtt_ms=20.5, source="measured") and found.at == 77.0
    assert found.reasons.keys() == {"down_bps"}


def test_an_aggregator_that_is_away_or_too_old(tmp_path: Path) -> None:
    for state, reason in (({"ready": False}, "away"), ({"link_bytes": 0}, "older version")):
        broker = MemoryBroker()
        serve(MemoryTransport(broker, "aggregator"), **state)
        found = find_link(config(tmp_path), transport=MemoryTransport(broker, "dev-a"))
        assert reason in found.reasons["rtt_ms"]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_sdk.agent.link._STATE_S", 0.2)
    monkeypatch.setattr("edge_sdk.agent.link._CONNECT_S", 1.0)


def test_no_broker(tmp_path: Path) -> None:
    found = find_link(config(tmp_path, url=f"mqtt://127.0.0.1:{free_port()}"))
    assert "no connection to mqtt://127.0.0.1" in found.reasons["down_bps"]
    assert "refused" in find_link(config(tmp_path, url="mqtt://example.org")).reasons["up_bps"]


def test_a_broker_without_an_aggregator(tmp_path: Path) -> None:
    found = find_link(config(tmp_path), transport=MemoryTransport(MemoryBroker(), "dev-a"))
    assert "no aggregator is there" in found.reasons["up_bps"]


def named(told: list[Reading]) -> dict[str, Reading]:
    assert len({one.name for one in told}) == len(told)
    return {one.name: one for one in told}


def test_readings_say_how_and_when_or_why_not() -> None:
    trainer = Trainer(Timed(id=1, throughput=(THROUGHPUT,), torch="2", seconds=1.0))
    lines: list[str] = []
    profile, found = measure_machine(None, tell=lines.append, trainer=trainer)
    assert trainer.closed and len(lines) == 2
    told = named(readings(profile, found))
    for one in told.values():
        assert (one.value is None) == (one.how is None)
        assert one.how is None or one.at > 0, one
        assert one.how is not None or one.reason, one
    fp32 = told["cpu.fp32_gflops"]
    assert (fp32.value, fp32.how, fp32.at, fp32.spread) == (40.0, "measured", 5.0, 0.25)
    assert told["cpu.copy_gb_s"].value == 9.5
    assert told["cpu.int8"].reason == "torch: cannot"
    assert told["memory_mb"].how == "read"
    assert "no config" in told["link.up_bps"].reason
    table = _table(list(told.values()))
    assert len(table) == len(told) + 1
    assert any(line.split()[:3] == ["cpu.fp32_gflops", "40", "measured"] for line in table)


@pytest.mark.parametrize(
    "reply, reason",
    [
        (
            Failed(id=1, cause="extra", message="training needs torch", hint="pip install 'edge-sdk[train]'"),
            "training needs torch: pip install 'edge-sdk[train]'",
        ),
        (Died(id=1, memory=False, exit=-11, message="the trainer was killed"), "the trainer was killed"),
    ],
)
def test_without_a_trainer_there_is_a_reason(reply: TrainerReply, reason: str) -> None:
    profile, _ = measure_machine(None, trainer=Trainer(reply))
    assert profile.throughput == () and profile.reasons["throughput"] == reason


def test_what_cannot_be_measured_is_taken_from_the_data_sheet_of_the_owners_class(tmp_path: Path) -> None:
    owned = config(tmp_path, device_class="jetson-agx-orin-64gb")
    profile, found = measure_machine(owned, link=False, compute=False)
    stated = [one for one in readings(profile, found) if one.how == "datasheet"]
    assert "cuda:0.copy_gb_s" in {one.name for one in stated} and all(one.value for one in stated)
    assert found == Found.nothing("left out as asked")
    played, _ = measure_machine(
        config(tmp_path, device_class="jetson-agx-orin-64gb", emulated=True), link=False, compute=False
    )
    assert played.throughput == (), "this machine only plays that class"


def made_up_time(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """Nothing takes any but waiting."""
    clock = ManualClock(1000.0)

    def next_event(call: _Call, seconds: float) -> Inbound | Connection | None:
        if call._inbox.empty():
            clock.advance(seconds)
            return None
        return call._inbox.get()

    monkeypatch.setattr(_Call, "_next", next_event)
    return clock


def limited(folder: Path, uplink_kbps: float) -> AgentConfig:
    return replace(config(folder), limits=LimitsSection(uplink_kbps=uplink_kbps))


def test_the_owners_limit_is_kept_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, broker = made_up_time(monkeypatch), MemoryBroker()
    serve(MemoryTransport(broker, "aggregator"), link_bytes=100_000)
    found = find_link(limited(tmp_path, 200.0), transport=MemoryTransport(broker, "dev-a"), clock=clock)
    assert found.link.up_bps == pytest.approx(200_000, rel=0.1)


def test_a_link_is_measured_within_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, broker = made_up_time(monkeypatch), MemoryBroker()
    serve(MemoryTransport(broker, "aggregator"), link_bytes=2_000_000)
    slow, device = limited(tmp_path, 100.0), MemoryTransport(broker, "dev-a")
    found = find_link(slow, transport=device, clock=clock, within_s=0.5)
    assert clock.now == pytest.approx(1000.5, abs=0.01)
    assert found.link.rtt_ms is not None and found.link.up_bps == pytest.approx(100_000, rel=0.2)
    silent = MemoryBroker()  # an aggregator that is there and answers nothing
    server = MemoryTransport(silent, "aggregator")
    server.start(lambda event: None)
    state = AggregatorState(ready=True, epoch="e", link_bytes=2_000_000)
    server.publish(Topics(NAMESPACE).aggregator, encode(state), retain=True)
    began = clock.now
    found = find_link(slow, transport=MemoryTransport(silent, "dev-a"), clock=clock, within_s=1.5)
    assert clock.now - began == pytest.approx(1.5, abs=0.01)
    assert found.reasons["up_bps"] == "it was not measured within 2 s" and found.link.source == "unknown"


def test_all_of_it_has_an_end(tmp_path: Path) -> None:
    class Silent(Trainer):
        def request(self, request: TrainerRequest) -> None:
            assert isinstance(request, Measure) and request.until is not None
            self.left = request.until - time.monotonic()

    silent, began = Silent(Failed(id=1, cause="bug", message="not said")), time.monotonic()
    profile, found = measure_machine(
        config(tmp_path, url=f"mqtt://127.0.0.1:{free_port()}"), seconds=1.6, trainer=silent
    )
    assert time.monotonic() - began < 2.5 and silent.closed and silent.left < 0.6
    assert "--seconds 60" in profile.reasons["throughput"] and "no connection" in found.reasons["rtt_ms"]


@pytest.mark.train
def test_the_command_keeps_to_its_seconds(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    done = edge_agent("profile", "--seconds", "8", "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert told["seconds"] < 9
    named = {one["name"]: one for one in told["readings"]}
    assert "cpu.fp32_gflops" in named or "--seconds 60" in named["throughput"]["reason"]


def test_the_command_as_json(tmp_path: Path) -> None:
    done = edge_agent("profile", "--no-compute", "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert told["profile"]["memory_mb"] > 0 and told["link"]["source"] == "unknown"
    (memory,) = (one for one in told["readings"] if one["name"] == "memory_mb")
    assert memory["how"] == "read" and not done.stderr


def test_the_command_needs_the_config_that_it_is_given(tmp_path: Path) -> None:
    done = edge_agent("profile", "-c", "no.toml", cwd=tmp_path)
    assert done.returncode == 64 and "no.toml" in done.stderr

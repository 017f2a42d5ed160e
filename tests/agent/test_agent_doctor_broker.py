"""Doctor against real brokers: let in, refused, not there; and the command itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from edge_sdk.agent.doctor import broker as doctor_broker
from edge_sdk.agent.doctor import examine, training
from edge_sdk.agent.doctor.broker import broker_findings
from edge_sdk.agent.doctor.finding import Finding
from edge_sdk.agent.lock import FolderLock
from edge_sdk.cli.doctor import _lines
from edge_sdk.cli.main import app
from edge_sdk.clock import ManualClock
from edge_sdk.config.agent import AgentConfig, AgentSection, BaseSection, DataSection
from edge_sdk.config.broker import BrokerConfig, TlsConfig
from edge_sdk.transport.memory import MemoryBroker, MemoryTransport
from tests.support.brokers import Authority, TlsWorld, require_mosquitto


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    require_mosquitto()
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[TlsWorld]:
    world = TlsWorld(tmp_path_factory.mktemp("broker"), authority, passwords=True)
    yield world
    world.close()


def agent(folder: Path, broker: BrokerConfig) -> AgentConfig:
    return AgentConfig(
        agent=AgentSection(id="dev-a", state_dir=str(folder / "state")),
        broker=broker,
        base=BaseSection(path=str(folder / "base")),
        data=DataSection(path=str(folder / "rows.jsonl")),
    )


def finding(config: AgentConfig, give_up_s: float = 30.0) -> Finding:
    (found,) = broker_findings(config, give_up_s=give_up_s)
    assert found.id == "broker"
    return found


def test_a_broker_that_lets_it_in(tmp_path: Path, world: TlsWorld) -> None:
    found = finding(agent(tmp_path, world.config("dev-a")))
    assert found.level == "ok" and "MQTT 5" in found.text


def test_a_wrong_password(tmp_path: Path, world: TlsWorld) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("guessed\n")
    found = finding(agent(tmp_path, msgspec.structs.replace(world.config("dev-a"), password_file=str(wrong))))
    assert found.exit_code == 77 and "password_file" in found.fix


def test_a_wrong_authority(tmp_path: Path, world: TlsWorld) -> None:
    other = Authority(tmp_path / "other", "Another CA")
    trusting = msgspec.structs.replace(world.config("dev-a"), tls=TlsConfig(ca=str(other.ca)))
    found = finding(agent(tmp_path, trusting))
    assert found.exit_code == 77 and "certificate" in found.text and "clock" in found.fix


def test_a_closed_port_is_given_up(tmp_path: Path) -> None:
    found = finding(agent(tmp_path, BrokerConfig(url="mqtt://127.0.0.1:1")), give_up_s=0.5)
    assert found.exit_code == 69 and "no broker answers" in found.text


def test_a_broker_that_never_answers_is_given_up(tmp_path: Path) -> None:
    broker = MemoryBroker()
    broker.stop()
    config = agent(tmp_path, BrokerConfig(url="mqtt://127.0.0.1:1"))
    (found,) = broker_findings(config, connect=lambda _: MemoryTransport(broker, "x"), give_up_s=0.1)
    assert found.exit_code == 69


def test_a_password_that_travels_readable(tmp_path: Path) -> None:
    open_broker = BrokerConfig(url="mqtt://192.0.2.1:1883", insecure=True)
    broker = MemoryBroker()
    found = list(
        broker_findings(agent(tmp_path, open_broker), connect=lambda _: MemoryTransport(broker, "x"))
    )
    assert [(one.id, one.level) for one in found] == [("broker-security", "warning"), ("broker", "ok")]


def test_no_second_connection_beside_an_agent_that_runs(tmp_path: Path) -> None:
    def connect(_config: AgentConfig) -> MemoryTransport:
        raise AssertionError("it would throw out the agent")

    lock = FolderLock(tmp_path / "state")
    config = agent(tmp_path, BrokerConfig(url="mqtt://127.0.0.1:1"))
    (found,) = broker_findings(config, connect=connect)
    lock.release()
    assert found.exit_code == 69 and "no connection" in found.text


def write(folder: Path, broker: BrokerConfig) -> Path:
    (folder / "rows.jsonl").write_text('{"text": "a", "label": "no"}\n')
    (folder / "agent.toml").write_text(
        f'[agent]\nid = "dev-a"\n[broker]\nurl = "{broker.url}"\nusername = "{broker.username}"\n'
        f'password_file = "{broker.password_file}"\ntls.ca = "{broker.tls.ca}"\n'
        '[base]\npath = "base"\n[data]\npath = "rows.jsonl"\n'
    )
    return folder / "agent.toml"


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is another test's: here its package seems not to be there."""
    monkeypatch.setattr(training.training_findings, "__kwdefaults__", {"checkup": None, "is_there": _absent})


def _absent(_name: str) -> None:
    return None


def test_a_clock_in_1970_beside_a_broker_that_answers(
    tmp_path: Path, world: TlsWorld, untrained: None
) -> None:
    file = write(tmp_path, world.config("dev-a"))
    found = {one.id: one for one in examine(file, clock=ManualClock(0.0))}
    assert found["clock"].level == "error" and "TLS" in found["clock"].text
    assert found["certificates"].exit_code == 77
    assert found["broker"].level == "ok"


def test_the_command(tmp_path: Path, world: TlsWorld, untrained: None) -> None:
    file = write(tmp_path, world.config("dev-a"))
    told = CliRunner().invoke(app, ["doctor", "--config", str(file), "--json"])
    report = json.loads(told.stdout)
    assert told.exit_code == report["exit_code"] == 70
    levels = {one["id"]: one["level"] for one in report["findings"]}
    assert levels["broker"] == "ok" and levels["torch"] == "error" and levels["base"] == "warning"
    plain = CliRunner().invoke(app, ["doctor", "--config", str(file)])
    assert "fix: pip install 'edge-sdk[train]'" in plain.stdout and "1 error" in plain.stdout


def test_without_a_config_the_machine_is_looked_at(
    tmp_path: Path, untrained: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_broker, "MqttTransport", None)
    told = CliRunner().invoke(app, ["doctor", "--config", str(tmp_path / "agent.toml"), "--json"])
    assert told.exit_code == 64
    findings = json.loads(told.stdout)["findings"]
    assert "`edge-agent init` writes" in findings[0]["fix"]
    levels = {one["id"]: one["level"] for one in findings}
    assert levels["config"] == "error" and levels["memory"] == "ok" and levels["broker"] == "skipped"


def test_several_errors_of_a_config_stand_apart() -> None:
    lines = "\n  agent.id: is missing\n  limits.memory_gb: is no key of this file"
    several = Finding(id="config", level="error", text=f"agent.toml: 2 errors:{lines}", exit_code=64)
    assert _lines(several) == [
        "error    config         agent.toml: 2 errors: agent.id: is missing; "
        "limits.memory_gb: is no key of this file"
    ]

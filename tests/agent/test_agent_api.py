"""The agent with its own thread: start, stop, locks, what an app sees."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from agent_fakes import FakeAggregator, FakeBase, FakeMachine, FakeTrainer, World, version_object

import edge_sdk.agent.api as api
import edge_sdk.agent.record as api_record
from edge_sdk.agent import lock as locks
from edge_sdk.agent.api import Agent
from edge_sdk.agent.lock import AGENT, AGGREGATOR, FolderLock, Owner, holder
from edge_sdk.agent.record import AgentRecord
from edge_sdk.errors import BrokerError, ConfigError, CredentialsError, StateError
from edge_sdk.events import Event
from edge_sdk.protocol.wire import Choice, Status
from edge_sdk.transport.base import Connection
from edge_sdk.transport.memory import MemoryBroker, MemoryTransport


class Stage:
    """An Agent in its thread, a fake aggregator pumped by the test."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(api.open_core, "__kwdefaults__", {
            **(api.open_core.__kwdefaults__ or {}), "machine": FakeMachine(), "base_files": FakeBase(),
        })  # fmt: skip
        self.config = World(folder).config
        self.broker = MemoryBroker()
        self.aggregator = FakeAggregator(MemoryTransport(self.broker, "aggregator"))
        self.aggregator.start()
        self.trainer = FakeTrainer()
        self.names: list[str] = []

    def agent(self, **options: object) -> Agent:
        agent = Agent(
            self.config,
            trainer=self.trainer,
            transport=MemoryTransport(self.broker, "agent"),
            **options,  # type: ignore[arg-type]
        )
        agent.on(lambda event: self.names.append(event.name))
        return agent

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            self.aggregator.pump()
            assert time.monotonic() < deadline, self.names
            time.sleep(0.005)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tmp_path, monkeypatch)


def test_a_whole_run_in_an_app(stage: Stage) -> None:
    with stage.agent() as agent:
        stage.aggregator.hello()
        stage.until(lambda: stage.aggregator.got(Status))
        stage.aggregator.offer()
        stage.until(lambda: "update.receipt" in stage.names)
        ref, data = version_object(1)
        stage.aggregator.objects[ref.object] = data
        stage.aggregator.state(finished=True, version=ref)
        stage.until(lambda: "run.finished" in stage.names)
        assert agent.adapter(20).name.startswith("1-")
        status = agent.status()
        assert status["running"] and status["connected"] and status["finished"]
        (row,) = status["rounds"]
        assert (row["depth"], row["binding_budget"], row["state"]) == (4, "none", "received")
        assert row["predicted_peak_mb"] == 50 and row["measured_peak_mb"] == 29
        assert status["ledger"]["chunks_up"] == 10
    assert not agent.running and agent.wait(0)
    assert not agent.status()["running"] and agent.status()["rounds"] == [row]


def test_pause_resume_and_stop_from_another_thread(stage: Stage) -> None:
    agent = stage.agent()
    agent.start()
    stage.aggregator.hello()
    stage.until(lambda: stage.aggregator.got(Status))
    agent.pause()
    stage.until(lambda: stage.aggregator.got(Status)[-1].permission == "paused")
    agent.resume()
    stage.until(lambda: stage.aggregator.got(Status)[-1].permission == "running")
    agent.stop()
    agent.stop()
    assert not agent.running
    with pytest.raises(StateError, match="not running"):
        agent.pause()


def test_an_apps_gate_may_come_and_go_while_the_agent_runs(stage: Stage) -> None:
    agent = stage.agent()
    in_use = [True]
    agent.gate("user", lambda: not in_use[0])
    agent.start()
    stage.aggregator.hello()
    stage.until(lambda: agent.status().get("reason") == "user: closed by the app")
    take_away = agent.gate("user", lambda: True)
    stage.until(lambda: stage.aggregator.got(Status))
    assert stage.aggregator.got(Status)[-1].permission == "running"
    agent.gate("thesis", lambda: False)
    take_away()
    stage.until(lambda: stage.aggregator.got(Status)[-1].reason == "thesis: closed by the app")
    agent.stop()


def test_two_agents_on_one_folder(stage: Stage) -> None:
    with stage.agent() as agent:
        with pytest.raises(StateError, match="in use by process"):
            stage.agent().start()
        with pytest.raises(StateError, match="runs already"):
            agent.start()
    with stage.agent():
        pass


def test_no_adapter_yet(stage: Stage) -> None:
    with stage.agent() as agent:
        stage.aggregator.hello()
        with pytest.raises(StateError, match="holds no version"):
            agent.adapter(10)


def test_adapter_from_a_callback_is_refused_rather_than_waiting_for_itself(stage: Stage) -> None:
    failures = []
    agent = stage.agent()

    def ask(event: Event) -> None:
        try:
            if event.name == "connection.up":
                agent.adapter()
        except StateError as error:
            failures.append(error)

    agent.on(ask)
    with agent:
        stage.until(lambda: failures)
    assert "callback" in failures[0].message


def test_a_subscriber_leaves(stage: Stage) -> None:
    seen: list[object] = []
    agent = stage.agent()
    agent.on(seen.append)()
    with agent:
        stage.until(lambda: "connection.up" in stage.names)
    assert not seen


def test_gives_up_without_a_broker_only_when_told(stage: Stage) -> None:
    stage.broker.stop()
    agent = stage.agent(give_up_s=0.1)
    agent.start()
    with pytest.raises(BrokerError, match="no connection"):
        agent.wait(20)


@pytest.mark.parametrize("once", [False, True])
def test_a_refused_password_ends_it_before_the_first_connection_or_when_told(
    stage: Stage, once: bool
) -> None:
    if not once:
        stage.broker.stop()
    agent = stage.agent(give_up_s=60.0 if once else None)
    agent.start()
    assert agent._core is not None
    stage.until(lambda: "connection.up" in stage.names or "connection.down" in stage.names)
    agent._core.inbox.put(Connection(up=False, error=CredentialsError("refused"), final=True))
    with pytest.raises(CredentialsError):
        agent.wait(20)


def test_a_refused_password_later_on_is_tried_again(stage: Stage) -> None:
    with stage.agent() as agent:
        stage.until(lambda: "connection.up" in stage.names)
        assert agent._core is not None
        agent._core.inbox.put(Connection(up=False, error=CredentialsError("refused"), final=True))
        stage.until(lambda: "connection.down" in stage.names)
        assert agent.running


def test_stop_while_training(stage: Stage) -> None:
    stage.trainer.auto = False
    with stage.agent():
        stage.aggregator.hello()
        stage.until(lambda: stage.aggregator.got(Status))
        stage.aggregator.offer()
        stage.until(lambda: stage.trainer.trained)
    stage.trainer = FakeTrainer()
    with stage.agent():
        stage.until(lambda: "update.receipt" in stage.names)
    assert {one.candidate.id for one in stage.aggregator.got(Choice)} == {"d4"}


def test_lock_names_the_process(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    lock = FolderLock(tmp_path)
    with pytest.raises(StateError, match=f"process {os.getpid()}"):
        FolderLock(tmp_path)
    assert holder(tmp_path) == os.getpid()
    lock.release()
    assert holder(tmp_path) is None
    FolderLock(tmp_path).release()


@pytest.mark.parametrize(("first", "second"), [(AGENT, AGGREGATOR), (AGGREGATOR, AGENT)])
def test_a_folder_is_of_one_kind(
    tmp_path: Path, first: Owner, second: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = FolderLock(tmp_path, first)
    assert holder(tmp_path, first) == os.getpid() and holder(tmp_path, second) is None
    with pytest.raises(ConfigError, match=rf"{second.key}.*of an {first.name}: process {os.getpid()}"):
        FolderLock(tmp_path, second)
    assert [one.name for one in tmp_path.iterdir()] == [first.lock], "left as it was"
    lock.release()
    (tmp_path / first.database).touch()
    with pytest.raises(ConfigError, match=f"{first.database} lies in it"):
        FolderLock(tmp_path, second)
    (tmp_path / first.database).unlink()

    pids = iter([None, 7])  # who came while this one took its lock
    monkeypatch.setattr(locks, "holder", lambda folder, owner: next(pids))
    with pytest.raises(ConfigError, match="process 7"):
        FolderLock(tmp_path, second)
    assert holder(tmp_path, second) is None, "and let go of"


def test_an_aggregators_folder_is_left_alone(stage: Stage) -> None:
    folder = Path(stage.config.agent.state_dir)
    (folder / "objects").mkdir(parents=True)
    accepted = folder / "objects" / ("0" * 64)
    for file in (accepted, folder / AGGREGATOR.database):
        file.write_text("accepted")
    agent = stage.agent()
    with pytest.raises(ConfigError, match=r"agent\.state_dir"):
        agent.start()
    with pytest.raises(ConfigError, match=r"agent\.state_dir"):
        agent.status()
    assert accepted.read_text() == "accepted"
    assert sorted(one.name for one in folder.iterdir()) == ["objects", AGGREGATOR.database]


def test_a_damaged_or_newer_state_file(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(StateError, match="damaged"):
        AgentRecord(path)
    path.unlink()
    record = AgentRecord(path)
    record._db.execute("PRAGMA user_version=99")
    record.close()
    with pytest.raises(StateError, match="schema 99"):
        AgentRecord(path)


def refuse(*_words: object, **_named: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["lock", "session", "objects", "record"])
def test_a_full_disk_is_told_at_the_start(stage: Stage, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_words: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    if where == "lock":
        monkeypatch.setattr(os, "pwrite", refuse)
    elif where == "session":
        monkeypatch.setattr(AgentRecord, "next_session", full)
    elif where == "objects":
        mkdir = Path.mkdir
        monkeypatch.setattr(
            Path, "mkdir", lambda path, **named: (refuse if path.name == "objects" else mkdir)(path, **named)
        )
    else:
        monkeypatch.setattr(api_record, "Outbox", full)
    with pytest.raises(StateError, match=r"No space|disk is full") as told:
        stage.agent().start()
    assert "disk space" in told.value.hint and "damaged" not in told.value.message
    monkeypatch.undo()
    FolderLock(Path(stage.config.agent.state_dir)).release()


def test_the_state_folder_is_the_owners_alone(stage: Stage) -> None:
    with stage.agent():
        pass
    assert Path(stage.config.agent.state_dir).stat().st_mode & 0o077 == 0


def test_sessions_count_starts(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        record = AgentRecord(tmp_path / "agent.db")
        assert record.next_session() == number
        record.close()


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, edge_sdk\n"
        "heavy = {'torch', 'numpy', 'paho', 'typer', 'msgspec'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert sorted(edge_sdk.__all__) == dir(edge_sdk)\n"
        "for name in edge_sdk.__all__:\n"
        "    getattr(edge_sdk, name)\n"
        "import edge_sdk.cli.main, edge_sdk.cli.running, edge_sdk.transport.mqtt\n"
        "heavy = {'torch', 'numpy', 'rich', 'asyncio', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr


def test_callbacks_run_in_the_agents_thread(stage: Stage) -> None:
    threads: set[str] = set()
    agent = stage.agent()
    agent.on(
        lambda event: threads.add(threading.current_thread().name) if event.name == "agent.reported" else None
    )
    with agent:
        stage.aggregator.hello()
        stage.until(lambda: threads)
    assert threads == {"edge-agent"}

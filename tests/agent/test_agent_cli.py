"""``edge-agent`` as a command: what it writes, and how errors look."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = str(Path(__file__).parents[2])


def edge_agent(*words: str, cwd: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words),
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(),
        check=False,
        timeout=timeout,
    )


def command(*words: str) -> list[str]:
    return [sys.executable, "-W", "error", "-c", "from edge_sdk.cli.main import main; main()", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ROOT}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "no"}\n')
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    write_config(tmp_path)
    return tmp_path


def write_config(folder: Path, extra: str = "", broker: str = "") -> None:
    (folder / "agent.toml").write_text(
        f'[agent]\nid = "one"\n{extra}\n[broker]\nurl = "{broker or f"mqtt://127.0.0.1:{free_port()}"}"\n'
        '[base]\npath = "base"\n[data]\npath = "rows.jsonl"\n'
    )


def errors(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: ") and all(line.startswith("hint: ") for line in lines[1:])
    assert len(lines) <= 2
    return done.stderr


@pytest.mark.parametrize("what", ["run", "status"])
def test_a_missing_config(tmp_path: Path, what: str) -> None:
    assert "agent.toml" in errors(edge_agent(what, cwd=tmp_path), 64)


def test_an_unknown_key_and_a_key_of_the_other_file(folder: Path) -> None:
    write_config(folder, extra='state_dri = "x"\n[run]\nname = "x"')
    told = errors(edge_agent("run", cwd=folder), 64)
    assert "state_dri" in told and "state_dir" in told


def test_a_device_class_that_does_not_exist(folder: Path) -> None:
    write_config(folder, extra='device_class = "jetson-orin-nano-9gb"')
    assert "jetson-orin-nano-8gb" in errors(edge_agent("run", cwd=folder), 64)


def test_an_insecure_broker(folder: Path) -> None:
    write_config(folder, broker="mqtt://example.org:1883")
    assert "insecure" in errors(edge_agent("run", cwd=folder), 64)


def test_a_folder_in_use(folder: Path) -> None:
    from edge_sdk.agent.lock import FolderLock

    lock = FolderLock(folder / "state")
    assert str(os.getpid()) in errors(edge_agent("run", cwd=folder), 73)
    lock.release()


def test_init_writes_a_config_and_refuses_to_overwrite(tmp_path: Path) -> None:
    assert "agent.toml" in edge_agent("init", cwd=tmp_path).stdout
    text = (tmp_path / "agent.toml").read_text()
    assert "exists already" in errors(edge_agent("init", cwd=tmp_path), 64)
    (tmp_path / "agent.toml").write_text("mine")
    done = edge_agent("init", "--force", "--json", cwd=tmp_path)
    assert json.loads(done.stdout) == {"written": "agent.toml"}
    assert (tmp_path / "agent.toml").read_text() == text
    errors(edge_agent("init", "no/such/folder/agent.toml", cwd=tmp_path), 64)


def test_device_classes(tmp_path: Path) -> None:
    lines = edge_agent("device-classes", cwd=tmp_path).stdout.splitlines()
    classes = json.loads(edge_agent("device-classes", "--json", cwd=tmp_path).stdout)
    assert len(lines) == len(classes) >= 24
    assert {"name", "runs_agent", "sources"} <= set(classes[0])


def test_link_classes_and_fleets(tmp_path: Path) -> None:
    for option, name in (("--links", "wifi-near"), ("--fleets", "jetson-80")):
        found = json.loads(edge_agent("device-classes", option, "--json", cwd=tmp_path).stdout)
        assert name in {one["name"] for one in found}
        assert f"{name} " in edge_agent("device-classes", option, cwd=tmp_path).stdout
    assert "ask for one" in errors(edge_agent("device-classes", "--links", "--fleets", cwd=tmp_path), 64)


def test_status_before_the_first_start(folder: Path) -> None:
    status = json.loads(edge_agent("status", "--json", cwd=folder).stdout)
    assert (status["device"], status["running"], status["run"]) == ("one", False, None)
    assert "not running" in edge_agent("status", cwd=folder).stdout


@contextmanager
def started(*words: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command(*words), text=True, cwd=cwd, env=environment(), **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def test_run_goes_on_without_a_broker_until_stopped(folder: Path) -> None:
    """Real processes, real signals: it says that it tries again, shows in status, and ends well."""
    with started("run", cwd=folder) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("device one, broker mqtt://127.0.0.1")
        assert "trying again" in process.stdout.readline()
        status = json.loads(edge_agent("status", "--json", cwd=folder).stdout)
        assert status["running"] and status["pid"] == process.pid and not status["connected"]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert not process.stderr.read()
    assert not json.loads(edge_agent("status", "--json", cwd=folder).stdout)["running"]


def test_run_as_json_and_ends_at_a_signal_right_after_the_start(folder: Path) -> None:
    with started("run", "--json", cwd=folder) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "agent.started"
        process.terminate()
        assert process.wait(20) == 0


def test_run_ends_when_nobody_reads_it(folder: Path) -> None:
    with started("run", "--json", cwd=folder) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == 0
        assert not process.stderr.read()


def test_run_goes_on_where_its_output_cannot_be_written(folder: Path) -> None:
    with (
        Path("/dev/full").open("w") as full,
        subprocess.Popen(
            command("run"), stdout=full, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment()
        ) as process,
    ):
        assert process.stderr is not None
        while not (folder / "state" / "agent.db").is_file():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        process.terminate()
        assert process.wait(20) == 0
        assert not process.stderr.read()


def test_once_gives_up_with_69(folder: Path) -> None:
    code = (
        "import edge_sdk.cli.running as running; running._ONCE_GIVE_UP_S = 0.5\n"
        "from edge_sdk.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "--once"], capture_output=True, text=True, cwd=folder,
        env=environment(), check=False, timeout=60,
    )  # fmt: skip
    assert "no connection" in errors(done, 69)


def test_help_and_version(tmp_path: Path) -> None:
    assert "device-classes" in edge_agent("--help", cwd=tmp_path).stdout
    assert edge_agent("--version", cwd=tmp_path).stdout.strip() == __import__("edge_sdk").__version__

"""JSON logs, and how the server's command ends."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_device import World

from aggregator.cli.logs import JsonLog
from edge_sdk.events import Event

TOML = """
[run]
name = "demo"
labels = ["no", "yes"]
state_dir = "state"
[base]
path = "base"
[broker]
url = "mqtt://127.0.0.1:{port}"
[lora]
rank = 2
alpha = 4.0
[training]
steps = 5
batch = 8
max_length = 32
"""


def test_every_line_has_run_round_and_device(tmp_path: Path) -> None:
    world, lines = World(tmp_path), []
    log = JsonLog("demo", lines.append)
    server = world.open()
    server.events.subscribe(log)
    world.device("kitchen")
    world.device("garden", decline="no")
    world.pump()
    server.close()
    told: list[dict[str, Any]] = [json.loads(line) for line in lines]
    assert all(
        list(one)[:7] == ["time", "level", "event", "run", "round", "device", "message"] for one in told
    )
    assert {one["run"] for one in told} == {"demo"} and all(one["message"] for one in told)
    received = [one for one in told if one["event"] == "update.received"]
    assert [(one["round"], one["device"]) for one in received] == [(1, "kitchen"), (2, "kitchen")]
    merged = next(one for one in told if one["event"] == "version.evaluated" and one["version"] == 1)
    assert merged["round"] == 1 and merged["device"] is None and "accuracy" in merged["message"]
    assert merged["time"].endswith("+00:00") and merged["level"] == "info"


def test_levels() -> None:
    lines: list[str] = []
    log = JsonLog("demo", lines.append)
    log(Event("run.failed", {"error": "StateError", "message": "full", "hint": ""}))
    log(Event("storage.paused", {"reason": "1 MB is free", "free_mb": 1.0}))
    log(Event("trainer.progress", {"stage": "loading", "done": 0, "total": 1}))
    assert [json.loads(line)["level"] for line in lines] == ["error", "warning", "debug"]
    assert "PAUSED" in json.loads(lines[1])["message"]


def test_records_of_libraries_are_lines_too() -> None:
    lines: list[str] = []
    logger = logging.Logger("paho")
    logger.addHandler(JsonLog("demo", lines.append))
    try:
        raise ValueError("odd")
    except ValueError:
        logger.exception("a message was not %s", "taken")
    told = json.loads(lines[0])
    assert told["level"] == "error" and told["event"] == "log.paho" and told["run"] == "demo"
    assert told["message"].startswith("a message was not taken\nTraceback") and "odd" in told["message"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_the_server_in_order(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Here while it waits for a broker; its folder is free again, and nothing but JSON was said."""
    World(tmp_path).open().close()
    (tmp_path / "run.toml").write_text(TOML.format(port=1))
    command = [sys.executable, "-c", "from aggregator.cli.main import main; main()", "run"]
    with subprocess.Popen(
        [*command, "--log-format", "json"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as server:
        assert server.stderr is not None and server.stdout is not None
        killer = threading.Timer(60, server.kill)
        killer.start()
        lines: list[dict[str, Any]] = []
        for line in server.stderr:
            lines.append(json.loads(line))
            if lines[-1]["event"] == "broker.down":
                server.send_signal(number)
        assert server.wait() == code and server.stdout.read() == b""
        killer.cancel()
    assert lines[-1]["event"] == "run.stopped"
    assert World(tmp_path).open() is not None

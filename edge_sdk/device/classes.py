"""Device classes: what is stated of boards and machines, one TOML file each in ``device_profiles``.

They name devices (``agent.device_class``), and feed estimates and simulation; what a real device can do is
measured on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Annotated, Literal

import msgspec

from edge_sdk.config.problems import Problem
from edge_sdk.device.sourced import Fact, Figure, Source, named, parse, read_all
from edge_sdk.protocol.base import Name, Positive, Record, Text

__all__ = [
    "DeviceClass",
    "Fact",
    "Figure",
    "PowerMode",
    "Source",
    "device_class",
    "device_classes",
    "parse_device_class",
]

More = Annotated[float, msgspec.Meta(gt=0)]


class PowerMode(Record, frozen=True, kw_only=True):
    """What a power mode sets: highest clocks, and how much is switched on.

    None: not stated; in a mode without ``watts`` there is no limit.
    """

    watts: More | None = None
    """Power budget."""
    cores: Positive | None = None
    """Processor cores that are on."""
    cpu_mhz: More | None = None
    gpu_mhz: More | None = None
    cuda_cores: Positive | None = None
    """CUDA cores that are on, where the mode switches some off."""
    memory_mhz: More | None = None
    source: Name
    note: Text = ""


class DeviceClass(Record, frozen=True, kw_only=True):
    """One device class. None: no figure is known here; none is estimated."""

    name: Name
    title: Text
    runs_agent: Literal["native", "container", "no"]
    why: Text = ""
    """Needed unless native."""
    shared_memory: bool
    """Processor and accelerator share one memory."""
    memory_mb: Figure | None = None
    """MB of 10^6 bytes, as sold."""
    visible_mb: Figure | None = None
    """What of it Linux has, as such a board prints it: firmware and carve-outs are gone."""
    idle_mb: Figure | None = None
    """What of that is in use on such a board while it does nothing; the note tells of a desktop."""
    accelerator_memory_mb: Figure | None = None
    """Its own, where it shares none."""
    processor: Fact | None = None
    cores: Figure | None = None
    """Processor cores, all clusters together."""
    accelerator: Fact | None = None
    cuda_cores: Figure | None = None
    gpu_mhz: Figure | None = None
    """Highest clock of the accelerator."""
    fp32_tflops: Figure | None = None
    fp16_tflops: Figure | None = None
    """Peak of dense arithmetic, as stated."""
    int8_tops: Figure | None = None
    """Peak; the note says whether sparsity and other engines are counted."""
    memory_gb_s: Figure | None = None
    """Peak; of the accelerator's memory where it has its own."""
    ethernet_mbps: Figure | None = None
    power_modes: dict[str, PowerMode] = msgspec.field(default_factory=dict)
    """By the vendor's name; the order is that of the file."""
    sources: dict[str, Source] = msgspec.field(default_factory=dict)


def device_classes() -> dict[str, DeviceClass]:
    """All device classes by name, in order of name. Raises ConfigError for a damaged file."""
    return dict(_installed())


def device_class(name: str) -> DeviceClass:
    """The class of that name. Raises ConfigError, with those that exist, where there is none."""
    return named(name, "device class", _installed())


def parse_device_class(file: str, text: str) -> DeviceClass:
    """One TOML file's class. Raises ConfigError with the file's name and every error of it."""
    return parse(file, text, DeviceClass, _problems)


def _problems(found: DeviceClass) -> Iterator[Problem]:
    if found.runs_agent != "native" and not found.why:
        yield Problem("why", "is missing", f'say why runs_agent is "{found.runs_agent}"')
    if found.visible_mb and found.memory_mb and found.visible_mb.value > found.memory_mb.value:
        yield Problem("visible_mb", f"received {found.visible_mb.value:g}, which is above memory_mb")
    if found.idle_mb and not found.visible_mb:
        yield Problem("idle_mb", "stands without visible_mb", "it is a part of that")
    for key in ("cores", "cuda_cores"):
        whole: Figure | None = getattr(found, key)
        for name, mode in found.power_modes.items():
            part: int | None = getattr(mode, key)
            if whole is not None and part is not None and part > whole.value:
                yield Problem(f"power_modes.{name}.{key}", f"received {part}; the class has {whole.value:g}")


@cache
def _installed() -> dict[str, DeviceClass]:
    return read_all("", parse_device_class)

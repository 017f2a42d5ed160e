"""Device classes: what vendors say of boards and machines, one TOML file each in ``device_profiles``.

They name devices (``agent.device_class``) and feed simulation; what a real device can do is measured on it.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal

import msgspec

from edge_sdk.config.checking import check
from edge_sdk.config.problems import Problem, nearest, refuse
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.base import Name, Record, Text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "DeviceClass",
    "Fact",
    "Figure",
    "PowerModes",
    "Source",
    "device_class",
    "device_classes",
    "parse_device_class",
]

Day = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^\d{4}(-\d{2}(-\d{2})?)?\Z", description='a date as text: "2026", "2026-01", "2026-01-31"'
    ),
]


class Source(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where figures come from: a vendor's page or data sheet."""

    title: Text
    date: Day
    """Of the edition, as exactly as it is known."""
    checked: Day | None = None
    """When the figures were last compared with the source's text; None: they were not, since written down."""


class Figure(Record, frozen=True, kw_only=True):
    """A number, with the name of its source in ``sources``."""

    value: Annotated[float, msgspec.Meta(gt=0)]
    source: Name
    note: Text = ""


class Fact(Record, frozen=True, kw_only=True):
    """A text, with the name of its source."""

    value: Text
    source: Name
    note: Text = ""


class PowerModes(Record, frozen=True, kw_only=True):
    """Power budgets that can be set, in watts."""

    value: Annotated[tuple[Annotated[float, msgspec.Meta(gt=0)], ...], msgspec.Meta(min_length=1)]
    source: Name
    note: Text = ""


class DeviceClass(Record, frozen=True, kw_only=True):
    """One device class. None: no figure that its vendor states is known here."""

    name: Name
    title: Text
    runs_agent: Literal["native", "container", "no"]
    why: Text = ""
    """Needed unless native."""
    shared_memory: bool
    """Processor and accelerator share one memory."""
    memory_mb: Figure | None = None
    """MB of 10^6 bytes."""
    processor: Fact | None = None
    cores: Figure | None = None
    """Processor cores, all clusters together."""
    accelerator: Fact | None = None
    fp16_tflops: Figure | None = None
    """Peak of dense arithmetic, as the vendor states it."""
    int8_tops: Figure | None = None
    """Peak; the note says whether sparsity and other engines are counted."""
    memory_gb_s: Figure | None = None
    ethernet_mbps: Figure | None = None
    power_modes_w: PowerModes | None = None
    sources: dict[str, Source] = msgspec.field(default_factory=dict)


def device_classes() -> dict[str, DeviceClass]:
    """All device classes by name, in order of name. Raises ConfigError for a damaged file."""
    return dict(_installed())


def device_class(name: str) -> DeviceClass:
    """The class of that name. Raises ConfigError, with those that exist, where there is none."""
    classes = _installed()
    if name in classes:
        return classes[name]
    meant = nearest(name, classes)
    hint = f'did you mean "{meant}"? ' if meant else ""
    raise ConfigError(f'there is no device class "{name}"', f"{hint}those that exist: {', '.join(classes)}")


def parse_device_class(file: str, text: str) -> DeviceClass:
    """One TOML file's class. Raises ConfigError with the file's name and every error of it."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: is not TOML: {error}") from None
    found = check(file, data, DeviceClass)
    refuse(file, list(_problems(file, found)))
    return found


def _problems(file: str, found: DeviceClass) -> list[Problem]:
    problems = []
    if file != f"{found.name}.toml":
        problems.append(Problem("name", f'received "{found.name}"', "it must be the file's name"))
    if found.runs_agent != "native" and not found.why:
        problems.append(Problem("why", "is missing", f'say why runs_agent is "{found.runs_agent}"'))
    for key in found.__struct_fields__:
        value: Any = getattr(found, key)
        if isinstance(value, Figure | Fact | PowerModes) and value.source not in found.sources:
            problems.append(Problem(f"{key}.source", f'"{value.source}" is not in [sources]'))
    return problems


@cache
def _installed() -> dict[str, DeviceClass]:
    files = resources.files("device_profiles").iterdir()
    texts = {file.name: file.read_text(encoding="utf-8") for file in files if file.name.endswith(".toml")}
    classes = [parse_device_class(file, texts[file]) for file in sorted(texts)]
    return {found.name: found for found in classes}

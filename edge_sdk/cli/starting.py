"""``edge-agent init`` and ``edge-agent device-classes``: before there is an agent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import msgspec
import typer

from edge_sdk.console import counted
from edge_sdk.device.classes import DeviceClass, device_classes
from edge_sdk.device.fleets import Fleet, fleets
from edge_sdk.device.links import LinkClass, link_classes
from edge_sdk.device.sourced import Figure
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.base import Record

__all__ = ["list_classes"]


def list_classes(*, links: bool = False, all_fleets: bool = False, as_json: bool) -> None:
    """Device classes; or link classes, or fleets. Raises ConfigError where both of these are asked for."""
    if links and all_fleets:
        raise ConfigError("received --links and --fleets", "ask for one of them")
    if links:
        _show(link_classes(), map(_link, link_classes().values()), as_json=as_json)
    elif all_fleets:
        _show(fleets(), map(_fleet, fleets().values()), as_json=as_json)
    else:
        _show(device_classes(), map(_class, device_classes().values()), as_json=as_json)


def _show(found: Mapping[str, Record], lines: Iterable[str], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([msgspec.to_builtins(one) for one in found.values()]))
        return
    width = max(map(len, found), default=0)
    for name, line in zip(found, lines, strict=True):
        typer.echo(f"{name:<{width}}  {line}")


def _class(one: DeviceClass) -> str:
    memory = one.accelerator_memory_mb or one.memory_mb
    runs = {"native": "runs agent", "container": "container", "no": "simulated"}[one.runs_agent]
    count = len(one.power_modes)
    modes = counted(count, "mode") if count else ""
    return f"{_number(memory, 'MB'):>9}  {runs:<10}  {modes:<7}  {one.title}"


def _link(one: LinkClass) -> str:
    up, down = _number(one.up_mbps, "up"), _number(one.down_mbps, "down Mb/s")
    return f"{up:>9}  {down:>15}  {_number(one.rtt_ms, 'ms'):>7}  {one.title}"


def _fleet(one: Fleet) -> str:
    redrawn = f"modes every {one.modes_every.value} rounds" if one.modes_every else "fixed modes"
    return f"{one.size:>4} devices  {redrawn}  {one.title}"


def _number(figure: Figure | None, unit: str) -> str:
    return "" if figure is None else f"{figure.value:.10g} {unit}"

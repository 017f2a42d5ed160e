"""``edge-agent init`` and ``edge-agent device-classes``: before there is an agent."""

from __future__ import annotations

import json

import msgspec
import typer

from edge_sdk.device.classes import DeviceClass, device_classes

__all__ = ["list_classes"]


def list_classes(*, as_json: bool) -> None:
    classes = device_classes()
    if as_json:
        typer.echo(json.dumps([msgspec.to_builtins(one) for one in classes.values()]))
        return
    width = max(map(len, classes), default=0)
    for name, one in classes.items():
        typer.echo(f"{name:<{width}}  {_memory(one):>9}  {_runs(one):<13}  {one.title}")


def _memory(one: DeviceClass) -> str:
    return "" if one.memory_mb is None else f"{one.memory_mb.value:.0f} MB"


def _runs(one: DeviceClass) -> str:
    return {"native": "runs agent", "container": "container", "no": "simulated"}[one.runs_agent]

"""``edge-agent init`` and ``edge-agent device-classes``: before there is an agent."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import typer

from edge_sdk.config.templates import agent_toml
from edge_sdk.device.classes import DeviceClass, device_classes
from edge_sdk.errors import ConfigError

__all__ = ["list_classes", "write_config"]


def write_config(path: Path, *, force: bool, as_json: bool) -> None:
    """Raises ConfigError where there is a file already, or it cannot be written."""
    if path.is_dir():
        path = path / "agent.toml"
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(agent_toml())
    except FileExistsError:
        raise ConfigError(f"{path} exists already", "use --force to overwrite it, or name another") from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}", "name a folder that exists"
        ) from None
    typer.echo(
        json.dumps({"written": str(path)})
        if as_json
        else f"wrote {path}; edit it, then: edge-agent run -c {path}"
    )


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

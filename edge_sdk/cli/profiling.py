"""``edge-agent profile``: what this device knows of itself, as a table or as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import msgspec
import typer

from edge_sdk.agent.profiling import PROFILE_S, measure_machine, readings
from edge_sdk.config.agent import AgentConfig
from edge_sdk.config.loading import load_agent_config
from edge_sdk.protocol.measure import Reading

__all__ = ["show_profile"]

_USUAL = Path("agent.toml")


def show_profile(
    config: Path | None, *, as_json: bool, link: bool, compute: bool, seconds: float | None
) -> None:
    """Raises ConfigError for a config that was named and cannot be used."""
    loaded: AgentConfig | None = None
    if config is not None or _USUAL.is_file():
        loaded = load_agent_config(config or _USUAL)
    watched = not as_json and sys.stderr.isatty()

    def tell(line: str) -> None:
        if watched:
            typer.echo(line, err=True)

    began = time.monotonic()
    profile, found = measure_machine(
        loaded, link=link, compute=compute, seconds=seconds or PROFILE_S, tell=tell
    )
    took = time.monotonic() - began
    told = readings(profile, found)
    if as_json:
        record = {"profile": profile, "link": found.link, "readings": told, "seconds": round(took, 2)}
        typer.echo(json.dumps(msgspec.to_builtins(record)))
        return
    for line in _table(told):
        typer.echo(line)
    if watched:
        typer.echo(f"took {took:.1f} s", err=True)


def _table(told: list[Reading]) -> list[str]:
    width = max(len(one.name) for one in told)
    lines = [f"{'':<{width}}  {'value':<32}  {'how':<9}  {'when':<8}  spread"]
    for one in told:
        when = time.strftime("%H:%M:%S", time.localtime(one.at)) if one.at and one.how else ""
        if one.value is None:
            lines.append(f"{one.name:<{width}}  {'-':<32}  {one.reason}".rstrip())
            continue
        spread = "" if one.spread is None else f"{100 * one.spread:.0f} %"
        note = f"  ({one.reason})" if one.reason else ""
        line = f"{one.name:<{width}}  {_shown(one.value):<32}  {one.how or '':<9}  {when:<8}  {spread}"
        lines.append(f"{line.rstrip()}{note}")
    return lines


def _shown(value: float | bool | str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

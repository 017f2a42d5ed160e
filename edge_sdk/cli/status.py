"""``edge-agent status``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from edge_sdk.agent.reporting import folder_status
from edge_sdk.config.loading import load_agent_config
from edge_sdk.console import counted

__all__ = ["show_status"]

_SHOWN_ROUNDS = 5


def show_status(config: Path, *, as_json: bool) -> None:
    status = folder_status(load_agent_config(config, files=False))
    if as_json:
        typer.echo(json.dumps(status))
        return
    for line in _lines(status):
        typer.echo(line)


def _lines(status: dict[str, Any]) -> list[str]:
    emulated = f" (emulated {status['device_class']})" if status["emulated"] else ""
    lines = [
        f"device    {status['device']}{emulated}",
        f"agent     {'running, process ' + str(status['pid']) if status['running'] else 'not running'}",
        f"broker    {status['broker']}{'  INSECURE: no TLS off this machine' if status['insecure'] else ''}",
    ]
    if status["run"] is None:
        return [*lines, "run       none joined yet"]
    if status["running"]:
        lines.append(
            f"state     {'connected' if status['connected'] else 'no connection'}, {status['permission']}, "
            f"round {status['state']}, trainer {status['trainer']}"
        )
    if status["trouble"]:
        lines.append(f"cannot    {status['trouble']}")
    if status["reason"]:
        lines.append(f"gates     closed: {status['reason']}")
    lines.append(f"run       {status['run']}{', finished' if status['finished'] else ''}")
    lines.append(f"versions  {', '.join(map(str, status['versions'])) or 'none'}")
    lines += [f"outbox    round {i['round']}: {i['state']}, {i['bytes']} bytes" for i in status["outbox"]]
    lines += [f"owed      update of round {number}" for number in status["owed"]]
    for row in status["rounds"][-_SHOWN_ROUNDS:]:
        told = f"round {row['round']:<4}{row['state']}"
        if "depth" in row:
            told += f": depth {row['depth']}, {row['quantized_layers']} quantized"
            told += f", bound by {row['binding_budget']}"
        elif "declined" in row:
            told += f": {row['message']}"
        lines.append(told)
    lines += [*_corrections(status["corrections"]), *_link(status["link"])]
    ledger = status["ledger"]
    lines.append(f"traffic   {ledger.get('bytes_up', 0)} bytes up, {ledger.get('bytes_down', 0)} down, "
                 f"{ledger.get('bytes_resent', 0)} sent again")  # fmt: skip
    allowed = status["gates"]["traffic_mb_per_day"]
    if allowed is not None:
        lines.append(f"today     {status['traffic_today'] / 1e6:.1f} of {allowed:g} MB")
    return lines


def _corrections(corrections: list[dict[str, Any]]) -> Iterator[str]:
    """What rounds took over what the probe predicts, for each way of training."""
    for one in corrections:
        levers = one["levers"]
        kept = f"{levers['activation_bits']} bits" if one["quantized"] else "not quantized"
        yield (
            f"learned   recompute {levers['recompute']}, {kept}: {one['peak']:.2f} times the memory, "
            f"{one['step']:.2f} times the seconds of the probe ({counted(one['rounds'], 'round')})"
        )


def _link(link: dict[str, Any]) -> list[str]:
    """Empty where nothing is known yet."""
    told = [f"{link[way] / 1e6:.3g} Mbit/s {word}" for way, word in (("up_bps", "up"), ("down_bps", "down"))
            if link[way] is not None]  # fmt: skip
    if link["rtt_ms"] is not None:
        told.append(f"{link['rtt_ms']:.3g} ms there and back")
    since = "" if link["at"] is None else f"; {time.strftime('%Y-%m-%d %H:%M', time.localtime(link['at']))}"
    return [f"link      {', '.join(told)}{since}"] if told else []

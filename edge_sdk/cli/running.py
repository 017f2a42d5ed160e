"""``edge-agent run``."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

import typer

from edge_sdk.agent.api import Agent
from edge_sdk.cli.progress import Progress
from edge_sdk.events import Event

__all__ = ["run_agent"]

_ONCE_GIVE_UP_S = 30.0


def run_agent(config: Path, *, once: bool, as_json: bool) -> None:
    """Runs until the run ends (``once``), a signal, or an error that trying again cannot help."""
    agent = Agent(config, give_up_s=_ONCE_GIVE_UP_S if once else None)
    ended = threading.Event()

    def write(line: str) -> None:
        try:
            typer.echo(line)
        except BrokenPipeError:  # whoever read us is gone, as in `| head`
            _mute()
            ended.set()
            agent.stop(wait=False)
        except OSError:  # a log file on a full disk: the training does not stop for it
            _mute()

    agent.on((lambda event: write(_json(event))) if as_json else Progress(write))
    if once:
        agent.on(lambda event: agent.stop(wait=False) if event.name == "run.finished" else None)

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()
        agent.stop(wait=False)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        agent.start()
        if ended.is_set():
            agent.stop(wait=False)
        agent.wait()
    finally:
        agent.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _mute() -> None:
    """Standard output leads nowhere from now on: what it holds unwritten must not fail again at the exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _json(event: Event) -> str:
    return json.dumps({"event": event.name, "wall": event.wall, **event.fields})

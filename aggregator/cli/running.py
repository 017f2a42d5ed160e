"""``edge-aggregator run``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import typer

from aggregator.cli.extra import need_server_extra
from aggregator.cli.progress import Progress
from edge_sdk.config.loading import load_run_config
from edge_sdk.events import Event

__all__ = ["run_server"]


def run_server(config: Path, *, as_json: bool) -> None:
    """Until the run is over (exit 0), a signal (128 + its number), or an error, which is raised."""
    need_server_extra()
    from aggregator.server import Aggregator

    signals: list[int] = []

    def write(line: str) -> None:
        try:
            typer.echo(line)
        except BrokenPipeError:  # whoever read us is gone, as in `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            end(signal.SIGPIPE, None)

    show = (lambda event: write(_json(event))) if as_json else Progress(write)
    server = Aggregator(load_run_config(config), on_event=show)

    def end(number: int, _frame: FrameType | None) -> None:
        signals.append(number)
        server.ask_to_stop()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run_forever()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signals:
        raise typer.Exit(128 + signals[0])


def _json(event: Event) -> str:
    return json.dumps({"event": event.name, "wall": event.wall, **event.fields})

"""``edge-aggregator run``."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import typer

from aggregator.cli.extra import need_server_extra
from aggregator.cli.logs import JsonLog
from aggregator.cli.progress import Progress
from edge_sdk.config.loading import load_run_config
from edge_sdk.events import Event

__all__ = ["run_server"]


def run_server(path: Path, *, as_json: bool, json_logs: bool = False) -> None:
    """Until the run is over or SIGTERM (exit 0), SIGINT (130), or an error, which is raised.

    Either signal ends it in order: what is in hand is finished, and the devices are told.

    Args:
        as_json: events on standard output, as JSON, for programs.
        json_logs: logs on standard error, as JSON, in place of lines for people.
    """
    need_server_extra()
    from aggregator.server import Aggregator

    signals: list[int] = []

    def write(line: str) -> None:
        try:
            typer.echo(line)
        except BrokenPipeError:  # whoever read us is gone, as in `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            end(signal.SIGPIPE, None)

    config = load_run_config(path)
    log = JsonLog(config.run.name, lambda line: typer.echo(line, err=True)) if json_logs else None
    show: Callable[[Event], None] | None = (
        (lambda event: write(_json(event))) if as_json else None if log else Progress(write)
    )
    server = Aggregator(config, on_event=show)
    if log is not None:
        server.events.subscribe(log)
        logging.basicConfig(handlers=[log], level=logging.INFO)

    def end(number: int, _frame: FrameType | None) -> None:
        signals.append(number)
        server.ask_to_stop()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run_forever()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if log is not None:
            logging.getLogger().removeHandler(log)
    if signals and signals[0] != signal.SIGTERM:
        raise typer.Exit(128 + signals[0])


def _json(event: Event) -> str:
    return json.dumps({"event": event.name, "wall": event.wall, **event.fields})

"""``edge-aggregator run``."""

from __future__ import annotations

import json
import signal
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

    server = Aggregator(load_run_config(config), on_event=_print_json if as_json else Progress(typer.echo))
    signals: list[int] = []

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


def _print_json(event: Event) -> None:
    typer.echo(json.dumps({"event": event.name, "wall": event.wall, **event.fields}))

"""JSON logs: a line for every event and every record of the libraries, each with run, round and device."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from aggregator.cli.progress import line_of
from edge_sdk.events import Event

__all__ = ["JsonLog"]

_WARNINGS = frozenset(
    {
        "broker.down", "device.refused", "message.foreign", "offer.none", "round.empty",
        "round.uncovered", "storage.paused", "update.refused", "update.set_aside", "version.not_evaluated",
    }
)  # fmt: skip
_ERRORS = frozenset({"round.held", "run.failed"})
_DETAILS = frozenset({"trainer.progress"})


class JsonLog(logging.Handler):
    """Subscribe it to the server's events, and add it to the root logger.

    Every line has ``time`` (UTC), ``level``, ``event``, ``run``, ``round`` and ``device`` (null where it is
    of none) and ``message``, the words that ``edge-aggregator run`` says; then the event's own fields.

    Args:
        write: takes a line.
    """

    def __init__(self, run: str, write: Callable[[str], object]) -> None:
        super().__init__(logging.INFO)
        self._run = run
        self._write = write
        self._round: int | None = None

    def __call__(self, event: Event) -> None:
        fields = dict(event.fields)
        if event.name in ("run.ready", "round.waiting", "round.opened"):
            self._round = fields["round"]
        level = (
            "error" if event.name in _ERRORS else "warning" if event.name in _WARNINGS
            else "debug" if event.name in _DETAILS else "info"
        )  # fmt: skip
        message = fields.pop("message", None) or line_of(event) or event.name
        self._line(event.wall, level, event.name, message, fields)

    def emit(self, record: logging.LogRecord) -> None:
        """A record of Python's logging."""
        try:
            message = record.getMessage()
            if record.exc_info:
                message += "\n" + logging.Formatter().formatException(record.exc_info)
            self._line(record.created, record.levelname.lower(), f"log.{record.name}", message, {})
        except Exception:
            self.handleError(record)

    def _line(self, wall: float, level: str, event: str, message: str, fields: dict[str, Any]) -> None:
        head = {
            "time": datetime.fromtimestamp(wall, timezone.utc).isoformat(timespec="milliseconds"),
            "level": level,
            "event": event,
            "run": self._run,
            "round": fields.pop("round", self._round),
            "device": fields.pop("device", None),
            "message": message,
        }
        fields.pop("run", None)
        self._write(json.dumps({**head, **fields}))

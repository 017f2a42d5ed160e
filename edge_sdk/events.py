"""What happened, for apps, progress displays and logs: one small record, one bus."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Event", "EventBus"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        name: dotted, stable: ``connection.up``, ``round.choice``, ``training.progress``, ``update.receipt``.
        fields: plain values (numbers, strings, lists), ready for JSON.
        wall: seconds since the epoch.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    wall: float = 0.0


class EventBus:
    """Calls every subscriber with every event, in the thread that emits it.

    A subscriber that raises is logged and kept: an app's display never stops the training.
    """

    def __init__(self) -> None:
        self._subscribers: list[Callable[[Event], None]] = []
        self._lock = threading.Lock()

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Adds ``callback``; returns a function that takes it away again."""
        with self._lock:
            self._subscribers.append(callback)

        def unsubscribe() -> None:
            with self._lock:
                if callback in self._subscribers:
                    self._subscribers.remove(callback)

        return unsubscribe

    def emit(self, event: Event) -> None:
        with self._lock:
            subscribers = list(self._subscribers)
        for callback in subscribers:
            try:
                callback(event)
            except Exception:
                _log.exception("a subscriber failed on event %s", event.name)

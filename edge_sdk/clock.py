"""Time as the product sees it: one interface, so that a simulation can hand in its own."""

from __future__ import annotations

import queue
import time
from pathlib import Path
from typing import Protocol, TypeVar

__all__ = ["Clock", "ManualClock", "SystemClock", "boot_id", "next_within"]

Item = TypeVar("Item")


class Clock(Protocol):
    """Seconds. ``monotonic`` for durations and deadlines, ``wall`` for what people read."""

    def monotonic(self) -> float: ...

    def wall(self) -> float: ...


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


class ManualClock:
    """A clock that moves when told to; for tests and simulation."""

    def __init__(self, start: float = 0.0) -> None:
        self.now = start

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def boot_id() -> str:
    """Name of this boot: monotonic times on disk mean nothing after another one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def next_within(inbox: queue.SimpleQueue[Item], seconds: float) -> Item:
    """The next thing that comes within so many seconds; at 0, what is there. Raises queue.Empty.

    For one reader. Python 3.10's SimpleQueue may wait for ever where its time is over before it has begun
    to wait, as long as nothing was looked for since the last put: hence the look first.
    """
    try:
        return inbox.get_nowait()
    except queue.Empty:
        if seconds <= 0:
            raise
    return inbox.get(timeout=seconds)

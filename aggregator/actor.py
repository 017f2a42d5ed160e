"""One inbox, one thread: whatever moves the server is an event in the inbox, or time.

``handle`` takes one event, ``tick`` does what is due; ``run_forever`` feeds both, and a simulator may do so
in its place.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass

from edge_sdk.clock import next_within
from edge_sdk.errors import EdgeError, StateError
from edge_sdk.protocol.trainer import TrainerReply
from edge_sdk.transport.base import Connection, Inbound

__all__ = ["Actor", "ServerEvent", "Stop"]

_log = logging.getLogger(__name__)
_BATCH = 256
"""Events handled before time is looked at again: a flood does not stop the clock."""


@dataclass(frozen=True)
class Stop:
    """End the server; everything stays where it is, and the same command goes on."""


ServerEvent = Inbound | Connection | TrainerReply | Stop


class Actor(ABC):
    """What runs the server. ``error`` is what it ended with; ``done``: it ends, or has ended."""

    def __init__(self) -> None:
        self.error: EdgeError | None = None
        self.done = False
        self._inbox: queue.SimpleQueue[ServerEvent] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @abstractmethod
    def open(self) -> None:
        """Makes everything ready. Does nothing the second time.

        Raises EdgeError for whatever makes the run impossible.
        """

    @abstractmethod
    def close(self) -> None:
        """Says goodbye and lets go of everything. May be called twice."""

    @abstractmethod
    def handle(self, event: ServerEvent) -> None:
        """Takes one event. Never raises for what a device sent."""

    @abstractmethod
    def tick(self) -> float:
        """Does what is due. Returns after how many seconds, at most, to call again."""

    def start(self) -> None:
        """Opens here, so that errors are raised here, and runs in a thread of its own."""
        self.open()
        self._thread = threading.Thread(target=self._run_quietly, name="aggregator", daemon=True)
        self._thread.start()

    def ask_to_stop(self) -> None:
        """``run_forever`` ends in order, soon. From any thread, and from a signal's handler."""
        self._inbox.put(Stop())

    def stop(self) -> None:
        """Asks, and waits until the thread that ``start`` began has ended. May be called twice."""
        self.ask_to_stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the server that ``start`` began has ended. Raises what it ended with."""
        if self._thread is not None:
            self._thread.join(timeout)
        if self.error is not None:
            raise self.error
        return self.done

    def run_forever(self) -> None:
        """Until the run is over, ``stop``, or an error, which is raised."""
        try:
            self.open()
            while not self.done:
                self.step(self.tick())
        finally:
            self.close()
        if self.error is not None:
            raise self.error

    def step(self, wait_s: float = 0.0) -> bool:
        """Handles what is in the inbox, waiting at most ``wait_s`` for the first; whether there was any."""
        handled = 0
        with contextlib.suppress(queue.Empty):
            event = next_within(self._inbox, wait_s)
            while not self.done:
                handled += 1
                self.handle(event)
                if handled >= _BATCH:
                    break
                event = self._inbox.get_nowait()
        return handled > 0

    def _run_quietly(self) -> None:
        try:
            self.run_forever()
        except EdgeError as error:
            self.error = error
        except Exception as error:
            _log.exception("the server failed")
            self.error = StateError(f"the server failed: {type(error).__name__}: {error}")

"""A client of a transport for tests: what was delivered, and waiting for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from edge_sdk.transport.base import Connection, Inbound, Transport, Will

PATIENCE_S = 20.0


class Peer:
    """Keeps everything that its transport delivers, in order."""

    def __init__(self, transport: Transport, will: Will | None = None, *, start: bool = True) -> None:
        self.transport = transport
        self.connections: list[Connection] = []
        self._messages: list[Inbound] = []
        self._condition = threading.Condition()
        if start:
            self.start(will)

    def start(self, will: Will | None = None) -> None:
        self.transport.start(self._take, will)

    def _take(self, event: Inbound | Connection) -> None:
        with self._condition:
            if isinstance(event, Connection):
                self.connections.append(event)
            else:
                self._messages.append(event)
            self._condition.notify_all()

    def up(self) -> Peer:
        """Waits until it is connected, and was told so."""
        self.wait(lambda: self.transport.connected and bool(self.connections) and self.connections[-1].up)
        return self

    def down(self) -> Peer:
        self.wait(
            lambda: not self.transport.connected and bool(self.connections) and not self.connections[-1].up
        )
        return self

    def wait(self, done: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
        end = time.monotonic() + seconds
        with self._condition:
            while not done():
                left = end - time.monotonic()
                assert left > 0, f"waited {seconds} s in vain; {self.connections}, {self._messages}"
                self._condition.wait(min(left, 0.05))

    def receive(self, topic: str) -> Inbound:
        """Waits for the next message on ``topic``; takes it out, and what came on it before stays gone."""
        found: list[Inbound] = []

        def look() -> bool:
            for message in self._messages:
                if message.topic == topic:
                    found.append(message)
                    self._messages.remove(message)
                    return True
            return False

        self.wait(look)
        return found[0]

    def take_all(self) -> list[Inbound]:
        with self._condition:
            messages, self._messages = self._messages, []
            return messages

"""The transport: publish, subscribe, and nothing that only some brokers do.

It never retries, never looks inside a payload and gives no promise beyond "the first hop was tried": what
must not be lost is held by the outbox and the store until a receipt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Connection", "Inbound", "Transport", "Will"]


@dataclass(frozen=True)
class Inbound:
    """A message that arrived."""

    topic: str
    payload: bytes
    retained: bool = False


@dataclass(frozen=True)
class Connection:
    """The connection went up, with every subscription confirmed, or down.

    ``error`` is set when it could not be made or was refused.
    """

    up: bool
    error: Exception | None = None
    final: bool = False
    """Trying again cannot help (wrong password, wrong certificate)."""


@dataclass(frozen=True)
class Will:
    """What the broker publishes, retained, when the client vanishes."""

    topic: str
    payload: bytes


class Transport(Protocol):
    """``deliver`` is called from any thread and must only enqueue. Subscriptions survive a reconnect."""

    @property
    def connected(self) -> bool: ...

    @property
    def busy(self) -> bool:
        """Whether something handed over is not known to have passed the first hop."""
        ...

    @property
    def description(self) -> str:
        """The broker, for people: ``mqtts://host:8883 (MQTT 5)``. Never holds a secret."""
        ...

    def start(self, deliver: Callable[[Inbound | Connection], None], will: Will | None = None) -> None:
        """Connects, and reconnects with jittered back-off until ``stop``. Returns at once."""
        ...

    def subscribe(self, topic_filter: str) -> None: ...

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Hands over one message, QoS 1. False: not connected, and nothing was sent or kept.

        Raises ProtocolError for a payload above what the broker takes.
        """
        ...

    def stop(self) -> None:
        """Disconnects without the will. May be called twice."""
        ...

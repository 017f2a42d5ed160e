"""The in-memory double: a broker as plain as the weakest real one, and a client of it. No threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

from edge_sdk.errors import BrokerError
from edge_sdk.transport.base import Connection, Inbound, Will
from edge_sdk.transport.rules import check_filter, check_message, matches

__all__ = ["MemoryBroker", "MemoryTransport"]


class MemoryBroker:
    """Routes messages between the transports of one process, in the thread of the publisher.

    ``stop`` and ``start`` are a broker's restart, ``drop`` and ``restore`` a client's link. A restart
    forgets the retained messages, as the embedded brokers do: clients publish theirs anew.
    """

    def __init__(self) -> None:
        # Re-entrant: what one client does on a message may publish the next one.
        self._lock = threading.RLock()
        self._clients: dict[str, MemoryTransport] = {}
        self._cut: set[str] = set()
        self._retained: dict[str, bytes] = {}
        self._taps: list[Callable[[str, str, bytes], None]] = []
        self._up = True

    def tap(self, callback: Callable[[str, str, bytes], None]) -> None:
        """Calls ``callback(client_id, topic, payload)`` for every message published from now on."""
        self._taps.append(callback)

    def drop(self, client_id: str) -> None:
        """Cuts a client's link: its will is published, and it stays away until ``restore``."""
        with self._lock:
            self._cut.add(client_id)
            self._lose(client_id, "the link was cut")

    def restore(self, client_id: str) -> None:
        """Gives a dropped client its link back; it connects at once if it was started."""
        with self._lock:
            self._cut.discard(client_id)
            self._join(client_id)

    def stop(self) -> None:
        """The broker goes down: every client loses its connection, no will is published."""
        with self._lock:
            self._up = False
            self._retained.clear()
            for client in self._clients.values():
                client._lost("the broker went down")

    def start(self) -> None:
        with self._lock:
            self._up = True
            for client_id in list(self._clients):
                self._join(client_id)

    def _attach(self, client: MemoryTransport) -> None:
        with self._lock:
            before = self._clients.get(client.client_id)
            if before is not None and before is not client:
                before._lost("another client connected under the same id")
            self._clients[client.client_id] = client
            self._join(client.client_id)

    def _detach(self, client: MemoryTransport) -> None:
        with self._lock:
            if self._clients.get(client.client_id) is client:
                del self._clients[client.client_id]

    def _join(self, client_id: str) -> None:
        client = self._clients.get(client_id)
        if client is None or client.connected:
            return
        if not self._up or client_id in self._cut:
            client._lost("the broker cannot be reached")
            return
        client._joined()
        for topic_filter in client._filters:
            self._replay(client, topic_filter)

    def _lose(self, client_id: str, why: str) -> None:
        client = self._clients.get(client_id)
        if client is None or not client.connected:
            return
        client._lost(why)
        if client._will is not None:
            self._route(client_id, client._will.topic, client._will.payload, retain=True)

    def _replay(self, client: MemoryTransport, topic_filter: str) -> None:
        for topic, payload in list(self._retained.items()):
            if matches(topic_filter, topic):
                client._deliver_to(Inbound(topic, payload, retained=True))

    def _route(self, sender: str, topic: str, payload: bytes, retain: bool) -> None:
        for tap in self._taps:
            tap(sender, topic, payload)
        if retain and payload:
            self._retained[topic] = payload
        elif retain:
            self._retained.pop(topic, None)
        for client in list(self._clients.values()):
            if client.connected and (
                topic in client._exact or any(matches(f, topic) for f in client._patterns)
            ):
                client._deliver_to(Inbound(topic, payload))


class MemoryTransport:
    """A client of a ``MemoryBroker``. See ``Transport`` for what it promises."""

    def __init__(self, broker: MemoryBroker, client_id: str) -> None:
        self.client_id = client_id
        self._broker = broker
        self._filters: list[str] = []
        self._exact: set[str] = set()
        """Filters without a wildcard: with a thousand clients, matching one by one would be all there is."""
        self._patterns: list[str] = []
        self._deliver: Callable[[Inbound | Connection], None] | None = None
        self._will: Will | None = None
        self._connected = False

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def busy(self) -> bool:
        return False

    @property
    def description(self) -> str:
        return "in memory"

    def start(self, deliver: Callable[[Inbound | Connection], None], will: Will | None = None) -> None:
        if will is not None:
            check_message(will.topic, will.payload)
        self._deliver, self._will = deliver, will
        self._broker._attach(self)

    def subscribe(self, topic_filter: str) -> None:
        check_filter(topic_filter)
        with self._broker._lock:
            if topic_filter not in self._filters:
                self._filters.append(topic_filter)
                if "+" in topic_filter or "#" in topic_filter:
                    self._patterns.append(topic_filter)
                else:
                    self._exact.add(topic_filter)
                if self._connected:
                    self._broker._replay(self, topic_filter)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        check_message(topic, payload)
        with self._broker._lock:
            if not self._connected:
                return False
            self._broker._route(self.client_id, topic, bytes(payload), retain)
            return True

    def stop(self) -> None:
        with self._broker._lock:
            self._broker._detach(self)
            self._connected = False
            self._deliver = None

    def _joined(self) -> None:
        self._connected = True
        if self._deliver is not None:
            self._deliver(Connection(up=True))

    def _lost(self, why: str) -> None:
        self._connected = False
        if self._deliver is not None:
            self._deliver(Connection(up=False, error=BrokerError(why)))

    def _wants(self, topic: str) -> bool:
        return topic in self._exact or any(matches(one, topic) for one in self._patterns)

    def _deliver_to(self, message: Inbound) -> None:
        if self._deliver is not None:
            self._deliver(message)

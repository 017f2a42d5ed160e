"""Which broker the server speaks to: one of its own, the config's, or a transport that was handed in."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from aggregator.broker.embedded import EmbeddedBroker, start_embedded
from aggregator.state.folder import StateFolder
from edge_sdk.config.broker import BrokerConfig, embedded_port, is_embedded, parse_broker_url
from edge_sdk.errors import BrokerError
from edge_sdk.protocol.base import Record
from edge_sdk.transport.base import Transport

__all__ = ["BrokerNote", "Brokerage", "read_note"]

_RETRY_S = 5.0
"""How long a port that was ours before is waited for: our broker may still be dying after a crash."""


class BrokerNote(Record, frozen=True, kw_only=True):
    """``broker.json`` in the state folder: where agents find the broker, for people and for scripts."""

    url: str
    kind: str
    namespace: str
    insecure: bool = False
    """Without TLS and off loopback: everything travels readable, by the operator's leave."""
    pid: int | None = None
    """Of the embedded broker."""


class Brokerage:
    """Holds the transport, and the embedded broker where there is one.

    Args:
        given: a transport handed in; it is used as it is.
    """

    def __init__(self, config: BrokerConfig, folder: StateFolder, given: Transport | None) -> None:
        self._config = config
        self._folder = folder
        self._given = given
        self._embedded: EmbeddedBroker | None = None
        self.transport: Transport | None = None

    @property
    def description(self) -> str:
        return "none" if self.transport is None else self.transport.description

    def open(self, emit: Callable[..., None]) -> Transport:
        """The transport, not yet started. Starts the embedded broker where the config wants it.

        Raises BrokerError where that cannot be had, MissingExtraError where there is none to start.
        """
        if self._given is not None:
            self.transport = self._given
            return self._given
        from edge_sdk.transport.mqtt import MqttTransport

        config = self._config
        if is_embedded(config.url):
            self._embedded = self._start(embedded_port(config.url))
            config = msgspec.structs.replace(config, url=self._embedded.url)
            self._tell(self._embedded, emit)
        else:
            address = parse_broker_url(config.url)
            note = BrokerNote(
                url=str(address),
                kind="external",
                namespace=config.namespace,
                insecure=not address.tls and not address.loopback,
            )
            _write(self._folder.broker_file, note)
            emit("broker.external", url=note.url, insecure=note.insecure)
        self.transport = MqttTransport(config, f"edge-aggregator-{config.namespace}")
        return self.transport

    def revive(self, emit: Callable[..., None]) -> None:
        """Starts the embedded broker again, on its port, if it is gone."""
        if self._embedded is not None and not self._embedded.alive:
            port = self._embedded.port
            self._embedded.stop()
            self._embedded = self._start(port)
            self._tell(self._embedded, emit)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.stop()
        if self._embedded is not None:
            self._embedded.stop()
            self._embedded = None

    def _start(self, port: int | None) -> EmbeddedBroker:
        """On the given port; else on the one of before, so that agents find it again; else on any."""
        before = self._last_port() if port is None else port
        end = time.monotonic() + _RETRY_S
        while before is not None:
            try:
                return start_embedded(self._folder.broker, before)
            except BrokerError:
                if time.monotonic() >= end:
                    if port is not None:
                        raise
                    break
                time.sleep(0.2)
        return start_embedded(self._folder.broker)

    def _last_port(self) -> int | None:
        note = read_note(self._folder)
        if note is None or note.kind == "external":
            return None
        return parse_broker_url(note.url).port

    def _tell(self, broker: EmbeddedBroker, emit: Callable[..., None]) -> None:
        note = BrokerNote(url=broker.url, kind=broker.kind, namespace=self._config.namespace, pid=broker.pid)
        _write(self._folder.broker_file, note)
        emit("broker.started", url=broker.url, kind=broker.kind)


def read_note(folder: StateFolder) -> BrokerNote | None:
    """None: there is none, or it cannot be read."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(folder.broker_file.read_bytes(), type=BrokerNote)
    return None


def _write(path: Path, note: BrokerNote) -> None:
    """Whole or not at all: scripts wait for this file."""
    beside = path.with_suffix(".tmp")
    beside.write_bytes(msgspec.json.format(msgspec.json.encode(note)) + b"\n")
    os.replace(beside, path)  # noqa: PTH105

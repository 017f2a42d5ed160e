"""One MQTT connection, from socket to loss: one paho client, one thread, thrown away afterwards.

A fresh client for every connection is the cure for several of paho's habits: nothing is resent from its
queues after a reconnect, a message that the broker chokes on does not come back, its loop is never
restarted. Paho's own thread is not used: the caller pumps, and hands over one message at a time, so that
a ping never waits behind more than that message.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_sdk.errors import BrokerError, CredentialsError, EdgeError
from edge_sdk.transport.access import BrokerAccess, tls_context
from edge_sdk.transport.base import Will
from edge_sdk.transport.mqtt_errors import CONNECT_S, NoAnswerError, connect_error, refusal, tls_error

__all__ = ["Link"]

_log = logging.getLogger(__name__)

_REFUSAL_S = 1.0
_MOST_UNACKNOWLEDGED = 16
_PACKET_OVERHEAD = 64
_UNSENT_BYTES = 256 * 1024
# In Linux since 3.12; not named in the socket module of older Pythons.
_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)


class _NotingSocket(ssl.SSLSocket):
    """Keeps the TLS error that paho only logs: with TLS 1.3 a refused client certificate shows on reading."""

    noted: ssl.SSLError | None = None

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except OSError:
            self.close()  # paho forgets it
            raise

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        try:
            return super().recv(buflen, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            self.noted = error
            raise

    def send(self, data: Any, flags: int = 0) -> int:
        try:
            return super().send(data, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except OSError:
            # The peer hung up; the alert that says why may lie here unread.
            with contextlib.suppress(OSError):
                self.recv(1)
            raise


class _PatientSocket(_NotingSocket):
    """Waits a second after the handshake for the broker to refuse the certificate.

    With TLS 1.3 that comes after the client's handshake, and is lost when a CONNECT crosses it.
    """

    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        timeout = self.gettimeout()
        poll = select.poll()
        poll.register(self, select.POLLIN)
        if poll.poll(int(1000 * _REFUSAL_S)):
            self.settimeout(0)
            try:
                self.recv(1)  # a broker says nothing before CONNECT: this is an alert or a session ticket
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                self.settimeout(timeout)


class Link:
    """``open``, ``pump`` until ``accepted``; then ``subscribe``, ``publish`` and ``pump`` until an error.

    Every method raises BrokerError (CredentialsError among them) when the connection is refused or lost.
    ``patient``: the one before ended without a word; give the broker time to say why.
    """

    def __init__(
        self,
        access: BrokerAccess,
        client_id: str,
        *,
        version5: bool,
        keepalive: int,
        will: Will | None,
        patient: bool = False,
        deliver: Callable[[str, bytes, bool], None],
    ) -> None:
        self.accepted = False
        self.refused = 0
        """Messages that the broker acknowledged with a refusal (MQTT 5 only)."""
        self.most_payload: int | None = None
        """What the broker takes of payload and topic together; None: it sets no limit."""
        self._access, self._client_id, self._version5 = access, client_id, version5
        self._keepalive = keepalive
        self._patient = patient
        self._deliver = deliver
        self._error: EdgeError | None = None
        self._unacknowledged: dict[int, float] = {}
        self._most_unacknowledged = _MOST_UNACKNOWLEDGED
        self._qos = 1
        self._socket: Any = None
        self._told_refused: set[int] = set()
        self._unconfirmed: dict[int, float] = {}
        self._opened = self._acknowledged = 0.0
        self._client = self._make(will)

    def _make(self, will: Will | None) -> paho.Client:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            clean_session=None if self._version5 else True,
            protocol=MQTTProtocolVersion.MQTTv5 if self._version5 else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        client.connect_timeout = CONNECT_S
        client.max_inflight_messages_set(_MOST_UNACKNOWLEDGED)
        client.on_socket_open = self._on_socket_open
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        if will is not None:
            client.will_set(will.topic, will.payload, qos=1, retain=True)
        return client

    # -- what the owner's thread calls -------------------------------------------------------------------

    def open(self) -> None:
        """Connects the socket and sends CONNECT; blocks for at most some seconds."""
        access, address = self._access, self._access.address
        if access.username is not None:
            self._client.username_pw_set(access.username, access.password())
        if address.tls:
            context = tls_context(access)
            context.sslsocket_class = _PatientSocket if self._patient else _NotingSocket
            self._client.tls_set_context(context)
        # No properties in CONNECT: brokers without MQTT 5 wait for ever for the end of what they misread.
        try:
            self._client.connect(address.host, address.port, self._keepalive)
        except OSError as error:
            raise connect_error(access, error) from error
        self._opened = time.monotonic()

    def pump(self, wake: int, timeout: float) -> None:
        """Waits for the network or for the descriptor ``wake``, and lets paho read, write and ping."""
        sock = self._client.socket()
        if sock is None:
            raise self._loss()
        # Bytes that TLS has already decrypted do not show in poll.
        pending = bool(sock.pending()) if isinstance(sock, ssl.SSLSocket) else False
        descriptor = sock.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN | (select.POLLOUT if self._client.want_write() else 0))
        poll.register(wake, select.POLLIN)
        ready = dict(poll.poll(0 if pending else int(timeout * 1000)))
        if pending or ready.get(descriptor, 0) & ~select.POLLOUT:
            self._client.loop_read()
        if self._client.want_write():
            self._client.loop_write()
        self._client.loop_misc()
        if self._error is not None:
            raise self._error
        if self._client.socket() is None:
            raise self._loss()
        self._watch()

    @property
    def ready(self) -> bool:
        """Whether another message may be handed over now."""
        return not self._client.want_write() and len(self._unacknowledged) < self._most_unacknowledged

    @property
    def unacknowledged(self) -> int:
        return len(self._unacknowledged)

    @property
    def subscribed(self) -> bool:
        """Whether the broker has confirmed every subscription asked for."""
        return not self._unconfirmed

    def publish(self, topic: str, payload: bytes, retain: bool) -> None:
        info = self._client.publish(topic, payload, qos=self._qos, retain=retain)
        if info.rc != paho.MQTT_ERR_SUCCESS:
            raise self._loss()
        if self._qos > 0:
            self._unacknowledged[info.mid] = time.monotonic()

    def subscribe(self, filters: Sequence[str]) -> None:
        if not filters:
            return
        if self._version5:
            code, mid = self._client.subscribe([(f, SubscribeOptions(qos=1)) for f in filters])
        else:
            code, mid = self._client.subscribe([(f, 1) for f in filters])
        if code != paho.MQTT_ERR_SUCCESS or mid is None:
            raise self._loss()
        self._unconfirmed[mid] = time.monotonic()

    def leave(self, wake: int) -> None:
        """Says goodbye, so that the broker drops the will; waits a second at most."""
        end = time.monotonic() + 1.0
        with contextlib.suppress(Exception):
            self._client.disconnect()
            while self._client.socket() is not None and time.monotonic() < end:
                self.pump(wake, 0.1)

    def close(self) -> None:
        """Lets go of the socket, without a goodbye."""
        sock, self._socket = self._socket, None
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.close()
        for name in (
            "on_socket_open",
            "on_connect",
            "on_disconnect",
            "on_message",
            "on_publish",
            "on_subscribe",
        ):
            setattr(self._client, name, None)

    # -- paho's callbacks: they note and hand on, and never raise --------------------------------------

    def _on_socket_open(self, _client: object, _data: object, sock: Any) -> None:
        self._socket = sock
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Else megabytes wait in the kernel on a slow link, and the ping behind them.
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _UNSENT_BYTES)

    def _on_connect(
        self, _client: object, _data: object, _flags: object, reason: ReasonCode, limits: Properties | None
    ) -> None:
        if reason.is_failure:
            self._error = refusal(self._access, self._client_id, self._version5, reason)
            return
        maximum = getattr(limits, "MaximumPacketSize", None)
        if maximum is not None:
            self.most_payload = maximum - _PACKET_OVERHEAD
        self._most_unacknowledged = min(
            _MOST_UNACKNOWLEDGED, getattr(limits, "ReceiveMaximum", _MOST_UNACKNOWLEDGED)
        )
        self._qos = min(1, getattr(limits, "MaximumQoS", 1))
        if getattr(limits, "RetainAvailable", 1) == 0:
            self._error = BrokerError(
                f"the broker {self._access.url} keeps no retained messages, which the protocol needs",
                "switch them on in the broker",
            )
            return
        self.accepted = True

    def _on_disconnect(
        self, _client: object, _data: object, flags: Any, reason: ReasonCode, _props: object
    ) -> None:
        if self._error is not None or not flags.is_disconnect_packet_from_server:
            return
        self._error = refusal(self._access, self._client_id, self._version5, reason)

    def _on_message(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        try:
            self._deliver(message.topic, bytes(message.payload), bool(message.retain))
        except Exception:
            _log.exception("a message was not taken")

    def _on_publish(
        self, _client: object, _data: object, mid: int, reason: ReasonCode, _props: object
    ) -> None:
        self._unacknowledged.pop(mid, None)
        self._acknowledged = time.monotonic()
        if reason.is_failure:
            self.refused += 1
            if reason.value not in self._told_refused:
                self._told_refused.add(reason.value)
                _log.warning("the broker %s refused a message: %s", self._access.url, reason)

    def _on_subscribe(
        self, _client: object, _data: object, mid: int, reasons: list[ReasonCode], _props: object
    ) -> None:
        self._unconfirmed.pop(mid, None)
        refused = [str(reason) for reason in reasons if reason.is_failure]
        if refused:
            self._error = CredentialsError(
                f"the broker {self._access.url} refused a subscription of {self._client_id!r}: {refused[0]}",
                "the broker's access list must let this client read its topics",
            )

    # -- what went wrong ---------------------------------------------------------------------------------

    def _watch(self) -> None:
        now = time.monotonic()
        if not self.accepted and now - self._opened > CONNECT_S:
            raise NoAnswerError(f"{self._access.url} took the connection and does not answer")
        if now - next(iter(self._unconfirmed.values()), now) > CONNECT_S:
            raise BrokerError(f"the broker {self._access.url} does not answer to a subscription")
        oldest = next(iter(self._unacknowledged.values()), now)
        # From the last one on: on a slow link each waits behind those before it.
        if now - max(oldest, self._acknowledged) > 3 * self._keepalive:
            raise BrokerError(f"the broker {self._access.url} acknowledges no messages any more")

    def _loss(self) -> EdgeError:
        if self._error is not None:
            return self._error
        noted = getattr(self._socket, "noted", None)
        if noted is not None and not isinstance(noted, ssl.SSLEOFError):
            return tls_error(self._access, noted)
        if not self.accepted:
            return NoAnswerError(
                f"{self._access.url} closed the connection without an answer",
                "does it want a certificate that it did not get?"
                if self._access.address.tls
                else "is it an MQTT broker, and does this port want TLS (mqtts://)?",
            )
        return BrokerError(f"the connection to {self._access.url} was lost")

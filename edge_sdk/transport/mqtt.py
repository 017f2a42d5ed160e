"""MQTT: one thread that connects, reconnects and moves messages; everything else only enqueues.

MQTT 5 where the broker offers it, else 3.1.1, which is remembered. Nothing is kept while there is no
connection, and nothing is sent twice: what must arrive is repeated by whoever awaits an answer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from edge_sdk.config.broker import BrokerConfig
from edge_sdk.errors import BrokerError, CredentialsError, EdgeError, ProtocolError
from edge_sdk.protocol.frames import is_chunk
from edge_sdk.transport.access import broker_access
from edge_sdk.transport.base import Connection, Inbound, Will
from edge_sdk.transport.mqtt_errors import NoAnswerError, NotYetValidError, TakenOverError
from edge_sdk.transport.mqtt_link import Link
from edge_sdk.transport.rules import check_filter, check_message

__all__ = ["MqttTransport"]

_log = logging.getLogger(__name__)

_FIRST_DELAY_S = 1.0
_MOST_DELAY_S = 60.0
_STEADY_S = 10.0
_SUSPICIOUS = 3
_DRAIN_S = 2.0
_MOST_WAITING_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class _Publish:
    topic: str
    payload: bytes
    retain: bool


@dataclass(frozen=True)
class _Subscribe:
    topic_filter: str


class MqttTransport:
    """A client of an MQTT broker. See ``Transport`` for what it promises.

    ``publish`` also answers False when 16 MiB wait for a slow link: the caller sends less, or later. What is
    retained is small, and always passes.
    ``Connection.final`` is set for a refused password or certificate; it goes on trying about once a minute
    all the same, since a password file or a clock may be put right.

    Raises ConfigError at once for a section that cannot work.
    """

    def __init__(self, broker: BrokerConfig, client_id: str, *, keepalive: int = 30) -> None:
        self._access = broker_access(broker)
        self._client_id = client_id
        self._keepalive = keepalive
        self._lock = threading.Lock()  # guards the fields below; never held across a call to paho
        self._queue: deque[_Publish | _Subscribe] = deque()
        self._waiting = 0
        self._filters: list[str] = []
        self._connected = False
        self._most_payload: int | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._wake_write = -1
        self._wake_read = -1
        self._deliver: Callable[[Inbound | Connection], None] = _nobody
        self._will: Will | None = None
        self._version5 = True
        self._version5_proved = False
        self._serving: Link | None = None
        self._served = False
        self._early: list[Inbound] | None = []  # what came before the connection was told to be up
        self._patient = False

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def busy(self) -> bool:
        link = self._serving
        return bool(self._queue) or (link is not None and link.unacknowledged > 0)

    @property
    def insecure(self) -> bool:
        """Plain MQTT off loopback, by leave of the config."""
        return self._access.insecure

    @property
    def description(self) -> str:
        if not self._connected:
            return self._access.url
        return f"{self._access.url} (MQTT {'5' if self._version5 else '3.1.1'})"

    def start(self, deliver: Callable[[Inbound | Connection], None], will: Will | None = None) -> None:
        if self._thread is not None:
            raise RuntimeError("the transport was started already")
        if will is not None:
            check_message(will.topic, will.payload)
        self._deliver, self._will = deliver, will
        self._stopping.clear()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{self._client_id}", daemon=True)
        self._thread.start()

    def subscribe(self, topic_filter: str) -> None:
        check_filter(topic_filter)
        with self._lock:
            if topic_filter in self._filters:
                return
            self._filters.append(topic_filter)
            if self._connected:
                self._queue.append(_Subscribe(topic_filter))
                self._wake()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        check_message(topic, payload)
        with self._lock:
            full = self._waiting + len(payload) > _MOST_WAITING_BYTES
            if not self._connected or (full and not retain):
                return False
            if self._most_payload is not None and len(payload) > self._most_payload - len(topic):
                raise ProtocolError(
                    f"a message of {len(payload)} bytes is above what {self._access.url} takes "
                    f"({self._most_payload} with its topic)",
                    "raise the broker's packet limit (max_packet_size), or lower transfer.chunk_kib",
                )
            self._queue.append(_Publish(topic, payload, retain))
            self._waiting += len(payload)
            self._wake()
            return True

    def stop(self) -> None:
        """Sends what waits, for two seconds at most, and disconnects; nothing is delivered afterwards.

        Chunks that wait are dropped, so that a goodbye does not wait behind them. Where not everything else
        was acknowledged in time, it leaves without a word, and the will speaks.
        """
        thread = self._thread
        if thread is None:
            return
        self._stopping.set()
        with self._lock:
            self._wake()
        if thread is not threading.current_thread():
            thread.join(timeout=30)
            if not thread.is_alive():
                self._thread = None

    # -- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        failures = short_lives = 0
        try:
            while not self._stopping.is_set():
                began = time.monotonic()
                error = self._connection()
                if error is None or self._stopping.is_set():
                    return
                if isinstance(error, NoAnswerError) and self._fall_back():
                    error = self._connection()
                    if error is None or self._stopping.is_set():
                        return
                    if isinstance(error, NoAnswerError):
                        self._version5 = True  # it was not the version
                lived = time.monotonic() - began
                failures = 1 if lived > _STEADY_S else failures + 1
                short_lives = short_lives + 1 if self._served and lived <= _STEADY_S else 0
                if short_lives >= _SUSPICIOUS and not error.hint:
                    # MQTT 3.1.1 has no word for it, and Mosquitto 2.0 does not use that of MQTT 5.
                    error = TakenOverError(
                        f"{error.message}, {short_lives} times in a row right after connecting",
                        f"does another client use the id {self._client_id!r}?",
                    )
                final = isinstance(error, CredentialsError) and not isinstance(error, NotYetValidError)
                self._tell(Connection(up=False, error=error, final=final))
                self._stopping.wait(_delay(failures, slow=final or isinstance(error, TakenOverError)))
        finally:
            with self._lock:
                for descriptor in (self._wake_read, self._wake_write):
                    os.close(descriptor)
                self._wake_read = self._wake_write = -1

    def _fall_back(self) -> bool:
        """To MQTT 3.1.1: several brokers close the connection on a version 5 CONNECT."""
        if not self._version5 or self._version5_proved:
            return False
        self._version5 = False
        return True

    def _connection(self) -> EdgeError | None:
        """One connection, until it is lost; None: it was ended by ``stop``."""
        link: Link | None = None
        self._served = False
        self._early = []
        try:
            if self._version5 and not self._version5_proved and self._will is not None:
                # A broker without MQTT 5 waits for ever for the end of a CONNECT with a will, which it
                # misreads; without one it answers at once.
                link = self._link(None)
                link.leave(self._wake_read)
                link.close()
            link = self._link(self._will)
            if not self._stopping.is_set():
                self._serve(link)
            if self._drain(link):
                link.leave(self._wake_read)
        except EdgeError as error:
            self._patient = isinstance(error, NoAnswerError)
            return error
        except Exception as error:  # whatever paho does, the thread goes on
            _log.exception("the MQTT client failed")
            return BrokerError(f"the MQTT client failed: {type(error).__name__}: {error}")
        finally:
            with self._lock:
                self._connected = False
                self._serving = None
                self._queue.clear()
                self._waiting = 0
            if link is not None:
                link.close()
        return None

    def _link(self, will: Will | None) -> Link:
        """A connection that the broker accepted, or one that ``stop`` ended before it could."""
        link = Link(
            self._access,
            self._client_id,
            version5=self._version5,
            keepalive=self._keepalive,
            will=will,
            patient=self._patient,
            deliver=self._on_message,
        )
        try:
            link.open()
            while not link.accepted and not self._stopping.is_set():
                link.pump(self._wake_read, 0.5)
                self._drain_wake()
        except BaseException:
            link.close()
            raise
        self._version5_proved = self._version5 and link.accepted
        return link

    def _serve(self, link: Link) -> None:
        patience = min(5.0, self._keepalive / 4)
        with self._lock:
            filters = list(self._filters)
        link.subscribe(filters)
        self._served = True
        while not link.subscribed and not self._stopping.is_set():
            link.pump(self._wake_read, patience)
            self._drain_wake()
        with self._lock:
            self._queue.extend(_Subscribe(late) for late in self._filters[len(filters) :])
            self._most_payload = link.most_payload
            self._serving = link
            self._connected = True
        self._tell(Connection(up=True))
        early, self._early = self._early, None
        for message in early or ():
            self._on_message(message.topic, message.payload, message.retained)
        while not self._stopping.is_set():
            self._feed(link)
            link.pump(self._wake_read, patience)
            self._drain_wake()

    def _drain(self, link: Link) -> bool:
        """False: something may not have reached the broker."""
        with self._lock:
            self._queue = deque(
                one for one in self._queue if not (isinstance(one, _Publish) and is_chunk(one.payload))
            )
        end = time.monotonic() + _DRAIN_S
        while True:
            self._feed(link)
            if not self._queue and not link.unacknowledged:
                return True
            if time.monotonic() >= end:
                return False
            link.pump(self._wake_read, 0.1)
            self._drain_wake()

    def _feed(self, link: Link) -> None:
        while link.ready:
            with self._lock:
                if not self._queue:
                    return
                command = self._queue[0]
            if isinstance(command, _Publish):
                link.publish(command.topic, command.payload, command.retain)
            else:
                link.subscribe([command.topic_filter])
            with self._lock:
                # Only now: ``busy`` sees it either here or with the link.
                self._queue.popleft()
                if isinstance(command, _Publish):
                    self._waiting -= len(command.payload)

    def _on_message(self, topic: str, payload: bytes, retained: bool) -> None:
        if self._stopping.is_set():
            return
        message = Inbound(topic, payload, retained)
        if self._early is None:
            self._deliver(message)
        else:
            self._early.append(message)

    def _tell(self, connection: Connection) -> None:
        if self._stopping.is_set():
            return
        try:
            self._deliver(connection)
        except Exception:
            _log.exception("a connection event was not taken")

    def _wake(self) -> None:
        """Called with the lock held."""
        if self._wake_write >= 0:
            with contextlib.suppress(BlockingIOError):
                os.write(self._wake_write, b"\0")

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._wake_read, 4096)) == 4096:
                pass


def _delay(failures: int, *, slow: bool) -> float:
    """Full jitter, so that a broker's restart does not bring every device back in the same second."""
    if slow:
        return random.uniform(_MOST_DELAY_S / 2, _MOST_DELAY_S)  # noqa: S311
    return random.uniform(0, min(_MOST_DELAY_S, _FIRST_DELAY_S * 2.0 ** (failures - 1)))  # noqa: S311


def _nobody(_event: Inbound | Connection) -> None:
    pass

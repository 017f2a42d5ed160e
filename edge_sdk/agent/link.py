"""The device's link, measured on purpose: by the command while no agent runs, kept where the agent finds it.

A device has one place at its broker: a second client under its name would throw the first out, and both would
hear each other's answers. So whoever measures holds the state folder's lock; while an agent does, what that
agent knows is told instead.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass, field
from pathlib import Path

from edge_sdk.agent.lock import FolderLock, holder
from edge_sdk.agent.record import AgentRecord
from edge_sdk.clock import Clock, SystemClock, next_within
from edge_sdk.config.agent import AgentConfig
from edge_sdk.errors import ConfigError, EdgeError, ProtocolError, StateError
from edge_sdk.protocol.frames import decode_chunk, is_chunk
from edge_sdk.protocol.measure import Link
from edge_sdk.protocol.topics import Topics
from edge_sdk.protocol.wire import AggregatorState, Pong, decode, encode
from edge_sdk.transport.base import Connection, Inbound, Transport
from edge_sdk.transport.link_meter import LinkMeter
from edge_sdk.transport.shaping import TokenBucket

__all__ = ["Found", "find_link", "keep_link", "kept_link"]

_CONNECT_S = 5.0
_STATE_S = 2.0
"""How long the aggregator's retained word may take once there is a connection."""
_BURST_BYTES = 8 * 1024
_FIELDS = ("rtt_ms", "down_bps", "up_bps")


@dataclass(frozen=True)
class Found:
    """A link, when it was measured, and what is not known of it."""

    link: Link = field(default_factory=Link)
    at: float = 0.0
    spread: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @classmethod
    def nothing(cls, reason: str) -> Found:
        return cls(reasons=dict.fromkeys(_FIELDS, reason))


def find_link(
    config: AgentConfig,
    *,
    transport: Transport | None = None,
    clock: Clock | None = None,
    within_s: float = 30.0,
) -> Found:
    """Measures the link and keeps the result for the agent; or what is known of it, and why no more.

    Args:
        transport: in place of MQTT to ``broker.url``.
        within_s: for all of it.
    """
    folder = Path(config.agent.state_dir)
    try:
        lock = FolderLock(folder)
    except (StateError, ConfigError) as error:
        pid = holder(folder)
        if pid is None:
            return Found.nothing(error.message)
        return _told_by(folder, f"the agent runs (process {pid}) and has not measured it yet")
    try:
        if transport is None:
            from edge_sdk.transport.mqtt import MqttTransport

            transport = MqttTransport(config.broker, f"{config.broker.namespace}-{config.agent.id}")
        found = _Call(config, transport, clock or SystemClock(), within_s).measure()
        if found.link.source == "measured":
            record = AgentRecord(folder / "agent.db")
            try:
                keep_link(record, found.link, found.at)
            finally:
                record.close()
        return found
    except EdgeError as error:
        return Found.nothing(error.message)
    finally:
        lock.release()


def keep_link(record: AgentRecord, link: Link, at: float) -> None:
    """What was measured on purpose takes the place of what transfers showed."""
    with record.transaction():
        for name in _FIELDS:
            value = getattr(link, name)
            if value is not None:
                record.put(f"link.{name}", str(round(value, 3)) if name == "rtt_ms" else str(round(value)))
        record.put("link.at", str(at))


def kept_link(record: AgentRecord) -> tuple[Link, float]:
    """What is known, from measurements and transfers, and since when it is."""
    known = {name: float(text) for name in _FIELDS if (text := record.get(f"link.{name}")) is not None}
    link = Link(**known, source="measured" if known else "unknown")
    return link, float(record.get("link.at") or 0.0)


def _told_by(folder: Path, reason: str) -> Found:
    try:
        record = AgentRecord(folder / "agent.db", read_only=True)
    except StateError as error:
        return Found.nothing(error.message)
    try:
        link, at = kept_link(record)
    finally:
        record.close()
    return Found(link, at, reasons={name: reason for name in _FIELDS if getattr(link, name) is None})


class _Call:
    """One connection to the broker, for one measurement."""

    def __init__(self, config: AgentConfig, transport: Transport, clock: Clock, within_s: float) -> None:
        self._device, self._namespace = config.agent.id, config.broker.namespace
        self._topics = Topics(self._namespace)
        self._transport, self._clock = transport, clock
        limit = config.limits.uplink_kbps
        self._bucket = TokenBucket(None if limit is None else limit * 1000, clock, _BURST_BYTES)
        self._inbox: queue.SimpleQueue[Inbound | Connection] = queue.SimpleQueue()
        self._why = ""
        self._within_s, self._end = within_s, clock.monotonic() + within_s

    def measure(self) -> Found:
        transport, topics = self._transport, self._topics
        transport.subscribe(topics.aggregator)
        transport.subscribe(topics.reply(self._device))
        transport.start(self._inbox.put)
        try:
            state = self._aggregator()
            if state is None:
                return Found.nothing(self._why)
            if not state.link_bytes:
                return Found.nothing("the aggregator answers no measurements; it runs an older version")
            meter = LinkMeter(
                self._namespace,
                self._device,
                say=lambda record: self._send(topics.control(self._device), encode(record)),
                send=lambda frame: self._send(topics.bulk(self._device), frame),
                wait=self._bucket.wait,
                most_bytes=state.link_bytes,
            )
            self._drive(meter)
            return Found(meter.link, self._clock.wall(), meter.spread, meter.reasons)
        finally:
            transport.stop()

    def _aggregator(self) -> AggregatorState | None:
        """What the aggregator last said; None: ``_why`` tells what is missing."""
        where = self._transport.description
        self._why = f"no connection to {where} within {_CONNECT_S:g} s"
        end = min(self._end, self._clock.monotonic() + _CONNECT_S)
        while (left := end - self._clock.monotonic()) > 0:
            event = self._next(left)
            if event is None:
                break
            if isinstance(event, Connection):
                if not event.up:
                    self._why = f"no connection to {where}: {event.error or 'it was closed'}"
                    if event.final:
                        break
                    continue
                self._why = f"connected to {where}, and no aggregator is there"
                end = min(self._end, self._clock.monotonic() + _STATE_S)
            elif event.topic == self._topics.aggregator and (state := _state_in(event.payload)) is not None:
                if state.ready:
                    return state
                self._why = "the aggregator is away"
        return None

    def _drive(self, meter: LinkMeter) -> None:
        clock = self._clock
        while (due := meter.tick(clock.monotonic())) is not None:
            if clock.monotonic() >= self._end:
                meter.stop(f"it was not measured within {self._within_s:.0f} s")
                continue
            event = self._next(max(0.001, min(due, self._end) - clock.monotonic()))
            if isinstance(event, Connection):
                if not event.up:
                    meter.lost()
            elif event is not None and event.topic == self._topics.reply(self._device):
                _hand_over(event.payload, meter, clock.monotonic())

    def _next(self, seconds: float) -> Inbound | Connection | None:
        """What comes within so many seconds."""
        try:
            return next_within(self._inbox, seconds)
        except queue.Empty:
            return None

    def _send(self, topic: str, payload: bytes) -> bool:
        self._bucket.spend(len(payload))
        return self._transport.publish(topic, payload)


def _hand_over(payload: bytes, meter: LinkMeter, now: float) -> None:
    """Whatever else comes for the device is the agent's affair, which asks for it again."""
    try:
        if is_chunk(payload):
            meter.on_chunk(decode_chunk(payload), now)
        elif isinstance(record := decode(payload), Pong):
            meter.on_pong(record, now)
    except ProtocolError:
        return


def _state_in(payload: bytes) -> AggregatorState | None:
    try:
        record = decode(payload)
    except ProtocolError:
        return None
    return record if isinstance(record, AggregatorState) else None

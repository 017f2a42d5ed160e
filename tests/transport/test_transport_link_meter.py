"""Measuring a link: on a link made of arithmetic, whose truth is known, and through real brokers."""

from __future__ import annotations

import heapq
import itertools
import queue
import time
from collections.abc import Callable
from random import Random

import pytest
from brokers import World
from peers import Peer

from aggregator.echo import LINK_BYTES, Echo
from edge_sdk.clock import ManualClock, SystemClock, next_within
from edge_sdk.protocol.base import Record
from edge_sdk.protocol.frames import decode_chunk, encode_chunk, is_chunk, link_transfer
from edge_sdk.protocol.topics import Topics
from edge_sdk.protocol.wire import Ping, Pong, decode, encode
from edge_sdk.transport.base import Connection, Inbound
from edge_sdk.transport.link_meter import MOST_WAY_BYTES, LinkMeter
from edge_sdk.transport.shaping import TokenBucket

NAMESPACE, DEVICE = "edge", "dev-a"


class Line:
    """Two ways with a rate and a delay each, a meter at one end and an echo at the other, in made-up time."""

    def __init__(
        self, up_bps: float, down_bps: float, delay_s: float, *, limit_bps: float | None = None
    ) -> None:
        self.clock = ManualClock()
        self._rates, self._delay = {"up": up_bps, "down": down_bps}, delay_s
        self._free = {"up": 0.0, "down": 0.0}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.bytes = {"up": 0, "down": 0}
        self.deaf = False
        self.connected = True
        self.events: list[str] = []
        self._bucket = TokenBucket(limit_bps, self.clock, 8 * 1024)
        self.echo = Echo(
            NAMESPACE,
            self.clock,
            lambda device, record: self._carry("down", encode(record), self._to_meter),
            lambda device, frame: self._carry("down", frame, self._to_meter),
            lambda name, **fields: self.events.append(name),
        )
        self.meter = self.new_meter()

    def new_meter(self, **options: object) -> LinkMeter:
        def up(data: bytes) -> bool:
            self._bucket.spend(len(data))
            return self.connected and self._carry("up", data, self._to_echo)

        return LinkMeter(
            NAMESPACE, DEVICE, say=lambda record: up(encode(record)), send=up, wait=self._bucket.wait,
            random=Random(1), **options,
        )  # type: ignore[arg-type]  # fmt: skip

    def run(self) -> LinkMeter:
        while not self.meter.done:
            due = self.meter.tick(self.clock.monotonic())
            if due is None:
                break
            if self._events and self._events[0][0] <= due:
                at, _, happen = heapq.heappop(self._events)
                self.clock.now = max(self.clock.now, at)
                happen()
            else:
                self.clock.now = max(self.clock.now, due)
        return self.meter

    def _carry(self, way: str, data: bytes, arrive: Callable[[bytes], None]) -> bool:
        start = max(self.clock.now, self._free[way])
        self._free[way] = start + 8 * len(data) / self._rates[way]
        self.bytes[way] += len(data)
        at = self._free[way] + self._delay
        heapq.heappush(self._events, (at, next(self._order), lambda: arrive(data)))
        return True

    def _to_echo(self, data: bytes) -> None:
        if self.deaf:
            return
        if is_chunk(data):
            assert self.echo.on_chunk(DEVICE, decode_chunk(data))
        else:
            self.echo.on_ping(DEVICE, decode(data))

    def _to_meter(self, data: bytes) -> None:
        if is_chunk(data):
            assert self.meter.on_chunk(decode_chunk(data), self.clock.now)
        else:
            self.meter.on_pong(decode(data), self.clock.now)


@pytest.mark.parametrize(
    "up_bps, down_bps, delay_s",
    [
        (1e6, 1e6, 0.02),
        (30e6, 30e6, 0.01),
        (2e6, 20e6, 0.05),
        (20e6, 2e6, 0.001),
        (100e3, 400e3, 0.1),
        (10e6, 10e6, 0.15),
    ],
)
def test_both_rates_and_the_round_trip_are_near_the_truth(
    up_bps: float, down_bps: float, delay_s: float
) -> None:
    line = Line(up_bps, down_bps, delay_s)
    meter = line.run()
    assert meter.reasons == {}
    link = meter.link
    assert link.source == "measured"
    assert link.up_bps == pytest.approx(up_bps, rel=0.05)
    assert link.down_bps == pytest.approx(down_bps, rel=0.05)
    assert link.rtt_ms == pytest.approx(2000 * delay_s, abs=30)
    assert line.clock.now < 10
    assert line.bytes["up"] < MOST_WAY_BYTES * 1.1 and line.bytes["down"] < MOST_WAY_BYTES * 1.1
    assert meter.bytes_up <= MOST_WAY_BYTES and meter.bytes_down <= MOST_WAY_BYTES
    assert meter.spread["up_bps"] < 0.2


def test_a_steady_link_ends_before_its_bytes_are_used_up() -> None:
    meter = Line(1e6, 1e6, 0.02).run()
    assert meter.bytes_down < MOST_WAY_BYTES / 4 and meter.bytes_up < MOST_WAY_BYTES / 4


def test_a_very_slow_link_ends_with_its_time() -> None:
    line = Line(20e3, 20e3, 0.3)
    meter = line.run()
    assert line.clock.now < 16
    assert meter.link.up_bps == pytest.approx(20e3, rel=0.2)


def test_the_owners_limit_holds() -> None:
    line = Line(30e6, 30e6, 0.01, limit_bps=200e3)
    link = line.run().link
    assert line.bytes["up"] * 8 <= 200e3 * line.clock.now + 2 * 8 * 8 * 1024
    assert link.up_bps == pytest.approx(200e3, rel=0.15)
    assert link.down_bps == pytest.approx(30e6, rel=0.1)


def test_one_way_alone() -> None:
    line = Line(1e6, 1e6, 0.02)
    line.meter = line.new_meter(ways=("down",))
    meter = line.run()
    assert meter.bytes_up == 0
    assert meter.link.up_bps is None and meter.link.down_bps and meter.link.rtt_ms


def test_nobody_answers() -> None:
    line = Line(1e6, 1e6, 0.02)
    line.deaf = True
    meter = line.run()
    assert (meter.link.source, meter.link.rtt_ms) == ("unknown", None)
    assert meter.reasons == dict.fromkeys(("rtt_ms", "down_bps", "up_bps"), "the aggregator did not answer")
    assert line.clock.now == 3.0


def test_an_aggregator_that_falls_silent() -> None:
    line = Line(1e6, 1e6, 0.02)
    while len(line.meter._trips) < 5:
        line.meter.tick(line.clock.now)
        at, _, happen = heapq.heappop(line._events)
        line.clock.now = at
        happen()
    line.deaf = True
    meter = line.run()
    assert meter.link.rtt_ms and meter.link.down_bps is None
    assert meter.reasons == dict.fromkeys(("down_bps", "up_bps"), "the aggregator fell silent")


def test_a_connection_that_is_lost() -> None:
    line = Line(1e6, 1e6, 0.02)
    line.connected = False
    assert line.run().reasons["rtt_ms"] == "there is no connection"
    other = Line(1e6, 1e6, 0.02)
    other.meter.tick(0.0)
    other.meter.lost()
    assert other.meter.done and set(other.meter.reasons.values()) == {"the connection was lost meanwhile"}


def test_a_device_that_measures_all_the_time_is_refused_and_may_again_later() -> None:
    line = Line(100e6, 100e6, 0.001)
    assert line.run().reasons == {}
    for _ in range(5):
        line.meter = line.new_meter()
        line.run()
    assert any("used up" in reason for reason in line.meter.reasons.values())
    assert "link.refused" in line.events
    assert line.bytes["down"] < LINK_BYTES * 1.5
    line.clock.advance(700)
    line.meter = line.new_meter()
    assert line.run().reasons == {}


class Heard:
    """An echo, and all that it says."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.said: list[Record] = []
        self.sent: list[bytes] = []
        self.echo = Echo(NAMESPACE, self.clock, self._say, self._send, lambda name, **fields: None)

    def _say(self, device: str, record: Record) -> bool:
        self.said.append(record)
        return True

    def _send(self, device: str, frame: bytes) -> bool:
        self.sent.append(frame)
        return True


def test_what_a_device_gets_is_bounded_whatever_it_asks() -> None:
    heard = Heard()
    for number in range(1000):
        heard.echo.on_ping(DEVICE, Ping(device=DEVICE, number=number, wants=256 * 1024))
    assert sum(map(len, heard.sent)) <= 2 * LINK_BYTES + 300_000
    assert 0 < len(heard.said) < 10 and all(isinstance(one, Pong) and one.refused for one in heard.said)
    for number in range(10):
        heard.echo.on_ping("dev-b", Ping(device="dev-b", number=number))
    assert heard.said[-1] == Pong(device="dev-b", number=9), "another device has a share of its own"


def test_what_all_devices_get_together_is_bounded() -> None:
    heard = Heard()
    for device in map("dev-{}".format, range(5000)):
        heard.echo.on_ping(device, Ping(device=device, number=1, wants=256 * 1024))
    assert sum(map(len, heard.sent)) < 17_000_000
    assert len(heard.echo._shares) <= 4096
    heard.clock.advance(10)
    heard.echo.on_ping("late", Ping(device="late", number=2, wants=1000))
    assert len(heard.sent[-1]) == 1040


def test_frames_of_other_transfers_are_left_alone() -> None:
    heard = Heard()
    other = link_transfer(NAMESPACE, "dev-b")
    assert not heard.echo.on_chunk(DEVICE, decode_chunk(encode_chunk(other, 1, 0, b"x")))
    assert heard.said == []
    meter = LinkMeter(NAMESPACE, DEVICE, say=lambda _: True, send=lambda _: True, wait=lambda _: 0.0)
    assert not meter.on_chunk(decode_chunk(encode_chunk(other, 1, 0, b"x")), 0.0)


def test_a_stray_answer_changes_nothing() -> None:
    line = Line(1e6, 1e6, 0.02)
    line.meter.tick(0.0)
    line.meter.on_pong(Pong(device=DEVICE, number=7), 0.001)
    own = link_transfer(NAMESPACE, DEVICE)
    assert line.meter.on_chunk(decode_chunk(encode_chunk(own, 7, 0, b"x")), 0.001), "an earlier measurement's"
    assert line.run().reasons == {}


@pytest.mark.alone
def test_through_a_broker(world: World, join: Callable[..., Peer]) -> None:
    topics = Topics(NAMESPACE)
    server = world.transport("aggregator")
    server.subscribe(topics.control("+"))
    server.subscribe(topics.bulk("+"))
    reply = topics.reply(DEVICE)
    echo = Echo(
        NAMESPACE, SystemClock(), lambda device, record: server.publish(reply, encode(record)),
        lambda device, frame: server.publish(reply, frame), lambda name, **fields: None,
    )  # fmt: skip

    def serve(event: Inbound | Connection) -> None:
        if isinstance(event, Inbound):
            if is_chunk(event.payload):
                echo.on_chunk(DEVICE, decode_chunk(event.payload))
            else:
                echo.on_ping(DEVICE, decode(event.payload))

    peer = Peer(server, start=False)
    server.start(lambda event: (serve(event), peer._take(event)))
    peer.up()
    device = world.transport(DEVICE)
    device.subscribe(reply)
    arrived: queue.SimpleQueue[Inbound | Connection] = queue.SimpleQueue()
    device.start(arrived.put)
    while not device.connected:
        arrived.get(timeout=20)
    meter = LinkMeter(
        NAMESPACE, DEVICE, say=lambda record: device.publish(topics.control(DEVICE), encode(record)),
        send=lambda frame: device.publish(topics.bulk(DEVICE), frame), wait=lambda size: 0.0,
        most_bytes=300_000,
    )  # fmt: skip
    try:
        while (due := meter.tick(time.monotonic())) is not None:
            try:
                event = next_within(arrived, due - time.monotonic())
            except queue.Empty:
                continue
            if isinstance(event, Inbound):
                if is_chunk(event.payload):
                    meter.on_chunk(decode_chunk(event.payload), time.monotonic())
                else:
                    meter.on_pong(decode(event.payload), time.monotonic())
    finally:
        device.stop()
        server.stop()
    assert meter.reasons == {}
    assert meter.link.rtt_ms and meter.link.up_bps and meter.link.down_bps
    assert 0 < meter.bytes_up <= 300_000 and 0 < meter.bytes_down <= 300_000

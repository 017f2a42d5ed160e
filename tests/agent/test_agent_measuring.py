"""The running agent measures its link at joining, and when what is known is old; bounded, out of the way."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from agent_fakes import FakeAggregator, World

from aggregator.echo import Echo
from edge_sdk.agent.measuring import LEDGER
from edge_sdk.agent.reporting import folder_status
from edge_sdk.agent.traffic import Traffic
from edge_sdk.cli.progress import _line
from edge_sdk.cli.status import _lines
from edge_sdk.config.agent import GatesSection
from edge_sdk.protocol.frames import decode_chunk, is_chunk
from edge_sdk.protocol.wire import Choice, Ping, Status, decode, encode
from edge_sdk.transport.memory import MemoryTransport

DAY_S = 86_400.0
UP_BPS, DOWN_BPS = 2e6, 8e6


class Line(FakeAggregator):
    """Answers measurements as the aggregator does, over a line on which bytes take their time."""

    def __init__(self, world: World, answers: bool = True) -> None:
        super().__init__(MemoryTransport(world.broker, "line"))
        self.clock, self.answers, self.pings = world.clock, answers, 0
        self.echo = Echo(
            "edge", world.clock, lambda device, record: self._down(encode(record)),
            lambda device, frame: self._down(frame), lambda name, **fields: None,
        )  # fmt: skip

    def _down(self, payload: bytes) -> bool:
        self.clock.advance(0.001 + 8 * len(payload) / DOWN_BPS)
        return self.transport.publish(self.topics.reply(self.device), payload)

    def pump(self) -> bool:
        if not self.queue:
            return False
        payload = self.queue[0].payload
        self.clock.advance(0.001 + 8 * len(payload) / UP_BPS)
        if is_chunk(payload) and self.echo.on_chunk(self.device, decode_chunk(payload)):
            self.queue.pop(0)
            return True
        record = None if is_chunk(payload) else decode(payload)
        if isinstance(record, Ping):
            self.queue.pop(0)
            self.pings += 1
            if self.answers:
                self.echo.on_ping(self.device, record)
            return True
        rest, self.queue = self.queue[1:], self.queue[:1]
        super().pump()
        self.queue += rest
        return True


def a_world(folder: Path, answers: bool = True, **options: Any) -> World:
    world = World(folder, **options)
    world.aggregator.transport.stop()
    world.aggregator = Line(world, answers)
    world.aggregator.start()
    world.start()
    world.aggregator.hello(link_bytes=2_000_000)
    for _ in range(8):
        world.settle(0.5)
    return world


def measured(world: World) -> list[dict[str, Any]]:
    return [event.fields for event in world.events if event.name == "link.measured"]


def last_link(world: World) -> Any:
    return world.aggregator.got(Status)[-1].link


def test_the_link_is_known_and_told_once_the_device_has_joined(tmp_path: Path) -> None:
    world = a_world(tmp_path)
    assert len(measured(world)) == 1 and measured(world)[0]["reasons"] == {}
    link = last_link(world)
    assert link.source == "measured" and 1 <= link.rtt_ms < 20
    assert (link.up_bps, link.down_bps) == pytest.approx((UP_BPS, DOWN_BPS), rel=0.25)
    context = world.core.context
    probe = context.record.ledger(LEDGER)
    assert 0 < probe["bytes_up"] < 600_000 and 0 < probe["bytes_down"] < 600_000
    assert sum(probe.values()) < context.traffic.used, "it is part of the day's traffic"
    assert sum(context.record.ledger("run-1").values()) < 100_000, "and not of the run's"


def test_the_owner_is_shown_it(tmp_path: Path) -> None:
    world = a_world(tmp_path)
    (line,) = (line for line in _lines(folder_status(world.config, world.clock)) if line.startswith("link"))
    said = _line(world.event("link.measured"))
    assert re.fullmatch(r"link: 1\.\d+ Mbit/s up, .+ Mbit/s down, 2\.\d+ ms there and back", said), said
    assert re.fullmatch(
        r"link +1\.\d+ Mbit/s up, [678]\.?\d* Mbit/s down, 2\.\d+ ms there and back; .+", line
    ), line


def test_it_is_measured_again_when_it_is_a_day_old_and_not_at_every_start(tmp_path: Path) -> None:
    world = a_world(tmp_path)
    world.kill()
    world.start()
    world.settle(2)
    world.clock.advance(DAY_S - 100)
    world.settle(2)
    assert len(measured(world)) == 1
    world.clock.advance(200)
    world.settle(4)
    assert len(measured(world)) == 2


def test_transfers_keep_it_from_growing_old(tmp_path: Path) -> None:
    world = a_world(tmp_path)
    for number in (1, 2, 3):
        world.clock.advance(0.75 * DAY_S)
        world.aggregator.offer(round=number)
        world.settle(4)
    assert len(world.aggregator.got(Choice)) == 3 and len(measured(world)) == 1


def test_the_owner_can_leave_it_out_or_bound_it(tmp_path: Path) -> None:
    off = a_world(tmp_path / "off", link_probe_mb=0)
    assert isinstance(off.aggregator, Line) and off.aggregator.pings == 0
    assert last_link(off).source == "unknown"
    small = a_world(tmp_path / "small", link_probe_mb=0.1)
    probe = small.core.context.record.ledger(LEDGER)
    assert probe["bytes_up"] < 70_000 and last_link(small).source == "measured"
    daily = a_world(tmp_path / "daily", gates=GatesSection(traffic_mb_per_day=2.0))
    assert sum(daily.core.context.record.ledger(LEDGER).values()) < 0.15 * 2e6
    assert Traffic(daily.core.context.record, daily.clock, None).used < 0.2 * 2e6


def test_a_round_has_the_link_for_itself(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.aggregator.transport.stop()
    world.aggregator = Line(world, answers=False)
    world.aggregator.start()
    world.start()
    world.aggregator.hello(link_bytes=2_000_000)
    world.settle(1)
    world.aggregator.answers = True
    world.aggregator.offer()
    world.settle(2)
    assert "update.receipt" in world.names() and measured(world) == []
    world.settle(3600)
    assert len(measured(world)) == 1


def test_without_answers_it_is_tried_ever_more_seldom(tmp_path: Path) -> None:
    world = a_world(tmp_path, answers=False)
    for _ in range(200):
        world.clock.advance(DAY_S / 100)
        world.settle(4)
    assert isinstance(world.aggregator, Line)
    assert 3 <= len(measured(world)) <= 12 and world.aggregator.pings <= 12
    assert measured(world)[-1]["reasons"]["rtt_ms"] == "the aggregator did not answer"

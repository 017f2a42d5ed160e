"""What the planner remembers from round to round, and over a restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_device import World
from msgspec.structs import replace

import aggregator.running
from aggregator.planner.plan import plan_round
from aggregator.planner.utility import read_utilities
from edge_sdk.protocol.measure import Memory
from edge_sdk.protocol.wire import Announce, Choice, Decline, Offer


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    if made.server is not None:
        made.server.close()


def test_layer_utilities_come_of_each_merge_and_outlive_the_server(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[tuple[int, Any]] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        planned.append((kwargs["round"], kwargs["utilities"]))
        return plan_round(*args, **kwargs)

    monkeypatch.setattr(aggregator.running, "plan_round", watched)
    server = world.open(rounds=replace(world.config.rounds, total=2))
    world.device()
    world.pump()
    first, second, third = server._store.versions("demo")
    assert first.utilities is None
    one, two = read_utilities(second.utilities), read_utilities(third.utilities)
    assert one is not None and two is not None and one != two
    assert sum(one) == pytest.approx(1.0) and min(one) > 0
    assert (planned[0], planned[-1]) == ((1, None), (2, one))
    world.kill()
    world.open(rounds=replace(world.config.rounds, total=3))
    world.device("two")
    world.pump()
    assert planned[-1] == (3, two)


def test_what_a_round_taught_is_in_the_next_plan_also_after_a_restart(world: World) -> None:
    server = world.open(rounds=replace(world.config.rounds, total=3))

    def slow(announce: Announce) -> Announce:
        device.until = "offer"
        return replace(announce, measured=replace(announce.measured, train_s=4 * announce.candidate.seconds))

    device = world.device(alter_announce=slow)
    world.pump()
    lessons = server._running.fleet["one"].lessons  # type: ignore[union-attr]
    assert lessons.rounds == 1 and lessons.time_ratio == pytest.approx(4.0)
    first, second = (record for record in device.records if isinstance(record, Offer))
    before, after = ({c.id: c.seconds for c in offer.candidates} for offer in (first, second))
    both = set(before) & set(after)
    assert both and all(after[name] > 3 * before[name] for name in both)
    world.kill()
    again = world.open()
    assert again._running is not None
    assert again._running.fleet["one"].lessons == lessons


def test_who_missed_the_deadline_is_slower_in_the_next_round(world: World) -> None:
    server = world.open(rounds=replace(world.config.rounds, total=3))
    world.device(until="choice")
    world.pump()
    for _ in range(80):
        world.pass_time(1)
    lessons = server._running.fleet["one"].lessons  # type: ignore[union-attr]
    assert lessons.time_ratio == 2.0 and "was not there" in lessons.why


@pytest.mark.parametrize("first", ["status", "decline"])
def test_a_failure_is_judged_by_the_memory_that_was_offered_for(world: World, first: str) -> None:
    server = world.open(rounds=replace(world.config.rounds, total=3))
    device = world.device(until="choice")
    world.pump()
    choice = device.answer
    assert isinstance(choice, Choice)
    peak_mb = choice.candidate.peak_mb
    declined = Decline(device="one", run=choice.run, round=1, reason="memory", message="out of memory")
    if first == "decline":
        device.say(declined)
        world.pump()
    device.report(memory=Memory(budget_mb=peak_mb, rest_mb=100))
    if first == "status":
        device.say(declined)
    world.pump()
    lessons = server._running.fleet["one"].lessons  # type: ignore[union-attr]
    assert (lessons.declined, lessons.declined_mb, lessons.share_mb) == (1, 100, 100)
    assert lessons.held_mb(peak_mb) == pytest.approx(peak_mb)

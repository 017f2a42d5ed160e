"""What is said again because it may have been lost, and how a run ends when its aggregator is gone."""

from __future__ import annotations

from pathlib import Path

import pytest
from agent_fakes import World, version_object
from msgspec.structs import replace

from edge_sdk.errors import BrokerError
from edge_sdk.protocol.frames import decode_chunk, encode_chunk, transfer_id
from edge_sdk.protocol.wire import Have, Presence, RoundPosition, Status


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def joined(world: World, give_up_s: float | None = None, **state: object) -> World:
    world.start(give_up_s=give_up_s)
    world.aggregator.hello(**state)
    world.settle()
    return world


def test_presence_and_status_are_said_again_every_few_minutes(world: World) -> None:
    joined(world)
    before = len(world.aggregator.got(Status)), len(world.aggregator.got(Presence))
    world.settle(1600)
    again = len(world.aggregator.got(Status)) - before[0], len(world.aggregator.got(Presence)) - before[1]
    assert 4 <= again[0] <= 7 and again[0] == again[1]


def test_a_device_that_became_idle_says_so(world: World) -> None:
    world.trainer.auto = False
    joined(world)
    world.aggregator.offer()
    world.settle()
    before = len(world.aggregator.got(Status))
    world.trainer.fail("data")
    world.settle()
    status = world.aggregator.got(Status)[before:]
    assert [one.position for one in status] == [None]


def test_a_round_without_an_offer_is_asked_for(world: World) -> None:
    joined(world, round=1)
    world.aggregator.offer()
    world.settle(60)
    before = len(world.aggregator.got(Status))
    world.aggregator.state(round=2)
    world.settle(40)
    assert len(world.aggregator.got(Status)) == before + 1
    world.aggregator.state(round=3)
    world.aggregator.offer(round=3)
    world.settle()
    before = len(world.aggregator.got(Status))
    world.settle(40)
    assert len(world.aggregator.got(Status)) == before


def test_work_on_an_older_round_is_told(world: World) -> None:
    """The aggregator awaits it: late, it counts in a later round."""
    world.trainer.auto = False
    joined(world, round=1)
    assert world.core.rounds.position() is None
    world.aggregator.offer()
    world.settle()
    world.aggregator.state(round=2)
    world.settle()
    assert world.core.rounds.position() == RoundPosition(round=1, state="training")


def final(world: World, **state: object) -> None:
    ref, data = version_object(7)
    world.aggregator.objects[ref.object] = data
    world.aggregator.state(**{"finished": True, "version": ref, "round": 3, **state})
    world.settle()


def test_once_ends_by_name_where_the_final_version_cannot_be_had(world: World) -> None:
    joined(world, give_up_s=30.0)
    final(world, ready=False)
    world.settle(29)
    assert world.core.error is None
    world.settle(2)
    assert isinstance(world.core.error, BrokerError) and "version 7" in world.core.error.message


def test_without_the_final_version_the_agent_tells_and_lives_on(world: World) -> None:
    joined(world)
    final(world, ready=False)
    world.settle(40)
    assert world.event("run.finished").fields["version"] is None and not world.core.done
    final(world, ready=True)
    assert world.event("run.finished").fields["version"] == 7
    world.settle(40)
    assert world.names().count("run.finished") == 2


def test_a_run_that_goes_on_finishes_again(world: World) -> None:
    joined(world)
    final(world)
    world.aggregator.state(round=4, rounds=4)
    world.aggregator.offer(round=4)
    world.settle()
    assert "update.receipt" in world.names()
    final(world, round=4)
    assert world.names().count("run.finished") == 2


def test_a_repeated_chunk_of_what_is_held_is_answered_and_any_other_ignored(world: World) -> None:
    joined(world)
    world.aggregator.offer()
    world.settle()
    ref, data = version_object(0)
    world.aggregator.records.clear()
    for digest in (ref.object, "0" * 64):
        name = transfer_id("edge", "one", "down", digest)
        frame = encode_chunk(name, 2, 2048, data[2048:3072])
        world.aggregator.transport.publish(world.aggregator.topics.reply("one"), frame)
    world.settle()
    (have,) = world.aggregator.got(Have)
    assert (have.object, have.chunk_bytes, have.ranges) == (ref.object, 1024, ((0, 5),))
    assert "problem" not in world.names()


def test_an_offer_said_again_brings_the_time_that_is_left(world: World) -> None:
    world.trainer.auto = False
    joined(world)
    world.aggregator.offer(deadline_s=100.0)
    world.settle(60)
    world.aggregator.offer(deadline_s=40.0)
    world.settle(39)
    assert world.core.rounds.state == "training"
    world.settle(2)
    assert world.core.rounds.state == "idle"


def test_what_a_fetch_finds_complete_is_held_at_once(world: World) -> None:
    joined(world)
    world.aggregator.serving = False
    world.aggregator.offer()
    world.settle()
    downloads = world.core.downloads
    (fetch,) = downloads._fetches.values()
    data = world.aggregator.objects[fetch.ref.object]
    (transfer,) = downloads._fetches
    for index in range(5):
        at = 1024 * index
        fetch.receiver.accept(decode_chunk(encode_chunk(transfer, index, at, data[at : at + 1024])))
    fetch.receiver.close()
    downloads._fetches.clear()
    assert downloads.want([fetch.ref], 1024, 2)
    other = replace(fetch.ref, object="1" * 64)
    assert not downloads.want([other], 1024, 2)

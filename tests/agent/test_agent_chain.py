"""A version may be a chain: the agent fetches what it lacks of it, and keeps what the newest builds on."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from agent_fakes import World, version_object

from edge_sdk.protocol.trainer import Train
from edge_sdk.protocol.wire import Have, VersionRef


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def joined(world: World) -> None:
    world.start()
    world.aggregator.hello()
    world.settle()


def chain_of(world: World, *parents: int | None) -> tuple[VersionRef, ...]:
    """Versions 0 to n, each with its parent, as far as the newest builds on them."""
    refs = []
    for number, parent in enumerate(parents):
        ref, data = version_object(number)
        world.aggregator.objects[ref.object] = data
        refs.append(msgspec.structs.replace(ref, parent=parent))
    chain = [refs[-1]]
    while chain[0].parent is not None:
        chain.insert(0, refs[chain[0].parent])
    return tuple(chain)


def asked_for(world: World) -> list[str]:
    return list(dict.fromkeys(have.object for have in world.aggregator.got(Have)))


def test_who_holds_nothing_fetches_the_chain_and_who_was_away_the_rest_of_it(world: World) -> None:
    joined(world)
    first = chain_of(world, None, 0)
    world.aggregator.offer(1, versions=first)
    world.settle()
    assert asked_for(world) == [ref.object for ref in first]
    later = chain_of(world, None, 0, 1, 2)
    world.aggregator.offer(4, versions=later)
    world.settle()
    assert asked_for(world) == [ref.object for ref in later], "two versions behind: two deltas"
    trained = [request for request in world.trainer.requests if isinstance(request, Train)]
    assert [Path(path).name for path in trained[-1].versions] == [ref.object for ref in later]


def test_what_the_newest_version_builds_on_is_kept_until_a_full_one_came(world: World) -> None:
    joined(world)
    for round, parents in enumerate(((None,), (None, 0), (None, 0, 1), (None, 0, 1, 2)), 1):
        world.aggregator.offer(round, versions=chain_of(world, *parents))
        world.settle()
    assert set(world.core.context.record.versions()) == {0, 1, 2, 3}
    for round, parents in ((5, (None, 0, 1, 2, None)), (6, (None, 0, 1, 2, None, 4))):
        world.aggregator.offer(round, versions=chain_of(world, *parents))
        world.settle()
    assert set(world.core.context.record.versions()) == {4, 5}


def test_the_end_of_a_run_fetches_all_that_the_final_version_builds_on(world: World) -> None:
    joined(world)
    chain = chain_of(world, None, 0, 1)
    world.aggregator.state(finished=True, version=chain[-1], chain=chain[:-1], round=3)
    world.settle()
    assert world.event("run.finished").fields == {"run": "demo", "version": 2}
    assert all(world.core.context.store.has(ref.object) for ref in chain)

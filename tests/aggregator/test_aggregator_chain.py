"""Deltas over the wire: everybody holds the server's bits; what nobody needs any more is pruned."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_device import World
from msgspec.structs import replace

from aggregator import adapters
from aggregator.retention import needed
from aggregator.state.base import ParticipationRow, VersionRow
from edge_sdk.config.run import MergeSection, StorageSection
from edge_sdk.errors import StateError
from edge_sdk.faults import arm
from edge_sdk.updates.versions import read_adapter


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    # of an adapter as small as the test's a delta saves nothing
    monkeypatch.setattr(adapters, "file_bytes", lambda header: 0 if header.builds_on is not None else 1)
    return World(tmp_path)


def test_versions_come_as_chains_and_any_of_them_can_be_read(world: World) -> None:
    server = world.open(
        rounds=replace(world.config.rounds, total=5), merge=MergeSection(full_every=3),
        storage=StorageSection(keep_versions=True),
    )  # fmt: skip
    one = world.device("one")
    world.pump()
    assert server.done and [receipt.round for receipt in one.receipts] == [1, 2, 3, 4, 5]
    versions = server._store.versions("demo")
    assert [version.parent for version in versions] == [None, 0, 1, None, 3, 4]
    assert one.holds == set(range(6))
    assert one.state is not None and [ref.number for ref in one.state.chain] == [3, 4]
    running = server._running
    assert running is not None
    for number in range(6):
        chain = running.rounds.chain(number)
        there = read_adapter([server._objects.path(version.object) for version in chain])
        here = read_adapter([one.store.path(version.object) for version in chain])
        assert all(here[key].tobytes() == there[key].tobytes() for key in there)


def a_version(number: int, parent: int | None, accuracy: float | None = None) -> VersionRow:
    return VersionRow("demo", number, number, f"{number:064x}", 1, parent, "global", 0.0, accuracy)


def test_what_is_needed_is_kept_with_the_chain_that_leads_to_it() -> None:
    full = (0, 3, 6)
    versions = [a_version(n, None if n in full else n - 1, 0.9 if n == 4 else 0.1) for n in range(9)]
    late = ParticipationRow("demo", 2, "late", "sending", "{}", 0.0, builds_on=1)
    assert needed(versions, []) == {3, 4, 6, 7, 8}, "the best, and the newest"
    assert needed(versions, [late]) == {0, 1, 3, 4, 6, 7, 8}
    assert needed(versions, [], {f"{2:064x}"}) == {0, 1, 2, 3, 4, 6, 7, 8}, "somebody is fetching it"


def kept(world: World) -> list[int]:
    """Versions that are kept; their files are there, and no other one's."""
    assert world.server is not None
    versions = [version for version in world.server._store.versions("demo") if version.kept]
    assert {version.object for version in versions} <= set(world.server._objects.digests())
    return [version.number for version in versions]


def test_versions_are_pruned_and_who_was_away_begins_at_the_full_one(world: World) -> None:
    server = world.open(
        rounds=replace(world.config.rounds, total=6, deadline_s=50.0, max_staleness=3),
        merge=MergeSection(full_every=3),
    )
    slow = world.device("slow", until="announce")
    one = world.device("one", updates_left=3)
    world.pump()
    for _ in range(3):
        world.pass_time(20)
        slow.report()  # it is still at work
        world.pump()
    assert [receipt.round for receipt in one.receipts] == [1, 2, 3]
    assert kept(world) == [0, 3], "the slow one's update of the first round may still come"
    slow.leave()
    one.updates_left = None
    one.send_announce()
    world.pump()
    assert kept(world) == [6] and 1 not in [receipt.round for receipt in slow.receipts]
    with pytest.raises(StateError, match="version 0 was pruned"):
        server._running.rounds.chain(0)  # type: ignore[union-attr]


def test_killed_between_a_pruned_row_and_its_file(world: World) -> None:
    class Killed(BaseException): ...

    def die() -> None:
        raise Killed

    world.open(rounds=replace(world.config.rounds, total=4), merge=MergeSection(full_every=1))
    world.device("one")
    with arm("versions.pruned", die, times=3), pytest.raises(Killed):
        world.pump()
    server = world.server
    assert server is not None
    gone = [version.object for version in server._store.versions("demo") if not version.kept]
    assert gone and server._objects.has(gone[-1])
    world.kill()
    world.open()
    assert kept(world) and world.server is not None and not world.server._objects.has(gone[-1])
    world.pump()
    assert kept(world)[-1] == 4 and world.names().count("run.finished") == 1
    versions = world.server._store.versions("demo")
    assert set(world.server._objects.digests()) == {version.object for version in versions if version.kept}

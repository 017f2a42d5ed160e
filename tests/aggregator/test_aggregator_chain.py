"""Deltas over the wire: everybody holds the server's bits, and every version can be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_device import World
from msgspec.structs import replace

from aggregator import adapters
from edge_sdk.config.run import MergeSection
from edge_sdk.updates.versions import read_adapter


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    # of an adapter as small as the test's a delta saves nothing
    monkeypatch.setattr(adapters, "file_bytes", lambda header: 0 if header.builds_on is not None else 1)
    return World(tmp_path)


def test_versions_come_as_chains_and_any_of_them_can_be_read(world: World) -> None:
    server = world.open(rounds=replace(world.config.rounds, total=5), merge=MergeSection(full_every=3))
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

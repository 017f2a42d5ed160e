"""The server's disk fills up, a real one: the rounds pause, nothing stored is damaged, and they go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from disks import SmallDisk
from fake_device import FakeDevice, World
from msgspec.structs import replace

from aggregator.cli.looking import show_status
from aggregator.state.folder import StateFolder, open_store
from edge_sdk.config.run import StorageSection
from edge_sdk.protocol.wire import AggregatorState
from edge_sdk.transport.objects import file_digest


def a_world(folder: Path, keep_free_mb: float) -> World:
    world = World(folder, min_devices=2, deadline_s=100.0)
    world.config = replace(world.config, storage=StorageSection(keep_free_mb=keep_free_mb))
    return world


def two(world: World, **values: Any) -> tuple[FakeDevice, FakeDevice]:
    return world.device("kitchen", **values), world.device("garden", samples=50, change=0.03)


def versions(world: World) -> list[str]:
    """Digests of all versions, each that is kept read back from the disk."""
    folder = StateFolder(world.folder / "state")
    store = open_store(folder, read_only=True)
    found = store.versions("demo")
    store.close()
    assert found[-1].kept
    assert all(file_digest(folder.objects / one.object)[0] == one.object for one in found if one.kept)
    return [one.object for one in found]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    world = a_world(tmp_path_factory.mktemp("undisturbed"), 0)
    server = world.open()
    two(world)
    world.pump()
    server.close()
    assert "run.finished" in world.names()
    return versions(world)


def test_below_the_mark_the_rounds_pause_until_there_is_room(
    tmp_path: Path, small_disk: SmallDisk, undisturbed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    world = a_world(tmp_path, keep_free_mb=4)
    server = world.open()
    kitchen, garden = two(world, frames_left=1)
    world.pump()
    small_disk.fill(leave=3_000_000)
    world.pass_time(2)
    assert "storage.paused" in world.names() and "below 4" in world.last("storage.paused")["reason"]
    assert kitchen.state is not None and not kitchen.state.ready and kitchen.state.reason == "storage"

    (tmp_path / "run.toml").write_text(
        '[run]\nname = "demo"\nlabels = ["no", "yes"]\nstate_dir = "state"\n'
        '[base]\npath = "base"\n[storage]\nkeep_free_mb = 4\n'
    )
    show_status(tmp_path / "run.toml", as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["state"] == "paused" and "below 4" in told["paused"] and told["free_mb"] < 4
    show_status(tmp_path / "run.toml", as_json=False)
    assert "PAUSED" in capsys.readouterr().out

    kitchen.frames_left = None
    world.pass_time(500, step=50)  # no deadline passes, and nobody is told of more than the pause
    assert not {"round.closed", "storage.resumed", "run.failed"} & set(world.names())
    assert kitchen.announce is not None and not kitchen.receipts and len(garden.receipts) == 1
    said = [record for record in kitchen.records if isinstance(record, AggregatorState)]
    assert sum(record.reason == "storage" for record in said) == 1

    small_disk.empty()
    world.pass_time(3)
    assert "storage.resumed" in world.names() and world.names().count("round.closed") == 2
    server.close()
    assert versions(world) == undisturbed
    show_status(tmp_path / "run.toml", as_json=True)
    assert json.loads(capsys.readouterr().out)["state"] == "finished"


@pytest.mark.parametrize("first", range(4))
def test_full_at_any_moment(
    tmp_path: Path, small_disk: SmallDisk, undisturbed: list[str], first: int
) -> None:
    """Without a mark: some write is refused, wherever it is; the same versions come of it."""
    world = a_world(tmp_path, keep_free_mb=0)
    server = world.open()
    while "run.ready" not in world.names():
        server.step()
    two(world)
    paused = 0
    for moment in range(1000):
        if moment % 4 == first:
            small_disk.fill()
        busy = server.step()
        server.tick()
        for device in world.devices:
            busy = device.pump() or busy
        if moment % 4 == first:
            for _ in range(5):
                server.step()
                server.tick()
            paused += server._paused is not None
            small_disk.empty()
            world.pass_time(90, step=15)
        assert server.error is None
        if server.done or (not busy and "run.finished" in world.names()):
            break
    world.pump()
    assert paused >= 1 and world.names().count("storage.paused") >= 1
    server.close()
    assert versions(world) == undisturbed


def test_an_update_for_which_there_is_no_room_is_kept_by_its_device(
    tmp_path: Path, small_disk: SmallDisk, undisturbed: list[str]
) -> None:
    world = a_world(tmp_path, keep_free_mb=0)
    server = world.open()
    kitchen, _ = two(world, until="announce")
    world.pump()
    small_disk.fill(leave=4096)
    kitchen.until = "receipt"
    kitchen.send_announce()
    world.pump()
    assert "storage.paused" in world.names()
    assert [refusal.reason for refusal in kitchen.refusals] == ["storage"] and kitchen.announce is not None
    small_disk.empty()
    world.pass_time(30, step=5)
    world.pump()
    server.close()
    assert versions(world) == undisturbed


def test_killed_while_it_pauses(tmp_path: Path, small_disk: SmallDisk, undisturbed: list[str]) -> None:
    world = a_world(tmp_path, keep_free_mb=4)
    world.open()
    two(world, frames_left=1)
    world.pump()
    small_disk.fill(leave=1_000_000)
    world.pass_time(2)
    world.kill()
    server = world.open()
    world.pump()
    world.pass_time(2)
    assert world.names().count("storage.paused") == 2
    small_disk.empty()
    world.devices[0].frames_left = None
    world.pass_time(3)
    server.close()
    assert versions(world) == undisturbed

"""Time: quorum, late updates, devices that vanish, over-selection, and the buffered schedule."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_device import FakeDevice, World
from msgspec.structs import replace

from aggregator.rounds import Rounds
from aggregator.scheduling.lot import Lot
from aggregator.scheduling.selection import Applicant, Uniform
from aggregator.state.base import Store
from edge_sdk.config.run import StorageSection
from edge_sdk.updates.versions import read_adapter


def a_world(folder: Path, **rounds: Any) -> World:
    world = World(folder, **{"deadline_s": 100.0, **rounds})
    storage = StorageSection(keep_versions=True)  # for tests that look at what each round made
    world.config = replace(world.config, evaluation=None, storage=storage)
    return world


def rounds_of(world: World) -> Rounds:
    assert world.server is not None and world.server._running is not None
    return world.server._running.rounds


def store_of(world: World) -> Store:
    assert world.server is not None
    return world.server._store


def moved(world: World, number: int) -> float:
    """How far a version is from the one before it: every fake device moves every value alike."""
    adapters = []
    for one in (number - 1, number):
        assert world.server is not None
        chain = rounds_of(world).chain(one)
        adapters.append(read_adapter([world.server._objects.path(version.object) for version in chain]))
    return float(np.mean([np.mean(adapters[1][key] - rows) for key, rows in adapters[0].items()]))


def resume(device: FakeDevice) -> None:
    """Sends what it held back."""
    device.until, device.updates_left = "receipt", 1
    device.send_announce()


def given_up(world: World) -> list[tuple[str, int]]:
    return [(e.fields["device"], e.fields["round"]) for e in world.events if e.name == "update.given_up"]


def test_quorum_closes_at_once_and_the_late_update_counts_in_a_later_round(tmp_path: Path) -> None:
    world = a_world(tmp_path, total=2, min_devices=3, quorum=0.6)
    world.open()
    slow = world.device("slow", updates_left=0, change=0.05)
    quick = [world.device(name, updates_left=1, change=0.01) for name in ("a", "b")]
    world.pump()
    first = store_of(world).rounds("demo")[1]
    assert (first.wanted, first.quorum, first.closed_by, first.open_s) == (3, 2, "quorum", 0)
    assert world.last("round.closed")["awaited"] == ["slow"]
    assert rounds_of(world).row.number == 2 and rounds_of(world).row.state == "open"
    assert slow.offer is not None and slow.offer.round == 1, "it is at work, and offered nothing else"

    resume(slow)
    world.pump()
    assert [receipt.round for receipt in slow.receipts] == [1] and slow.refusals == []
    assert world.last("update.received")["late"]
    for device in quick:
        resume(device)
    world.pump()
    row = store_of(world).participation("demo", 1, "slow")
    assert row is not None and (row.builds_on, row.counts_in, row.staleness, row.late) == (0, 2, 1, True)
    weight = 1 / sqrt(2)
    assert row.weight == pytest.approx(weight)
    assert world.last("round.closed")["late"] == ["slow"]
    assert moved(world, 2) == pytest.approx((2 * 0.01 + weight * 0.05) / (2 + weight), abs=1e-3)


def test_a_late_update_that_comes_alone_moves_the_adapter_by_what_it_is_worth(tmp_path: Path) -> None:
    """In a mean over itself its weight would count for nothing."""
    world = a_world(tmp_path, total=2, min_devices=2, quorum=0.5)
    world.open()
    slow = world.device("slow", updates_left=0, change=0.05)
    world.device("quick", updates_left=1, change=0.01)
    world.pump()
    resume(slow)
    world.pump()
    assert rounds_of(world).row.number == 2
    world.pass_time(101, step=20)
    assert [(row.device, row.staleness) for row in store_of(world).counted("demo", 2)] == [("slow", 1)]
    assert moved(world, 2) == pytest.approx(0.05 / sqrt(2), abs=1e-3)


def test_the_deadline_ends_the_round_and_not_the_update(tmp_path: Path) -> None:
    world = a_world(tmp_path, total=2, min_devices=2)
    world.open()
    slow = world.device("slow", frames_left=1)
    world.device("quick", updates_left=1)
    world.pump()
    world.pass_time(50, step=25)
    slow.frames_left = 1
    world.pass_time(51, step=25)
    first = store_of(world).rounds("demo")[1]
    assert first.closed_by == "deadline" and rounds_of(world).row.number == 2
    slow.frames_left = None
    world.pass_time(60, step=10)
    assert [receipt.round for receipt in slow.receipts] == [1] and slow.refusals == []


def test_who_vanishes_delays_nobody_beyond_the_deadline(tmp_path: Path) -> None:
    world = a_world(tmp_path, total=3, min_devices=2)
    world.open()
    gone, stays = world.device("gone", until="choice"), world.device("stays", updates_left=1)
    world.pump()
    gone.leave()
    world.pass_time(99, step=33)
    assert rounds_of(world).row.number == 1
    world.pass_time(3)
    assert (rounds_of(world).row.number, rounds_of(world).row.state) == (2, "waiting"), "for a second one"
    assert [receipt.round for receipt in stays.receipts] == [1]
    world.pass_time(10, step=5)
    assert given_up(world) == [("gone", 1)], "nothing was heard of it for as long as it had time"


def test_a_device_whose_work_moves_is_awaited_and_one_that_is_still_is_not(tmp_path: Path) -> None:
    world = a_world(tmp_path, total=9, min_devices=3, quorum=0.1)
    world.open()
    moves = world.device("moves", until="choice")
    world.device("still", until="choice")
    world.device("quick", updates_left=1).leave()
    world.pump()
    world.devices[-1].come_back()
    world.pump()
    world.devices[-1].leave()
    for _ in range(6):
        world.pass_time(20, step=20)
        moves.report()
        world.pump()
    states = {row.device: row.state for row in store_of(world).participations("demo", 1)}
    assert states == {"moves": "chosen", "still": "missed", "quick": "received"}


def test_what_a_device_has_forgotten_is_not_awaited(tmp_path: Path) -> None:
    world = a_world(tmp_path, total=5, min_devices=2, quorum=0.5)
    world.open()
    wiped = world.device("wiped", until="choice")
    world.device("quick", updates_left=1)
    world.pump()
    assert [row.round for row in store_of(world).awaited("demo", "wiped")] == [1]
    wiped.working = False
    wiped.report()
    world.pump()
    assert given_up(world) == [("wiped", 1)]


def test_an_update_of_too_old_a_version_is_refused_and_owed(tmp_path: Path) -> None:
    world = a_world(tmp_path, total=4, min_devices=2, quorum=0.5, max_staleness=1)
    world.open()
    old = world.device("old", updates_left=0)
    quick = world.device("quick", updates_left=1)
    world.pump()
    late = old.announce
    resume(quick)
    world.pump()
    assert rounds_of(world).row.number == 3 and given_up(world) == [("old", 1)]
    old.say(late)
    world.pump()
    assert [refusal.reason for refusal in old.refusals] == ["round"]


def test_nothing_is_awaited_after_the_last_round(tmp_path: Path) -> None:
    world = a_world(tmp_path, total=1, min_devices=2, quorum=0.5)
    world.open()
    world.device("slow", updates_left=0)
    world.device("quick")
    world.pump()
    assert rounds_of(world).finished and world.last("round.closed")["missed"] == ["slow"]


def test_more_are_asked_than_wanted(tmp_path: Path) -> None:
    world = a_world(tmp_path, total=1, min_devices=4, devices_per_round=2, over_select=1.5, late="refuse")
    world.open()
    devices = [world.device(f"d{number}", updates_left=0) for number in range(4)]
    world.pump()
    asked = [device for device in devices if device.offer is not None]
    row = store_of(world).rounds("demo")[1]
    assert (len(asked), row.wanted, row.quorum, row.selection) == (3, 2, 2, "uniform")
    for device in asked[:2]:
        resume(device)
    world.pump()
    assert store_of(world).rounds("demo")[1].closed_by == "quorum"
    assert world.last("round.closed")["missed"] == [asked[2].name]


def test_a_share_of_those_who_are_ready_takes_part(tmp_path: Path) -> None:
    world = a_world(tmp_path, total=2, min_devices=4, devices_per_round=0.5)
    world.open()
    for number in range(4):
        world.device(f"d{number}")
    world.pump()
    rows = store_of(world).participations("demo")
    drawn = [[row.device for row in rows if row.round == number] for number in (1, 2)]
    lots = [Lot(world.config.run.seed, number) for number in (1, 2)]
    everybody = [Applicant(f"d{number}") for number in range(4)]
    assert drawn == [Uniform().select(everybody, 2, lot) for lot in lots]


# The buffered schedule


def test_a_buffer_that_is_full_is_merged_and_a_participation_spans_versions(tmp_path: Path) -> None:
    world = a_world(tmp_path, total=3, min_devices=3, schedule="buffered", buffer=2)
    world.open()
    slow = world.device("slow", updates_left=0, change=0.05)
    a, b = (world.device(name, change=0.01, updates_left=number) for name, number in (("a", 2), ("b", 1)))
    world.pump()
    first = store_of(world).rounds("demo")[1]
    assert (first.schedule, first.closed_by, first.quorum) == ("buffered", "buffer", 2)
    assert rounds_of(world).row.number == 2 and rounds_of(world).row.state == "open", "one is not a buffer"
    assert [len(a.receipts), len(b.receipts)] == [2, 1] and b.offer is not None and b.offer.round == 2
    assert slow.offer is not None and slow.offer.round == 1, "it is at work still"
    resume(slow)
    world.pump()
    row = store_of(world).participation("demo", 1, "slow")
    assert row is not None and (row.counts_in, row.staleness) == (2, 1)
    weight = 1 / sqrt(2)
    assert moved(world, 2) == pytest.approx((0.01 + weight * 0.05) / (1 + weight), abs=1e-3)
    assert slow.offer.round == 3, "it was free again"


def test_who_comes_in_the_middle_of_a_buffer_gets_work_at_once(tmp_path: Path) -> None:
    world = a_world(tmp_path, total=1, min_devices=1, schedule="buffered", buffer=3)
    world.open()
    world.device("first", until="choice")
    world.pump()
    second = world.device("second")
    world.pump()
    assert [receipt.round for receipt in second.receipts] == [1] and rounds_of(world).row.state == "open"


def test_no_more_are_at_work_than_there_are_places(tmp_path: Path) -> None:
    world = a_world(tmp_path, total=2, min_devices=4, schedule="buffered", buffer=4, devices_per_round=2)
    world.open()
    devices = [world.device(f"d{number}", updates_left=0) for number in range(4)]
    world.pump()
    at_work = [device for device in devices if device.offer is not None]
    assert len(at_work) == 2
    resume(at_work[0])
    world.pump()
    assert len([device for device in devices if device.offer is not None]) == 3


def test_a_buffer_that_is_not_filled_closes_at_its_deadline(tmp_path: Path) -> None:
    world = a_world(tmp_path, total=2, min_devices=2, schedule="buffered", buffer=9)
    world.open()
    world.device("a", updates_left=1)
    held = world.device("held", until="choice")
    world.pump()
    for _ in range(6):
        world.pass_time(20, step=20)
        held.report()
    first = store_of(world).rounds("demo")[1]
    assert (first.closed_by, first.outcome) == ("deadline", "merged")
    assert {row.device: row.round for row in store_of(world).awaited("demo")} == {"a": 2, "held": 1}


def test_a_buffer_that_nobody_can_fill_closes_with_what_it_has(tmp_path: Path) -> None:
    world = a_world(tmp_path, total=1, min_devices=2, schedule="buffered", buffer=9)
    world.open()
    world.device("a")
    world.device("gone", until="choice").leave()
    world.pump()
    world.devices[-1].come_back()
    world.pump()
    world.devices[-1].leave()
    world.pass_time(101, step=20)
    assert rounds_of(world).finished and given_up(world) == [("gone", 1)]


def test_all_deliver_and_the_buffer_is_larger(tmp_path: Path) -> None:
    world = a_world(tmp_path, total=2, min_devices=2, schedule="buffered", buffer=9)
    world.open()
    devices = [world.device("a"), world.device("b")]
    world.pump()
    assert [row.closed_by for row in store_of(world).rounds("demo")[1:]] == ["all", "all"]
    assert [len(device.receipts) for device in devices] == [2, 2]


def test_the_server_is_killed_while_updates_are_late(tmp_path: Path) -> None:
    for schedule in ("synchronous", "buffered"):
        world = a_world(tmp_path / schedule, total=3, min_devices=2, quorum=0.5, schedule=schedule, buffer=1)
        world.open()
        slow = world.device("slow", frames_left=1)
        world.device("other", updates_left=1)
        world.pump()
        assert rounds_of(world).row.number == 2
        world.kill()
        slow.frames_left = None
        world.open()
        world.pump()
        row = store_of(world).participation("demo", 1, "slow")
        assert row is not None and (row.state, row.counts_in, row.staleness) == ("received", 2, 1)
        assert slow.receipts[0].duplicate_bytes <= 2 * 1024
        assert world.server is not None
        world.server.close()

"""A run that stacks: the fold grows, slots begin anew, and a late update is of slots that are no more."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from fake_device import FakeDevice, World
from msgspec.structs import replace

from edge_sdk.config.run import MergeSection, StorageSection
from edge_sdk.faults import arm
from edge_sdk.updates.keys import Adapter
from edge_sdk.updates.versions import read_adapter


def a_world(folder: Path, **rounds: object) -> World:
    world = World(folder, **{"min_devices": 2, "deadline_s": 100.0, **rounds})
    world.config = replace(
        world.config, run=replace(world.config.run, method="fedavg"), merge=MergeSection(rule="stacking"),
        storage=StorageSection(keep_versions=True),
    )  # fmt: skip
    return world


def two(world: World) -> tuple[FakeDevice, FakeDevice]:
    return world.device("one", change=0.03, samples=30), world.device("two", change=-0.05, samples=10)


def versions(world: World) -> list[Adapter]:
    assert world.server is not None
    rows = world.server._store.versions("demo")
    assert all(row.parent is None for row in rows)
    return [read_adapter([world.server._objects.path(row.object)]) for row in rows]


def test_the_fold_is_what_all_rounds_added_up_to(tmp_path: Path) -> None:
    world = a_world(tmp_path, total=3)
    world.open()
    one, two_ = two(world)
    world.pump()
    assert [receipt.round for receipt in one.receipts] == [1, 2, 3]
    made = versions(world)
    for layer in range(4):
        a, b = (f"{layer}.query.{factor}" for factor in "AB")
        whole = np.zeros((16, 16))
        for before, after in pairwise(made):
            assert not before[b].any(), "slots begin at nothing"
            for device, weight in ((one, 0.75), (two_, 0.25)):
                ends = [before[key].astype(np.float64) + device.change for key in (a, b)]
                whole += weight * ends[1].T @ ends[0]
            fold = after[f"fold.{b}"].astype(np.float64).T @ after[f"fold.{a}"]
            np.testing.assert_allclose(fold, whole, atol=2e-3 * np.abs(whole).max())
            assert not np.array_equal(before[a], after[a])


def test_killed_at_the_merge_the_fold_has_the_same_bytes(tmp_path: Path) -> None:
    class Killed(BaseException): ...

    def die() -> None:
        raise Killed

    objects = []
    for place in ("", "version.durable"):
        world = a_world(tmp_path / (place or "undisturbed"))
        world.open()
        world.pump()
        two(world)
        if place:
            with arm(place, die), pytest.raises(Killed):
                world.pump()
            world.kill()
            world.open()
        world.pump()
        assert world.server is not None and world.server.done
        objects.append([row.object for row in world.server._store.versions("demo")])
    assert objects[0] == objects[1] and len(objects[0]) == 3


def test_what_comes_after_its_round_is_refused_at_its_announce(tmp_path: Path) -> None:
    world = a_world(tmp_path, total=4)
    world.open()
    one, slow = two(world)
    slow.until = "announce"
    world.pump()
    late = slow.announce
    assert late is not None
    world.pass_time(101)
    assert world.last("round.closed")["missed"] == ["two"] and world.server is not None
    slow.say(late)
    world.pump()
    (refusal,) = slow.refusals
    assert refusal.reason == "version" and "stacking makes all slots anew" in refusal.message
    assert [e.fields["device"] for e in world.events if e.name == "upload.started"].count("two") == 0
    assert one.receipts[0].round == 1


def test_an_upload_that_its_round_does_not_wait_for_is_refused_likewise(tmp_path: Path) -> None:
    world = a_world(tmp_path)
    world.open()
    _, slow = two(world)
    slow.frames_left = 1
    world.pump()
    world.pass_time(101, step=20)
    assert [refusal.reason for refusal in slow.refusals] == ["version"]

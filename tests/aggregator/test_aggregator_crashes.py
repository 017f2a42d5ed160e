"""A run that is killed between any two things that must be durable, with messages that come twice and in
another order, ends with the same bytes as one that nothing happened to."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fake_device import FakeDevice, World
from msgspec.structs import replace

from edge_sdk.faults import AGGREGATOR_PLACES, arm


class Killed(BaseException):
    """As ``kill -9`` ends a process: nothing catches it, nothing more is done."""


def die() -> None:
    raise Killed


def said_twice(device: FakeDevice, chance: random.Random) -> None:
    """Makes some of what the device says come a second time."""
    original = device.transport.publish

    def publish(topic: str, payload: bytes, *, retain: bool = False) -> bool:
        if chance.random() < 0.3:
            original(topic, payload, retain=retain)
        return original(topic, payload, retain=retain)

    device.transport.publish = publish  # type: ignore[method-assign]


def a_run(folder: Path, schedule: str, places: tuple[str, ...] = (), seed: int | None = None) -> World:
    """A run of seven rounds, three devices and one that declines, killed at each of ``places`` in turn."""
    world = World(
        folder, total=7, min_devices=4, deadline_s=10_000.0, schedule=schedule,
        buffer=3,
    )  # fmt: skip
    world.config = replace(world.config, transfer=replace(world.config.transfer, window=4))
    world.open()
    for number, name in enumerate(("a", "b", "c")):
        world.device(name, change=0.01 * (number + 1), samples=50 + 10 * number)
    world.device("d", decline="no")
    chance = random.Random(seed)
    if seed is not None:
        for device in world.devices:
            said_twice(device, chance)
    for place in places:
        with arm(place, die):
            try:
                world.pump()
            except Killed:
                world.kill()
            else:
                pytest.fail(f"{place} was not reached")
        chance.shuffle(world.devices)
        world.open()
    world.pump()
    return world


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    world = a_run(tmp_path_factory.mktemp("undisturbed"), "synchronous")
    return versions(world)


def versions(world: World) -> list[str]:
    assert world.server is not None and world.server.done and world.server.error is None
    return [row.object for row in world.server._store.versions("demo")]


@pytest.mark.parametrize("schedule", ["synchronous", "buffered"])
def test_killed_at_every_place_the_run_ends_with_the_same_bytes(
    tmp_path: Path, schedule: str, undisturbed: list[str]
) -> None:
    """A buffer of as many as deliver is a round: both schedules then merge the same updates."""
    world = a_run(tmp_path, schedule, AGGREGATOR_PLACES, seed=7)
    assert versions(world) == undisturbed and len(undisturbed) == 8
    assert world.server is not None
    store = world.server._store
    for device in world.devices:
        for receipt in device.receipts:
            row = store.participation("demo", receipt.round, device.name)
            assert row is not None and row.object == receipt.object and row.counts_in is not None
        rounds = {receipt.round for receipt in device.receipts}
        assert rounds == (set() if device.decline else {1, 2, 3, 4, 5, 6, 7}), "acknowledged, each once"
    assert len([row for row in store.participations("demo") if row.state == "received"]) == 21

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

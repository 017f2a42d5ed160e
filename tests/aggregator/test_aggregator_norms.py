"""An update far larger than the fleet's is refused by its layer; what little is known refuses nothing."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from fake_device import World
from msgspec.structs import replace

from aggregator.norms import LEAST, FleetNorms, NormsOf
from aggregator.state.base import ParticipationRow, RoundRow, RunRow, Store
from aggregator.state.memory import MemoryStore

RUN = RunRow("demo", "fedquad", "{}", "{}", "/base", "f", 10, False, 1.0)


def taken(store: Store, round: int, sizes: list[float], first: int = 0) -> None:
    store.add_round(RoundRow("demo", round, "closed"))
    for number, size in enumerate(sizes, first):
        norms = msgspec.json.encode({"3": size, "head": 1.0}).decode()
        store.add_participation(
            ParticipationRow("demo", round, f"d{number}", "received", "{}", 0.0, norms=norms)
        )


@pytest.fixture
def store() -> Store:
    store = MemoryStore()
    store.add_run(RUN)
    return store


def test_until_enough_is_known_nothing_is_too_large(store: Store) -> None:
    taken(store, 1, [1.0] * (LEAST - 1))
    assert FleetNorms(store, "demo").too_large({"3": 1e9}, 2) is None


def test_a_layer_beyond_the_fleets_is_told_with_what_is_usual(store: Store) -> None:
    taken(store, 1, [0.8 + 0.02 * number for number in range(LEAST + 4)])
    norms = FleetNorms(store, "demo")
    assert norms.too_large({"3": 9.0, "head": 9.0}, 2) is None, "ten times the median is no reason"
    told = norms.too_large({"3": 11.0, "head": 1.0}, 2)
    assert told is not None and "layer 3 changes by 11" in told and "by 0.99" in told
    assert "the head changes by" in str(norms.too_large({"3": 1.0, "head": 11.0}, 2))
    assert norms.too_large({"7": 1e6}, 2) is None, "nobody ever changed that layer"


def test_a_third_of_bad_updates_moves_no_bound(store: Store) -> None:
    taken(store, 1, [1.0 + 0.01 * number for number in range(20)] + [1e6] * 9)
    assert FleetNorms(store, "demo").too_large({"3": 50.0}, 2) is not None


def test_updates_of_the_same_round_do_not_count(store: Store) -> None:
    """So that it does not matter which came first."""
    taken(store, 1, [100.0] * LEAST)
    norms = FleetNorms(store, "demo")
    assert norms.too_large({"3": 500.0}, 2) is None
    taken(store, 2, [1.0] * 90)
    assert norms.too_large({"3": 500.0}, 2) is None
    assert norms.too_large({"3": 500.0}, 3) is not None


def test_norms_are_of_layers_and_of_the_head() -> None:
    norms = NormsOf()
    for key in ("0.m.A", "0.m.B", "1.m.A", "dense.w", "dense.b"):
        norms.add(key, np.full((1, 4), 3.0, np.float32))
    assert norms.result() == pytest.approx({"0": 72**0.5, "1": 6.0, "head": 72**0.5})


def test_a_server_refuses_it_by_name_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aggregator.norms.LEAST", 2)
    world = World(tmp_path)
    world.open(rounds=replace(world.config.rounds, total=4, min_devices=1))
    device = world.device()
    device.alter_announce = lambda announce: announce
    original = device.make_update
    device.make_update = lambda **more: original(  # type: ignore[method-assign]
        **more, **({"end": far(device)} if device.offer is not None and device.offer.round == 3 else {})
    )
    world.pump()
    (refusal,) = device.refusals
    assert refusal.reason == "norm" and refusal.round == 3 and "the fleet's updates by" in refusal.message
    assert world.last("update.refused")["reason"] == "norm"
    assert [receipt.round for receipt in device.receipts][:2] == [1, 2]
    assert world.server is not None and world.server.error is None
    row = world.server._store.participation("demo", 3, "one")
    assert row is not None and row.state == "refused" and row.norms is None
    first = world.server._store.participation("demo", 1, "one")
    assert first is not None and first.norms is not None


def far(device):  # type: ignore[no-untyped-def]
    from edge_sdk.updates.versions import read_adapter

    start = read_adapter([device.store.path(ref.object) for ref in device.offer.versions])
    return {key: rows + np.float32(50.0) for key, rows in start.items()}

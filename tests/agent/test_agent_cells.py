"""Every cell of the three tables: what it says is what the agent does."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from agent_fakes import World, a_candidate, version_object

from edge_sdk.agent.inbox import GateChanged, Pause, Resume, Stop
from edge_sdk.agent.states import (
    ITEM,
    OCCASIONS,
    PERMISSION,
    ROUND,
    ItemState,
    Occasion,
    Permission,
    RoundState,
)
from edge_sdk.protocol.spec import TrainSpec
from edge_sdk.protocol.trainer import Died
from edge_sdk.protocol.wire import Announce, Choice, Decline, Offer, Status


def an_offer(round: int) -> Offer:
    ref, _ = version_object(round - 1)
    return Offer(
        run="demo", round=round, nonce="run-1", deadline_s=100.0, spec=TrainSpec(), versions=(ref,),
        candidates=tuple(a_candidate(depth) for depth in (4, 2, 1)), chunk_bytes=1024, window=2,
    )  # fmt: skip


def joined(folder: Path) -> World:
    world = World(folder)
    world.trainer.auto = False
    world.start()
    world.aggregator.hello()
    world.settle()
    return world


def in_round(world: World, state: RoundState, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brings the round axis into a state, by events wherever it does not pass through at once."""
    if state == "choosing":
        world.core.rounds.react("offer", offer=an_offer(1))
    elif state == "fetching":
        world.aggregator.serving = False
        world.aggregator.offer()
        world.settle()
    elif state in ("training", "packing"):
        world.aggregator.offer()
        world.settle()
        if state == "packing":

            def full(path: Path, expect: str | None = None) -> tuple[str, int]:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(world.core.context.store, "adopt", full)
            world.trainer.finish()
            world.settle()
    assert world.core.rounds.state == state


def with_item(world: World, state: ItemState) -> None:
    world.trainer.auto = True
    if state == "queued":
        world.aggregator.offer()
        while not world.core.uploads.items:
            world.core.pump()
            if not world.core.uploads.items:
                world.aggregator.pump()
    elif state == "sending":
        world.aggregator.offer()
        while world.aggregator.pump() or not world.core.uploads.items:
            world.core.pump()
            if world.core.uploads.items and world.core.uploads.items[0].state == "sending":
                break
    else:
        world.aggregator.receipts = False
        world.aggregator.offer()
        world.settle()
    assert [item.state for item in world.core.uploads.items] == [state]


def test_tables_are_complete() -> None:
    assert set(OCCASIONS) == set(get_args(Occasion))
    for table, states in ((PERMISSION, Permission), (ROUND, RoundState), (ITEM, ItemState)):
        assert tuple(table) == get_args(states)  # type: ignore[call-overload]
        for cell in table.values():  # type: ignore[attr-defined]
            assert cell.moved_by and cell.on_disk and set(cell.on) == set(OCCASIONS)
            assert all(reaction.to in (None, *table) for reaction in cell.on.values())


@pytest.mark.parametrize("occasion", OCCASIONS)
@pytest.mark.parametrize("state", list(ROUND))
def test_round_cell(
    state: RoundState, occasion: Occasion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = joined(tmp_path)
    in_round(world, state, monkeypatch)
    rounds, aggregator = world.core.rounds, world.aggregator
    aggregator.pump()
    aggregator.records.clear()
    before, requests = rounds.row, len(world.trainer.requests)
    offer = {"offer": an_offer(7), "offer-again": an_offer(1)}.get(occasion)
    reply = Died(id=0, memory=False, exit=-11, message="gone") if occasion == "trainer-death" else None

    rounds.react(occasion, offer=offer, reply=reply)

    aggregator.pump()
    reaction = ROUND[state].on[occasion]
    if reaction.to is not None:
        assert rounds.state == reaction.to
    said = [type(record) for record in aggregator.records]
    assert len(world.trainer.requests) == requests
    match reaction.action:
        case "stay":
            assert rounds.row == before and not said and not world.trainer.interrupts
        case "take" | "replace":
            assert rounds.row is not None and rounds.row.round == 7 and not said
            if before is not None:
                old = world.core.context.record.round("run-1", before.round)
                assert old is not None and old.state is None and old.outcome == "replaced"
            assert world.trainer.interrupts == (state == "training")
        case "repeat":
            assert rounds.row == before and said == ([Choice] if before and before.answer else [])
        case "interrupt":
            assert rounds.row == before and world.trainer.interrupts == 1
        case "judge":
            assert rounds.row is not None and rounds.row.failures == 1 and rounds.state == "training"
        case "give-up":
            assert said == [Decline] and rounds.row is None
            assert world.trainer.interrupts == (state == "training")
        case other:
            raise AssertionError(f"{other} has no meaning on the round axis")
    # What the core believes is what a restart would find.
    assert world.core.context.record.rounds()[-1:] == (
        [rounds.row] if rounds.row else world.core.context.record.rounds()[-1:]
    )


@pytest.mark.parametrize("occasion", OCCASIONS)
@pytest.mark.parametrize("state", list(ITEM))
def test_item_cell(state: ItemState, occasion: Occasion, tmp_path: Path) -> None:
    world = joined(tmp_path)
    with_item(world, state)
    world.aggregator.serving = False
    world.aggregator.pump()
    world.aggregator.records.clear()

    world.core.uploads.react(occasion, world.clock.now)

    world.aggregator.pump()
    reaction = ITEM[state].on[occasion]
    (item,) = world.core.uploads.items
    assert item.state == reaction.to
    assert world.core.context.record.outbox.items() == [item]
    said = [type(record) for record in world.aggregator.records]
    assert said == ([Choice, Announce] if reaction.action == "announce" else [])
    assert reaction.action in ("stay", "announce", "requeue")


@pytest.mark.parametrize("occasion", OCCASIONS)
@pytest.mark.parametrize("state", list(PERMISSION))
def test_permission_cell(state: Permission, occasion: Occasion, tmp_path: Path) -> None:
    world = joined(tmp_path)
    core = world.core
    into = {"running": [], "paused": [Pause()], "gated": [GateChanged("hot")], "stopped": [Stop()]}[state]
    for event in into:
        core.handle(event)  # type: ignore[arg-type]
    assert core.context.permission == state
    world.aggregator.pump()
    world.aggregator.records.clear()
    events = {
        "pause": Pause(), "resume": Resume(), "stop": Stop(), "gate-failed": GateChanged("hot"),
        "gate-passed": GateChanged(None),
    }  # fmt: skip
    if occasion in events and not core.done:
        core.handle(events[occasion])  # type: ignore[arg-type]
    elif occasion in ("offer", "offer-again"):
        if occasion == "offer-again":
            core._on_offer(an_offer(1))
            world.aggregator.pump()
            world.aggregator.records.clear()
        core._on_offer(an_offer(1))
    else:
        core._occasion(occasion)

    world.aggregator.pump()
    reaction = PERMISSION[state].on[occasion]
    assert core.context.permission == reaction.to
    assert core.done == (reaction.to == "stopped")
    said = [type(record) for record in world.aggregator.records]
    match reaction.action:
        case "enter":
            assert said == ([Status] if reaction.to != "stopped" else [])
        case "refuse":
            assert said == [Decline]
        case "pass":
            assert said in ([], [Decline])  # an offer met again is answered as before
        case "stay":
            assert not said
        case other:
            raise AssertionError(f"{other} has no meaning on the permission axis")

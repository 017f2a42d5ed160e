"""The agent is killed, in every state and between two steps, and goes on on its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from agent_fakes import FakeTrainer, World

from edge_sdk.protocol.base import Record
from edge_sdk.protocol.wire import Announce, Choice, Decline


class Killed(BaseException):
    """Stands for kill -9: nothing in the agent may catch it."""


def joined(folder: Path, auto: bool = False) -> World:
    world = World(folder)
    world.trainer.auto = auto
    world.start()
    world.aggregator.hello()
    world.settle()
    return world


def restart(world: World, *, auto: bool = True) -> None:
    """Another process on the same folder, with less memory: a choice made anew would be another one."""
    world.kill(FakeTrainer(auto=auto))
    world.machine.free_mb = 125.0
    world.aggregator.serving = world.aggregator.receipts = True
    world.start()
    world.settle()


def finish(world: World, candidate: str = "d4") -> None:
    world.settle(8)
    assert "update.receipt" in world.names()
    assert {one.candidate.id for one in world.aggregator.got(Choice)} <= {candidate}
    announces = world.aggregator.got(Announce)
    assert len({one.object for one in announces}) == 1 and announces[-1].candidate.id == candidate
    assert world.core.rounds.state == "idle" and not world.core.uploads.items
    assert not world.aggregator.got(Decline)


def test_killed_before_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = joined(tmp_path)
    monkeypatch.setattr("edge_sdk.agent.choosing.choose", _killed)
    with pytest.raises(Killed):
        world.aggregator.offer()
        world.settle()
    monkeypatch.undo()
    restart(world)
    world.machine.free_mb = 10_000
    finish(world, "d1")


def test_killed_between_keeping_and_telling_the_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = joined(tmp_path)
    say = world.core.context.say

    def dying(record: Record) -> bool:
        if isinstance(record, Choice):
            raise Killed
        return say(record)

    monkeypatch.setattr(world.core.context, "say", dying)
    with pytest.raises(Killed):
        world.aggregator.offer()
        world.settle()
    assert not world.aggregator.got(Choice)
    restart(world)
    finish(world)


def test_killed_while_fetching(tmp_path: Path) -> None:
    world = joined(tmp_path)
    world.aggregator.serving = False
    world.aggregator.offer()
    world.settle()
    assert world.core.rounds.state == "fetching"
    restart(world)
    finish(world)


def test_killed_while_training(tmp_path: Path) -> None:
    world = joined(tmp_path)
    world.aggregator.offer()
    world.settle()
    assert world.core.rounds.state == "training"
    restart(world)
    finish(world)
    assert [one.candidate.id for one in world.trainer.trained] == ["d4"]


def test_killed_again_and_again_while_training(tmp_path: Path) -> None:
    world = joined(tmp_path)
    world.aggregator.offer()
    world.settle()
    for _ in range(5):
        restart(world, auto=False)
        assert world.core.rounds.state == "training"
    restart(world)
    finish(world)


def test_killed_after_a_step_down(tmp_path: Path) -> None:
    world = joined(tmp_path)
    world.aggregator.offer()
    world.settle()
    world.trainer.fail("memory")
    world.settle()
    world.aggregator.records.clear()
    restart(world)
    finish(world, "d2")
    assert world.aggregator.got(Choice)[-1].attempt == 1


@pytest.mark.parametrize("point", ["before", "between", "after"])
def test_killed_while_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    world = joined(tmp_path)
    world.aggregator.offer()
    world.settle()
    context = world.core.context
    if point == "before":
        monkeypatch.setattr(context.store, "adopt", _killed)
    elif point == "between":
        monkeypatch.setattr(context.record.outbox, "add", _killed)
    else:
        monkeypatch.setattr(world.core.uploads, "added", _killed)
    world.trainer.finish()
    with pytest.raises(Killed):
        world.settle()
    restart(world)
    finish(world)
    # Files that lay there whole are adopted; a half adopted pair is trained again, to the same bytes.
    assert len(world.trainer.trained) == (1 if point == "between" else 0)


@pytest.mark.parametrize("state", ["queued", "sending", "awaiting-receipt"])
def test_killed_with_an_update_in_the_outbox(tmp_path: Path, state: str) -> None:
    world = joined(tmp_path, auto=True)
    world.aggregator.receipts = state != "awaiting-receipt"
    world.aggregator.offer()
    for _ in range(1000):
        world.core.pump()
        if [item.state for item in world.core.uploads.items] == [state]:
            break
        world.aggregator.pump()
    assert [item.state for item in world.core.uploads.items] == [state]
    restart(world)
    finish(world)
    assert not world.trainer.trained
    window = world.aggregator.window * 1024
    assert world.event("update.receipt").fields["bytes_resent"] <= window


def test_a_kill_while_uploading_sends_at_most_a_window_again(tmp_path: Path) -> None:
    world = joined(tmp_path, auto=True)
    world.aggregator.offer()
    for _ in range(1000):
        world.core.pump()
        world.aggregator.pump()
        if sum(map(len, world.aggregator.received.values())) >= 3:
            break
    restart(world)
    finish(world)
    assert world.event("update.receipt").fields["bytes_resent"] <= world.aggregator.window * 1024


def test_after_a_reboot_the_deadline_counts_anew_and_files_are_made_again(tmp_path: Path) -> None:
    world = joined(tmp_path)
    world.aggregator.offer(deadline_s=50.0)
    world.settle(40)
    world.boot = "boot-2"
    world.clock.now = 5.0
    restart(world, auto=False)
    world.settle(40)
    assert world.core.rounds.state == "training"
    world.trainer.finish()
    finish(world)


def test_in_the_same_boot_the_deadline_goes_on(tmp_path: Path) -> None:
    world = joined(tmp_path)
    world.aggregator.offer(deadline_s=50.0)
    world.settle(40)
    restart(world, auto=False)
    world.settle(9)
    assert world.core.rounds.state == "training"
    world.settle(2)
    assert world.core.rounds.state == "idle"
    assert [one.reason for one in world.aggregator.got(Decline)] == ["deadline"]


def test_a_restart_needs_no_trainer_to_report(tmp_path: Path) -> None:
    world = joined(tmp_path)
    restart(world)
    assert "agent.reported" in world.names() and not world.trainer.requests
    world.kill()
    (tmp_path / "rows.jsonl").write_text('{"text": "other", "label": "no"}\n{"text": "a", "label": "no"}\n')
    world.start()
    world.settle()
    assert len(world.trainer.requests) == 2


def _killed(*args: object, **kwargs: object) -> None:
    raise Killed

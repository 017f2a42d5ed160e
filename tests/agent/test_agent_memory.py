"""Running out of memory, as the agent takes it: what it remembers, what it tells, and that it lives on."""

from __future__ import annotations

from pathlib import Path

import pytest
from agent_fakes import FIT, FakeMachine, FakeTrainer, World

from edge_sdk.errors import TrainerError
from edge_sdk.protocol.trainer import Describe, Probe
from edge_sdk.protocol.wire import Choice, Decline, Status

DAY_S = 86_400.0


class Board(FakeMachine):
    """200 MB are free without the trainer, which takes 100 of them at rest."""

    def __init__(self, world: World) -> None:
        super().__init__(200)
        self._world = world

    def free_memory_mb(self) -> float | None:
        return self.free_mb - 100 * self._world.trainer.loaded


def a_world(folder: Path, trainer: FakeTrainer | None = None, **limits: float) -> World:
    """Depth 4 needs 50 MB above rest by the fit, depth 2 30, depth 1 20."""
    world = World(folder, **limits)
    world.trainer = trainer or FakeTrainer(auto=False)
    world.machine = Board(world)
    world.start()
    world.aggregator.hello()
    world.settle()
    return world


def run_out_once(world: World) -> None:
    """Round 1: depth 4 is taken and does not fit, then depth 2 is trained."""
    world.aggregator.offer()
    world.settle()
    world.trainer.die(memory=True, exit=-9)
    world.settle()
    world.trainer.finish()
    world.settle()
    assert [(one.candidate.depth, one.attempt) for one in world.aggregator.got(Choice)] == [(4, 0), (2, 1)]
    assert "update.receipt" in world.names()


def depth_of(world: World, round: int) -> int:
    world.aggregator.offer(round=round)
    world.settle()
    choice: Choice = world.aggregator.got(Choice)[-1]
    assert (choice.round, choice.attempt) == (round, 0)
    world.trainer.finish()
    world.settle()
    return choice.candidate.depth


def test_what_ran_out_of_memory_is_not_chosen_again_and_the_server_is_told(tmp_path: Path) -> None:
    world = a_world(tmp_path)
    assert world.aggregator.got(Status)[-1].memory.budget_mb == 100
    run_out_once(world)
    assert world.aggregator.got(Status)[-1].memory.budget_mb == 50
    assert depth_of(world, 2) == 2
    world.kill(FakeTrainer(auto=False))
    world.start()
    world.settle()
    assert depth_of(world, 3) == 2


def test_with_more_memory_than_then_it_is_tried_again(tmp_path: Path) -> None:
    world = a_world(tmp_path)
    run_out_once(world)
    world.machine.free_mb = 225
    assert depth_of(world, 2) == 4


def test_a_day_later_it_is_tried_again_unless_the_owner_limits_memory(tmp_path: Path) -> None:
    world = a_world(tmp_path / "free")
    run_out_once(world)
    world.clock.advance(DAY_S)
    assert depth_of(world, 2) == 4
    limited = a_world(tmp_path / "limited", memory_mb=190.0)
    run_out_once(limited)
    limited.clock.advance(DAY_S)
    assert depth_of(limited, 2) == 2


def test_with_nothing_smaller_the_round_is_declined_and_so_are_those_that_follow(tmp_path: Path) -> None:
    world = a_world(tmp_path)
    world.aggregator.offer(depths=(1,))
    world.settle()
    world.trainer.fail("memory", "can't allocate memory")
    world.settle()
    for number in (2, 3):
        world.aggregator.offer(round=number, depths=(1,))
        world.settle()
    said = [(one.reason, one.message) for one in world.aggregator.got(Decline)]
    assert [reason for reason, _ in said] == ["memory"] * 3 and len(world.trainer.trained) == 1
    assert "can't allocate memory" in said[0][1] and "needs 20 MB above rest" in said[1][1]


def test_a_base_that_does_not_fit_is_told_and_tried_again_ever_more_seldom(tmp_path: Path) -> None:
    class Full(FakeTrainer):
        def finish(self) -> None:
            if isinstance(self.pending, Describe) and len(self.requests) < 4:
                self.fail("memory", "the trainer holds 80 MB at rest")
            else:
                super().finish()

    world = a_world(tmp_path, Full())
    waits = [event.fields["again_s"] for event in world.events if event.name == "join.postponed"]
    assert waits == [60.0] and not world.core.done and world.core.error is None
    assert "80 MB at rest" in (world.core.context.record.get("live") or "")
    world.settle(59)
    assert len(world.trainer.requests) == 1
    world.settle(2)
    world.settle(121)
    waits = [event.fields["again_s"] for event in world.events if event.name == "join.postponed"]
    assert waits == [60.0, 120.0, 240.0] and not world.aggregator.got(Status)
    world.settle(241)
    status = world.aggregator.got(Status)[-1]
    assert status.fit == FIT and status.reason == "" and world.core.joining.trouble == ""


def test_a_probe_that_does_not_fit_is_reported_without_a_fit(tmp_path: Path) -> None:
    class Tight(FakeTrainer):
        def finish(self) -> None:
            if isinstance(self.pending, Probe):
                self.fail("memory", "not even one layer can be trained in 3 MB above rest")
            else:
                super().finish()

    world = a_world(tmp_path, Tight())
    status = world.aggregator.got(Status)[-1]
    assert status.fit is None and "not even one layer" in status.reason and status.memory.budget_mb == 100
    world.aggregator.offer()
    world.settle()
    assert "offer.ignored" in world.names() and not world.core.done


def test_whoever_does_not_wait_is_told_by_an_error(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.trainer = FakeTrainer(auto=False)
    world.trainer.finish = lambda: world.trainer.fail("memory", "80 MB at rest")  # type: ignore[method-assign]
    world.start(give_up_s=30.0)
    world.aggregator.hello()
    world.settle()
    assert isinstance(world.core.error, TrainerError) and "80 MB at rest" in world.core.error.message


def test_a_probe_stays_within_what_is_free_and_one_that_was_killed_gets_less(tmp_path: Path) -> None:
    class Killed(FakeTrainer):
        def finish(self) -> None:
            probes = [one for one in self.requests if isinstance(one, Probe)]
            if isinstance(self.pending, Probe) and len(probes) < 3:
                self.die(memory=True, exit=-9)
            else:
                super().finish()

    world = a_world(tmp_path, Killed())
    given = [one.setup.memory_mb for one in world.trainer.requests if isinstance(one, Probe)]
    assert given == pytest.approx([200, 125, 106]) and world.core.joining.ready


def test_two_unexplained_kills_of_a_probe_count_as_memory(tmp_path: Path) -> None:
    class Killed(FakeTrainer):
        def finish(self) -> None:
            probes = [one for one in self.requests if isinstance(one, Probe)]
            if isinstance(self.pending, Probe) and len(probes) < 3:
                self.die(exit=-9)
            else:
                super().finish()

    world = a_world(tmp_path, Killed())
    given = [one.setup.memory_mb for one in world.trainer.requests if isinstance(one, Probe)]
    assert given == pytest.approx([200, 200, 125]) and world.core.joining.ready

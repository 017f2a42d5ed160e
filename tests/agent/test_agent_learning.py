"""A fit that is off is corrected by what rounds take, and the choices that follow are right."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from agent_fakes import FIT, LORA, SHAPE, FakeTrainer, World, a_candidate, a_run, answer
from msgspec.structs import replace
from test_agent_memory import Board

from edge_sdk.agent.learning import corrected, ratios, taught
from edge_sdk.agent.reporting import folder_status
from edge_sdk.cli.progress import _line
from edge_sdk.cli.status import _lines
from edge_sdk.planning.choice import PrefixRoom
from edge_sdk.planning.cost import peak_mb, step_s
from edge_sdk.protocol.measure import Fit, Measured
from edge_sdk.protocol.spec import Levers, Setting, TrainSpec
from edge_sdk.protocol.trainer import Train, Trained, TrainerReply, TrainerRequest
from edge_sdk.protocol.wire import Choice, Status

SPEC = TrainSpec()
RUN = a_run()


class Off(FakeTrainer):
    """Takes ``times`` the memory and the seconds that the probe's fit says, and dies beyond ``room`` MB."""

    def __init__(self, times: float, room: float = math.inf, slower: float = 1.0) -> None:
        super().__init__()
        self.times, self.room, self.slower = times, room, slower

    def finish(self) -> None:
        request = self.pending
        if isinstance(request, Train) and self.peak(request) > self.room:
            self.die(memory=True, exit=-9)
        elif request is not None:
            self.reply(self.answer(request))

    def peak(self, request: Train) -> float:
        return self.times * peak_mb(FIT, SHAPE, LORA, request.candidate.setting(request.spec))

    def answer(self, request: TrainerRequest) -> TrainerReply:
        reply = answer(request)
        if not isinstance(request, Train) or not isinstance(reply, Trained):
            return reply
        step = step_s(FIT, SHAPE, LORA, request.candidate.setting(request.spec))
        seconds = self.slower * request.candidate.steps * step
        measured = replace(reply.measured, peak_mb=self.peak(request), train_s=seconds)
        return replace(reply, measured=measured)


def a_world(folder: Path, trainer: FakeTrainer, **limits: float) -> World:
    """By the fit depth 4 needs 50 MB above a rest of 100, depth 2 30, depth 1 20."""
    world = World(folder, **limits)
    world.trainer = trainer
    world.start()
    world.aggregator.hello()
    world.settle()
    return world


def play(world: World, round: int) -> list[tuple[int, int]]:
    """Depth and attempt of each choice in that round."""
    world.aggregator.offer(round=round)
    world.settle()
    assert world.core.context.record.outbox.items() == []
    return [(c.candidate.depth, c.attempt) for c in world.aggregator.got(Choice) if c.round == round]


def told_mb(world: World, depth: int) -> float:
    """What the status says that a depth takes."""
    fit: Fit = world.aggregator.got(Status)[-1].fit
    return peak_mb(fit, SHAPE, LORA, a_candidate(depth).setting(SPEC))


def test_who_takes_more_than_predicted_steps_down_once_and_then_chooses_right(tmp_path: Path) -> None:
    world = a_world(tmp_path, Off(1.3, room=58), memory_mb=158.0)
    assert play(world, 1) == [(4, 0), (2, 1)]
    assert told_mb(world, 2) == pytest.approx(1.3 * 30) and told_mb(world, 4) == pytest.approx(1.3 * 50)
    assert [play(world, number) for number in (2, 3)] == [[(2, 0)], [(2, 0)]]
    assert world.aggregator.got(Choice)[-1].candidate.peak_mb == pytest.approx(39)
    lines = _lines(folder_status(world.config, world.clock))
    assert any("not quantized: 1.30 times the memory, 1.00 times the seconds" in line for line in lines), (
        lines
    )
    world.kill(Off(1.3, room=58))
    world.start()
    world.settle()
    assert told_mb(world, 4) == pytest.approx(65), "a restart forgets nothing"
    assert play(world, 4) == [(2, 0)]


def test_one_round_that_measures_more_is_enough(tmp_path: Path) -> None:
    """Where free memory is the bound a shortfall is forgotten, and what was measured is not."""
    world = a_world(tmp_path, Off(1.3))
    world.machine.free_mb = 60
    assert play(world, 1) == [(4, 0)] and told_mb(world, 4) == pytest.approx(65)
    assert play(world, 2) == [(2, 0)]
    world.machine.free_mb = 73
    assert play(world, 3) == [(4, 0)]


def test_an_out_of_memory_teaches_of_the_fit_only_where_the_owner_set_the_limit(tmp_path: Path) -> None:
    free = a_world(tmp_path / "free", Off(1.0, room=40))
    free.machine = free.core.context.machine = Board(free)
    free.machine.free_mb = 160
    assert play(free, 1) == [(4, 0), (2, 1)]
    assert told_mb(free, 4) == pytest.approx(50), "another program may have held the rest"
    limited = a_world(tmp_path / "limited", Off(1.3, room=20), memory_mb=158.0)
    limited.aggregator.offer(depths=(4,))
    limited.settle()
    limited.core._report()
    limited.settle()
    assert told_mb(limited, 4) == pytest.approx(58) and told_mb(limited, 2) == pytest.approx(58 * 30 / 50)


def test_who_takes_less_than_predicted_gets_room_slowly(tmp_path: Path) -> None:
    world = a_world(tmp_path, Off(0.7))
    world.machine.free_mb = 50
    depths = [play(world, number)[0][0] for number in range(1, 21)]
    first = depths.index(4)
    assert depths == [2] * first + [4] * (20 - first) and first >= 8
    assert told_mb(world, 4) == pytest.approx(0.7 * 50)


def test_the_owner_is_told_where_it_takes_more(tmp_path: Path) -> None:
    world = a_world(tmp_path, Off(1.3))
    play(world, 1)
    assert "took 1.30 times the memory" in _line(world.event("fit.corrected"))
    world = a_world(tmp_path / "less", Off(0.9))
    play(world, 1)
    assert not _line(world.event("fit.corrected"))


def test_seconds_are_an_average(tmp_path: Path) -> None:
    world = a_world(tmp_path, Off(1.0, slower=2.0))
    factors = []
    for number in range(1, 9):
        play(world, number)
        fit: Fit = world.aggregator.got(Status)[-1].fit
        factors.append(fit.corrections[0].step)
    assert factors[0] == pytest.approx(2**0.5) and factors == sorted(factors) and 1.8 < factors[-1] < 2.0


def setting(depth: int, **changes: object) -> Setting:
    return a_candidate(depth, **changes).setting(SPEC)


def test_one_lucky_round_changes_nothing_and_an_odd_one_is_forgotten() -> None:
    lessons = taught((), setting(2), 0.0, 0.6, None)
    assert corrected(FIT, lessons).corrections[0].peak == 1.0
    lessons = taught(lessons, setting(2), 0.0, 1.4, None)
    for _ in range(7):
        lessons = taught(lessons, setting(2), 0.0, 0.9, None)
        assert lessons[0].peak == 1.4
    fallen = taught(lessons, setting(2), 0.0, 0.9, None)[0].peak
    assert fallen == pytest.approx(0.95 * 1.4)


def test_levers_are_corrected_apart_and_new_ones_as_the_best_of_the_others() -> None:
    plain, packed = setting(3), setting(3, quantized_layers=3)
    lessons = taught((), plain, 0.0, 1.5, 2.0)
    one = corrected(FIT, lessons)
    for wanted in (plain, packed):
        assert peak_mb(one, SHAPE, LORA, wanted) == pytest.approx(1.5 * peak_mb(FIT, SHAPE, LORA, wanted))
    both = corrected(FIT, taught(lessons, packed, 0.0, 1.1, None))
    assert peak_mb(both, SHAPE, LORA, plain) == peak_mb(one, SHAPE, LORA, plain)
    assert peak_mb(both, SHAPE, LORA, packed) == pytest.approx(1.1 * peak_mb(FIT, SHAPE, LORA, packed))
    new = setting(3, recompute="layer")
    assert peak_mb(both, SHAPE, LORA, new) == pytest.approx(1.1 * peak_mb(FIT, SHAPE, LORA, new))
    assert both.step_factor == 1.0, "the packed round was not timed: nothing is common to both"
    # what plain layers would be packed with says nothing of them
    assert peak_mb(both, SHAPE, LORA, setting(3, activation_bits=4)) == peak_mb(both, SHAPE, LORA, plain)


def test_what_is_kept_is_bounded() -> None:
    lessons = taught((), setting(1), 0.0, 1e9, 1e-9)
    assert (lessons[0].peak, lessons[0].peaks[-1]) == (4.0, 4.0) and len(lessons[0].peaks) == 8
    assert lessons[0].step == pytest.approx(0.5**0.5)
    for bits in range(1, 40):
        levers = Levers(activation_bits=bits)
        lessons = taught(lessons, replace(setting(1), levers=levers, quantized_layers=1), 0.0, 1.1, None)
    assert len(lessons) == 16 and lessons[-1].levers.activation_bits == 39


def test_room_for_kept_hidden_states_does_not_pass_for_training() -> None:
    """Rows that were reckoned with and not kept must not look like training that needs less."""
    candidate = a_candidate(2, peak_mb=peak_mb(FIT, SHAPE, LORA, setting(2)) + 40)
    measured = Measured(rest_mb=100, peak_mb=40, train_s=1.0, step_s=0.1, steps=5, loss_first=1, loss_last=1)
    room = PrefixRoom(mb=100, rows=50, in_memory=True)
    assert ratios(FIT, FIT, RUN, SPEC, candidate, measured, room)[0] == 1.0
    more = replace(measured, peak_mb=40 + 36.0)
    assert ratios(FIT, FIT, RUN, SPEC, candidate, more, room)[0] == pytest.approx(36 / 30)
    twice = a_candidate(2, peak_mb=candidate.peak_mb, steps=50)
    quick = ratios(FIT, FIT, RUN, SPEC, twice, replace(measured, train_s=50 * 0.07), room)[1]
    assert quick > 1.0, "frozen layers that were read are not part of what was predicted"


def test_a_new_probe_begins_without_lessons(tmp_path: Path) -> None:
    world = a_world(tmp_path, Off(1.3))
    play(world, 1)
    assert world.aggregator.got(Status)[-1].fit.corrections
    rows = Path(world.config.data.path)
    world.kill(Off(1.3))
    rows.write_text(rows.read_text() * 2)  # other rows: the trainer's findings are void
    world.start()
    world.settle()
    assert world.aggregator.got(Status)[-1].fit == FIT

"""What the server learns of a device, and what its next offers are for it."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from planner_cases import a_config, a_fit, a_run, a_status

from aggregator.methods.base import find_method
from aggregator.planner.lessons import Lessons
from aggregator.planner.plan import RoundPlan, plan_round
from aggregator.state.base import ParticipationRow
from edge_sdk.planning.choice import Budgets, Chosen, choose, step_down
from edge_sdk.protocol.measure import Correction, Measured, Memory
from edge_sdk.protocol.spec import Candidate, TrainSpec
from edge_sdk.protocol.wire import Announce, Choice, Decline, Offer, Status, VersionRef

FEDQUAD = find_method("fedquad")
DIGEST = "a" * 64


def plan(status: Status, lessons: Lessons, round: int = 1, others: tuple[Status, ...] = ()) -> RoundPlan:
    return plan_round(
        a_run(), FEDQUAD, [status, *others], config=a_config(), round=round, lessons={status.device: lessons}
    )


def recommended(made: RoundPlan, device: str = "a") -> Candidate | None:
    return next((one for one in made.candidates[device] if one.recommended), None)


def chosen(made: RoundPlan, status: Status) -> Candidate:
    """What the device takes by its own figures, which know nothing of lessons."""
    assert status.fit is not None
    found = choose(
        made.candidates[status.device], fit=status.fit, budgets=budgets(made, status), shape=a_run().shape,
        lora=a_run().lora, spec=a_run().spec, down_bytes=0,
    )  # fmt: skip
    assert isinstance(found, Chosen)
    return found.candidate


def budgets(made: RoundPlan, status: Status) -> Budgets:
    return Budgets(status.memory.budget_mb, made.target_s, status.link.up_bps, latest_s=made.deadline_s)


def a_row(made: RoundPlan, state: Any, round: int = 1, **records: Any) -> ParticipationRow:
    offer = Offer(
        run="r", round=round, nonce="n", deadline_s=made.deadline_s, target_s=made.target_s, spec=TrainSpec(),
        versions=(VersionRef(number=0, object=DIGEST, bytes=1),), candidates=made.candidates["a"],
    )  # fmt: skip
    texts = {name: msgspec.json.encode(record).decode() for name, record in records.items()}
    return ParticipationRow("r", round, "a", state, msgspec.json.encode(offer).decode(), 0.0, **texts)


def a_choice(one: Candidate, attempt: int = 0) -> Choice:
    return Choice(device="a", run="r", round=1, candidate=one, binding="none", attempt=attempt)


def an_announce(one: Candidate, peak_mb: float, train_s: float) -> Announce:
    return Announce(
        device="a", run="r", round=1, nonce="n", fingerprint=DIGEST, object=DIGEST, bytes=1, chunk_bytes=1024,
        builds_on=0, samples=100, candidate=one,
        measured=Measured(
            rest_mb=300, peak_mb=peak_mb, train_s=train_s, step_s=1, steps=10, loss_first=1, loss_last=1
        ),
    )  # fmt: skip


def received(
    made: RoundPlan, one: Candidate, attempt: int = 0, peak_mb: float | None = None, train_s: float = 3.0
) -> ParticipationRow:
    peak_mb = one.peak_mb if peak_mb is None else peak_mb
    return a_row(made, "received", choice=a_choice(one, attempt), announce=an_announce(one, peak_mb, train_s))


def taught(
    lessons: Lessons, row: ParticipationRow, status: Status, open_s: float = 5.0, online: bool = True
) -> Lessons:
    return lessons.after_round(row, a_run(), status, open_s, online=online)


def test_reports_are_averaged_and_less_memory_counts_at_once() -> None:
    lessons = Lessons().after_status(a_status(fit=a_fit(), budget_mb=100))
    slower = a_status(fit=a_fit(pace=2.0), budget_mb=200)
    lessons = lessons.after_status(slower)
    assert (lessons.layer_s, lessons.budget_mb) == pytest.approx((0.8 * 0.05 + 0.2 * 0.1, 120))
    planned = lessons.planned(slower)
    assert planned.fit is not None
    assert (planned.fit.layer_s, planned.memory.budget_mb) == pytest.approx((0.06, 120))
    assert lessons.planned(a_status(fit=a_fit(), budget_mb=50)).memory.budget_mb == 50
    set_by_owner = replace(slower, memory=Memory(budget_mb=200, rest_mb=300, limit_mb=500))
    assert lessons.planned(set_by_owner).memory.budget_mb == 200


def test_another_machine_begins_anew() -> None:
    lessons = replace(Lessons().after_status(a_status(fit=a_fit())), time_ratio=3.0, memory_share=0.5)
    assert lessons.after_status(a_status(fit=a_fit())).time_ratio == 3.0
    other = a_status(fit=replace(a_fit(pace=9.0), machine="another"))
    assert lessons.planned(other) == other
    assert lessons.after_status(other).time_ratio == 1.0
    assert lessons.after_status(other).layer_s == pytest.approx(0.45)


def test_who_stepped_down_is_offered_no_more_than_what_then_fitted() -> None:
    status = a_status(fit=a_fit(), budget_mb=150)
    made = plan(status, Lessons())
    first = chosen(made, status)
    assert first.id == "d6a5"
    then = step_down(
        made.candidates["a"], first, fit=a_fit(), budgets=budgets(made, status), shape=a_run().shape,
        lora=a_run().lora, spec=a_run().spec, down_bytes=0,
    )  # fmt: skip
    assert then is not None
    lessons = taught(Lessons(), received(made, then.candidate, attempt=1), status)
    assert "stepped down to " + then.candidate.id in lessons.why
    for _ in range(3):
        made = plan(status, lessons)
        again = chosen(made, status)
        assert recommended(made) is not None
        assert again.recommended
        assert again.peak_mb <= then.candidate.peak_mb + 1e-6
        lessons = taught(lessons, received(made, again), status)
    more = a_status(fit=a_fit(), budget_mb=300)
    assert chosen(plan(more, lessons), more).peak_mb > first.peak_mb, "what it can do grows with its memory"


def test_what_one_failure_took_comes_back_in_steps_and_later_after_each_one_more() -> None:
    status = a_status(fit=a_fit(), budget_mb=150)
    made = plan(status, Lessons())
    one = chosen(made, status)
    low = min(made.candidates["a"], key=lambda c: c.peak_mb)

    def shares(lessons: Lessons, rounds: int) -> list[float]:
        told = []
        for _ in range(rounds):
            lessons = taught(lessons, received(made, one), status)
            told.append(lessons.memory_share)
        return told

    lessons = taught(Lessons(), received(made, low, attempt=1), status)
    fell = lessons.memory_share
    assert fell < 0.7 and (lessons.failures, lessons.steady) == (1, 0)
    came = shares(lessons, 40)
    assert came[:8] == [fell] * 8 and came[8:10] == pytest.approx([1.1 * fell, 1.21 * fell])
    assert came[-1] == 1.0
    twice = taught(replace(lessons, memory_share=0.9, steady=20), received(made, low, attempt=1), status)
    assert (twice.memory_share, twice.failures, twice.steady) == (fell, 2, 0)
    assert shares(twice, 17)[15:] == pytest.approx([fell, 1.1 * fell])
    held = taught(replace(lessons, memory_share=1.0, failures=3, steady=9), received(made, one), status)
    assert (held.memory_share, held.failures) == (1.0, 0)


def test_a_budget_of_nothing_is_no_measure_of_more() -> None:
    declined = Lessons(declined=3, declined_round=1, declined_mb=0.0)
    assert all(declined.waits(2, budget_mb) for budget_mb in (0.0, 0.5, 1.0))
    assert not declined.waits(2, 1.5) and not declined.waits(9, 0.0)


def test_measured_memory_corrects_the_next_plan_at_once() -> None:
    status = a_status(fit=a_fit(), budget_mb=150)
    made = plan(status, Lessons())
    one = chosen(made, status)
    lessons = taught(Lessons(), received(made, one, peak_mb=1.3 * one.peak_mb), status)
    assert lessons.memory_ratio == pytest.approx(1.3)
    made = plan(status, lessons)
    again = chosen(made, status)
    assert again.recommended and 1.3 * again.peak_mb <= 0.9 * 150
    planned = recommended(made)
    assert planned is not None and planned.peak_mb == pytest.approx(1.3 * again.peak_mb)
    assert taught(lessons, received(made, again), status).memory_ratio == pytest.approx(0.8 * 1.3 + 0.2)


@pytest.mark.parametrize("first", ["status", "round"])
def test_what_a_device_corrects_itself_does_not_count_twice(first: str) -> None:
    before = a_status(fit=a_fit(), budget_mb=150)
    made = plan(before, Lessons())
    one = next(c for c in made.candidates["a"] if c.recommended)
    row = received(made, one, attempt=1, peak_mb=1.3 * one.peak_mb, train_s=2 * one.seconds)
    correction = Correction(levers=one.levers, quantized=bool(one.quantized_layers), peak=1.3, step=1.5)
    after = a_status(fit=replace(a_fit(), corrections=(correction,)), budget_mb=150)
    lessons = Lessons().after_status(before)
    if first == "status":
        lessons = taught(lessons.after_status(after), row, after)
    else:
        lessons = taught(lessons, row, before).after_status(after)
    share = min(1.0, 1.3 * one.peak_mb / (0.9 * 150))
    assert (lessons.memory_factor, lessons.memory_share) == pytest.approx((1.0, share), rel=1e-6)
    again = plan(after, lessons)
    assert chosen(again, after).recommended and chosen(again, after).peak_mb <= 0.9 * 150
    assert lessons.after_status(after) == replace(lessons, **averages(lessons.after_status(after)))


@pytest.mark.parametrize("ends", ["declined", "received"])
@pytest.mark.parametrize("first", ["status", "round"])
def test_a_failure_counts_once_whichever_is_heard_first(first: str, ends: str) -> None:
    """The device reports no more memory than what failed needs, before or after its round closes."""
    before = a_status(fit=a_fit(), budget_mb=150)
    made = plan(before, Lessons())
    by_peak = sorted(made.candidates["a"], key=lambda one: one.peak_mb)
    low = by_peak[1]
    decline = Decline(device="a", run="r", round=1, reason="memory", message="out of memory")
    if ends == "declined":
        row, held = a_row(made, "declined", choice=a_choice(low), decline=decline), 0.9 * low.peak_mb
        after = a_status(fit=a_fit(), budget_mb=low.peak_mb)
    else:
        row, held = received(made, low, attempt=1), low.peak_mb
        after = a_status(fit=a_fit(), budget_mb=by_peak[-1].peak_mb)
    lessons = Lessons().after_status(before).after_offer(before)
    if first == "status":
        lessons = taught(lessons.after_status(after), row, after)
    else:
        lessons = taught(lessons, row, before).after_status(after)
    assert 0.9 * lessons.held_mb(after.memory.budget_mb) == pytest.approx(held)
    assert 0.9 * lessons.held_mb(150) == pytest.approx(held), "also when the memory is there again"
    assert 0.9 * lessons.held_mb(300) == pytest.approx(2 * held)
    assert (lessons.failures, lessons.declined_mb) == (1, 150 if ends == "declined" else 0)
    if ends == "received":
        assert low.id in {one.id for one in plan(after, lessons).candidates["a"]}


def averages(lessons: Lessons) -> dict[str, Any]:
    return {name: getattr(lessons, name) for name in ("forward_s", "layer_s", "quantize_s", "budget_mb")}


def test_who_trained_longer_than_predicted_and_than_the_plan_aims_at_is_slower_from_then_on() -> None:
    status, other = a_status(fit=a_fit()), a_status("b", fit=a_fit())
    made = plan(status, Lessons(), others=(other,))
    one = chosen(made, status)
    assert one.depth == 6
    lessons = taught(Lessons(), received(made, one, train_s=3 * one.seconds), status)
    assert lessons.time_ratio == pytest.approx(3.0)
    assert f"took longer than the {made.target_s:.1f} s" in lessons.why
    made = plan(status, lessons, others=(other,))
    again = recommended(made)
    assert again is not None and recommended(made, "b") is not None
    assert again.seconds == pytest.approx(3 * (1 + 0.5 * again.depth))
    assert chosen(made, status).id == again.id, "its own figures still say that it is fast"
    steady = received(made, again, train_s=again.seconds / 3)
    assert taught(lessons, steady, status).time_ratio == pytest.approx(0.8 * 3 + 0.2)


def test_who_is_faster_than_predicted_is_not_asked_for_more() -> None:
    status = a_status(fit=a_fit())
    made = plan(status, Lessons())
    one = chosen(made, status)
    lessons = taught(Lessons(), received(made, one, peak_mb=0.5 * one.peak_mb, train_s=1.0), status)
    assert lessons.time_ratio < 1 and lessons.memory_ratio < 1
    assert plan(status, lessons) == made


def test_who_did_not_deliver_in_its_time_is_slower_unless_it_went_away() -> None:
    status = a_status(fit=a_fit())
    made = plan(status, Lessons())
    one = chosen(made, status)
    missed = a_row(made, "missed", choice=a_choice(one))
    assert taught(Lessons(), missed, status, open_s=64.2).time_ratio == 2.0
    assert taught(Lessons(), missed, status, open_s=1.01 * one.seconds).time_ratio == 1.25
    assert taught(Lessons(), missed, status, open_s=0.9 * one.seconds) == Lessons(), "its time was not up"
    still_awaited = dataclasses.replace(missed, state="sending")
    assert taught(Lessons(), still_awaited, status, open_s=64.2) == Lessons(), "the round closed before it"
    assert taught(Lessons(), missed, status, online=False) == Lessons()
    assert taught(Lessons(), a_row(made, "missed"), status) == Lessons(), "it never took the offer"
    lessons = Lessons()
    for _ in range(9):
        lessons = taught(lessons, missed, status, open_s=64.2)
    assert lessons.time_ratio == 8.0


def test_who_declined_for_memory_is_left_alone_for_ever_longer() -> None:
    small, big = a_status(fit=a_fit(), budget_mb=20), a_status("b", fit=a_fit())
    decline = Decline(device="a", run="r", round=1, reason="memory", message="no")
    lessons, asked = Lessons(), []
    for round in range(1, 40):
        made = plan(small, lessons, round, others=(big,))
        if "a" in made.candidates:
            asked.append(round)
            lessons = taught(lessons, a_row(made, "declined", round, decline=decline), small)
        else:
            assert "asked again in round" in made.excluded["a"]
    assert asked == [1, 3, 7, 15, 31]
    assert "a" in plan(a_status(fit=a_fit(), budget_mb=80), lessons, 32, others=(big,)).candidates
    assert "a" in plan(small, lessons, 32).candidates, "where nobody else is left"
    gated = a_row(plan(small, Lessons()), "declined", decline=replace(decline, reason="gate"))
    assert taught(Lessons(), gated, small) == Lessons()


def test_what_failed_last_of_all_is_not_offered_again() -> None:
    status = a_status(fit=a_fit(), budget_mb=150)
    lessons, made = Lessons(), plan(status, Lessons())
    for _ in range(6):  # what takes less, half a batch at a time, is tried in between
        smallest = min(made.candidates["a"], key=lambda one: one.peak_mb)
        decline = Decline(device="a", run="r", round=1, reason="memory", message="out of memory")
        row = a_row(made, "declined", choice=a_choice(smallest, 2), decline=decline)
        lessons = taught(lessons, row, status)
        made = plan(status, lessons, 9)
    offer = made.candidates["a"]
    assert recommended(made) is None
    assert len(offer) == 1, "all that it would take failed: the least is asked for, should it know better"


def test_lessons_keep_what_is_recommended_what_is_chosen() -> None:
    """Whatever was learned, a device with its own, uncorrected figures takes what is recommended."""
    random_ = random.Random(8)
    for _ in range(80):
        status = a_status(
            fit=a_fit(random_.uniform(0.2, 4), quantize=random_.uniform(0, 0.04)),
            budget_mb=random_.uniform(30, 300), up_bps=random_.choice([None, random_.uniform(1e4, 1e7)]),
        )  # fmt: skip
        lessons = replace(
            Lessons().after_status(status), time_ratio=random_.uniform(0.5, 4),
            memory_ratio=random_.uniform(0.5, 2), memory_share=random_.uniform(0.3, 1),
        )  # fmt: skip
        made = plan(status, lessons, others=(a_status("b", fit=a_fit(random_.uniform(0.2, 4))),))
        best = recommended(made)
        if best is not None:
            assert chosen(made, status).id == best.id


def test_lessons_outlive_their_form() -> None:
    lessons = replace(Lessons().after_status(a_status(fit=a_fit())), why="x", declined=2)
    assert msgspec.json.decode(msgspec.json.encode(lessons), type=Lessons) == lessons
    assert msgspec.json.decode("{}", type=Lessons) == Lessons()

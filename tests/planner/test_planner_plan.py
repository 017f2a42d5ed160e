from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest
from msgspec.structs import replace
from planner_cases import a_config, a_fit, a_run, a_status

from aggregator.methods.base import Method, find_method
from aggregator.planner.allocation import ReferenceTime, offered_depths
from aggregator.planner.plan import ALLOWANCE_S, LONGEST_S, SLACK, TOLERANCE, RoundPlan, plan_round
from edge_sdk.planning.choice import Budgets, Chosen, choose, step_down
from edge_sdk.planning.cost import step_s
from edge_sdk.protocol.measure import Link
from edge_sdk.protocol.spec import Candidate, Levers, Setting
from edge_sdk.protocol.wire import Status

FEDQUAD, FEDAVG = find_method("fedquad"), find_method("fedavg")
REFERENCE = dataclasses.replace(FEDQUAD, name="reference", allocation=ReferenceTime())
ONE_WAY = dataclasses.replace(FEDQUAD, other_levers=())
"""No other levers, and no batch in halves."""


def plan(
    *statuses: Status,
    method: Method = FEDQUAD,
    layers: int = 6,
    deadline_s: float | None = None,
    previous: dict[str, int] | None = None,
) -> RoundPlan:
    return plan_round(
        a_run(layers), method, statuses, config=a_config(deadline_s=deadline_s), previous=previous
    )


def ids(candidates: Sequence[Candidate]) -> list[str]:
    return [c.id for c in candidates]


def recommended(candidates: Sequence[Candidate]) -> Candidate | None:
    marked = [c for c in candidates if c.recommended]
    assert len(marked) <= 1
    return marked[0] if marked else None


def test_a_strong_device_is_recommended_everything() -> None:
    made = plan(a_status(fit=a_fit()))
    best = recommended(made.candidates["a"])
    assert best is not None
    assert (best.depth, best.quantized_layers, best.gain) == (6, 0, 1.0)
    assert ids(made.candidates["a"]) == ["d1a0", "d1a1", "d3a0", "d3a3", "d4a0", "d4a4", "d6a0", "d6a6"]


def test_candidates_carry_method_run_and_predictions() -> None:
    made = plan(a_status(fit=a_fit(), up_bps=1e6))
    for c in made.candidates["a"]:
        assert (c.micro_batch, c.max_length, c.steps, c.codec, c.activation_bits) == (16, 32, 10, "int8", 8)
        assert c.peak_mb == pytest.approx(
            10 + 40 * c.depth - 25 * c.quantized_layers + 6 * (c.quantized_layers > 0)
        )
        train = 10 * (0.1 + 0.05 * c.depth + 0.01 * c.quantized_layers)
        assert c.seconds == pytest.approx(train + 8e-6 * c.bytes_up)
        assert c.bytes_down > 0


def test_candidates_are_of_the_precision_that_the_device_holds_its_base_in() -> None:
    own = ("activation:int8", "base:nf4", "codec:int8")
    made = plan(a_status(fit=a_fit()), a_status("b", fit=a_fit(), mechanisms=own))
    assert {c.base_precision for c in made.candidates["a"]} == {"fp32"}
    assert {c.base_precision for c in made.candidates["b"]} == {"nf4"}


def test_depths_that_did_not_fit_are_offered_fully_quantized() -> None:
    made = plan(a_status(fit=a_fit(), budget_mb=75), method=ONE_WAY)
    best = recommended(made.candidates["a"])
    assert best is not None
    assert best.id == "d3a3"
    assert ids(made.candidates["a"]) == ["d1a0", "d1a1", "d3a3", "d4a4", "d6a6"]


def test_a_device_for_which_nothing_fits_is_asked_and_told_nothing_to_prefer() -> None:
    made = plan(a_status("small", fit=a_fit(), budget_mb=20), a_status("big", fit=a_fit()), method=ONE_WAY)
    assert recommended(made.candidates["small"]) is None
    assert ids(made.candidates["small"])[0] == "d1a1"
    assert recommended(made.candidates["big"]) is not None
    alone = plan(a_status("small", fit=a_fit(), budget_mb=20), method=ONE_WAY)
    assert alone.candidates["small"] == made.candidates["small"]
    assert alone.target_s == pytest.approx(TOLERANCE * 10 * 0.16)


def test_half_a_batch_twice_is_offered_where_a_whole_one_does_not_fit() -> None:
    best = recommended(plan(a_status(fit=a_fit(), budget_mb=75)).candidates["a"])
    assert best is not None
    assert best.depth > 3 and (best.micro_batch, best.accumulation) == (8, 2)


def test_other_levers_are_offered_where_memory_binds_to_devices_that_have_them() -> None:
    own = ("activation:int8", "codec:int8", "recompute:outputs")
    words = ("activation:int4", "recompute:inner", "rounding:nearest")

    def offered(*mechanisms: str, budget_mb: float = 75) -> list[Candidate]:
        status = a_status(fit=a_fit(), budget_mb=budget_mb, mechanisms=mechanisms)
        return list(plan(status).candidates["a"])

    def others(candidates: list[Candidate]) -> set[tuple[int, str]]:
        return {(c.activation_bits, c.recompute) for c in candidates} - {(8, "outputs")}

    assert others(offered(*own)) == set()
    assert others(offered(*own, *words)) == {(8, "inner")}, "4 bits are rounded in a way that it lacks"
    assert others(offered(*own, *words, "rounding:stochastic")) == {(8, "inner"), (4, "outputs")}
    assert others(offered(*own, *words, budget_mb=10_000)) == set()
    deepest = max(c.depth for c in offered(*own, *words) if c.recompute == "inner")
    assert deepest > max(c.depth for c in offered(*own) if c.peak_mb <= 0.9 * 75 and c.micro_batch == 16)


def test_devices_without_a_usable_fit_get_no_offer() -> None:
    made = plan(a_status("new"), a_status("odd", fit=a_fit(micro_batch=4)), a_status("ok", fit=a_fit()))
    assert list(made.candidates) == ["ok"]
    assert sorted(made.excluded) == ["new", "odd"]
    assert plan(a_status("new")).candidates == {}


def test_the_deadline_bears_more_than_the_target() -> None:
    made = plan(a_status(fit=a_fit()))
    assert made.target_s == pytest.approx(TOLERANCE * 10 * 0.4)
    assert made.deadline_s == made.target_s + ALLOWANCE_S
    slow = plan(a_status(fit=a_fit(pace=500.0)))
    assert slow.deadline_s == pytest.approx(SLACK * slow.target_s)


def test_a_fixed_deadline_takes_the_sweeps_place() -> None:
    # 3.5 s to train in: depth 5
    made = plan(a_status("a", fit=a_fit()), a_status("b", fit=a_fit(pace=9.0)), deadline_s=3.5 * SLACK)
    assert (made.deadline_s, made.target_s) == pytest.approx((3.5 * SLACK, 3.5))
    best = recommended(made.candidates["a"])
    assert best is not None
    assert best.depth == 5
    assert recommended(made.candidates["b"]) is None


def test_layers_that_a_fixed_deadline_has_no_time_for_are_told_with_one_that_has() -> None:
    # 4 s to train all six layers in: one device of two shall, and the slow one never need
    fleet = a_status("a", fit=a_fit()), a_status("b", fit=a_fit(pace=9.0))
    short = plan(*fleet, deadline_s=2.0 * SLACK).warning
    assert short.startswith("rounds.deadline_s is 2.4: 4 layers are trained by fewer devices than should")
    assert "from 5 s on there is time" in short
    assert not plan(*fleet, deadline_s=5).warning and plan(*fleet, deadline_s=3.99 * SLACK).warning
    assert not plan(*fleet).warning, "the sweep covers them"


def test_where_not_even_one_layer_keeps_a_fixed_deadline_there_are_fewer_steps() -> None:
    # a step of one layer takes it 0.3 s: 6 of 10 in the 2 s that there are
    made = plan(a_status("a", fit=a_fit()), a_status("b", fit=a_fit(pace=2.0)), deadline_s=2.0 * SLACK)
    best = recommended(made.candidates["b"])
    assert best is not None
    assert (best.id, best.steps, best.gain) == ("d1a0s6", 6, pytest.approx(0.6 / 6))
    assert best.seconds <= made.target_s
    assert {c.steps for c in made.candidates["b"] if c is not best} == {10, 3}


def test_fedavg_asks_all_for_everything() -> None:
    made = plan(
        a_status("a", fit=a_fit(levers=FEDAVG.levers), budget_mb=100),
        a_status("b", fit=a_fit(levers=FEDAVG.levers)),
        a_status("c", fit=a_fit(pace=3, levers=FEDAVG.levers)),
        method=FEDAVG,
    )
    for device, best in {"a": False, "b": True, "c": True}.items():
        (only,) = made.candidates[device]
        assert (only.depth, only.quantized_layers, only.codec, only.recommended) == (6, 0, "fp32", best)
    assert made.target_s == pytest.approx(TOLERANCE * 10 * 0.4 * 3)


def test_offered_depths() -> None:
    assert offered_depths(3, 2) == (1, 2, 3)
    assert offered_depths(4, None) == (1, 2, 3, 4)
    assert offered_depths(6, 3) == (1, 3, 4, 6)
    assert offered_depths(12, 12) == (1, 6, 9, 12)
    assert offered_depths(12, 1) == (1, 2, 7, 12)
    assert offered_depths(24, 23) == (1, 12, 23, 24)
    assert offered_depths(5, 5) == (1, 3, 4, 5)


@pytest.mark.parametrize("method", [FEDQUAD, FEDAVG, REFERENCE], ids=lambda m: m.name)
def test_offers_are_small_and_what_is_recommended_is_what_a_device_takes(method: Method) -> None:
    """With the planner's own figures a device takes the recommended candidate; the target admits it. Also
    where depths are kept as they were in the round before."""
    random_ = random.Random(5)
    for number in range(60):
        layers = random_.randint(1, 24)
        statuses = [
            a_status(
                f"d{i}",
                fit=a_fit(random_.uniform(0.2, 4), quantize=random_.uniform(0, 0.04)),
                budget_mb=random_.uniform(10, 60 * layers),
                up_bps=random_.choice([None, random_.uniform(1e4, 1e7)]),
                samples=random_.randint(1, 500),
            )
            for i in range(random_.randint(1, 12))
        ]
        previous = {s.device: random_.randint(1, layers) for s in statuses if number % 2}
        made = plan(*statuses, method=method, layers=layers, previous=previous)
        run = a_run(layers)
        assert set(made.candidates) == {s.device for s in statuses}
        for status in statuses:
            offer = made.candidates[status.device]
            assert 1 <= len(offer) <= 12
            assert len({c.id for c in offer}) == len(offer)
            best = recommended(offer)
            if best is None:
                continue
            assert best.peak_mb <= 0.9 * status.memory.budget_mb
            assert TOLERANCE * best.seconds <= made.target_s + 1e-9 < made.deadline_s
            assert status.fit is not None
            for seconds in (made.target_s, made.target_s / TOLERANCE * (1 + 1e-12)):
                found = choose(
                    offer,
                    fit=status.fit,
                    budgets=Budgets(status.memory.budget_mb, seconds, status.link.up_bps),
                    shape=run.shape,
                    lora=run.lora,
                    spec=run.spec,
                    down_bytes=best.bytes_down,
                )
                assert isinstance(found, Chosen)
                assert found.candidate.id == best.id


def test_limits_make_choices_and_swapping_them_swaps_the_choices() -> None:
    """Three equal machines, one short of memory, one on a thin link, one free."""
    link = 20_000.0

    def choices(limits: dict[str, tuple[float, float | None]]) -> dict[str, tuple[str, str]]:
        statuses = [
            a_status(name, fit=a_fit(), budget_mb=mb, up_bps=bps) for name, (mb, bps) in limits.items()
        ]
        made, run = plan(*statuses), a_run()
        found = {}
        for status in statuses:
            chosen = choose(
                made.candidates[status.device],
                fit=a_fit(),
                budgets=Budgets(status.memory.budget_mb, made.target_s, status.link.up_bps),
                shape=run.shape,
                lora=run.lora,
                spec=run.spec,
                down_bytes=0,
            )
            assert isinstance(chosen, Chosen)
            found[status.device] = (chosen.candidate.id, chosen.binding)
        return found

    one = choices({"a": (75, None), "b": (10_000, link), "c": (10_000, None)})
    assert [binding for _, binding in one.values()] == ["memory", "link", "none"]
    assert len({candidate for candidate, _ in one.values()}) == 3
    other = choices({"a": (10_000, link), "b": (75, None), "c": (10_000, None)})
    assert (other["a"], other["b"], other["c"]) == (one["b"], one["a"], one["c"])


def test_what_a_device_says_of_itself_cannot_hold_the_run_for_ever() -> None:
    made = plan(a_status(fit=replace(a_fit(), layer_s=1e9)))
    assert made.deadline_s == LONGEST_S and made.target_s < LONGEST_S
    assert plan(a_status(fit=a_fit(), up_bps=5e-324)).excluded["a"].endswith("too slow to predict with")


def test_a_device_that_says_nonsense_of_itself_stops_no_plan_for_others() -> None:
    words = ("activation:int8", "codec:int8")
    odd = {
        "bits": a_status("bits", fit=a_fit(levers=Levers(activation_bits=16))),
        "lever": a_status("lever", fit=a_fit(levers=Levers(recompute="everything"))),
        "base": a_status("base", fit=a_fit(), mechanisms=(*words, "base:a b\n")),
        "link": replace(a_status("link", fit=a_fit()), link=Link(up_bps=0.0, source="measured")),
        "crawls": a_status("crawls", fit=replace(a_fit(), forward_s=1e9)),
    }
    good = a_status("ok", fit=a_fit())
    made, alone = plan(*odd.values(), good), plan(good)
    assert made.excluded.keys() == odd.keys()
    assert (made.candidates, made.deadline_s) == (alone.candidates, alone.deadline_s)


def test_fits_and_candidates_of_bits_without_a_price_can_be_weighed_after_a_round() -> None:
    run = a_run()
    odd = a_fit(levers=Levers(activation_bits=16))
    at = Setting(depth=1, quantized_layers=1, levers=Levers(activation_bits=3))
    assert step_s(odd, run.shape, run.lora, at) > 0


@pytest.mark.parametrize("deadline_s", [None, 1.6 * SLACK])
@pytest.mark.parametrize("budget_mb", [40.0, 60.0, 10_000.0])
def test_whoever_takes_the_smallest_has_something_to_step_down_to(
    deadline_s: float | None, budget_mb: float
) -> None:
    """Half a batch at a time takes least, where the method allows of it."""
    status, run = a_status(fit=a_fit(), budget_mb=budget_mb), a_run()
    made = plan(status, deadline_s=deadline_s)
    offer = made.candidates["a"]
    assert len(offer) <= 12
    budgets = Budgets(budget_mb, made.target_s, latest_s=made.deadline_s)
    known = {"fit": a_fit(), "shape": run.shape, "lora": run.lora, "spec": run.spec, "down_bytes": 0}
    first = choose(offer, budgets=budgets, **known)  # type: ignore[arg-type]
    assert isinstance(first, Chosen)
    budgets = Budgets(budget_mb, latest_s=made.deadline_s)
    then = step_down(offer, first.candidate, budgets=budgets, **known)  # type: ignore[arg-type]
    assert then is not None and then.candidate.peak_mb <= 0.9 * first.candidate.peak_mb

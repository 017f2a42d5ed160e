"""Times: train = 10 · (0.1 + 0.05 d + 0.01 a) s; memory: 10 + 40 d − 25 a + 6 [a > 0] MB; kappa 0.9."""

import pytest
from planning_cases import LORA, candidate, encoder, fit, setting

from edge_sdk.planning.choice import (
    Budgets,
    Chosen,
    Infeasible,
    choose,
    fits_memory,
    step_down,
    unpredictable,
)
from edge_sdk.planning.cost import update_bytes
from edge_sdk.protocol.measure import Fit
from edge_sdk.protocol.spec import Candidate, Levers, TrainSpec

SHAPE = encoder()
OFFER = [candidate(d, a) for d in (1, 3, 4, 6) for a in (0, d)]


def pick(budgets: Budgets, offer: list[Candidate] = OFFER, model: Fit | None = None) -> Chosen | Infeasible:
    return choose(
        offer, fit=model or fit(), budgets=budgets, shape=SHAPE, lora=LORA, spec=TrainSpec(), down_bytes=0
    )


def chosen(budgets: Budgets, offer: list[Candidate] = OFFER, model: Fit | None = None) -> Chosen:
    found = pick(budgets, offer, model)
    assert isinstance(found, Chosen), found
    return found


def test_without_limits_the_best_gain_is_taken_and_nothing_binds() -> None:
    found = chosen(Budgets(memory_mb=10_000, deadline_s=1000, up_bps=1e9, down_bps=1e9))
    assert (found.candidate.id, found.binding, found.reason) == ("d6a0", "none", "")


def test_the_choice_carries_the_devices_own_predictions() -> None:
    found = choose(
        [candidate(4, 4, peak_mb=1.0, seconds=1.0, bytes_up=1)],
        fit=fit(),
        budgets=Budgets(memory_mb=1000, up_bps=1e6, down_bps=2e6),
        shape=SHAPE,
        lora=LORA,
        spec=TrainSpec(),
        down_bytes=500_000,
    )
    assert isinstance(found, Chosen)
    taken = found.candidate
    assert taken.peak_mb == pytest.approx(76)
    assert taken.bytes_up == update_bytes(SHAPE, LORA, 4, "int8")
    assert taken.bytes_down == 500_000
    assert taken.seconds == pytest.approx(10 * 0.34 + 2.0 + 8e-6 * taken.bytes_up)


def test_memory_binds_when_layers_must_be_quantized() -> None:
    # depth 6 needs 250 MB plain, 106 MB quantized
    found = chosen(Budgets(memory_mb=150))
    assert (found.candidate.id, found.binding) == ("d6a6", "memory")
    assert "depth 6 with 0 quantized layers needs 250 MB above rest and 135 MB may be used" in found.reason


def test_memory_binds_when_the_plain_form_is_not_even_offered() -> None:
    found = chosen(Budgets(memory_mb=200), [candidate(6, 4), candidate(6, 6), candidate(1, 0)])
    assert (found.candidate.id, found.binding) == ("d6a4", "memory")
    roomy = chosen(Budgets(memory_mb=1000), [candidate(6, 4), candidate(6, 6), candidate(1, 0)])
    assert (roomy.candidate.id, roomy.binding) == ("d6a4", "none")


def test_memory_binds_when_it_keeps_out_the_quick_plain_form_of_a_deeper_one() -> None:
    # depth 6 quantized takes 4.6 s; plain it takes 4.0 s, and 250 MB
    offer = [candidate(1, 0), candidate(4, 4), candidate(5, 5), candidate(6, 6)]
    found = chosen(Budgets(memory_mb=130, deadline_s=4.2), offer)
    assert (found.candidate.id, found.binding) == ("d5a5", "memory")
    assert "depth 6 with 0 quantized layers needs 250 MB" in found.reason


def test_memory_binds_when_depth_must_shrink() -> None:
    # 61 of 75 MB: depth 3 quantized; depth 4 quantized needs 76
    found = chosen(Budgets(memory_mb=75))
    assert (found.candidate.id, found.binding) == ("d3a3", "memory")


def test_a_late_upload_is_the_links_fault() -> None:
    size = update_bytes(SHAPE, LORA, 6, "int8")
    budgets = Budgets(memory_mb=1000, deadline_s=7.0, up_bps=8 * size / 6.0)
    found = chosen(budgets)  # depth 6: 4 s of training and 6 s of upload
    assert found.candidate.depth < 6
    assert found.binding == "link"
    assert "of 7.0 s" in found.reason


def test_slow_steps_are_the_processors_fault() -> None:
    found = chosen(Budgets(memory_mb=1000, deadline_s=3.5, up_bps=1e9))
    assert (found.candidate.id, found.binding) == ("d4a0", "compute")


def test_the_best_candidate_that_one_budget_alone_keeps_out_decides() -> None:
    # d6a0 fails both; d6a6 fits memory and is late; d4a0 does not fit and is in time
    found = chosen(Budgets(memory_mb=150, deadline_s=3.5))
    assert (found.candidate.id, found.binding) == ("d4a4", "compute")


def test_where_no_budget_alone_decides_the_most_exceeded_one_does() -> None:
    offer = [candidate(6, 0), candidate(1, 0)]
    # 250 MB of 90, 4 s of 3.5
    found = chosen(Budgets(memory_mb=100, deadline_s=3.5), offer)
    assert (found.candidate.id, found.binding) == ("d1a0", "memory")
    # 250 MB of 225, 4 s of 1.6
    found = chosen(Budgets(memory_mb=250, deadline_s=1.6), offer)
    assert (found.candidate.id, found.binding) == ("d1a0", "compute")


def test_equal_gains_are_told_apart_by_seconds_then_by_id() -> None:
    offer = [candidate(3, 3), candidate(3, 0), candidate(3, 0, id="a-twin")]
    assert chosen(Budgets(memory_mb=1000), offer).candidate.id == "a-twin"


def test_the_prediction_may_fill_nine_tenths() -> None:
    assert fits_memory(90.0, 100.0)
    assert not fits_memory(90.1, 100.0)
    assert not fits_memory(1.0, 0.0)


def test_nothing_fits_in_memory() -> None:
    found = pick(Budgets(memory_mb=20))
    assert found == Infeasible(
        "memory",
        "even depth 1 with 1 quantized layers needs 31 MB above rest and 18 MB may be used",
    )


@pytest.mark.parametrize("deadline", [1.0, 0.0, -3.0])
def test_nothing_is_in_time(deadline: float) -> None:
    found = pick(Budgets(memory_mb=60, deadline_s=deadline))
    assert isinstance(found, Infeasible)
    assert found.reason == "deadline"
    assert "even depth 1 with 0 quantized layers takes 1.5 s" in found.message


def test_an_aim_that_nothing_meets_is_missed_by_as_little_as_possible() -> None:
    # depth 1 takes 1.5 s; the plan hoped for 1, and the round stays open for 60
    found = chosen(Budgets(memory_mb=1000, deadline_s=1.0, latest_s=60.0, up_bps=1e9))
    assert found.candidate.depth == 1 and found.binding == "compute"
    assert isinstance(pick(Budgets(memory_mb=1000, deadline_s=1.0, latest_s=1.0)), Infeasible)
    slow = chosen(Budgets(memory_mb=1000, deadline_s=1.0, latest_s=1e6, up_bps=1e3))
    assert slow.candidate.depth == 1 and slow.binding == "link"


def test_quantized_layers_that_were_never_probed_are_not_chosen() -> None:
    plain = fit((1, 0), (6, 0))
    found = chosen(Budgets(memory_mb=150), model=plain)  # 135 MB: depth 3 plain needs 130
    assert (found.candidate.id, found.binding) == ("d3a0", "memory")


def test_plain_layers_that_were_never_probed_are_not_chosen() -> None:
    packed = fit((1, 1), (3, 3))
    assert chosen(Budgets(memory_mb=10_000), model=packed).candidate.id == "d6a6"
    found = pick(Budgets(memory_mb=10_000), [candidate(6, 0)], packed)
    assert isinstance(found, Infeasible)
    assert found.reason == "memory"


def test_what_no_probe_showed_is_said() -> None:
    def why(model: Fit, depth: int, quantized: int, bits: int = 8, recompute: str = "none") -> str:
        levers = Levers(activation_bits=bits, recompute=recompute)
        return unpredictable(model, SHAPE, LORA, setting(depth, quantized, levers=levers))

    assert not why(fit(), 6, 3)
    assert "quantized layers were not probed" in why(fit((1, 0), (6, 0)), 6, 3)
    assert "plain layers did not fit" in why(fit((1, 1), (6, 6)), 6, 3)
    assert not why(fit(), 6, 3, bits=4) and not why(fit(), 6, 0, recompute="layer")
    assert "nothing is known" in why(fit(), 6, 3, bits=3)
    assert "nothing is known" in why(fit(), 6, 0, recompute="half")
    found = pick(Budgets(memory_mb=10_000), [candidate(6, 6, activation_bits=3)])
    assert isinstance(found, Infeasible) and found.reason == "trainer" and "nothing is known" in found.message


def test_after_out_of_memory_the_next_smaller_one() -> None:
    steps = []
    failed: Candidate | None = candidate(6, 0)
    while failed is not None:
        found = step_down(
            OFFER,
            failed,
            fit=fit(),
            budgets=Budgets(memory_mb=1000),
            shape=SHAPE,
            lora=LORA,
            spec=TrainSpec(),
            down_bytes=0,
        )
        failed = found.candidate if found else None
        if found:
            assert found.binding == "memory"
            steps.append(found.candidate.id)
    # 250 -> 106 MB -> 90 -> 76 -> 61 -> 50 -> 31 MB; each at least a tenth less than the one that failed
    assert steps == ["d6a6", "d4a4", "d3a3", "d1a0", "d1a1"]


def test_stepping_down_keeps_to_the_deadline() -> None:
    budgets = Budgets(memory_mb=1000, deadline_s=2.0)
    found = step_down(
        OFFER,
        candidate(6, 0),
        fit=fit(),
        budgets=budgets,
        shape=SHAPE,
        lora=LORA,
        spec=TrainSpec(),
        down_bytes=0,
    )
    assert found is not None
    assert found.candidate.depth == 1

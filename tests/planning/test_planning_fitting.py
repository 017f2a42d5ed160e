import math
import random

import msgspec
import pytest
from planning_cases import ALL_KINDS, fit, peak, step, truth

from edge_sdk.errors import TrainerError
from edge_sdk.planning.fitting import fit_cost, non_negative_least_squares
from edge_sdk.protocol.measure import ProbePoint


@pytest.mark.parametrize(
    "settings",
    [((1, 0), (6, 0), (1, 1), (6, 6)), ((1, 0), (2, 0), (2, 1), (2, 2)), ((0, 0), (3, 0), (4, 2), (5, 5))],
)
def test_enough_probes_give_every_coefficient(settings: tuple[tuple[int, int], ...]) -> None:
    model = fit(*settings)
    assert (model.head_mb, model.layer_mb, model.saved_mb, model.work_mb) == pytest.approx((10, 40, 25, 6))
    assert (model.forward_s, model.layer_s, model.quantize_s) == pytest.approx((0.1, 0.05, 0.01))
    assert [(p.depth, p.quantized_layers) for p in model.probes] == list(settings)


def test_what_was_not_probed_is_not_made_up() -> None:
    model = fit((1, 0), (3, 0), (6, 0))
    assert (model.saved_mb, model.work_mb, model.quantize_s) == (0, 0, 0)
    assert (model.head_mb, model.layer_mb) == pytest.approx((10, 40))


def test_one_depth_is_charged_to_the_layers() -> None:
    model = fit((1, 0))
    assert model.head_mb == 0
    assert peak(model, 1, 0) == pytest.approx(50)
    assert peak(model, 6, 0) == pytest.approx(300)  # the truth is 250: unknown is never cheap
    assert step(model, 6, 0) == pytest.approx(0.9)


def test_plain_layers_seen_at_one_depth_alone_never_look_cheap() -> None:
    """What a device short of memory can probe: there, the head's share cannot be told from the layers'."""
    model = fit((1, 1), (1, 0), (3, 3))
    for depth in range(1, 7):
        assert peak(model, depth, depth) == pytest.approx(truth(depth, depth).peak_mb)
        for quantized in range(depth):
            assert peak(model, depth, quantized) > truth(depth, quantized).peak_mb - 1e-6


def test_quantized_probes_alone_predict_quantized_settings() -> None:
    model = fit((1, 1), (4, 4))
    for depth in (1, 4, 6):
        assert peak(model, depth, depth) == pytest.approx(truth(depth, depth).peak_mb)
        assert step(model, depth, depth) == pytest.approx(truth(depth, depth).step_s)


def test_noise_never_makes_a_coefficient_negative_nor_memory_shrink_with_depth() -> None:
    random_ = random.Random(7)
    for _ in range(200):
        points = [
            ProbePoint(
                depth=d,
                quantized_layers=a,
                peak_mb=max(0.0, truth(d, a).peak_mb * random_.uniform(0.3, 2.0)),
                step_s=truth(d, a).step_s * random_.uniform(0.3, 2.0),
            )
            for d, a in ((1, 0), (3, 0), (6, 0), (1, 1), (3, 3), (6, 3), (6, 6))
        ]
        model = fit_cost(points, micro_batch=1, max_length=8, rest_mb=0)
        for name in ("head_mb", "layer_mb", "saved_mb", "work_mb", "forward_s", "layer_s", "quantize_s"):
            assert getattr(model, name) >= 0, name
        assert model.saved_mb <= model.layer_mb + 1e-9


def test_the_solution_is_the_optimum() -> None:
    """Karush-Kuhn-Tucker: no slope on the support, none that leads down elsewhere."""
    random_ = random.Random(3)
    for _ in range(200):
        unknowns = random_.randint(1, 4)
        rows = [
            [random_.uniform(-1, 3) for _ in range(unknowns)] for _ in range(random_.randint(unknowns, 8))
        ]
        values = [random_.uniform(-2, 5) for _ in rows]
        x = non_negative_least_squares(rows, values)
        rest = [
            sum(c * v for c, v in zip(row, x, strict=True)) - y for row, y in zip(rows, values, strict=True)
        ]
        for i in range(unknowns):
            slope = sum(row[i] * r for row, r in zip(rows, rest, strict=True))
            assert x[i] >= 0
            assert slope > -1e-6 if x[i] == 0 else abs(slope) < 1e-6


def test_nothing_measured_is_an_error_with_a_way_out() -> None:
    with pytest.raises(TrainerError, match=r"no setting could be measured.*limits\.memory_mb"):
        fit_cost([], micro_batch=16, max_length=32, rest_mb=100)


def test_what_few_probes_leave_open_is_decided_by_counting() -> None:
    points = [truth(1, 1), truth(1, 0), truth(3, 3)]
    counted = fit_cost([truth(d, a) for d, a in ALL_KINDS], micro_batch=16, max_length=32, rest_mb=100)
    found = fit_cost(points, micro_batch=16, max_length=32, rest_mb=100, prior=counted)
    assert (found.layer_mb, found.saved_mb) == pytest.approx((counted.layer_mb, counted.saved_mb), rel=1e-3)
    far = msgspec.structs.replace(counted, layer_mb=5 * counted.layer_mb, head_mb=0.0)
    held = fit_cost(
        [truth(d, a) for d, a in ALL_KINDS], micro_batch=16, max_length=32, rest_mb=100, prior=far
    )
    assert held.layer_mb == pytest.approx(counted.layer_mb, rel=0.05)  # what was measured weighs more


def test_a_probe_that_is_not_finite_is_named() -> None:
    bad = ProbePoint(depth=3, quantized_layers=1, peak_mb=math.nan, step_s=0.1)
    with pytest.raises(TrainerError, match="depth 3 with 1 quantized layers"):
        fit_cost([truth(1, 0), bad], micro_batch=16, max_length=32, rest_mb=100)

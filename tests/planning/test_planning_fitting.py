import math
import random
from dataclasses import replace

import msgspec
import pytest
from planning_cases import LORA, encoder, setting

from edge_sdk.errors import TrainerError
from edge_sdk.planning.cost import Scales, peak_mb, phases, step_s
from edge_sdk.planning.fitting import estimate, fit_cost, non_negative_least_squares, setting_of
from edge_sdk.protocol.measure import Fit, ProbePoint
from edge_sdk.protocol.spec import Levers, Setting

SHAPE = encoder()
REFERENCE = setting(1, levers=Levers(recompute="outputs"))
TRUE = Scales(plain=1.1, packed=1.3, room=0.9, packed_room=1.2, fixed_mb=7.0)
PACES = {"forward_s": 2.0, "layer_s": 2.4, "quantize_s": 1.5}
WANTED = ((1, 1), (1, 0), (6, 6), (6, 0))


def device() -> Fit:
    """A machine that takes the true scales' share of what is counted."""
    counted = estimate(SHAPE, LORA, REFERENCE)
    return msgspec.structs.replace(
        counted, **{name: pace * getattr(counted, name) for name, pace in PACES.items()}
    )


def measured(wanted: Setting, noise: float = 1.0) -> tuple[float, float]:
    peak = max(TRUE.peak_mb(phase) for phase in phases(SHAPE, LORA, wanted))
    return noise * peak, noise * step_s(device(), SHAPE, LORA, wanted)


def probe(depth: int, quantized: int, noise: float = 1.0, **more: object) -> ProbePoint:
    wanted = ProbePoint(depth=depth, quantized_layers=quantized, peak_mb=0.0, step_s=0.0, **more)  # type: ignore[arg-type]
    peak, step = measured(setting_of(wanted, REFERENCE), noise)
    return msgspec.structs.replace(wanted, peak_mb=peak, step_s=step)


def fitted(points: list[ProbePoint]) -> Fit:
    return fit_cost(
        points, shape=SHAPE, lora=LORA, reference=REFERENCE, rest_mb=300.0, threads=2, machine="m"
    )


def off(model: Fit, wanted: Setting) -> tuple[float, float]:
    """Relative errors of memory and time."""
    peak, step = measured(wanted)
    return peak_mb(model, SHAPE, LORA, wanted) / peak - 1, step_s(model, SHAPE, LORA, wanted) / step - 1


PROBES = [*(probe(d, a) for d, a in WANTED), probe(6, 6, micro_batch=4)]
OTHERS = [
    setting(
        d, a, levers=Levers(activation_bits=bits, recompute=recompute), micro_batch=batch, max_length=length
    )
    for d, a in ((2, 2), (4, 0), (5, 3), (6, 6))
    for bits, recompute in ((8, "none"), (4, "outputs"), (2, "inner"), (8, "layer"))
    for batch, length in ((16, 32), (4, 64), (32, 128))
]


def test_five_probes_tell_every_other_setting() -> None:
    model = fitted(PROBES)
    errors = [off(model, wanted) for wanted in OTHERS]
    assert max(abs(memory) for memory, _ in errors) < 0.08
    assert max(abs(time) for _, time in errors) < 0.03
    assert (model.rest_mb, model.threads, model.machine, len(model.probes)) == (300.0, 2, "m", 5)


def test_few_probes_lean_on_what_is_counted() -> None:
    for points in ([probe(1, 1)], [probe(1, 1), probe(1, 0)], [probe(1, 1), probe(1, 0), probe(3, 3)]):
        model = fitted(points)
        errors = [off(model, wanted) for wanted in OTHERS]
        assert max(abs(memory) for memory, _ in errors) < 0.4
        assert max(abs(time) for _, time in errors) < 0.25


def test_noise_never_makes_memory_shrink_with_depth_nor_grow_by_quantizing() -> None:
    random_ = random.Random(7)
    for _ in range(30):
        points = [probe(d, a, random_.uniform(0.3, 2.0)) for d, a in WANTED]
        model = fitted(points)
        for name in ("layer_mb", "saved_mb", "work_mb", "forward_s", "layer_s", "quantize_s"):
            assert getattr(model, name) >= 0, name
        assert model.saved_mb <= model.layer_mb + 1e-9


def test_an_estimate_is_what_is_counted() -> None:
    model = estimate(SHAPE, LORA, REFERENCE, pace=3.0)
    assert not model.probes
    counted = replace(TRUE, plain=1.0, packed=1.0, room=1.0, packed_room=1.0, fixed_mb=model.fixed_mb)
    for wanted in OTHERS:
        peak = max(counted.peak_mb(phase) for phase in phases(SHAPE, LORA, wanted))
        assert peak_mb(model, SHAPE, LORA, wanted) == pytest.approx(peak)
    slow, quick = (step_s(estimate(SHAPE, LORA, REFERENCE, pace=p), SHAPE, LORA, OTHERS[0]) for p in (3, 1))
    assert slow == pytest.approx(3 * quick)


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
        fitted([])


def test_a_probe_that_is_not_finite_is_named() -> None:
    bad = ProbePoint(depth=3, quantized_layers=1, peak_mb=math.nan, step_s=0.1)
    with pytest.raises(TrainerError, match="depth 3 with 1 quantized layers"):
        fitted([probe(1, 0), bad])


def test_of_a_training_that_takes_next_to_nothing_every_figure_can_be_told() -> None:
    tiny = [msgspec.structs.replace(point, peak_mb=0.4 + 0.1 * point.depth) for point in PROBES]
    model = fitted(tiny)
    assert msgspec.json.decode(msgspec.json.encode(model), type=Fit) == model
    assert peak_mb(model, SHAPE, LORA, setting_of(PROBES[0], REFERENCE)) >= 0

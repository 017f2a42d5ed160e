"""Which settings the probe runs: few, different in what matters, and none that would not fit."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.train

from msgspec.structs import replace  # noqa: E402

from edge_sdk.planning.cost import peak_mb, step_s  # noqa: E402
from edge_sdk.planning.fitting import estimate, setting_of  # noqa: E402
from edge_sdk.planning.shapes import shape_of  # noqa: E402
from edge_sdk.protocol.measure import ProbePoint  # noqa: E402
from edge_sdk.protocol.model import LoraShape, ModelShape  # noqa: E402
from edge_sdk.protocol.spec import Levers, TrainSpec  # noqa: E402
from edge_sdk.protocol.trainer import Setup  # noqa: E402
from edge_sdk.training.probing import MAX_SETTINGS, Probing  # noqa: E402

SETUP = Setup(
    base="x", labels=("a", "b"), max_length=128, micro_batch=8, lora=LoraShape(rank=8), spec=TrainSpec()
)


def a_shape(layers: int = 12) -> ModelShape:
    return shape_of(
        {"model_type": "bert", "vocab_size": 1000, "hidden_size": 384, "intermediate_size": 1536,
         "num_hidden_layers": layers, "num_attention_heads": 6}
    )  # fmt: skip


def probed(limit_mb: float | None, takes: float = 1.0, free_mb: float | None = None) -> list[ProbePoint]:
    """What a device measures that takes ``takes`` times what is counted."""
    probing = Probing(a_shape(), SETUP, Levers(recompute="outputs"), "fbgemm", limit_mb, free_mb)
    truth = estimate(probing.shape, probing.lora, probing.reference)
    points: list[ProbePoint] = []
    for stage in range(MAX_SETTINGS):
        wanted = probing.wanted(stage, points)
        if wanted is not None:
            setting = setting_of(wanted, probing.reference)
            peak = takes * peak_mb(truth, probing.shape, probing.lora, setting)
            step = step_s(truth, probing.shape, probing.lora, setting)
            points.append(replace(wanted, peak_mb=peak, step_s=step))
    return points


def test_without_a_limit_depth_packing_and_tokens_are_told_apart() -> None:
    points = probed(None)
    assert len(points) == MAX_SETTINGS
    assert {(p.depth, p.quantized_layers) for p in points} == {(1, 1), (1, 0), (12, 12), (12, 0)}
    assert {p.micro_batch for p in points} == {0, 2}


@pytest.mark.parametrize("takes", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("limit", [35.0, 60.0, 100.0, 200.0, 400.0])
def test_nothing_is_run_that_would_not_fit(limit: float, takes: float) -> None:
    points = probed(limit, takes)
    # the very first is the least there is: the limit itself finds out whether it fits
    assert all(point.peak_mb <= limit for point in points[1:])
    assert limit < 60 or len(points) >= 3


def test_where_the_machine_has_no_room_for_one_layer_nothing_is_run() -> None:
    assert probed(10.0, free_mb=10.0) == []
    assert len(probed(5.0, free_mb=1000.0)) == 1

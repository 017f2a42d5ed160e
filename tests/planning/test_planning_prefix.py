"""Reuse of the frozen layers in the cost model and in a device's choice."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from edge_sdk.errors import MechanismError
from edge_sdk.planning.choice import MEMORY_SAFETY, Budgets, Chosen, PrefixRoom, choose, predict, step_down
from edge_sdk.planning.cost import peak_mb, prefix_row_bytes, prefix_share, step_s
from edge_sdk.protocol.measure import Fit, ProbePoint
from edge_sdk.protocol.model import DensePart, LoraModule, LoraShape, ModelShape
from edge_sdk.protocol.spec import Candidate, TrainSpec

LORA = LoraShape(rank=4)
SHAPE = ModelShape(
    family="bert", layers=12, hidden=100, intermediate=400, heads=4, vocabulary=50, layer_path="x",
    modules=(LoraModule(name="q", inputs=100, outputs=100),), dense=(DensePart(name="c", shape=(2, 100)),),
    parameters=1, base_bytes=4,
)  # fmt: skip
# peak 10 + 5 d, step 12 + 2 d
FIT = Fit(
    micro_batch=8, max_length=50, rest_mb=100, head_mb=10, layer_mb=5, saved_mb=0, work_mb=0, forward_s=12,
    layer_s=2, quantize_s=0,
    probes=(ProbePoint(depth=1, quantized_layers=0, peak_mb=15, step_s=14),),
)  # fmt: skip
WORK = {"micro_batch": 8, "max_length": 50, "steps": 30}
ROW_MB = 50 * 100 * 4 / 1e6


def candidate(depth: int, **more: object) -> Candidate:
    return Candidate(id=f"d{depth}", depth=depth, gain=float(depth), **WORK, **more)


def peak(depth: int) -> float:
    return peak_mb(FIT, SHAPE, LORA, candidate(depth).setting(TrainSpec()))


def step(depth: int, **more: float) -> float:
    return step_s(FIT, SHAPE, LORA, candidate(depth).setting(TrainSpec()), **more)


def own(depth: int, budgets: Budgets) -> tuple[Candidate, float]:
    made, time = predict(
        candidate(depth), fit=FIT, budgets=budgets, shape=SHAPE, lora=LORA, spec=TrainSpec(), down_bytes=0
    )
    return made, time.train_s


@pytest.mark.parametrize("seed", range(20))
def test_the_share_is_that_of_a_walk_through_the_rows(seed: int) -> None:
    draw = random.Random(seed)
    rows, visits, kept = draw.randint(1, 12), draw.randint(1, 60), draw.randint(0, 14)
    often = sorted(range(rows), key=lambda row: (-len(range(row, visits, rows)), row))
    chosen, seen, read = set(often[:kept]), set(), 0
    for visit in range(visits):
        row = visit % rows
        read += row in seen
        seen |= {row} & chosen
    assert prefix_share(rows, visits, kept) == pytest.approx(read / visits)


def test_what_is_read_is_not_computed() -> None:
    assert step(2) == pytest.approx(16)
    assert step(2, prefix_read=0.5) == pytest.approx(16 - 0.5 * 10)
    assert step(12, prefix_read=0.5) == step(12)


def test_forms_of_a_row() -> None:
    assert prefix_row_bytes(SHAPE, 50) == 20_000 and prefix_row_bytes(SHAPE, 50, value_bytes=2) == 10_000
    assert prefix_row_bytes(SHAPE, 50, "fp16") == 10_004
    assert prefix_row_bytes(SHAPE, 50, "int8") == 5000 + 5000 // 50 * 8
    with pytest.raises(MechanismError, match="int3"):
        prefix_row_bytes(SHAPE, 50, "int3")


def test_a_cache_makes_rounds_shorter_and_counts_as_memory() -> None:
    plain, room = Budgets(memory_mb=1000), PrefixRoom(mb=100, rows=80, in_memory=True)
    bare, seconds = own(2, plain)
    kept, shorter = own(2, replace(plain, prefix=room))
    on_disk, same = own(2, replace(plain, prefix=replace(room, in_memory=False)))
    assert seconds == pytest.approx(30 * 16) and shorter == same == pytest.approx(30 * (16 - 10 * 2 / 3))
    assert kept.peak_mb == pytest.approx(bare.peak_mb + 80 * ROW_MB) and on_disk.peak_mb == bare.peak_mb
    for depth in (0, 12):
        assert own(depth, replace(plain, prefix=room)) == own(depth, plain)
    assert own(2, replace(plain, prefix=replace(room, rows=240))) == own(2, plain)  # one epoch


def test_the_cache_takes_what_training_leaves_and_excludes_nothing() -> None:
    deep = peak(11)
    budgets = Budgets(
        memory_mb=(deep + 10.5 * ROW_MB) / MEMORY_SAFETY, prefix=PrefixRoom(mb=100, rows=80, in_memory=True)
    )
    given = {"fit": FIT, "budgets": budgets, "shape": SHAPE, "lora": LORA}
    found = choose([candidate(2), candidate(11)], spec=TrainSpec(), down_bytes=0, **given)
    assert isinstance(found, Chosen) and found.candidate.depth == 11
    assert found.candidate.peak_mb == pytest.approx(deep + 10 * ROW_MB)
    smaller = step_down(
        [candidate(2), candidate(11)], found.candidate, spec=TrainSpec(), down_bytes=0, **given
    )
    assert smaller is not None and smaller.candidate.peak_mb == pytest.approx(peak(2))

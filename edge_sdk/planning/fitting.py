"""From probes to a ``Fit``: small non-negative least squares around what was counted, in plain Python.

Memory has five unknowns: what the bytes counted for plain layers, packed layers and the rooms of either are
to be multiplied with, and a fixed rest. Time has four: of the forward pass, of tuned layers, of packing, of
what does not grow with the batch, all near the one pace that this machine has against that of the prices.
Errors are relative to what was measured. Each unknown is drawn to its counted value with a small weight, so
that few probes never leave one open, and what was not probed is what was counted.

The optimum of a non-negative least squares problem is the ordinary one on its support. With five unknowns
there are 31 supports, so all are tried: no iteration, no tolerance to tune.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from statistics import median

from msgspec.structs import replace

from edge_sdk.errors import TrainerError
from edge_sdk.planning.cost import Scales, phases
from edge_sdk.planning.memory import counted
from edge_sdk.planning.work import prices, worked
from edge_sdk.protocol.measure import Fit, ProbePoint
from edge_sdk.protocol.model import LoraShape, ModelShape
from edge_sdk.protocol.spec import Setting

__all__ = ["estimate", "fit_cost", "non_negative_least_squares", "setting_of"]

_MEMORY_PRIOR = 0.4
"""A scale that is off its counted value by all of it weighs as much as a probe that is off by two fifths."""
_ROOMS_PRIOR = 0.25
"""The same of the two rooms' difference: a packed layer's room holds more tensors than a plain one's, so the
one tells of the other, but not all."""
_TIME_PRIORS = (0.2, 0.2, 0.2, 0.02)
"""What a call takes differs most between machines, and the allocator is in it."""
_PACES = len(_TIME_PRIORS)
_FIXED_PRIOR = 0.1
_SPREAD_MB = 5.0
_BELOW_MB = 20.0
"""By how much the fixed rest may be below 0: what the heap at rest has in holes, small trainings fill."""
_ROUNDS = 4
"""Which phase of a probe was the highest depends on the scales: so often are both found in turn."""


def setting_of(point: ProbePoint, reference: Setting) -> Setting:
    """What a probe measured; what it does not say is the reference's."""
    return replace(
        reference,
        depth=point.depth,
        quantized_layers=point.quantized_layers,
        micro_batch=point.micro_batch or reference.micro_batch,
        max_length=point.max_length or reference.max_length,
        levers=point.levers or reference.levers,
    )


def fit_cost(
    points: Sequence[ProbePoint],
    *,
    shape: ModelShape,
    lora: LoraShape,
    reference: Setting,
    rest_mb: float,
    kernel: str = "fbgemm",
    threads: int = 0,
    machine: str = "",
    heap: float = 1.0,
) -> Fit:
    """The cost model of a device from what it measured; its figures are of ``reference``, whatever its depth.

    A kind of setting that was not probed is as it was counted; ``choice.unpredictable`` keeps it from being
    chosen. ``heap``: what the allocator is expected to hold for a byte of tensors, where probes do not tell.

    Raises:
        TrainerError: no point at all, or one that is not finite.
    """
    if not points:
        raise TrainerError(
            "no setting could be measured: not even the smallest probe ran",
            "raise limits.memory_mb, or lower training.batch or training.max_length in the run",
        )
    for point in points:
        if not (math.isfinite(point.peak_mb) and math.isfinite(point.step_s)):
            raise TrainerError(
                f"the probe at depth {point.depth} with {point.quantized_layers} quantized layers "
                f"measured {point.peak_mb} MB and {point.step_s} s"
            )
    scales = _memory(points, shape, lora, reference, heap)
    paces = _time(points, shape, lora, reference, kernel)
    return replace(
        _figures(shape, lora, reference, scales, paces, kernel),
        rest_mb=rest_mb,
        probes=tuple(points),
        threads=threads,
        machine=machine,
    )


def estimate(
    shape: ModelShape,
    lora: LoraShape,
    reference: Setting,
    *,
    pace: float = 1.0,
    kernel: str = "fbgemm",
    heap: float = 1.0,
) -> Fit:
    """What is counted, with nothing measured.

    ``pace``: seconds here for one on the machine of the prices. ``heap``: as in ``fit_cost``; 1 is what a
    trainer under a memory limit holds.
    """
    scales = Scales(heap, heap, heap, heap, prices().fixed_mb)
    return _figures(shape, lora, reference, scales, (pace,) * _PACES, kernel)


def _figures(
    shape: ModelShape,
    lora: LoraShape,
    reference: Setting,
    scales: Scales,
    paces: Sequence[float],
    kernel: str,
) -> Fit:
    """Scales as the figures of the reference."""
    flat = replace(reference, depth=1, quantized_layers=0, accumulation=1)
    at, work = counted(shape, lora, flat), worked(shape, lora, flat, kernel)
    layer = scales.plain * (at.plain + at.state) / 1e6
    packed = min(layer, scales.packed * (at.packed + at.state) / 1e6)
    besides = at.head + at.edge
    room = scales.room * (besides + at.plain_room) / 1e6
    fixed = max(scales.fixed_mb, -room)  # of a training that holes in the heap take in whole
    return Fit(
        micro_batch=reference.micro_batch,
        max_length=reference.max_length,
        levers=reference.levers,
        factors=reference.factors,
        optimizer=reference.optimizer,
        rest_mb=0.0,
        head_mb=fixed + room,
        layer_mb=layer,
        saved_mb=layer - packed,
        work_mb=max(0.0, scales.packed_room * (besides + at.packed_room) / 1e6 - room),
        fixed_mb=fixed,
        forward_s=paces[0] * work.forward_s,
        layer_s=paces[1] * work.layer_s + paces[0] * work.again_s,
        quantize_s=paces[2] * work.quantize_s,
        call_s=paces[3] * (work.call_s + work.tuned_s),
        probes=(),
        kernel=kernel,
    )


def _memory(
    points: Sequence[ProbePoint], shape: ModelShape, lora: LoraShape, reference: Setting, heap: float
) -> Scales:
    fixed = prices().fixed_mb
    scales = Scales(heap, heap, heap, heap, fixed)
    found = [(p, phases(shape, lora, setting_of(p, reference))) for p in points if p.peak_mb > 0]
    prior = [tuple(_MEMORY_PRIOR * (place == column) for column in range(5)) for place in range(4)]
    prior.append((0.0, 0.0, _ROOMS_PRIOR, -_ROOMS_PRIOR, 0.0))
    prior.append((0.0, 0.0, 0.0, 0.0, _FIXED_PRIOR / _SPREAD_MB))
    wanted = [_MEMORY_PRIOR * heap] * 4 + [0.0, _FIXED_PRIOR * (fixed + _BELOW_MB) / _SPREAD_MB]
    for _ in range(_ROUNDS):
        rows: list[tuple[float, ...]] = []
        values: list[float] = []
        for point, options in found:
            top = max(options, key=scales.peak_mb)
            rooms = (0.0, top.room) if top.of_packed else (top.room, 0.0)
            row = (*(part / 1e6 for part in (top.plain, top.packed, *rooms)), 1.0)
            rows.append(tuple(part / point.peak_mb for part in row))
            values.append((point.peak_mb + _BELOW_MB) / point.peak_mb)
        plain, packed, room, packed_room, rest = non_negative_least_squares(
            [*rows, *prior], [*values, *wanted]
        )
        scales = Scales(plain, packed, room, packed_room, rest - _BELOW_MB)
    return scales


def _time(
    points: Sequence[ProbePoint], shape: ModelShape, lora: LoraShape, reference: Setting, kernel: str
) -> tuple[float, ...]:
    columns = []
    for point in points:
        one = worked(shape, lora, replace(setting_of(point, reference), depth=1, quantized_layers=0), kernel)
        again, calls = point.depth * one.again_s, one.call_s + point.depth * one.tuned_s
        columns.append(
            (
                one.forward_s + again,
                point.depth * one.layer_s,
                point.quantized_layers * one.quantize_s,
                calls,
            )
        )
    timed = [(point.step_s, row) for point, row in zip(points, columns, strict=True) if point.step_s > 0]
    if not timed:
        return (0.0,) * _PACES
    pace = median(seconds / sum(row) for seconds, row in timed)
    rows = [tuple(pace * part / seconds for part in row) for seconds, row in timed]
    rows += [
        tuple(prior * (place == column) for column in range(_PACES))
        for place, prior in enumerate(_TIME_PRIORS)
    ]
    found = non_negative_least_squares(rows, [1.0] * len(timed) + list(_TIME_PRIORS))
    return tuple(pace * one for one in found)


def non_negative_least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> tuple[float, ...]:
    """x >= 0 that minimises |rows · x - values|²; among equals the one with the fewest, first unknowns.

    For a handful of unknowns only: it tries every support (2^n of them).
    """
    unknowns = len(rows[0])
    best = (0.0,) * unknowns
    best_loss = _loss(rows, values, best)
    slack = 1e-12 * sum(v * v for v in values)  # rounding must not bring in another unknown
    for size in range(1, unknowns + 1):
        for support in combinations(range(unknowns), size):
            solved = _least_squares([[row[i] for i in support] for row in rows], values)
            if solved is None or min(solved) < 0:
                continue
            full = [0.0] * unknowns
            for index, value in zip(support, solved, strict=True):
                full[index] = value
            loss = _loss(rows, values, full)
            if loss < best_loss - slack:
                best, best_loss = tuple(full), loss
    return best


def _loss(rows: Sequence[Sequence[float]], values: Sequence[float], x: Sequence[float]) -> float:
    return sum(
        (sum(c * v for c, v in zip(row, x, strict=True)) - value) ** 2
        for row, value in zip(rows, values, strict=True)
    )


def _least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float] | None:
    """Normal equations by elimination with pivoting; None where the columns depend on each other."""
    n = len(rows[0])
    table = [
        [sum(row[i] * row[j] for row in rows) for j in range(n)]
        + [sum(row[i] * value for row, value in zip(rows, values, strict=True))]
        for i in range(n)
    ]
    scale = max(abs(table[i][i]) for i in range(n))
    for column in range(n):
        pivot = max(range(column, n), key=lambda r: abs(table[r][column]))
        if abs(table[pivot][column]) <= 1e-9 * scale:
            return None
        table[column], table[pivot] = table[pivot], table[column]
        for below in range(column + 1, n):
            factor = table[below][column] / table[column][column]
            for j in range(column, n + 1):
                table[below][j] -= factor * table[column][j]
    x = [0.0] * n
    for i in reversed(range(n)):
        x[i] = (table[i][n] - sum(table[i][j] * x[j] for j in range(i + 1, n))) / table[i][i]
    return x

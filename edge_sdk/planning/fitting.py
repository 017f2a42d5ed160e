"""From probes to a ``Fit``: two small non-negative least squares, solved exactly in plain Python.

The optimum of a non-negative least squares problem is the ordinary one on its support. With four unknowns
there are fifteen supports, so all are tried: no iteration, no tolerance to tune. Where the probes leave a
coefficient open (one depth only, nothing quantized), the smallest support is taken, and its order says
which: what cannot be told apart is charged to the layers, so that greater depths never look cheap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from edge_sdk.errors import TrainerError
from edge_sdk.protocol.measure import Fit, ProbePoint
from edge_sdk.protocol.spec import Levers

__all__ = ["fit_cost", "non_negative_least_squares"]


_PRIOR = 0.02


def fit_cost(
    points: Sequence[ProbePoint],
    *,
    micro_batch: int,
    max_length: int,
    levers: Levers | None = None,
    rest_mb: float,
    threads: int = 0,
    machine: str = "",
    prior: Fit | None = None,
) -> Fit:
    """The cost model of a device from what it measured; see ``Fit`` for the two formulas.

    A kind of setting that was not probed is not made up: without a quantized probe ``saved_mb``, ``work_mb``
    and ``quantize_s`` are 0, and ``choice.predictable`` keeps such settings from being chosen.

    Args:
        prior: what memory was counted to be. It weighs a fiftieth of a probe, and so only decides what the
            probes leave open: three of them, under a tight limit, do not tell four coefficients apart.

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
    # layer_mb = kept + saved with both at least 0: quantizing a layer cannot save more than the layer holds,
    # which also keeps memory monotone in depth.
    rows = [(p.depth, p.depth - p.quantized_layers, float(p.quantized_layers > 0), 1.0) for p in points]
    peaks = [p.peak_mb for p in points]
    if prior is not None and any(p.quantized_layers for p in points):
        counted = (prior.layer_mb - prior.saved_mb, prior.saved_mb, prior.work_mb, prior.head_mb)
        for index, figure in enumerate(counted):
            rows.append(tuple(_PRIOR * (index == column) for column in range(4)))  # type: ignore[arg-type]
            peaks.append(_PRIOR * figure)
    kept, saved, work, head = non_negative_least_squares(rows, peaks)
    layer_s, forward_s, quantize_s = non_negative_least_squares(
        [(p.depth, 1.0, p.quantized_layers) for p in points], [p.step_s for p in points]
    )
    return Fit(
        micro_batch=micro_batch,
        max_length=max_length,
        levers=levers or Levers(),
        rest_mb=rest_mb,
        head_mb=head,
        layer_mb=kept + saved,
        saved_mb=saved,
        work_mb=work,
        forward_s=forward_s,
        layer_s=layer_s,
        quantize_s=quantize_s,
        probes=tuple(points),
        threads=threads,
        machine=machine,
    )


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

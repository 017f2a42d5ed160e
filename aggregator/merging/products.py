"""Sums of products B A: kept as stacked factors as long as these are smaller than the dense matrix.

Slot-major, as parts are stored: A (rank, in), B (rank, out); the product is B^T A, (out, in).
"""

from __future__ import annotations

import numpy as np

from aggregator.merging.base import Doubles

__all__ = ["ProductSum", "factorise"]

_NULL = 1e-12
"""Singular values below this share of the largest are rounding, not content."""


class ProductSum:
    """sum of w · B^T A, exact up to float64's rounding, in no more room than the dense matrix takes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self._inputs, self._outputs = inputs, outputs
        self._a: list[Doubles] = []
        self._b: list[Doubles] = []
        self._rank = 0
        self._dense: Doubles | None = None

    def add(self, a: Doubles, b: Doubles, weight: float) -> None:
        if self._dense is not None:
            self._dense += b.T @ (weight * a)
            return
        self._a.append(weight * a)
        self._b.append(np.array(b))
        self._rank += a.shape[0]
        if self._rank * (self._inputs + self._outputs) > self._inputs * self._outputs:
            a, b = np.concatenate(self._a), np.concatenate(self._b)
            self._a, self._b = [], []
            self._dense = b.T @ a

    def factors(self, scale: float, most: int) -> tuple[Doubles, Doubles, Doubles]:
        """The best approximation of ``scale`` times the sum by ``most`` slots at most: A, B, their values.

        Singular values fall; A and B have orthonormal rows. Signs are such that the largest entry of each row
        of B is positive, so that the same sum has one answer.
        """
        if self._dense is not None:
            return factorise(None, None, self._dense * scale, most)
        if not self._a:
            nothing = np.zeros((0, self._inputs)), np.zeros((0, self._outputs))
            return *nothing, np.zeros(0)
        return factorise(np.concatenate(self._a) * scale, np.concatenate(self._b), None, most)


def factorise(
    a: Doubles | None, b: Doubles | None, dense: Doubles | None, most: int
) -> tuple[Doubles, Doubles, Doubles]:
    """SVD of ``dense``, or of ``b.T @ a`` by way of the factors' QR, where nothing dense is built."""
    if dense is not None:
        u, values, v = np.linalg.svd(dense, full_matrices=False)
    else:
        assert a is not None and b is not None  # noqa: S101 - the caller has one or the other
        q_out, r_out = np.linalg.qr(b.T)
        q_in, r_in = np.linalg.qr(a.T)
        core_u, values, core_v = np.linalg.svd(r_out @ r_in.T, full_matrices=False)
        u, v = q_out @ core_u, core_v @ q_in.T
    kept = min(most, int((values > _NULL * values[0]).sum()) if values.size and values[0] > 0 else 0)
    left, right, values = np.ascontiguousarray(u.T[:kept]), v[:kept].copy(), values[:kept]
    if kept:
        largest = np.abs(left).argmax(axis=1)
        signs = np.where(left[np.arange(kept), largest] < 0, -1.0, 1.0)[:, None]
        left, right = left * signs, right * signs
    return right, left, values

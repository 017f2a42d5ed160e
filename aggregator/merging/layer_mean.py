"""Per-layer mean: each part moves by the mean of the deltas of those who trained it.

    theta_l <- theta_l + sum_{i in S_l} w_i delta_{i,l} / sum_{i in S_l} w_i,   w_i = samples_i · weight_i

S_l are the contributors to part l (to the slot, where an update holds some slots only); a part that nobody
trained stays. A and B are averaged separately. With equal depths this is FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from aggregator.merging.base import Change, Doubles, MergeRule
from edge_sdk.updates.codecs import Floats

__all__ = ["RULE", "LayerMean", "Means"]


class Means:
    """A weighted mean of every row, over those who changed the row."""

    def __init__(self, before: Mapping[str, Floats]) -> None:
        self._before = before
        self._totals = {key: np.zeros(rows.shape, np.float64) for key, rows in before.items()}
        self._weights = {key: np.zeros((rows.shape[0], 1), np.float64) for key, rows in before.items()}

    def add(self, changes: Mapping[str, Change], weight: float) -> None:
        for key, change in changes.items():
            at, rows = change.at, change.rows.astype(np.float64)
            rows *= weight
            self._totals[key][at] += rows
            self._weights[key][at] += weight

    def result(self) -> Mapping[str, Doubles]:
        return {key: self._mean(key, rows) for key, rows in self._before.items()}

    def _mean(self, key: str, rows: Floats) -> Doubles:
        """In place of the total, which is of no more use: a copy of a large part is memory."""
        merged, weights = self._totals.pop(key), self._weights[key]
        still = weights[:, 0] <= 0
        merged /= np.where(weights > 0, weights, 1.0)
        merged += rows
        merged[still] = rows[still]
        return merged


class LayerMean(MergeRule):
    name = "layer-mean"

    def begin(self, before: Mapping[str, Floats]) -> Means:
        return Means(before)


RULE = LayerMean()

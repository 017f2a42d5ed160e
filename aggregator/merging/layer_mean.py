"""Per-layer mean: each part moves by the mean of the deltas of those who trained it.

    theta_l <- theta_l + sum_{i in S_l} w_i delta_{i,l} / sum_{i in S_l} w_i,   w_i = samples_i · weight_i

S_l are the contributors to part l (to the slot, where an update holds some slots only); a part that nobody
trained stays. A and B are averaged separately. With equal depths this is FedAvg.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aggregator.merging.base import Contribution, Opened, open_all
from edge_sdk.updates.codecs import Floats
from edge_sdk.updates.container import rows_of
from edge_sdk.updates.keys import Adapter

__all__ = ["LayerMean"]


class LayerMean:
    """Holds one part of one update at a time, beside a float64 accumulator of that part."""

    name = "layer-mean"

    def merge(self, current: Adapter, contributions: Sequence[Contribution]) -> Adapter:
        opened = open_all(current, contributions)
        return {key: _merge_part(key, rows, opened) for key, rows in current.items()}


def _merge_part(key: str, rows: Floats, opened: Sequence[Opened]) -> Floats:
    total = np.zeros(rows.shape, np.float64)
    weights = np.zeros((rows.shape[0], 1), np.float64)
    for one in opened:
        part = one.container.parts.get(key)
        if part is None:
            continue
        one.container.add_to(total, key, one.weight)
        weights[rows_of(part)] += one.weight
    merged = rows.copy()
    moved = weights[:, 0] > 0
    merged[moved] = (rows[moved] + total[moved] / weights[moved]).astype(np.float32)
    return merged

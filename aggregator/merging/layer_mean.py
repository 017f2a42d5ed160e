"""Per-layer mean: each part moves by the mean of the deltas of those who trained it.

    theta_l <- theta_l + sum_{i in S_l} w_i delta_{i,l} / sum_{i in S_l} w_i,   w_i = samples_i · weight_i

S_l are the contributors to part l (to the slot, where an update holds some slots only); a part that nobody
trained stays. A and B are averaged separately. With equal depths this is FedAvg.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from aggregator.merging.base import Contribution
from edge_sdk.errors import ContainerError
from edge_sdk.updates.codecs import Floats
from edge_sdk.updates.container import Container, read_container
from edge_sdk.updates.keys import Adapter

__all__ = ["LayerMean"]


class LayerMean:
    """Reads one part at a time, in the order of the devices' ids, into a float64 accumulator."""

    name = "layer-mean"

    def merge(self, current: Adapter, contributions: Sequence[Contribution]) -> Adapter:
        ordered = sorted(contributions, key=lambda one: one.device)
        with ExitStack() as stack:
            opened = [(one, stack.enter_context(read_container(one.path, "update"))) for one in ordered]
            for one, container in opened:
                _refuse_strangers(one, container, current)
            return {key: _merge_part(key, rows, opened) for key, rows in current.items()}


def _merge_part(key: str, rows: Floats, opened: Sequence[tuple[Contribution, Container]]) -> Floats:
    total = np.zeros(rows.shape, np.float64)
    weights = np.zeros((rows.shape[0], 1), np.float64)
    for one, container in opened:
        part = container.parts.get(key)
        if part is None:
            continue
        weight = one.samples * one.weight
        slots = slice(None) if part.slots is None else list(part.slots)
        total[slots] += weight * container.tensor(key).astype(np.float64)
        weights[slots] += weight
    mean = np.divide(total, weights, out=np.zeros_like(total), where=weights > 0)
    return (rows.astype(np.float64) + mean).astype(np.float32)


def _refuse_strangers(one: Contribution, container: Container, current: Adapter) -> None:
    for key, part in container.parts.items():
        rows = current.get(key)
        count = part.rows if part.slots is None else (max(part.slots) + 1)
        if rows is None or rows.shape[1] != part.width or count > rows.shape[0]:
            raise ContainerError(f"the update of {one.device} has a part {key!r} that the adapter has not")

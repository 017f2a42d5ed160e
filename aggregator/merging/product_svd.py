"""Product-space SVD: the mean of what devices' adapters do, B A, brought back to the run's rank.

    M <- sum_{i in S} w_i (B + dB_i)(A + dA_i) / sum_{i in S} w_i
    B, A <- the best approximation of M by rank r

S are the devices that trained the module; w_i = samples_i · weight_i. B and A share each singular value by
its root. A slot for which M has nothing left gets B = 0 and an A that can still be trained.

After FlexLoRA (NeurIPS 2024): the mean of products and its SVD are the paper's; the even split of singular
values, signs and spare slots are ours. Slots are mixed anew at every merge, so nothing that belongs to a slot
lives on: no error feedback, no server optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from aggregator.merging.base import Change, Doubles, MergeRule, Sizes, pair
from aggregator.merging.layer_mean import Means
from aggregator.merging.products import ProductSum
from edge_sdk.updates.codecs import Floats

__all__ = ["RULE", "ProductSvd", "moved", "room_of_products"]


def moved(before: Mapping[str, Floats], changes: Mapping[str, Change], key: str) -> Doubles:
    """A factor as one device has it after its training."""
    rows = before[key].astype(np.float64)
    change = changes.get(key)
    if change is not None:
        rows[change.at] += change.rows
    return rows


def room_of_products(sizes: Sizes, keys: tuple[str, str]) -> int:
    """The sum of products, and what its decomposition takes beside it."""
    (rank, inputs), (_, outputs) = (sizes[key] for key in keys)
    return 8 * (4 * inputs * outputs + 4 * rank * (inputs + outputs))


class _Products:
    def __init__(self, before: Mapping[str, Floats], keys: tuple[str, str]) -> None:
        self._before = before
        self._a, self._b = keys
        self._sum = ProductSum(before[self._a].shape[1], before[self._b].shape[1])
        self._weight = 0.0

    def add(self, changes: Mapping[str, Change], weight: float) -> None:
        if weight > 0:
            a, b = (moved(self._before, changes, key) for key in (self._a, self._b))
            self._sum.add(a, b, weight)
            self._weight += weight

    def result(self) -> Mapping[str, Doubles]:
        a, b = (self._before[key].astype(np.float64) for key in (self._a, self._b))
        if self._weight > 0:
            rank = a.shape[0]
            right, left, values = self._sum.factors(1.0 / self._weight, rank)
            root, used = np.sqrt(values)[:, None], len(values)
            # a pair of zeros would have no gradient for ever
            spare = a[used:]
            a, b = (
                np.concatenate([root * right, spare]),
                np.concatenate([root * left, np.zeros_like(b[used:])]),
            )
        return {self._a: a, self._b: b}


class ProductSvd(MergeRule):
    name = "product-svd"
    keeps_slots = False

    def begin(self, before: Mapping[str, Floats]) -> _Products | Means:
        keys = pair(before)
        return Means(before) if keys is None else _Products(before, keys)

    def room(self, sizes: Sizes) -> int:
        keys = pair(sizes)
        return super().room(sizes) if keys is None else room_of_products(sizes, keys)


RULE = ProductSvd()

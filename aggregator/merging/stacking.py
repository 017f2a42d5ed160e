"""Stacking: what the devices' adapters do is added up exactly, and folded into the base as a low-rank part.

    F <- F + sum_{i in S} w_i (B + dB_i)(A + dA_i) / sum_{i in S} w_i ;   B <- 0, A <- drawn anew

S are the devices that trained the module; w_i = samples_i · weight_i. The sum of the devices' products has
more rank than one adapter has slots, so that it moves into the fold F, which every holder of the version adds
to its base: a part of role ``fold``, whose rows are the stacked factors, orthogonalised, and no more of them
than the sum has rank. Every round begins with fresh slots.

After FLoRA (NeurIPS 2024): exact sums by stacking and new slots each round are the paper's; that the fold
stays a low-rank part of the version instead of changing the base's weights, and its orthogonal form, are
ours. It grows: after n devices and rounds of rank r up to n·r rows a module, at most as many as the module's
smaller side. Slots do not go on, so there is no error feedback and no server optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from aggregator.merging.base import Change, Doubles, MergeRule, Sizes, pair
from aggregator.merging.layer_mean import Means
from aggregator.merging.product_svd import moved, room_of_products
from aggregator.merging.products import ProductSum
from edge_sdk.errors import ContainerError
from edge_sdk.protocol.container import Part
from edge_sdk.updates.codecs import Floats

__all__ = ["RULE", "Stacking"]

_FOLD = "fold."


class _Stack:
    def __init__(self, before: Mapping[str, Floats], keys: tuple[str, str]) -> None:
        self._before = before
        self._a, self._b = keys
        self._inputs, self._outputs = before[self._a].shape[1], before[self._b].shape[1]
        self._sum = ProductSum(self._inputs, self._outputs)
        self._weight = 0.0

    def add(self, changes: Mapping[str, Change], weight: float) -> None:
        if weight > 0:
            a, b = (moved(self._before, changes, key) for key in (self._a, self._b))
            self._sum.add(a, b, weight)
            self._weight += weight

    def result(self) -> Mapping[str, Doubles]:
        folds = [_FOLD + key for key in (self._a, self._b)]
        before = {key: self._before[key].astype(np.float64) for key in folds if key in self._before}
        if self._weight == 0:
            return before
        if before:
            a, b = (before[key] for key in folds)
            self._sum.add(a, b, self._weight)  # divided by it below: the fold counts once
        right, left, values = self._sum.factors(1.0 / self._weight, min(self._inputs, self._outputs))
        root = np.sqrt(values)[:, None]
        return dict(zip(folds, (root * right, root * left), strict=True))


class Stacking(MergeRule):
    name = "stacking"
    keeps_slots = False
    reinit = "each-round"
    fold = "low-rank"

    def begin(self, before: Mapping[str, Floats]) -> _Stack | Means:
        keys = pair(before)
        return Means(before) if keys is None else _Stack(before, keys)

    def check(self, parts: Mapping[str, Part]) -> None:
        for part in parts.values():
            both = {f"{part.layer}.{part.module}.{factor}" for factor in "AB"}
            if part.layer is not None and not both <= parts.keys():
                raise ContainerError(
                    f"part {part.key!r} comes without its other factor",
                    "stacking needs both: set training.factors to AB",
                )

    def room(self, sizes: Sizes) -> int:
        keys = pair(sizes)
        return super().room(sizes) if keys is None else room_of_products(sizes, keys)

    def sizes_after(self, sizes: Sizes, trained: Mapping[str, int]) -> Sizes:
        """The fold has a row for every slot that was trained, until it has all that its module can have."""
        keys = pair(sizes)
        if keys is None:
            return sizes
        (_, inputs), (_, outputs) = (sizes[key] for key in keys)
        held = sizes[_FOLD + keys[0]][0] if _FOLD + keys[0] in sizes else 0
        rows = min(inputs, outputs, held + trained.get(keys[1], 0))
        return {**sizes, _FOLD + keys[0]: (rows, inputs), _FOLD + keys[1]: (rows, outputs)}


RULE = Stacking()

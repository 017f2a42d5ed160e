"""Rank-1 over contributors: each pair of a module is averaged over the devices that trained this pair.

    A_j <- A_j + sum_{i in K_j} w_i dA_{i,j} / sum_{i in K_j} w_i,   B_j likewise

w_i = samples_i · weight_i; K_j are the devices whose update holds slot j; a slot that nobody trained stays to
the bit. So nothing is diluted by the zeros of those who left a pair alone, as it is where all devices count
for every pair.

After HAFLQ (arXiv 2411.06581). Stated by the paper: only the devices that updated a rank-1 matrix count for
it. Reconstructed here: the weights, and that both factors of a pair are trained together.
"""

from __future__ import annotations

from collections.abc import Mapping

from aggregator.merging.base import MergeRule
from aggregator.merging.layer_mean import Means
from edge_sdk.errors import ContainerError
from edge_sdk.protocol.container import Part
from edge_sdk.updates.codecs import Floats

__all__ = ["RULE", "RankOne"]


class RankOne(MergeRule):
    name = "rank-one"

    def begin(self, before: Mapping[str, Floats]) -> Means:
        return Means(before)

    def check(self, parts: Mapping[str, Part]) -> None:
        """A and B of a module, where both are there, are of the same pairs."""
        for key, part in parts.items():
            other = parts.get(f"{part.layer}.{part.module}.B")
            if part.factor == "A" and other is not None and other.slots != part.slots:
                raise ContainerError(
                    f"part {key!r} holds the slots {part.slots or 'of all pairs'}, "
                    f"its B {other.slots or 'those of all'}",
                    "a rank-1 pair is trained whole",
                )


RULE = RankOne()

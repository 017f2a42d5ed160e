"""The merge, a block of parts at a time: what lies in memory does not grow with the devices.

A block is as many groups of parts as fit into ``BLOCK_BYTES`` of accumulators, one at least. Every update is
opened once a block and added in the one order; sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from aggregator.merging.base import Change, Contribution, Doubles, Gathering, MergeRule, Sizes, groups_of
from aggregator.merging.updates import Updates
from edge_sdk.errors import ContainerError
from edge_sdk.updates.codecs import Floats
from edge_sdk.updates.keys import Adapter

__all__ = ["BLOCK_BYTES", "Fresh", "Held", "Merge", "Source", "merge_adapter"]

BLOCK_BYTES = 10 << 20
Fresh = Callable[[str, tuple[int, int]], Floats]


class Source(Protocol):
    """An adapter whose parts are had one at a time: a chain of versions, or one in memory."""

    @property
    def sizes(self) -> Sizes: ...

    def tensor(self, key: str) -> Floats: ...


class Held:
    """An adapter in memory."""

    def __init__(self, adapter: Mapping[str, Floats]) -> None:
        self._adapter = adapter
        self.sizes: Sizes = {key: (rows.shape[0], rows.shape[1]) for key, rows in adapter.items()}

    def tensor(self, key: str) -> Floats:
        return self._adapter[key]


class Merge:
    """One merge of what devices sent into an adapter.

    Args:
        fresh: a slot's rows, by key and size, as a device that re-initialises has them in the next round.

    Raises ContainerError for a damaged update, or one that does not fit.
    """

    def __init__(
        self,
        rule: MergeRule,
        before: Source,
        contributions: Sequence[Contribution],
        fresh: Fresh | None = None,
        *,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self._rule = rule
        self._before = before
        self._fresh = fresh
        self._block_bytes = block_bytes
        self._updates = Updates(contributions, before.sizes, rule)
        trained = self._updates.trained
        self._groups = [group for group in groups_of(before.sizes) if trained.keys() & set(group)]
        if rule.reinit != "none" and fresh is None:
            raise ContainerError(f"the rule {rule.name} begins every round with fresh slots, and has none")
        self.sizes = {
            key: size
            for group in self._groups
            for key, size in rule.sizes_after({key: before.sizes[key] for key in group}, trained).items()
        }
        """Rows and width of every part that changes, as they will be."""

    def freshest(self, key: str) -> float:
        """The greatest ``weight`` of a contribution that trained the part."""
        return self._updates.freshest.get(key, 1.0)

    def parts(self) -> Iterator[tuple[str, Floats | None, Doubles]]:
        """Every part that changes: its key, how it was, and how it becomes."""
        for block in self._blocks():
            befores = [{key: self._before.tensor(key) for key in group} for group in block]
            gatherings = [self._rule.begin(before) for before in befores]
            self._gather(block, gatherings)
            for before, gathering in zip(befores, gatherings, strict=True):
                for key, rows in sorted(self._result(before, gathering).items()):
                    if not np.isfinite(rows).all():
                        raise ContainerError(f"the merge leads to values of {key!r} that are not finite")
                    yield key, before.get(key), rows

    def _result(self, before: Mapping[str, Floats], gathering: Gathering) -> dict[str, Doubles]:
        result = {key: _padded(rows, self.sizes[key][0]) for key, rows in gathering.result().items()}
        if self._rule.reinit != "none" and self._fresh is not None:
            for key, rows in before.items():
                if key not in result:
                    result[key] = self._fresh(key, (rows.shape[0], rows.shape[1])).astype(np.float64)
        return result

    def _gather(self, block: Sequence[tuple[str, ...]], gatherings: Sequence[Gathering]) -> None:
        for batch in self._updates.batches():
            for group, gathering in zip(block, gatherings, strict=True):
                for container, weight in batch:
                    parts = container.parts
                    changes = {
                        key: Change(parts[key], container.tensor(key)) for key in group if key in parts
                    }
                    if changes:
                        gathering.add(changes, weight)

    def _blocks(self) -> Iterator[list[tuple[str, ...]]]:
        block: list[tuple[str, ...]] = []
        room = 0
        for group in self._groups:
            more = self._rule.room({key: self._before.sizes[key] for key in group})
            if block and room + more > self._block_bytes:
                yield block
                block, room = [], 0
            block.append(group)
            room += more
        if block:
            yield block


def _padded(rows: Doubles, count: int) -> Doubles:
    """With rows of zeros up to ``count``: less than was reckoned with may be left of a sum."""
    if rows.shape[0] == count:
        return rows
    return np.concatenate([rows, np.zeros((count - rows.shape[0], rows.shape[1]))])


def merge_adapter(
    rule: MergeRule,
    current: Adapter,
    contributions: Sequence[Contribution],
    fresh: Fresh | None = None,
    *,
    block_bytes: int = BLOCK_BYTES,
) -> Adapter:
    """The merge of an adapter that lies in memory; ``current`` stays as it is."""
    merged = dict(current)
    merge = Merge(rule, Held(current), contributions, fresh, block_bytes=block_bytes)
    for key, _, rows in merge.parts():
        merged[key] = rows.astype(np.float32)
    return merged

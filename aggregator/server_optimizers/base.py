"""Server optimizers: how far the adapter goes along the merged change. One file each.

The change that a merge rule finds is taken as a step's direction, with state that lives from version to
version: an object beside each version, so that a server that was killed goes on with the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aggregator.merging.base import Doubles

__all__ = ["ServerOptimizer", "State", "rows_at_rest"]

State = dict[str, Doubles]
"""One part's state, by name of the state."""


@dataclass(frozen=True)
class ServerOptimizer:
    """A frozen dataclass, whose fields are the figures that ``[merge]`` of run.toml may set."""

    name = ""

    @property
    def states(self) -> tuple[str, ...]:
        """Names of what it keeps of every value."""
        raise NotImplementedError

    def begin(self, state: str) -> float:
        """What a state is before the first step."""
        raise NotImplementedError

    def step(self, change: Doubles, state: State) -> Doubles:
        """The step for a change, row by row; ``state`` is changed in place."""
        raise NotImplementedError

    def figures(self) -> Mapping[str, float]:
        """Its settings, by name."""
        return dataclasses.asdict(self)


def rows_at_rest(change: Doubles) -> npt.NDArray[np.bool_]:
    """Rows that nobody changed: they stay, and what is kept of them waits."""
    return np.asarray((change == 0).all(axis=1))

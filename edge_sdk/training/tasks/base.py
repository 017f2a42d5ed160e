"""What the training loop knows of a task: rows, batches, a loss, an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from edge_sdk.data.rows import RowSource
from edge_sdk.training.model import TunableModel
from edge_sdk.training.tasks.metrics import Metrics
from edge_sdk.training.tasks.tokens import Rows

__all__ = ["Batch", "Task"]

Batch = tuple[Any, Any, Any]
"""Token ids (batch, length), attention mask (batch, length), targets.

Where the mask is None, the first is what the head reads, (batch, 1, hidden). Targets of classification:
labels (batch,); of a causal LM: the id that is to follow each place, (batch, length), -100 where none is to
be learnt.
"""


class Task(Protocol):
    """Of a model it uses ``hidden``, ``encode``, ``head`` and the output layer, never the net itself."""

    @property
    def name(self) -> str: ...

    @property
    def has_head(self) -> bool:
        """Whether there is a head to train on its own, whose inputs may be kept from epoch to epoch."""
        ...

    def rows(
        self,
        source: RowSource,
        labels: Sequence[str],
        *,
        tokenizer: Any,
        template: str,
        max_length: int,
        check: Callable[[], None],
    ) -> Rows:
        """Reads and tokenizes all rows. ``check`` is called between blocks, to be interrupted.

        Raises:
            DataError: a row that cannot be used, with its number; or no row is left.
            BaseModelError: the tokenizer lacks what the rows need.
        """
        ...

    def batch(self, rows: Rows, chosen: Any, device: Any, *, trim: bool = False) -> Batch:
        """The chosen rows, (batch,) int64. ``trim``: no longer than the longest of them."""
        ...

    def random_targets(self, ids: Any, labels: int, draw: np.random.Generator) -> Any:
        """Targets for random ``ids`` that cost as much as any."""
        ...

    def count(self, batch: Batch) -> int:
        """How many targets the batch's loss is the mean of."""
        ...

    def loss(self, model: TunableModel, batch: Batch, count: int | None = None) -> Any:
        """Sum over the batch's targets divided by ``count``; None: by their number.

        Where a step is made of several batches, ``count`` is that of all of them, and the losses add up.
        """
        ...

    def evaluate(
        self,
        model: TunableModel,
        batches: Iterable[Batch],
        *,
        check: Callable[[], None],
        report: Callable[[int], None],
    ) -> Metrics:
        """Over all batches. ``report`` is told of the rows done.

        Raises TrainerError where the loss is not finite.
        """
        ...

"""Classification of whole texts: one label a row, read by a head that is trained with the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from edge_sdk.data.rows import RowSource, read_rows
from edge_sdk.errors import DataError
from edge_sdk.training.model import TunableModel
from edge_sdk.training.tasks.base import Batch
from edge_sdk.training.tasks.metrics import LabelScores, Metrics
from edge_sdk.training.tasks.tokens import BLOCK, Rows, RowsBuilder

__all__ = ["Classification"]


class Classification:
    name = "classification"
    has_head = True

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
        number = {label: index for index, label in enumerate(labels)}
        counts = [0] * len(labels)
        targets: list[int] = []
        texts: list[str] = []
        numbers: list[int] = []
        builder = RowsBuilder()

        def flush() -> None:
            check()
            coded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
            for row_number, ids in zip(numbers, coded, strict=True):
                if not ids:
                    raise DataError(
                        f"{source.path}: row {row_number}: the base's tokenizer makes no token of its text",
                        "take the row out; if it is so with every row, the tokenizer is another model's",
                    )
                builder.add(ids)
            texts.clear()
            numbers.clear()

        for row in read_rows(source, labels):
            texts.append(template.replace("{text}", row.text))
            numbers.append(row.number)
            targets.append(number[row.label])
            counts[targets[-1]] += 1
            if len(texts) == BLOCK:
                flush()
        if texts:
            flush()
        return builder.build(
            max_length=max_length,
            pad=tokenizer.pad_token_id,
            labels=torch.tensor(targets),
            counts=tuple(counts),
        )

    def batch(self, rows: Rows, chosen: Any, device: Any, *, trim: bool = False) -> Batch:
        return (*rows.inputs(chosen, device, trim=trim), rows.labels[chosen].to(device))

    def random_targets(self, ids: Any, labels: int, draw: np.random.Generator) -> Any:
        return torch.from_numpy(draw.integers(0, labels, len(ids))).to(ids.device)

    def count(self, batch: Batch) -> int:
        return len(batch[2])

    def loss(self, model: TunableModel, batch: Batch, count: int | None = None) -> Any:
        labels = batch[2]
        share = 1.0 if count is None else len(labels) / count
        return cross_entropy(_logits(model, batch).float(), labels) * share

    def evaluate(
        self,
        model: TunableModel,
        batches: Iterable[Batch],
        *,
        check: Callable[[], None],
        report: Callable[[int], None],
    ) -> Metrics:
        scores = LabelScores()
        with torch.inference_mode():
            for batch in batches:
                check()
                scores.add(_logits(model, batch).float(), batch[2])
                report(scores.examples)
        return scores.result()


def _logits(model: TunableModel, batch: Batch) -> Any:
    inputs, mask, _ = batch
    return model.head(inputs if mask is None else model.encode(inputs, mask))

"""Rows as the model reads them: text through the template, tokenized once, padded to one length."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edge_sdk.data.rows import RowSource, read_rows
from edge_sdk.errors import BaseModelError

__all__ = ["Rows", "load_tokenizer", "tokenize_rows"]

_BLOCK = 512
"""Rows that are tokenized at a time; keeps the texts of the rest out of memory."""


@dataclass
class Rows:
    """Tokenized rows. ``ids`` (rows, max_length) int32, padded; ``lengths`` and ``labels`` (rows,).

    ``head_inputs``: what the head reads of each row, (rows, hidden), with the digest of the LoRA values that
    they were computed with, and which rows are there.
    """

    ids: Any
    lengths: Any
    labels: Any
    counts: tuple[int, ...]
    head_inputs: tuple[str, Any, Any] | None = None

    def __len__(self) -> int:
        return int(self.labels.numel())

    def inputs(self, chosen: Any, device: Any, *, trim: bool = False) -> tuple[Any, Any]:
        """Token ids and attention mask of the chosen rows, (batch, max_length) int64 each.

        ``trim``: no longer than the longest of them.
        """
        ids = self.ids[chosen].to(device=device, dtype=torch.int64)
        if trim:
            ids = ids[:, : int(self.lengths[chosen].max())]
        places = torch.arange(ids.shape[1]).unsqueeze(0)
        mask = (places < self.lengths[chosen].unsqueeze(1)).to(device=device, dtype=torch.int64)
        return ids, mask

    def targets(self, chosen: Any, device: Any) -> Any:
        return self.labels[chosen].to(device)


def load_tokenizer(folder: Path) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BaseModelError(
            f"the tokenizer in {folder} cannot be loaded: {str(error).splitlines()[0][:300]}",
            "the folder needs tokenizer.json or the vocabulary of its tokenizer",
        ) from error
    if tokenizer.pad_token_id is None:
        raise BaseModelError(f"the tokenizer in {folder} has no padding token", "set pad_token in its config")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def tokenize_rows(
    source: RowSource,
    labels: Sequence[str],
    *,
    tokenizer: Any,
    template: str,
    max_length: int,
    check: Callable[[], None],
) -> Rows:
    """Reads and tokenizes all rows. ``check`` is called between blocks, to be interrupted.

    Raises DataError for a row that cannot be used, with its number.
    """
    number = {label: index for index, label in enumerate(labels)}
    counts = [0] * len(labels)
    ids, lengths, targets = [], [], []
    texts: list[str] = []

    def flush() -> None:
        check()
        coded = tokenizer(texts, truncation=True, max_length=max_length, padding="max_length")
        ids.append(torch.tensor(coded["input_ids"], dtype=torch.int32))
        lengths.append(torch.tensor(coded["attention_mask"], dtype=torch.int32).sum(1))
        texts.clear()

    for row in read_rows(source, labels):
        texts.append(template.replace("{text}", row.text))
        targets.append(number[row.label])
        counts[targets[-1]] += 1
        if len(texts) == _BLOCK:
            flush()
    if texts:
        flush()
    return Rows(torch.cat(ids), torch.cat(lengths), torch.tensor(targets), tuple(counts))

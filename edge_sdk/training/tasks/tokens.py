"""Rows as the model reads them: tokenized once, kept end to end, padded when a batch is made of them."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_sdk.errors import BaseModelError

__all__ = ["BLOCK", "Rows", "RowsBuilder", "check_ids", "load_tokenizer"]

BLOCK = 512
"""Rows that are tokenized at a time; keeps the texts of the rest out of memory."""


@dataclass
class Rows:
    """Tokenized rows. ``ids`` of all rows end to end, int32; of each row ``starts`` and ``lengths``, (rows,).

    Attributes:
        max_length: what batches are padded to, with the token ``pad``.
        labels: of classification, (rows,) int64.
        learnt: of a causal LM, beside ``ids``: whether the token there is one to predict.
        counts: rows by label.
        dropped: rows that are not here because nothing of them could be learnt.
        head_inputs: what the head reads of each row, (rows, hidden), with the digest of the LoRA values that
            they were computed with, and which rows are there. By whether their batches were trimmed: the
            last bits differ.
    """

    ids: Any
    starts: Any
    lengths: Any
    max_length: int
    pad: int
    labels: Any = None
    learnt: Any = None
    counts: tuple[int, ...] = ()
    dropped: int = 0
    head_inputs: dict[bool, tuple[str, Any, Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.lengths.numel())

    def inputs(self, chosen: Any, device: Any, *, trim: bool = False) -> tuple[Any, Any]:
        """Token ids and attention mask of the chosen rows, (batch, max_length) int64 each.

        ``trim``: no longer than the longest of them.
        """
        at, there = self._places(chosen, trim)
        ids = torch.where(there, self.ids[at].long(), self.pad)
        return ids.to(device), there.long().to(device)

    def following(self, chosen: Any, device: Any, *, trim: bool = False) -> Any:
        """The id that is to follow each place of ``inputs``, -100 where none is to be learnt."""
        at, there = self._places(chosen, trim)
        ids = torch.where(there & self.learnt[at], self.ids[at].long(), -100)
        return torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100).to(device)

    def _places(self, chosen: Any, trim: bool) -> tuple[Any, Any]:
        """Index into ``ids``, and whether there is a token, (batch, length) each."""
        lengths = self.lengths[chosen].unsqueeze(1)
        places = torch.arange(int(lengths.max()) if trim else self.max_length).unsqueeze(0)
        there = places < lengths
        return torch.where(there, self.starts[chosen].unsqueeze(1) + places, 0), there


class RowsBuilder:
    """Takes token ids row by row."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._lengths = array("q")
        self._learnt = bytearray()

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, ids: Sequence[int], learnt: Sequence[int] = ()) -> None:
        self._ids.extend(ids)
        self._lengths.append(len(ids))
        self._learnt.extend(learnt)

    def build(self, *, max_length: int, pad: int, **more: Any) -> Rows:
        lengths = torch.from_numpy(np.array(self._lengths))  # at once: torch makes an object of every token
        return Rows(
            ids=torch.from_numpy(np.array(self._ids)),
            starts=lengths.cumsum(0) - lengths,
            lengths=lengths,
            max_length=max_length,
            pad=pad,
            learnt=torch.from_numpy(np.array(np.frombuffer(self._learnt, bool))) if self._learnt else None,
            **more,
        )


def check_ids(ids: Any, tokenizer: Any, vocabulary: int) -> None:
    """Raises BaseModelError where the model has no embedding of a token: one of ``ids``, or the padding's."""
    highest = max(int(tokenizer.pad_token_id), int(ids.max()) if ids.numel() else 0)
    if highest >= vocabulary:
        raise BaseModelError(
            f"the tokenizer gives token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), the base "
            f"model has {vocabulary} embeddings",
            "the tokenizer is another model's, or was given tokens that the model was not: "
            "model.resize_token_embeddings(len(tokenizer)), and save both",
        )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder``. One without a padding token pads with the token that ends a text: what
    stands there is masked. Raises BaseModelError.
    """
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
        if tokenizer.eos_token_id is None:
            raise BaseModelError(
                f"the tokenizer in {folder} has neither a padding token nor one that ends a text",
                "set pad_token in its config",
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer

"""How well a model does: what is added up over batches, and what is told in the end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from edge_sdk.errors import TrainerError

__all__ = ["LabelScores", "Metrics", "TokenScores"]

_LARGEST = 1e300
"""Perplexity of losses whose exponential no float holds."""


@dataclass(frozen=True)
class Metrics:
    """Of classification per row, of a causal LM per predicted token; what is not the task's own is None."""

    accuracy: float
    loss: float
    examples: int
    f1: float | None = None
    perplexity: float | None = None
    tokens: int | None = None


class LabelScores:
    """Accuracy, loss, and F1 as the plain mean over all labels that were given or predicted at least once."""

    def __init__(self) -> None:
        self.examples = 0
        self._loss = 0.0
        self._confusion: Any = None

    def add(self, logits: Any, labels: Any) -> None:
        """Logits (batch, labels), labels (batch,)."""
        classes = logits.shape[1]
        if self._confusion is None:
            self._confusion = torch.zeros(classes, classes, dtype=torch.int64)
        pairs = (labels * classes + logits.argmax(1)).cpu()
        self._confusion += torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
        self._loss += float(cross_entropy(logits, labels, reduction="sum"))
        self.examples += len(labels)

    def result(self) -> Metrics:
        """Raises TrainerError where the loss is not finite."""
        right = self._confusion.diagonal().double()
        # 2 TP / (2 TP + FP + FN): given and predicted, each counted once
        seen = self._confusion.sum(0) + self._confusion.sum(1)
        scores = 2 * right[seen > 0] / seen[seen > 0]
        return Metrics(
            accuracy=int(right.sum()) / self.examples,
            loss=_finite(self._loss / self.examples),
            examples=self.examples,
            f1=float(scores.mean()),
        )


class TokenScores:
    """Loss per predicted token, its exponential, and the share of tokens that were the likeliest."""

    def __init__(self) -> None:
        self.examples = 0
        self._tokens = 0
        self._right = 0
        self._loss = 0.0

    def add(self, rows: int, tokens: int, loss: float, right: int) -> None:
        """``loss``: the sum over the tokens."""
        self.examples += rows
        self._tokens += tokens
        self._loss += loss
        self._right += right

    def result(self) -> Metrics:
        """Raises TrainerError where the loss is not finite."""
        loss = _finite(self._loss / self._tokens)
        return Metrics(
            accuracy=self._right / self._tokens,
            loss=loss,
            examples=self.examples,
            perplexity=math.exp(loss) if loss < math.log(_LARGEST) else _LARGEST,
            tokens=self._tokens,
        )


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise TrainerError(
            f"the loss of the evaluation is {loss}", "lower training.learning_rate in run.toml"
        )
    return loss

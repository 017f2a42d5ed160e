"""Figures worked out by hand."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from edge_sdk.errors import TrainerError
from edge_sdk.training.tasks.metrics import LabelScores, TokenScores

pytestmark = pytest.mark.train


def logits_for(predicted: list[int], classes: int) -> Any:
    return torch.nn.functional.one_hot(torch.tensor(predicted), classes).float() * math.log(9)


def test_labels_by_hand() -> None:
    # of five labels one is neither given nor predicted; "2" is given and never predicted, "3" the reverse
    given = [0, 0, 0, 1, 1, 2]
    predicted = [0, 0, 1, 1, 3, 0]
    scores = LabelScores()
    for part in (slice(0, 4), slice(4, 6)):
        scores.add(logits_for(predicted[part], 5), torch.tensor(given[part]))
    found = scores.result()
    assert found.examples == 6 and found.accuracy == pytest.approx(3 / 6)
    f1 = [2 * 2 / (3 + 3), 2 * 1 / (2 + 2), 0.0, 0.0]
    assert found.f1 == pytest.approx(sum(f1) / 4)
    right, wrong = -math.log(9 / 13), -math.log(1 / 13)
    assert found.loss == pytest.approx((3 * right + 3 * wrong) / 6, rel=1e-6)
    assert found.perplexity is None and found.tokens is None


def test_all_right_is_one() -> None:
    scores = LabelScores()
    scores.add(logits_for([0, 1, 1], 3), torch.tensor([0, 1, 1]))
    assert (scores.result().accuracy, scores.result().f1) == (1.0, 1.0)


def test_tokens_by_hand() -> None:
    scores = TokenScores()
    scores.add(2, 6, 6 * math.log(4), 3)
    scores.add(1, 2, 2 * math.log(16), 2)
    assert asdict(scores.result()) == {
        "accuracy": 5 / 8, "loss": pytest.approx(math.log(4) * 10 / 8), "examples": 3, "f1": None,
        "perplexity": pytest.approx(4 ** (10 / 8)), "tokens": 8,
    }  # fmt: skip


def test_a_loss_beyond_all_exponentials_still_has_a_perplexity() -> None:
    scores = TokenScores()
    scores.add(1, 1, 5000.0, 0)
    assert math.isfinite(scores.result().perplexity or math.inf)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_an_error(loss: float) -> None:
    tokens = TokenScores()
    tokens.add(1, 1, loss, 0)
    with pytest.raises(TrainerError, match="loss of the evaluation"):
        tokens.result()
    labels = LabelScores()
    labels.add(torch.tensor([[loss, 0.0]]), torch.tensor([1]))
    with pytest.raises(TrainerError):
        labels.result()

"""The training loop: one candidate, from where the model stands, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from edge_sdk.errors import TrainerError
from edge_sdk.protocol.spec import Candidate, TrainSpec
from edge_sdk.training.activations.plan import PLAIN, Form, LayerPlan
from edge_sdk.training.activations.store import ActivationStore
from edge_sdk.training.model import TunableModel
from edge_sdk.training.optimizer import RoundOptimizer

__all__ = ["Batch", "Trace", "accuracy", "train"]

Batch = tuple[Any, Any, Any]
"""Token ids, attention mask, labels; at depth 0: what the head reads, None, labels."""


@dataclass
class Trace:
    """Loss and seconds of every step, the whole training's seconds."""

    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    train_s: float = 0.0


def train(
    model: TunableModel,
    batches: Iterator[Batch],
    candidate: Candidate,
    spec: TrainSpec,
    *,
    check: Callable[[], None],
    report: Callable[[int, float], None],
) -> Trace:
    """Trains ``candidate.steps`` steps of ``candidate.accumulation`` batches each.

    Args:
        batches: as many as are asked for; of features where the depth is 0.
        check: called between batches; may raise to end the training.
        report: called after every step with its number and loss.

    Raises:
        TrainerError: the loss is not finite.
    """
    started = time.perf_counter()
    optimizer = RoundOptimizer(model, model.set_depth(candidate.depth), spec)
    bottom = model.shape.layers - candidate.depth
    plans = _plans(list(model.layers[bottom:]), candidate)
    store = ActivationStore(model.net.parameters()).over(plans) if plans else nullcontext()
    trace = Trace()
    try:
        with store:
            for step in range(candidate.steps):
                begun = time.perf_counter()
                total = 0.0
                for _ in range(candidate.accumulation):
                    check()
                    inputs, mask, labels = next(batches)
                    logits = model.head(inputs) if mask is None else model.logits(inputs, mask)
                    loss = cross_entropy(logits, labels) / candidate.accumulation
                    loss.backward()
                    total += loss.item()
                    del logits, loss
                if total - total != 0.0:
                    raise TrainerError(
                        f"the loss of step {step + 1} is {total}", "lower training.learning_rate in run.toml"
                    )
                optimizer.step()
                trace.losses.append(total)
                trace.step_s.append(time.perf_counter() - begun)
                report(step + 1, total)
        check()
    finally:
        optimizer.close()
        model.set_depth(0)
    trace.train_s = time.perf_counter() - started
    return trace


def _plans(tuned: list[Any], candidate: Candidate) -> dict[Any, LayerPlan]:
    """By layer; the lowest are packed: their noise reaches the fewest gradients."""
    form = Form(candidate.activation_bits, candidate.activation_rounding)  # type: ignore[arg-type]
    plans = {}
    for i, layer in enumerate(tuned):
        plan = LayerPlan(form if i < candidate.quantized_layers else None, candidate.recompute)  # type: ignore[arg-type]
        if plan != PLAIN:
            plans[layer] = plan
    return plans


def accuracy(
    model: TunableModel, batches: Iterator[Batch], *, check: Callable[[], None], report: Callable[[int], None]
) -> tuple[float, float, int]:
    """Share of rows whose highest logit is the label, mean loss per row, rows."""
    right, loss, rows = 0, 0.0, 0
    with torch.inference_mode():
        for inputs, mask, labels in batches:
            check()
            logits = model.head(inputs) if mask is None else model.logits(inputs, mask)
            right += int((logits.argmax(1) == labels).sum())
            loss += float(cross_entropy(logits, labels, reduction="sum"))
            rows += len(labels)
            report(rows)
    return right / rows, loss / rows, rows

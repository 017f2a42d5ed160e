"""The training loop: one candidate, from where the model stands, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from edge_sdk.errors import DataError, TrainerError
from edge_sdk.protocol.spec import Candidate, TrainSpec
from edge_sdk.training.activations.plan import PLAIN, Form, LayerPlan
from edge_sdk.training.activations.store import ActivationStore
from edge_sdk.training.checking import checked
from edge_sdk.training.model import TunableModel
from edge_sdk.training.optimizer import LossScale, RoundOptimizer
from edge_sdk.training.prefix import Prefix
from edge_sdk.training.tasks.base import Batch, Task

__all__ = ["StepDone", "Trace", "layer_plans", "train"]

_RECENT = 8
"""Steps whose mean time tells how long the rest will take."""


@dataclass
class Trace:
    """Loss and seconds of every step, the whole training's seconds; share of row visits whose frozen prefix
    was read rather than computed."""

    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    train_s: float = 0.0
    prefix_read: float = 0.0


@dataclass(frozen=True)
class StepDone:
    """``number`` counts from 1; tokens without padding, None where features were trained on."""

    number: int
    loss: float
    tokens_per_s: float | None
    left_s: float


def train(
    model: TunableModel,
    batches: Iterator[Batch],
    candidate: Candidate,
    spec: TrainSpec,
    *,
    task: Task,
    check: Callable[[], None],
    report: Callable[[StepDone], None],
    generator: Any = None,
    prefix: Prefix | None = None,
) -> Trace:
    """Trains ``candidate.steps`` steps of ``candidate.accumulation`` batches each.

    The gradient of a step is that of the mean over all its targets, however they fall into batches.

    Args:
        batches: as many as are asked for; of features where the depth is 0.
        check: called between batches and layers; may raise to end the training.
        report: called after every step.
        generator: on the model's device; draws what is rounded by chance.
        prefix: reuse of the frozen layers, made for the rows of these batches.

    Raises:
        TrainerError: the loss is not finite.
        DataError: a step has nothing to learn.
        MechanismError: the optimizer does not run here, or gradients do not fit into fp16.
    """
    started = time.perf_counter()
    trace = Trace()
    optimizer: RoundOptimizer | None = None
    scale = LossScale() if _computes_in(model) == torch.float16 else None
    try:
        optimizer = RoundOptimizer(
            _tune(model, candidate, spec), spec, steps=candidate.steps, generator=generator
        )
        with ExitStack() as around:
            around.enter_context(_store(model, candidate, generator))
            around.enter_context(checked(model, check))
            around.enter_context(prefix.over() if prefix is not None else nullcontext())
            for step in range(candidate.steps):
                begun = time.perf_counter()
                drawn = [next(batches) for _ in range(candidate.accumulation)]
                moved = False
                while not moved:  # again at half the scale, so that a round of few steps learns, too
                    loss, tokens = _gradients(model, drawn, task, check, scale, prefix)
                    if loss - loss != 0.0:
                        raise TrainerError(
                            f"the loss of step {step + 1} is {loss}",
                            "lower training.learning_rate in run.toml",
                        )
                    moved = optimizer.step(scale)
                    if prefix is not None and not moved:
                        prefix.again(sum(len(batch[0]) for batch in drawn))
                trace.losses.append(loss)
                trace.step_s.append(time.perf_counter() - begun)
                report(_done(trace, tokens, candidate.steps))
        check()
    finally:
        if optimizer is not None:
            optimizer.close()
        model.tune(0)
    if prefix is not None:
        trace.prefix_read = prefix.read / max(1, prefix.read + prefix.computed)
    trace.train_s = time.perf_counter() - started
    return trace


def layer_plans(model: TunableModel, candidate: Candidate) -> dict[Any, LayerPlan]:
    """How each tuned layer keeps its activations, where not plainly.

    The lowest are the quantized ones: their noise reaches the fewest gradients.
    """
    form = Form(candidate.activation_bits, candidate.activation_rounding)  # type: ignore[arg-type]
    plans = {}
    for i, layer in enumerate(model.layers[model.shape.layers - candidate.depth :]):
        plan = LayerPlan(form if i < candidate.quantized_layers else None, candidate.recompute)  # type: ignore[arg-type]
        if plan != PLAIN:
            plans[layer] = plan
    return plans


def _store(model: TunableModel, candidate: Candidate, generator: Any) -> AbstractContextManager[None]:
    plans = layer_plans(model, candidate)
    if not plans:
        return nullcontext()
    return ActivationStore(model.net.parameters(), generator=generator).over(plans)


def _tune(model: TunableModel, candidate: Candidate, spec: TrainSpec) -> Mapping[str, Any]:
    """Makes what the candidate trains trainable; it, by part key."""
    model.tune(candidate.depth, slots=candidate.slots, factors=spec.factors)
    return model.trained()


def _gradients(
    model: TunableModel,
    drawn: Sequence[Batch],
    task: Task,
    check: Callable[[], None],
    scale: LossScale | None,
    prefix: Prefix | None,
) -> tuple[float, int]:
    """Gradients of one step; its loss and tokens."""
    count = sum(task.count(batch) for batch in drawn)
    if not count:
        raise DataError("the rows of a step hold no token to learn", "raise training.max_length in run.toml")
    total, tokens = 0.0, 0
    for batch in drawn:
        check()
        if prefix is not None:
            prefix.expect(len(batch[0]))
        loss = task.loss(model, batch, count)
        (loss if scale is None else loss * scale.value).backward()
        total += loss.item()
        tokens += 0 if batch[1] is None else int(batch[1].sum())
    return total, tokens


def _done(trace: Trace, tokens: int, steps: int) -> StepDone:
    recent = trace.step_s[-_RECENT:]
    return StepDone(
        number=len(trace.step_s),
        loss=trace.losses[-1],
        tokens_per_s=tokens / trace.step_s[-1] if tokens else None,
        left_s=(steps - len(trace.step_s)) * sum(recent) / len(recent),
    )


def _computes_in(model: TunableModel) -> Any:
    """The dtype of the residual stream: that of the norms and biases of a layer."""
    kinds = [p.dtype for p in model.layers[-1].parameters() if p.dim() == 1 and p.is_floating_point()]
    return kinds[0] if kinds else torch.float32

"""The loop: what a step is the mean of, what may interrupt it, what it tells, what is drawn by chance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train

from edge_sdk.errors import DataError, TrainerError  # noqa: E402
from edge_sdk.protocol.model import LoraShape  # noqa: E402
from edge_sdk.protocol.spec import Candidate, TrainSpec  # noqa: E402
from edge_sdk.training import checking  # noqa: E402
from edge_sdk.training.activations.plan import Form, LayerPlan  # noqa: E402
from edge_sdk.training.checking import checked  # noqa: E402
from edge_sdk.training.failures import InterruptError  # noqa: E402
from edge_sdk.training.loop import StepDone, Trace, layer_plans, train  # noqa: E402
from edge_sdk.training.model import TunableModel, load_model  # noqa: E402
from edge_sdk.training.randomness import draw_rows, generator, torch_generator  # noqa: E402
from edge_sdk.training.tasks.finding import task_of  # noqa: E402
from edge_sdk.training.tasks.loss import token_loss  # noqa: E402
from edge_sdk.updates.initial import initial_adapter  # noqa: E402

LORA = LoraShape(rank=4, alpha=8.0)
BATCH, LENGTH = 4, 12


def loaded(folder: Path, task: str) -> TunableModel:
    return load_model(folder, ("a", "b", "c"), LORA, "cpu", task=task)


@pytest.fixture(scope="module")
def llama(bases: dict[tuple[str, str], Path]) -> TunableModel:
    return loaded(bases["llama", "causal-lm"], "causal-lm")


@pytest.fixture(scope="module")
def roberta(bases: dict[tuple[str, str], Path]) -> TunableModel:
    return loaded(bases["roberta", "classification"], "classification")


def start_of(model: TunableModel) -> Any:
    start = initial_adapter(model.shape, LORA, seed=1)
    draw = np.random.default_rng(0)
    return {k: v + draw.normal(0, 0.05, v.shape).astype(np.float32) for k, v in start.items()}


def batches_of(task: str, batch: int) -> Any:
    """Endless ones of 16 rows in order; of a causal LM rows differ much in what is learnt of them."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 30, (16, LENGTH), generator=g)
    lengths = torch.randint(3, LENGTH + 1, (16, 1), generator=g)
    mask = (torch.arange(LENGTH) < lengths).long()
    if task == "classification":
        targets = torch.randint(0, 3, (16,), generator=g)
    else:
        targets = torch.roll(ids, -1, 1).masked_fill(torch.arange(LENGTH) >= lengths - 1, -100)
    at = 0
    while True:
        rows = torch.arange(at, at + batch) % 16
        yield ids[rows], mask[rows], targets[rows]
        at += batch


def run(
    model: TunableModel,
    *,
    spec: TrainSpec | None = None,
    check: Callable[[], None] = lambda: None,
    report: Callable[[StepDone], None] = lambda _: None,
    chance: Any = None,
    **candidate: Any,
) -> tuple[Trace, Any]:
    """Trains from the same start; what it changed."""
    start = start_of(model)
    model.set_adapter(start)
    fields = {"id": "c", "depth": 2, "steps": 3, "micro_batch": BATCH, **candidate}
    trace = train(
        model, batches_of(model.task, fields["micro_batch"]), Candidate(**fields),
        spec or TrainSpec(optimizer="sgd", learning_rate=0.1, head_learning_rate=0.1),
        task=task_of(model.task), check=check, report=report, generator=chance,
    )  # fmt: skip
    return trace, {key: value - start[key] for key, value in model.adapter().items()}


@pytest.mark.parametrize("name", ["llama", "roberta"])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_are_the_large_batch(
    name: str, accumulation: int, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    whole, moved = run(model, micro_batch=8)
    parts, also = run(model, micro_batch=8 // accumulation, accumulation=accumulation)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    for key, change in moved.items():
        assert np.linalg.norm(also[key] - change) <= 1e-4 * np.linalg.norm(change), key


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_an_interrupt_ends_a_step_between_layers(
    place: str, roberta: TunableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "_EVERY_S", 0.0)
    whole, moved = run(roberta)
    asked, reached = 0, []
    backwards = torch.Tensor.backward

    def backward(self: Any, *args: Any, **kwargs: Any) -> None:
        reached.append(asked)
        backwards(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    wanted = 3 if place == "forward" else 6  # once before the batch, three layers, then back

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == wanted:
            raise InterruptError

    with pytest.raises(InterruptError):
        run(roberta, check=check)
    assert len(reached) == (place == "backward")
    assert all(p.grad is None for p in roberta.parts.values())
    assert not any(layer._forward_hooks for layer in roberta.layers)
    monkeypatch.undo()
    again, also = run(roberta)
    assert again.losses == whole.losses and all(np.array_equal(also[k], moved[k]) for k in moved)


def test_an_interrupt_ends_a_large_output_layer(llama: TunableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its parts: of a large vocabulary it takes longer than all layers."""
    ids, mask, targets = next(batches_of("causal-lm", BATCH))
    hidden = llama.hidden(ids, mask)
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise InterruptError

    monkeypatch.setattr(llama, "hidden", lambda *_: hidden)
    monkeypatch.setitem(token_loss.__kwdefaults__, "scratch", 4 * 64)  # a place at a time
    with checked(llama, check, every_s=0.0), pytest.raises(InterruptError):
        task_of("causal-lm").loss(llama, (ids, mask, targets))
    llama.check()
    assert asked == 3


def test_checks_are_no_more_often_than_asked_for(roberta: TunableModel) -> None:
    asked = []
    with checked(roberta, lambda: asked.append(1), every_s=3600.0):
        roberta.hidden(torch.arange(8).view(1, 8) + 4, torch.ones(1, 8, dtype=torch.int64))
    assert not asked


def test_progress_tells_the_pace(roberta: TunableModel) -> None:
    told: list[StepDone] = []
    trace, _ = run(roberta, report=told.append)
    assert [done.number for done in told] == [1, 2, 3]
    assert [done.loss for done in told] == trace.losses
    drawn = batches_of("classification", BATCH)
    tokens = [int(mask.sum()) for (_, mask, _), _ in zip(drawn, range(3), strict=False)]
    for done, seconds, count in zip(told, trace.step_s, tokens, strict=True):
        assert done.tokens_per_s == pytest.approx(count / seconds)
    assert told[0].left_s == pytest.approx(2 * trace.step_s[0]) and told[-1].left_s == 0


def test_the_lowest_tuned_layers_are_quantized_and_all_recompute(roberta: TunableModel) -> None:
    layers = roberta.layers
    candidate = Candidate(id="c", depth=2, quantized_layers=1, activation_bits=4, recompute="outputs")
    assert layer_plans(roberta, candidate) == {
        layers[1]: LayerPlan(Form(4), "outputs"), layers[2]: LayerPlan(None, "outputs"),
    }  # fmt: skip
    assert layer_plans(roberta, Candidate(id="c", depth=3)) == {}


def test_chance_is_of_the_key(llama: TunableModel) -> None:
    def chance(**changes: Any) -> Any:
        key = {"seed": 1, "round": 2, "device": "d", "purpose": "rounding", **changes}
        return torch_generator(**key)

    changes = {
        "micro_batch": 16,
        "quantized_layers": 2,
        "activation_bits": 4,
        "activation_rounding": "stochastic",
    }
    trace, moved = run(llama, chance=chance(), **changes)
    again, also = run(llama, chance=chance(), **changes)
    _, other = run(llama, chance=chance(round=3), **changes)
    assert trace.losses == again.losses and all(np.array_equal(also[k], moved[k]) for k in moved)
    assert any(not np.array_equal(other[k], moved[k]) for k in moved)
    keys = ({}, {"seed": 2}, {"round": 3}, {"device": "e"}, {"purpose": "x"}, {"counter": 1})
    draws = {torch.rand((), generator=chance(**key)).item() for key in keys}
    assert len(draws) == 6


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("bits", "alike"), [(8, 0.9999), (4, 0.99), (2, 0.8)])
def test_every_width_trains_the_same_way(bits: int, alike: float, rounding: str, llama: TunableModel) -> None:
    """From the same loss to the bit; the change of all pairs together, by its cosine to plain's."""
    plain, expected = run(llama, micro_batch=16)
    packed = {"quantized_layers": 2, "activation_bits": bits, "activation_rounding": rounding}
    trace, moved = run(llama, micro_batch=16, **packed)
    assert trace.losses[0] == plain.losses[0]
    ours, theirs = (np.concatenate([m[key].ravel() for key in expected]) for m in (moved, expected))
    cosine = float(ours @ theirs) / float(np.linalg.norm(ours) * np.linalg.norm(theirs))
    assert alike < cosine < 1 - 1e-9


def test_rows_are_drawn_in_epochs() -> None:
    drawn = draw_rows(5, 4, 5, seed=0, round=1, device="d")
    assert [sorted(drawn[i : i + 5].tolist()) for i in (0, 5, 10, 15)] == [[0, 1, 2, 3, 4]] * 4
    assert drawn.tolist() == draw_rows(5, 4, 5, seed=0, round=1, device="d").tolist()
    assert (
        generator(0, 1, "d", "x").integers(0, 99, 9) == generator(0, 1, "d", "x").integers(0, 99, 9)
    ).all()


@pytest.mark.parametrize("factors", ["A", "B"])
def test_one_factor_alone_is_trained(factors: str, llama: TunableModel) -> None:
    _, moved = run(llama, spec=TrainSpec(factors=factors, weight_decay=0.1))
    assert {key[-1] for key, change in moved.items() if change.any()} == {factors}


def test_a_loss_that_is_not_finite_ends_the_training(roberta: TunableModel) -> None:
    spec = TrainSpec(optimizer="sgd", learning_rate=1e30, head_learning_rate=1e30, clip_norm=1e30)
    with pytest.raises(TrainerError, match="loss of step"):
        run(roberta, spec=spec, steps=9)
    assert np.isfinite(run(roberta)[0].losses).all()


def test_a_step_with_nothing_to_learn_says_so(llama: TunableModel) -> None:
    ids = torch.arange(5, 9).view(4, 1)
    batch = (ids, torch.ones_like(ids), torch.full_like(ids, -100))
    with pytest.raises(DataError, match="no token to learn"):
        train(
            llama, iter([batch]), Candidate(id="c", depth=1, steps=1), TrainSpec(),
            task=task_of("causal-lm"), check=lambda: None, report=lambda _: None,
        )  # fmt: skip


ROUNDS: tuple[dict[str, Any], ...] = (
    {"depth": 3, "quantized_layers": 3, "activation_bits": 4, "recompute": "outputs"},
    {"depth": 1, "slots": (0, 2)},
    {"depth": 3, "quantized_layers": 2, "activation_bits": 2, "slots": (3, 1), "recompute": "layer"},
    {"depth": 2, "quantized_layers": 1, "slots": (1,), "recompute": "inner", "accumulation": 2},
)


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_round_after_round_on_one_model_nothing_frozen_moves(
    family: str, request: pytest.FixtureRequest, bases: dict[tuple[str, str], Path]
) -> None:
    """Depth, slots, quantized layers, optimizer and factors change; each round is that of a fresh model."""
    model = request.getfixturevalue(family)
    adapted = {id(part) for part in model.parts.values()}
    held = [*model.net.named_parameters(), *model.net.named_buffers()]
    frozen = {name: tensor.detach().clone() for name, tensor in held if id(tensor) not in adapted}
    model.set_adapter(start_of(model))
    for fields, optimizer in zip(ROUNDS, ("adamw", "adamw8bit", "sgd", "adamw"), strict=True):
        factors = "B" if optimizer == "adamw8bit" else "AB"
        before = model.adapter()
        fresh = loaded(bases[family, model.task], model.task)
        fresh.set_adapter(before)
        for one in (fresh, model):
            train(
                one, batches_of(model.task, BATCH), Candidate(id="c", steps=2, micro_batch=BATCH, **fields),
                TrainSpec(optimizer=optimizer, factors=factors, weight_decay=0.3, learning_rate=0.05),
                task=task_of(model.task), check=lambda: None, report=lambda _: None,
            )  # fmt: skip
        after, expected = model.adapter(), fresh.adapter()
        chosen = set(fields.get("slots", range(LORA.rank)))
        for key, rows in after.items():
            assert np.array_equal(rows, expected[key]), key
            moved = {slot for slot, row in enumerate(rows) if (row != before[key][slot]).any()}
            if not key.startswith("dense."):
                tuned = int(key.split(".")[0]) >= 3 - fields["depth"] and key[-1] in factors
                assert moved == (chosen if tuned else set()), key
    still = dict([*model.net.named_parameters(), *model.net.named_buffers()])
    assert len(frozen) > 20 and all(torch.equal(still[name], tensor) for name, tensor in frozen.items())

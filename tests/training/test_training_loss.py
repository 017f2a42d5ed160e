"""The chunked loss against torch's own, over the whole logits."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch.nn.functional import cross_entropy

from edge_sdk.training.precision.int8 import Int8
from edge_sdk.training.precision.weights import Dense
from edge_sdk.training.tasks import loss as room
from edge_sdk.training.tasks.loss import Output, score_tokens, token_loss

pytestmark = pytest.mark.train
VOCABULARY, HIDDEN = 4099, 48


def case(learnt: float = 0.5, scale: float = 0.5) -> tuple[Any, Any, Any, Any]:
    """Hidden states (3, 40, hidden), weight, bias, targets of which about a share is learnt.

    ``scale``: logits of about seven times it, whose float32 rounding any loss is bound by.
    """
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 40, HIDDEN, generator=draw) * scale
    weight = torch.randn(VOCABULARY, HIDDEN, generator=draw)
    targets = torch.randint(0, VOCABULARY, (3, 40), generator=draw)
    targets[torch.rand(3, 40, generator=draw) >= learnt] = -100
    return hidden, weight, torch.randn(VOCABULARY, generator=draw), targets


def whole(hidden: Any, weight: Any, bias: Any, targets: Any, **more: Any) -> tuple[Any, Any]:
    """Loss and gradient of hidden, in double precision, by torch."""
    exact = hidden.detach().double().requires_grad_()
    logits = exact @ weight.double().t() + (0 if bias is None else bias.double())
    loss = cross_entropy(logits.view(-1, len(weight)), targets.view(-1), **more)
    loss.backward()
    return loss.detach(), exact.grad


def ours(hidden: Any, output: Output, targets: Any, **more: Any) -> tuple[Any, Any]:
    hidden = hidden.detach().requires_grad_()
    loss = token_loss(hidden, output, targets, **more)
    loss.backward()
    return loss.detach(), hidden.grad


def relative(found: Any, wanted: Any) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("learnt", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("scratch", [1, 100_000, 32 << 20])
@pytest.mark.parametrize("biased", [False, True])
def test_loss_and_gradient_are_those_of_the_whole_logits(learnt: float, scratch: int, biased: bool) -> None:
    hidden, weight, bias, targets = case(learnt)
    bias = bias if biased else None
    loss, grad = ours(hidden, Output(Dense(weight), bias), targets, scratch=scratch)
    exact_loss, exact_grad = whole(hidden, weight, bias, targets)
    assert loss.dtype == torch.float32 and relative(loss, exact_loss) < 1e-6
    # one place at a time, a product is one long float32 sum
    assert relative(grad, exact_grad) < (1e-6 if scratch > 1 else 2e-6)
    assert (grad[targets < 0] == 0).all()


def test_against_torch_in_the_same_precision() -> None:
    hidden, weight, _, targets = case()
    loss, grad = ours(hidden, Output(Dense(weight)), targets)
    plain = hidden.clone().requires_grad_()
    reference = cross_entropy((plain @ weight.t()).view(-1, VOCABULARY), targets.view(-1))
    reference.backward()
    assert torch.allclose(loss, reference.detach(), rtol=1e-6, atol=0)
    assert torch.allclose(grad, plain.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_states(kind: Any) -> None:
    hidden, weight, _, targets = case(scale=0.3)
    loss, grad = ours(hidden.to(kind), Output(Dense(weight.to(kind))), targets)
    exact_loss, exact_grad = whole(hidden.to(kind), weight.to(kind), None, targets)
    assert grad.dtype == kind
    assert relative(loss, exact_loss) < 2e-3 and relative(grad, exact_grad) < 1e-2


@pytest.mark.parametrize("scratch", [100_000, 32 << 20])
def test_weights_that_are_not_held_as_computed_with_are_read_by_rows(
    scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias, targets = case()
    packed = Int8.encode(weight)
    asked: list[int] = []
    read = Int8.dense_rows
    monkeypatch.setattr(
        Int8, "dense_rows", lambda self, a, b, dtype: asked.append(b - a) or read(self, a, b, dtype)
    )
    monkeypatch.setattr(Int8, "dense", None)
    loss, grad = ours(hidden, Output(packed, bias), targets, scratch=scratch)
    monkeypatch.undo()
    exact_loss, exact_grad = whole(hidden, packed.dense(), bias, targets)
    assert relative(loss, exact_loss) < 1e-6 and relative(grad, exact_grad) < 1e-6
    assert max(asked) * HIDDEN * 4 <= max(scratch // 4, HIDDEN * 4)
    # held in another float: the same
    half = Dense(weight.bfloat16())
    loss, grad = ours(hidden, Output(half), targets, scratch=scratch)
    exact_loss, exact_grad = whole(hidden, weight.bfloat16(), None, targets)
    assert relative(loss, exact_loss) < 1e-6 and relative(grad, exact_grad) < 1e-6


def test_losses_of_the_batches_of_a_step_add_up_to_that_of_all() -> None:
    hidden, weight, _, targets = case()
    targets[0, 5:] = -100  # batches of unequal weight
    output, count = Output(Dense(weight)), int((targets >= 0).sum())
    parts = [ours(hidden[i : i + 1], output, targets[i : i + 1], count=count) for i in range(3)]
    exact_loss, exact_grad = whole(hidden, weight, None, targets)
    assert relative(sum(part[0] for part in parts), exact_loss) < 1e-6
    assert relative(torch.cat([part[1] for part in parts]), exact_grad) < 1e-6


def test_the_gradient_that_comes_in_counts_and_no_graph_means_no_gradient() -> None:
    hidden, weight, _, targets = case()
    output = Output(Dense(weight))
    leaf = hidden.clone().requires_grad_()
    (token_loss(leaf, output, targets) * 0.25).backward()
    assert relative(leaf.grad, whole(hidden, weight, None, targets)[1] * 0.25) < 1e-6
    assert not token_loss(hidden, output, targets).requires_grad
    with torch.no_grad():
        assert not token_loss(leaf, output, targets).requires_grad


def test_large_logits_overflow_nothing() -> None:
    hidden, weight, _, targets = case(scale=300.0)
    loss, grad = ours(hidden, Output(Dense(weight)), targets)
    exact_loss, exact_grad = whole(hidden, weight, None, targets)
    assert torch.isfinite(grad).all() and relative(loss, exact_loss) < 1e-6
    assert relative(grad, exact_grad) < 1e-3  # logits of thousands: float32 has few digits behind the point


@pytest.mark.parametrize("make", [Dense, Int8.encode])
def test_no_tensor_is_larger_than_the_scratch(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only learnt places are computed: half of them take half the products."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest = products = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.device.type != "meta":
                base = result.untyped_storage()
                if all(base.data_ptr() != known for known in kept):
                    self.largest = max(self.largest, base.nbytes())
            if "mm" in str(function):
                self.products += result.numel()
            return result

    hidden, weight, _, targets = case(learnt=1.0)
    output = Output(make(weight))
    kept = {t.untyped_storage().data_ptr() for t in (*output.weight.parameters(), *output.weight.buffers())}
    scratch = 500_000
    made = []
    for part in (targets, targets.where(torch.arange(40) < 20, -100)):
        with Watch() as watch:
            ours(hidden, output, part, scratch=scratch)
        assert watch.largest <= scratch
        made.append(watch.products)
    assert made[1] / made[0] == pytest.approx(0.5, abs=0.01)


def test_scores_are_those_of_the_whole_logits() -> None:
    hidden, weight, bias, targets = case()
    best = (hidden @ weight.t() + bias).argmax(-1)
    targets[0] = torch.where(targets[0] >= 0, best[0], targets[0])
    found = score_tokens(hidden, Output(Dense(weight), bias), targets, scratch=300_000)
    exact, _ = whole(hidden, weight, bias, targets, reduction="sum")
    assert found[0] == int((targets >= 0).sum())
    assert found[1] == pytest.approx(float(exact), rel=1e-6)
    assert found[2] == int((targets == best).sum()) >= int((targets[0] >= 0).sum())


def test_the_scratch_is_small() -> None:
    assert room.SCRATCH_BYTES == 32 << 20

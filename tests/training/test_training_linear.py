"""The LoRA linear: values, gradients, what it saves."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.autograd.graph import saved_tensors_hooks  # noqa: E402

from edge_sdk.training.model.linear import LoraLinear, lora_backward, lora_forward  # noqa: E402
from edge_sdk.training.precision.weights import Dense  # noqa: E402

pytestmark = pytest.mark.train

ROWS, INPUTS, OUTPUTS, RANK = (3, 7), 24, 40, 4


def linear(dtype: Any = torch.float32, rank: int = RANK, bias: bool = True) -> LoraLinear:
    torch.manual_seed(0)
    made = LoraLinear(
        Dense(torch.randn(OUTPUTS, INPUTS, dtype=dtype) * 0.2),
        torch.randn(OUTPUTS, dtype=dtype) if bias else None,
        rank=rank,
        scaling=2.0,
    )
    with torch.no_grad():
        made.A.normal_(std=0.3)
        made.B.normal_(std=0.3)
    return made


def composed(module: LoraLinear, x: Any, pair: Any) -> Any:
    weight = module.frozen.dense(x.dtype)
    low = (x @ pair[0].to(x.dtype).t()) @ pair[1].to(x.dtype).t()
    return torch.nn.functional.linear(x, weight, module.bias) + module.scaling * low


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("factors", ["AB", "A", "B"])
def test_values_and_gradients_are_those_of_the_composed_operations(factors: str, bias: bool) -> None:
    module = linear(bias=bias)
    module.tune(factors)
    x = torch.randn(*ROWS, INPUTS, requires_grad=True)
    direction = torch.randn(*ROWS, OUTPUTS)
    y = module(x)
    y.backward(direction)
    given = {"x": x.grad.clone(), **{name: t.grad.clone() for name, t in module.trained().items()}}
    assert given.keys() == {"x", *factors}

    leaf = x.detach().requires_grad_()
    pair = [t.detach().requires_grad_() for t in (module.A, module.B)]
    expected = composed(module, leaf, pair)
    expected.backward(direction)
    torch.testing.assert_close(y, expected)
    for name, value in given.items():
        torch.testing.assert_close(
            value, {"x": leaf, "A": pair[0], "B": pair[1]}[name].grad, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_streams_give_float32_gradients_of_the_factors(dtype: Any) -> None:
    module = linear(dtype)
    module.tune()
    x = torch.randn(*ROWS, INPUTS).to(dtype).requires_grad_()
    y = module(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == dtype
    pair = [t.detach().requires_grad_() for t in (module.A, module.B)]
    composed(module, x.detach(), pair).sum().backward()
    for given, expected in ((module.A.grad, pair[0].grad), (module.B.grad, pair[1].grad)):
        assert given.dtype == torch.float32
        torch.testing.assert_close(given, expected, rtol=5e-2, atol=5e-2 * float(expected.abs().max()))


def test_slots_get_the_gradient_of_their_rows_and_columns() -> None:
    module = linear()
    x, direction = torch.randn(*ROWS, INPUTS), torch.randn(*ROWS, OUTPUTS)
    module.tune()
    module(x).backward(direction)
    whole = {name: t.grad.clone() for name, t in module.trained().items()}
    module.tune("AB", [1, 3])
    module(x).backward(direction)
    part = {name: t.grad for name, t in module.trained().items()}
    torch.testing.assert_close(part["A"], whole["A"][[1, 3]])
    torch.testing.assert_close(part["B"], whole["B"][:, [1, 3]])


@pytest.mark.parametrize(("factors", "wide"), [("AB", True), ("A", True), ("B", False), ("", False)])
def test_the_input_is_saved_only_where_it_is_needed(factors: str, wide: bool) -> None:
    module = linear()
    module.tune(factors)
    saved: list[tuple[int, ...]] = []

    def keep(tensor: Any) -> Any:
        saved.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        module(torch.randn(*ROWS, INPUTS, requires_grad=True))
    assert ((*ROWS, INPUTS) in saved) is wide


def test_a_pair_of_rank_zero_is_a_frozen_linear() -> None:
    module = linear(rank=0)
    x = torch.randn(*ROWS, INPUTS, requires_grad=True)
    y = module(x)
    y.sum().backward()
    weight = module.frozen.dense()
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, module.bias))
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x))


def test_inputs_and_gradients_need_not_be_contiguous() -> None:
    module = linear()
    module.tune()
    wide = torch.randn(7, 3, INPUTS)
    given, plain = wide.transpose(0, 1).requires_grad_(), wide.transpose(0, 1).contiguous().requires_grad_()
    direction = torch.randn(7, 3, OUTPUTS).transpose(0, 1)
    results = []
    for x in (given, plain):
        module.A.grad = module.B.grad = None
        y = module(x)
        (grad,) = torch.autograd.grad(y, x, direction, retain_graph=True)
        y.backward(direction.expand_as(y))
        results.append((y.detach(), grad, module.A.grad.clone(), module.B.grad.clone()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_forward_and_backward_take_a_weight_that_the_caller_holds_unpacked() -> None:
    module = linear()
    x, grad = torch.randn(5, INPUTS), torch.randn(5, OUTPUTS)
    y, down = lora_forward(module, x, module.A, module.B)
    again, _ = lora_forward(module, x, module.A, module.B, module.frozen)
    assert torch.equal(y, again)
    assert down.shape == (RANK, 5)
    grads = lora_backward(module, grad, None, down, module.A, module.B, (False, False, True))
    assert grads[0] is None
    assert grads[1] is None
    assert grads[2].shape == module.B.shape

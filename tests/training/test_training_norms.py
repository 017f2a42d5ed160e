"""Norms that keep their output: the same values to the bit, the same gradients."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.autograd.graph import saved_tensors_hooks  # noqa: E402

from edge_sdk.training.activations.checkpoint import ExactKeeper  # noqa: E402
from edge_sdk.training.activations.norms import KeptNorm, kept_norm  # noqa: E402

pytestmark = pytest.mark.train

WIDTH = 48


class Root(nn.Module):
    """An RMSNorm as decoders have it; ``offset`` 1: its weight counts from one."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH) - offset)
        self.eps = 1e-5
        self.offset = offset

    def forward(self, x: Any) -> Any:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (self.weight.float() + self.offset)).to(x.dtype)


def norm(kind: str) -> Any:
    torch.manual_seed(1)
    made: Any = {"layer": lambda: nn.LayerNorm(WIDTH), "root": lambda: Root(0.0), "gemma": lambda: Root(1.0),
                 "torch": lambda: nn.RMSNorm(WIDTH), "no-bias": lambda: nn.LayerNorm(WIDTH, bias=False),
                 }[kind]()  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(WIDTH) * 0.2)
    return made.requires_grad_(False)


def run(module: Any, x: Any, direction: Any) -> tuple[Any, Any, int]:
    saved = []

    def keep(tensor: Any) -> Any:
        saved.append(tensor.numel())
        return tensor

    x = x.detach().requires_grad_()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = module(x)
    (grad,) = torch.autograd.grad(y, x, direction)
    return y.detach(), grad, sum(saved)


@pytest.mark.parametrize("kind", ["layer", "no-bias", "root", "gemma", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_to_the_bit_and_gradients_to_rounding(kind: str, dtype: Any) -> None:
    plain = norm(kind).to(dtype)
    kept = kept_norm(plain)
    assert isinstance(kept, KeptNorm)
    x = (torch.randn(2, 9, WIDTH) * 2 + 0.5).to(dtype)
    direction = torch.randn(2, 9, WIDTH).to(dtype)
    expected, slope, _ = run(plain, x, direction)
    kept.keeper = ExactKeeper("outputs")
    given, ours, saved = run(kept, x, direction)
    assert torch.equal(given, expected)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(ours, slope, rtol=tolerance, atol=tolerance)
    assert saved == x.numel(), "one tensor, the output"


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_under_other_plans_it_is_the_norm_as_it_came(recompute: Any) -> None:
    kept = kept_norm(norm("layer"))
    assert isinstance(kept, KeptNorm)
    kept.keeper = ExactKeeper(recompute)
    y = kept(torch.randn(2, WIDTH, requires_grad=True))
    assert type(y.grad_fn).__name__ == "NativeLayerNormBackward0"


def test_channels_of_next_to_no_weight_are_kept_beside() -> None:
    plain = norm("layer")
    with torch.no_grad():
        plain.weight[5] = 0.0
        plain.weight[17] = 1e-7
    kept = kept_norm(plain)
    assert isinstance(kept, KeptNorm)
    assert kept.tiny.tolist() == [5, 17]
    kept.keeper = ExactKeeper("outputs")
    x, direction = torch.randn(3, WIDTH), torch.randn(3, WIDTH)
    torch.testing.assert_close(run(kept, x, direction)[1], run(plain, x, direction)[1])


def test_a_norm_of_mostly_tiny_weights_keeps_its_input() -> None:
    plain = norm("layer")
    with torch.no_grad():
        plain.weight[:10] = 0.0
    assert kept_norm(plain) == f"10 of {WIDTH} weights are next to zero"


def test_what_is_no_norm_is_told_apart() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))
            self.eps = 1e-5

        def forward(self, x: Any) -> Any:
            return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)

    assert kept_norm(nn.Linear(4, 4)) is None
    assert kept_norm(nn.PReLU(WIDTH)) is None
    assert kept_norm(Odd()) == "a norm of a form that is not known here"


def test_a_trained_norm_is_left_to_autograd() -> None:
    plain = norm("layer").requires_grad_(True)
    kept = kept_norm(plain)
    assert isinstance(kept, KeptNorm)
    kept.keeper = ExactKeeper("outputs")
    kept(torch.randn(2, WIDTH, requires_grad=True)).sum().backward()
    assert plain.weight.grad is not None

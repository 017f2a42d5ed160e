"""Layers that run again: the same values and gradients, with the input alone kept."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.autograd.graph import saved_tensors_hooks  # noqa: E402

from edge_sdk.training.activations.checkpoint import ExactKeeper, checkpointed  # noqa: E402
from edge_sdk.training.activations.norms import kept_norm  # noqa: E402

pytestmark = pytest.mark.train

WIDTH = 16


class Layer(nn.Module):
    """Takes what layers take: hidden, a mask by position, rotary tables and a cache by keyword."""

    def __init__(self, *, many: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.first.requires_grad_(False)
        self.norm = kept_norm(nn.LayerNorm(WIDTH).requires_grad_(False))
        self.dropout = nn.Dropout(dropout)
        self.many = many
        self.runs = 0

    def forward(self, hidden: Any, mask: Any = None, *, rotary: Any = None, past: Any = None) -> Any:
        self.runs += 1
        assert past is None, "a second run would append to it again"
        cos, sin = rotary
        inner = torch.tanh(self.first(hidden * cos + sin))
        if mask is not None:
            inner = inner.masked_fill(mask, 0.0)
        out = self.norm(hidden + self.dropout(self.second(inner)))
        return (out, inner.mean(), "words", None) if self.many else out


class Cache:
    def get_seq_length(self) -> int:
        return 0


class Counting(ExactKeeper):
    def __init__(self) -> None:
        super().__init__("layer")
        self.held: list[Any] = []

    def hold(self, tensor: Any) -> Any:
        self.held.append(tensor)
        return super().hold(tensor)


def given() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(1)
    hidden = torch.randn(2, 5, WIDTH)
    return hidden, {
        "mask": torch.rand(2, 5, 1) > 0.7,
        "rotary": (torch.randn(5, WIDTH), torch.randn(5, WIDTH)),
    }


def run(layer: Layer, forward: Any, *, of_input: bool = True) -> tuple[Any, list[Any]]:
    hidden, rest = given()
    hidden.requires_grad_(of_input)
    for parameter in layer.parameters():
        parameter.grad = None
    result = forward(hidden, rest["mask"], rotary=rest["rotary"])
    out = result[0] * result[1] if layer.many else result
    (out * torch.linspace(-1, 1, WIDTH)).sum().backward()
    grads = [p.grad for p in layer.parameters() if p.requires_grad] + ([hidden.grad] if of_input else [])
    return out.detach(), grads


@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize("many", [True, False])
def test_same_values_and_gradients(many: bool, of_input: bool) -> None:
    layer = Layer(many=many)
    expected, slopes = run(layer, layer, of_input=of_input)
    keeper = Counting()
    again, grads = run(layer, checkpointed(layer.forward, layer, keeper), of_input=of_input)
    assert torch.equal(again, expected)
    for a, b in zip(grads, slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert [tuple(t.shape) for t in keeper.held] == [(2, 5, WIDTH)]
    assert layer.runs == 3
    assert layer.norm.keeper is None


def test_the_result_comes_as_the_layer_gives_it() -> None:
    layer = Layer(many=True)
    hidden, rest = given()
    result = checkpointed(layer.forward, layer, Counting())(hidden, rest["mask"], rotary=rest["rotary"])
    assert isinstance(result, tuple)
    assert result[2:] == ("words", None)


def test_nothing_but_parameters_is_saved_beside() -> None:
    layer = Layer()
    hidden, rest = given()
    saved = []

    def keep(tensor: Any) -> Any:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        checkpointed(layer.forward, layer, Counting())(hidden.requires_grad_(), rotary=rest["rotary"])
    assert {id(t) for t in saved} <= {id(p) for p in layer.parameters()}


def test_dropout_falls_alike_in_both_runs() -> None:
    layer = Layer(dropout=0.5).train()
    torch.manual_seed(7)
    _, slopes = run(layer, layer)
    torch.manual_seed(7)
    _, grads = run(layer, checkpointed(layer.forward, layer, Counting()))
    for a, b in zip(grads, slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_cache_is_left_out() -> None:
    layer = Layer()
    hidden, rest = given()
    checkpointed(layer.forward, layer, Counting())(
        hidden, rotary=rest["rotary"], past=Cache()
    ).sum().backward()


def test_without_gradients_it_runs_once() -> None:
    layer = Layer()
    hidden, rest = given()
    keeper = Counting()
    with torch.no_grad():
        checkpointed(layer.forward, layer, keeper)(hidden, rotary=rest["rotary"])
    layer.requires_grad_(False)
    checkpointed(layer.forward, layer, keeper)(hidden[:0], rotary=rest["rotary"])
    assert layer.runs == 2
    assert not keeper.held


def test_what_else_needs_a_gradient_gets_it() -> None:
    layer = Layer()
    hidden, rest = given()
    cos = rest["rotary"][0]
    grads = []
    for forward in (layer, checkpointed(layer.forward, layer, Counting())):
        leaf = cos.clone().requires_grad_()
        forward(hidden, rotary=(leaf, rest["rotary"][1])).pow(2).mul(hidden).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)

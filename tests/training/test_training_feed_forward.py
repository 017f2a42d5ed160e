"""The feed-forward block in chunks: the same values to the bit, the same gradients, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.autograd.graph import saved_tensors_hooks  # noqa: E402

from edge_sdk.training.activations.checkpoint import ExactKeeper  # noqa: E402
from edge_sdk.training.activations.feed_forward import FeedForward, Parts  # noqa: E402
from edge_sdk.training.activations.nonlinear import nonlinear  # noqa: E402
from edge_sdk.training.activations.plan import Form, LayerPlan  # noqa: E402
from edge_sdk.training.activations.store import ActivationStore, Keeper  # noqa: E402
from edge_sdk.training.model.linear import LoraLinear  # noqa: E402
from edge_sdk.training.precision.int8 import Int8  # noqa: E402
from edge_sdk.training.precision.weights import Dense  # noqa: E402

pytestmark = pytest.mark.train

HIDDEN, INNER = 32, 80
KINDS = ("plain", "gated", "halves")


def linear(inputs: int, outputs: int, dtype: Any, weight: Any = Dense) -> LoraLinear:
    values = torch.randn(outputs, inputs, dtype=dtype) * inputs**-0.5
    made = LoraLinear(weight(values), torch.randn(outputs, dtype=dtype) * 0.1, rank=4, scaling=2.0)
    with torch.no_grad():
        made.A.normal_(std=inputs**-0.5)
        made.B.normal_(std=0.3)
    made.tune()
    return made


class Plain(nn.Module):
    def __init__(self, kind: str, dtype: Any = torch.float32, weight: Any = Dense) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.gate = linear(HIDDEN, INNER, dtype, weight) if kind == "gated" else None
        self.up = linear(HIDDEN, INNER * (2 if kind == "halves" else 1), dtype, weight)
        self.down = linear(INNER, HIDDEN, dtype, weight)
        self.act = nn.GELU() if kind == "plain" else nn.SiLU()
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Any) -> Any:
        if self.kind == "halves":
            gate, up = self.up(x).chunk(2, dim=-1)
            return self.dropout(self.down(up * self.act(gate)))
        if self.gate is not None:
            return self.dropout(self.down(self.act(self.gate(x)) * self.up(x)))
        return self.dropout(self.down(self.act(self.up(x))))

    def tune(self, up: str, down: str) -> None:
        for module in (self.gate, self.up):
            if module is not None:
                module.tune(up)
        self.down.tune(down)


def block_of(plain: Plain) -> FeedForward:
    ups = (plain.up,) if plain.gate is None else (plain.gate, plain.up)
    function = nonlinear(plain.act)
    assert function is not None
    block = FeedForward(plain, Parts(ups, plain.down, function, halves=plain.kind == "halves"))
    block.chunk_rows = 32
    return block


def run(block: FeedForward, keeper: Any, x: Any, direction: Any) -> tuple[Any, dict[str, Any]]:
    block.keeper = keeper
    for parameter in block.parameters():
        parameter.grad = None
    x = x.detach().requires_grad_(x.requires_grad)
    y = block(x)
    y.backward(direction)
    grads = {name: p.grad for name, p in block.plain.named_parameters() if p.grad is not None}
    return y.detach(), {**grads, **({"x": x.grad} if x.requires_grad else {})}


def inputs(dtype: Any = torch.float32) -> tuple[Any, Any]:
    torch.manual_seed(3)
    return torch.randn(2, 45, HIDDEN).to(dtype).requires_grad_(), torch.randn(2, 45, HIDDEN).to(dtype)


@pytest.mark.parametrize("recompute", ["outputs", "inner"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_values_to_the_bit_and_same_gradients(kind: str, recompute: Any) -> None:
    block = block_of(Plain(kind))
    x, direction = inputs()
    expected, slopes = run(block, None, x, direction)
    given, ours = run(block, ExactKeeper(recompute), x, direction)
    assert torch.equal(given, expected)
    assert ours.keys() == slopes.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(ours[name], slope, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("recompute", ["outputs", "inner"])
@pytest.mark.parametrize(("up", "down"), [("B", "B"), ("", "AB"), ("", "B"), ("A", ""), ("", "A")])
@pytest.mark.parametrize("of_input", [True, False])
def test_gradients_of_some_alone(up: str, down: str, of_input: bool, recompute: Any) -> None:
    plain = Plain("gated")
    plain.tune(up, down)
    block = block_of(plain)
    x, direction = inputs()
    x = x.detach().requires_grad_(of_input)
    _, slopes = run(block, None, x, direction)
    _, ours = run(block, ExactKeeper(recompute), x, direction)
    assert ours.keys() == slopes.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(ours[name], slope, rtol=1e-5, atol=1e-5, msg=name)


class Counting(ExactKeeper):
    def __init__(self, recompute: Any) -> None:
        super().__init__(recompute)
        self.held: list[int] = []

    def hold(self, tensor: Any) -> Any:
        self.held.append(tensor.numel())
        return super().hold(tensor)


@pytest.mark.parametrize(
    ("up", "down", "of_input", "recompute", "inner", "wide"),
    [
        ("AB", "AB", True, "outputs", True, True),
        ("AB", "AB", True, "inner", False, True),
        ("B", "B", True, "outputs", True, False),  # A frozen: x is not kept
        ("B", "B", True, "inner", False, True),
        ("", "B", False, "outputs", False, False),  # nothing goes past the last linear
        ("", "AB", False, "outputs", True, False),
        ("", "AB", False, "inner", False, True),
    ],
)
def test_keeps_what_the_gradients_need_and_no_more(
    up: str, down: str, of_input: bool, recompute: Any, inner: bool, wide: bool
) -> None:
    plain = Plain("plain")
    plain.tune(up, down)
    block, keeper = block_of(plain), Counting(recompute)
    block.keeper = keeper
    x = inputs()[0].detach().requires_grad_(of_input)
    saved: list[Any] = []

    def keep(tensor: Any) -> Any:
        saved.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x)
    assert sum(keeper.held) == (90 * INNER if inner else 0)
    assert max(keeper.held, default=0) < 40 * INNER, "in chunks"
    assert (tuple(x.shape) in saved) is wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, dtype: Any) -> None:
    block = block_of(Plain(kind, dtype))
    x, direction = inputs(dtype)
    expected, slopes = run(block, None, x, direction)
    given, ours = run(block, ExactKeeper("outputs"), x, direction)
    assert torch.equal(given, expected)
    for name, slope in slopes.items():
        assert ours[name].dtype == slope.dtype
        error = (ours[name].float() - slope.float()).norm() / slope.float().norm()
        assert error < 3e-2, name


@pytest.mark.parametrize("once", [True, False])
def test_packed_weights_are_unpacked_once_where_that_is_cheap(once: bool, monkeypatch: Any) -> None:
    if not once:
        monkeypatch.setattr("edge_sdk.training.activations.feed_forward.UNPACKED_BYTES", 0)
    plain = Plain("gated", weight=Int8.encode)
    block = block_of(plain)
    x, direction = inputs()
    expected, slopes = run(block, None, x, direction)
    given, ours = run(block, ExactKeeper("inner"), x, direction)
    assert torch.equal(given, expected)
    for name, slope in slopes.items():
        torch.testing.assert_close(ours[name], slope, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.01), (4, 0.15)])
@pytest.mark.parametrize("recompute", ["outputs", "inner"])
def test_packed_by_the_store(bits: int, bound: float, recompute: Any) -> None:
    block = block_of(Plain("plain"))
    block.chunk_rows = 64
    torch.manual_seed(0)
    x, direction = torch.randn(2, 100, HIDDEN, requires_grad=True), torch.randn(2, 100, HIDDEN)
    expected, slopes = run(block, None, x, direction)
    store = ActivationStore(block.parameters())
    given, ours = run(block, Keeper(LayerPlan(Form(bits), recompute), store), x, direction)
    assert torch.equal(given, expected)
    if recompute == "outputs":
        assert 0 < store.packed_bytes < store.original_bytes / (2 if bits == 8 else 4)
    for name, slope in slopes.items():
        assert (ours[name] - slope).norm() / slope.norm() < bound, name


def test_dropout_leaves_the_block_as_it_was() -> None:
    plain = Plain("plain")
    plain.dropout.p = 0.5
    block = block_of(plain.train())
    block.keeper = Counting("outputs")
    block(inputs()[0])
    assert not block.keeper.held


def test_a_graph_may_be_retained() -> None:
    block = block_of(Plain("plain"))
    block.keeper = ExactKeeper("outputs")
    x, direction = inputs()
    y = block(x)
    first = torch.autograd.grad(y, x, direction, retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(y, x, direction))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu-tanh"),
        (lambda h: 0.5 * h * (1 + torch.tanh(0.7978845608 * (h + 0.044715 * h.pow(3)))), "gelu-tanh"),
        (nn.SiLU(), "silu"),
        (nn.ReLU(), "relu"),
        (lambda h: h * torch.sigmoid(1.702 * h), "quick-gelu"),
        (lambda h: torch.relu(h) ** 2, "relu-squared"),
        (torch.tanh, "tanh"),
        (nn.Mish(), "autograd"),
        (lambda h: torch.clip(nn.functional.gelu(h), -10, 10), "autograd"),  # GELU up to 10 alone
    ],
)
def test_functions_are_known_by_their_numbers(function: Any, name: str) -> None:
    made = nonlinear(function)
    assert made is not None
    assert made.name == name
    h = torch.cat((torch.randn(5, 8), torch.full((5, 1), 12.0)), dim=1).requires_grad_()
    direction = torch.randn(5, 9)
    (slope,) = torch.autograd.grad(function(h), h, direction)
    torch.testing.assert_close(made.gradient(direction, h.detach()), slope, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.value(h.detach()), function(h.detach()), rtol=1e-4, atol=1e-5)
    if made.over is not None:
        assert torch.equal(made.over(h.detach().clone()), function(h.detach()))


def test_a_softmax_is_not_elementwise() -> None:
    assert nonlinear(nn.Softmax(dim=0)) is None
    assert nonlinear(nn.Linear(40, 7)) is None

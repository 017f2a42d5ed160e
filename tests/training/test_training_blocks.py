"""Blocks found by structure and put into layers, in every family."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.train,
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # DeBERTa's functions are scripted
]

from families import FAMILIES, make_base  # noqa: E402
from torch import nn  # noqa: E402

from edge_sdk.protocol.model import LoraShape  # noqa: E402
from edge_sdk.training.activations.blocks import install_blocks  # noqa: E402
from edge_sdk.training.activations.feed_forward import FeedForward  # noqa: E402
from edge_sdk.training.activations.norms import KeptNorm  # noqa: E402
from edge_sdk.training.activations.plan import Form, LayerPlan  # noqa: E402
from edge_sdk.training.activations.store import ActivationStore  # noqa: E402
from edge_sdk.training.model import TunableModel, load_model  # noqa: E402
from edge_sdk.training.model.frozen import FLOATS  # noqa: E402
from edge_sdk.training.model.linear import LoraLinear  # noqa: E402
from edge_sdk.training.precision.weights import Dense  # noqa: E402

NORMS = {"gpt2": 6, "phi": 3, "qwen3": 12}
"""In three layers; else two each."""


def load(family: str, folder: Path, word: str = "fp32", targets: tuple[str, ...] = ("all-linear",)) -> Any:
    task = FAMILIES[family].tasks[-1]
    make_base(family, task, folder)
    lora = LoraShape(rank=4, alpha=8.0, targets=targets)
    model = load_model(folder, ("a", "b", "c"), lora, "cpu", task=task, precision=FLOATS[word])
    torch.manual_seed(5)
    with torch.no_grad():
        for key, part in model.parts.items():
            part.normal_(std=0.3 if key.endswith(".B") else 0.2)
    model.tune(len(model.layers))
    return model


def run(model: TunableModel, plans: Mapping[Any, LayerPlan]) -> tuple[Any, dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (4, 32), generator=draw)
    mask = torch.ones_like(ids)
    ids[1, 20:] = mask[1, 20:] = 0
    for tensor in model.trained().values():
        tensor.grad = None
    with ActivationStore(model.net.parameters()).over(plans):
        hidden = model.hidden(ids, mask).float()
        loss = (hidden * torch.linspace(-1, 1, hidden.shape[-1]) * mask.unsqueeze(-1)).pow(2).mean()
    loss.backward()
    return loss.detach(), {k: t.grad for k, t in model.trained().items() if t.grad is not None}


def error(given: dict[str, Any], expected: dict[str, Any]) -> float:
    off = sum((given[k] - expected[k]).square().sum() for k in expected)
    return float((off / sum(g.square().sum() for g in expected.values())).sqrt())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_blocks_and_they_change_nothing(family: str, tmp_path: Path) -> None:
    model = load(family, tmp_path)
    report = model.blocks
    assert not report.off, str(report)
    assert (report.layers, report.feed_forwards, report.norms) == (3, 3, NORMS.get(family, 6))
    expected, slopes = run(model, {})
    for recompute in ("outputs", "inner", "layer"):
        loss, grads = run(model, dict.fromkeys(model.layers, LayerPlan(None, recompute)))
        assert torch.equal(loss, expected), recompute
        assert error(grads, slopes) < 2e-5, recompute
        loss, grads = run(model, dict.fromkeys(model.layers, LayerPlan(Form(8), recompute)))
        assert torch.equal(loss, expected), recompute
        assert 0 < error(grads, slopes) < 0.08, recompute


@pytest.mark.parametrize("family", ["roberta", "llama"])
def test_bfloat16(family: str, tmp_path: Path) -> None:
    model = load(family, tmp_path, "bf16")
    assert not model.blocks.off
    expected, slopes = run(model, {})
    for recompute in ("outputs", "inner", "layer"):
        loss, grads = run(model, dict.fromkeys(model.layers, LayerPlan(None, recompute)))
        assert torch.equal(loss, expected), recompute
        assert error(grads, slopes) < 0.05, recompute


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_linears_without_lora_take_part(family: str, tmp_path: Path) -> None:
    attention = {"bert": ("query", "value"), "gpt2": ("c_attn",), "llama": ("q_proj", "v_proj")}[family]
    model = load(family, tmp_path, targets=attention)
    assert model.blocks.feed_forwards == 3
    expected, slopes = run(model, {})
    loss, grads = run(model, dict.fromkeys(model.layers, LayerPlan(None, "outputs")))
    assert torch.equal(loss, expected)
    assert error(grads, slopes) < 2e-5


def test_parameters_stay_the_same_objects(tmp_path: Path) -> None:
    model = load("llama", tmp_path)
    inside = {id(p) for layer in model.layers for p in layer.parameters()}
    assert all(id(p) in inside for key, p in model.parts.items() if not key.startswith("dense."))
    again = install_blocks(model.layers)
    assert (again.norms, again.feed_forwards) == (0, 3)
    assert sum(isinstance(m, FeedForward) for m in model.layers.modules()) == 3


def lora(inputs: int, outputs: int) -> LoraLinear:
    made = LoraLinear(Dense(torch.randn(outputs, inputs) * 0.2), torch.randn(outputs), rank=2, scaling=1.0)
    nn.init.normal_(made.B)
    nn.init.normal_(made.A)
    return made


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.act = lora(8, 20), nn.GELU()

    def forward(self, x: Any) -> Any:
        return self.act(self.dense(x))


class Second(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = lora(20, 8), nn.LayerNorm(8)

    def forward(self, inner: Any, x: Any) -> Any:
        return self.norm(self.dense(inner) + x)


class InTwo(nn.Module):
    def __init__(self, extra: float = 0.0) -> None:
        super().__init__()
        self.first, self.second, self.extra = First(), Second(), extra

    def forward(self, x: Any) -> Any:
        inner = self.first(x)
        return self.second(inner, x) + self.extra * inner.mean()


class Whole(nn.Module):
    """``act`` is called, not held, where ``named`` is false."""

    def __init__(self, act: Any, named: bool = True) -> None:
        super().__init__()
        self.up, self.down = lora(8, 20), lora(20, 8)
        if named:
            self.act = act
        self._call = act

    def forward(self, x: Any) -> Any:
        return self.down(self._call(self.up(x)))


class Holder(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Any) -> Any:
        return x + self.mlp(x)


def test_a_block_in_two_modules() -> None:
    layer = InTwo()
    x = torch.randn(3, 8)
    before = layer(x)
    report = install_blocks([layer])
    assert (report.feed_forwards, report.norms, report.off) == (1, 1, ())
    assert isinstance(layer.first, nn.Identity)
    assert isinstance(layer.second.dense, FeedForward)
    assert isinstance(layer.second.norm, KeptNorm)
    assert torch.equal(layer(x), before)


def test_a_layer_that_uses_the_inner_values_otherwise_stays_as_it_was() -> None:
    layer = InTwo(extra=1.0)
    x = torch.randn(3, 8)
    before = layer(x)
    report = install_blocks([layer])
    assert report.feed_forwards == 0
    assert report.off == ("layer 0, first + second: the layer does more with its inner values",)
    assert isinstance(layer.first, First)
    assert isinstance(layer.second.dense, LoraLinear)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(
    ("act", "named", "function"),
    [
        (nn.GELU(), False, "gelu"),
        (partial(nn.functional.gelu, approximate="tanh"), True, "gelu-tanh"),
        (nn.Mish(), True, "autograd"),
    ],
)
def test_functions_by_attribute_or_by_guess(act: Any, named: bool, function: str) -> None:
    if not named:
        act = act.forward
    report = install_blocks([Holder(Whole(act, named))])
    assert report.functions == (function,)


def test_a_block_that_is_not_what_it_seems_stays_and_says_why() -> None:
    class Gated(Whole):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * 1.5

    layer = Holder(Gated(nn.GELU()))
    report = install_blocks([layer])
    assert report.feed_forwards == 0
    assert report.off == ("layer 0, mlp: ours gives something else",)
    assert "as it was: layer 0, mlp" in str(report)
    assert isinstance(layer.mlp, Gated)


def test_a_layer_without_one_says_so() -> None:
    report = install_blocks([Holder(lora(8, 8))])
    assert report.off == ("layer 0, no feed-forward block of a form that is known",)


def test_training_mode_and_dropout_are_as_before() -> None:
    layer = Holder(nn.Sequential(Whole(nn.GELU()), nn.Dropout(0.5))).train()
    assert install_blocks([layer]).feed_forwards == 1
    assert all(module.training for module in layer.modules())

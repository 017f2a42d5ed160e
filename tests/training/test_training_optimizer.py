"""Schedules, clipping, 8-bit moments, trained factors; and that nothing frozen moves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train

from edge_sdk.errors import MechanismError  # noqa: E402
from edge_sdk.protocol.model import LoraShape  # noqa: E402
from edge_sdk.protocol.spec import TrainSpec  # noqa: E402
from edge_sdk.training.adamw8bit import AdamW8bit  # noqa: E402
from edge_sdk.training.model import TunableModel, load_model  # noqa: E402
from edge_sdk.training.optimizer import LossScale, RoundOptimizer, rate_share  # noqa: E402
from edge_sdk.updates.initial import initial_adapter  # noqa: E402


def test_the_rate_rises_and_stays_or_falls() -> None:
    constant, linear = TrainSpec(warmup_steps=3), TrainSpec(warmup_steps=3, schedule="linear")
    assert [rate_share(n, constant, 8) for n in range(1, 9)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert [rate_share(n, linear, 8) for n in range(1, 9)] == [0.25, 0.5, 0.75, 1, 0.8, 0.6, 0.4, 0.2]
    assert rate_share(2, TrainSpec(), 8) == 1
    assert all(0 < rate_share(n, TrainSpec(warmup_steps=9, schedule="linear"), 4) < 1 for n in range(1, 5))


def _problem(optimizer: Any, steps: int = 120) -> tuple[list[float], list[Any]]:
    """A small net on rows whose columns differ a hundredfold, so that gradients do as well."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(256, 64), torch.nn.GELU(), torch.nn.Linear(64, 100), torch.nn.GELU(),
        torch.nn.Linear(100, 5),
    )  # fmt: skip
    start = [p.detach().clone() for p in net.parameters()]
    made = optimizer(net.parameters())
    g = torch.Generator().manual_seed(0)
    right = torch.randn(256, 5, generator=g)
    losses = []
    for _ in range(steps):
        x = torch.randn(32, 256, generator=g) * torch.logspace(0, -2, 256)
        loss = torch.nn.functional.cross_entropy(net(x), (x @ right).argmax(1))
        loss.backward()
        made.step()
        made.zero_grad()
        losses.append(loss.item())
    return losses, [p.detach() - s for p, s in zip(net.parameters(), start, strict=True)]


def test_moments_in_8_bits_go_where_whole_ones_go() -> None:
    def packed(parameters: Any) -> Any:
        return AdamW8bit(parameters, lr=2e-3, weight_decay=0.01, generator=torch.Generator().manual_seed(1))

    plain, there = _problem(lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.01, foreach=False))
    losses, moved = _problem(packed)
    again, _ = _problem(packed)
    assert losses == again
    assert (
        np.mean(losses[-20:]) == pytest.approx(np.mean(plain[-20:]), rel=0.02) and plain[-1] < 0.8 * plain[0]
    )
    for one, other in zip(moved, there, strict=True):
        assert (one - other).norm() < 0.06 * other.norm()


def test_what_moments_take() -> None:
    big, small = torch.nn.Parameter(torch.randn(64, 256)), torch.nn.Parameter(torch.randn(16))
    sizes = {}
    for name in ("adamw", "adamw8bit", "sgd"):
        optimizer = RoundOptimizer({"0.x.A": big, "dense.b": small}, TrainSpec(optimizer=name), steps=2)
        big.grad, small.grad = torch.randn_like(big), torch.randn_like(small)
        optimizer.step()
        sizes[name] = optimizer.state_bytes
        optimizer.close()
        assert optimizer.state_bytes == 0 and big.grad is None
    assert sizes["adamw"] >= 8 * (big.numel() + small.numel())
    assert sizes["adamw8bit"] == 2 * big.numel() + 8 * big.numel() // 256 + 8 * small.numel()
    assert sizes["sgd"] == 0


def test_odd_shapes_and_lonely_gradients_in_8_bits() -> None:
    parameter = torch.nn.Parameter(torch.zeros(5001))
    optimizer = AdamW8bit([parameter], lr=0.1)
    parameter.grad = torch.zeros(5001)
    parameter.grad[7], parameter.grad[8] = 1.0, 1e-9
    for _ in range(5):
        optimizer.step()
    moved = parameter.detach()
    assert moved[7] == pytest.approx(-0.5, rel=0.05) and moved[8].abs() < 0.5
    assert not moved[5000] and bool(torch.isfinite(moved).all())


def test_head_and_factors_have_their_own_rates_and_decay() -> None:
    parts = {key: torch.nn.Parameter(torch.ones(4, 4)) for key in ("0.x.A", "dense.weight")}
    parts["dense.bias"] = torch.nn.Parameter(torch.ones(4))
    spec = TrainSpec(
        optimizer="sgd", learning_rate=0.1, head_learning_rate=0.2, weight_decay=0.5, clip_norm=1e9
    )
    optimizer = RoundOptimizer(parts, spec, steps=1)
    for parameter in parts.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    got = {key: parameter.detach().flatten()[0].item() for key, parameter in parts.items()}
    assert got == pytest.approx({"0.x.A": 0.85, "dense.weight": 0.7, "dense.bias": 0.8})


def test_gradients_are_clipped_to_the_norm() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    spec = TrainSpec(optimizer="sgd", head_learning_rate=1.0, clip_norm=0.5)
    optimizer = RoundOptimizer({"dense.b": parameter}, spec, steps=1)
    parameter.grad = torch.full((4,), 3.0)
    optimizer.step()
    assert parameter.detach().norm() == pytest.approx(0.5, rel=1e-4)


@pytest.fixture(scope="module")
def model(tiny: dict[str, Path]) -> TunableModel:
    return load_model(tiny["bert"], ("a", "b"), LoraShape(rank=4, alpha=8.0), "cpu")


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
def test_nothing_frozen_moves_or_has_state(factors: str, optimizer: str, model: TunableModel) -> None:
    start = initial_adapter(model.shape, model.lora, seed=1)
    for key, value in start.items():
        start[key] = value + np.float32(0.1)
    model.set_adapter(start)
    frozen = {n: p.detach().clone() for n, p in model.net.named_parameters()}
    spec = TrainSpec(optimizer=optimizer, weight_decay=0.5, learning_rate=0.05, factors=factors)
    model.tune(1, factors=factors)
    trained = model.trained()
    optimizer_made = RoundOptimizer(trained, spec, steps=2)
    for _ in range(2):
        model.logits(torch.arange(4, 12).view(2, 4), torch.ones(2, 4, dtype=torch.int64)).sum().backward()
        optimizer_made.step()
    moved = {key for key, value in model.adapter().items() if (value != start[key]).any()}
    layers = {key for key in moved if not key.startswith("dense.")}
    assert moved == set(trained) and {key[-1] for key in layers} == set(factors)
    assert {key.split(".")[0] for key in layers} == {"2"}
    names = {id(p) for p in trained.values()}
    for name, parameter in model.net.named_parameters():
        if id(parameter) not in names:
            assert torch.equal(parameter, frozen[name]), name
    assert len(optimizer_made._inner.state) == (0 if optimizer == "sgd" else len(trained))


def test_a_scaled_loss_gives_the_same_step() -> None:
    spec, ends = TrainSpec(head_learning_rate=0.1), []
    for scale in (None, LossScale()):
        parameter = torch.nn.Parameter(torch.ones(8))
        optimizer = RoundOptimizer({"dense.b": parameter}, spec, steps=1)
        loss = (parameter * torch.arange(8.0)).sum()
        (loss if scale is None else loss * scale.value).backward()
        optimizer.step(scale)
        ends.append(parameter.detach())
    assert torch.equal(*ends)


def test_an_overflow_moves_nothing_and_halves_the_scale() -> None:
    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = RoundOptimizer({"dense.b": parameter}, TrainSpec(), steps=9)
    scale = LossScale(1024.0, patience=2)
    parameter.grad = torch.full((8,), float("inf"))
    assert not optimizer.step(scale)
    assert (scale.value, optimizer._step) == (512, 0)
    assert bool((parameter == 1).all()) and parameter.grad is None
    for expected in (512, 1024):
        parameter.grad = torch.ones(8)
        assert optimizer.step(scale)
        assert scale.value == expected
    assert bool((parameter < 1).all()) and optimizer._step == 2
    scale.value = 2.0
    parameter.grad = torch.full((8,), float("nan"))
    assert not optimizer.step(scale)
    parameter.grad = torch.full((8,), float("nan"))
    with pytest.raises(MechanismError, match="range of fp16"):
        optimizer.step(scale)


def test_a_paged_optimizer_is_refused_where_nothing_can_be_paged(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"0.x.A": torch.nn.Parameter(torch.ones(2, 2))}
    with pytest.raises(MechanismError, match="on the CPU") as refused:
        RoundOptimizer(parts, TrainSpec(optimizer="paged-adamw8bit"), steps=1)
    assert "adamw8bit" in refused.value.hint
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(MechanismError, match="lion"):
        RoundOptimizer(parts, TrainSpec(optimizer="lion"), steps=1)

"""The activation store: exact forward, small error in the gradient, bytes that really fall."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train

from edge_sdk.protocol.model import LoraShape  # noqa: E402
from edge_sdk.training.activations.plan import Form, LayerPlan  # noqa: E402
from edge_sdk.training.activations.store import ActivationStore, Held  # noqa: E402
from edge_sdk.training.model import TunableModel, load_model  # noqa: E402
from edge_sdk.updates.initial import initial_adapter  # noqa: E402

BATCH, LENGTH = 8, 32
PACKED = LayerPlan(Form(8))


@pytest.fixture(scope="module")
def model(minilm: Path) -> TunableModel:
    model = load_model(minilm, tuple("abcdefgh"), LoraShape(), "cpu")
    model.set_adapter(initial_adapter(model.shape, model.lora, seed=0))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.parts.items():
            if key.endswith(".B"):
                parameter.normal_(0, 0.02, generator=draw)
    return model


@pytest.fixture
def peaked(model: TunableModel) -> Iterator[TunableModel]:
    """Queries and keys six times as large: attention that looks at one token."""

    def scale(by: float) -> None:
        with torch.no_grad():
            for layer in model.layers:
                for name in ("query", "key"):
                    linear = layer.get_submodule(f"attention.self.{name}")
                    linear.frozen.weight.mul_(by)
                    linear.bias.mul_(by)

    scale(6.0)
    yield model
    scale(1 / 6.0)


def _run(model: TunableModel, quantized: int, depth: int | None = None) -> tuple[float, Any, ActivationStore]:
    """Loss, all LoRA gradients, and the store, of one forward and backward pass."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(1000, 20000, (BATCH, LENGTH), generator=draw)
    mask = torch.ones_like(ids)
    mask[: BATCH // 2, LENGTH // 2 :] = 0
    labels = torch.randint(0, 8, (BATCH,), generator=draw)
    depth = model.shape.layers if depth is None else depth
    model.set_depth(depth)
    store = ActivationStore(model.net.parameters())
    bottom = model.shape.layers - depth
    with store.over(dict.fromkeys(model.layers[bottom : bottom + quantized], PACKED)):
        loss = torch.nn.functional.cross_entropy(model.logits(ids, mask), labels)
    loss.backward()
    gradients = [p.grad.flatten() for k, p in model.parts.items() if p.grad is not None and k[0].isdigit()]
    return loss.item(), torch.cat(gradients), store


def _error(model: TunableModel, quantized: int) -> float:
    loss, exact, _ = _run(model, 0)
    packed_loss, noisy, _ = _run(model, quantized)
    assert packed_loss == loss
    return float((noisy - exact).norm() / exact.norm())


def test_the_loss_is_the_same_to_the_bit_and_gradients_within_a_hundredth(model: TunableModel) -> None:
    assert 0 < _error(model, 6) < 0.01


def test_peaked_attention_is_no_worse_since_its_own_tensors_stay_exact(peaked: TunableModel) -> None:
    # with queries, keys and values packed as well it is above 0.9
    assert 0 < _error(peaked, 6) < 0.025


def test_the_lowest_layers_only(model: TunableModel) -> None:
    _, exact, _ = _run(model, 0, depth=3)
    _, noisy, store = _run(model, 1, depth=3)
    per_layer = exact.numel() // 3
    # gradients of the layers above the packed one are untouched
    assert torch.equal(exact[per_layer:], noisy[per_layer:])
    assert not torch.equal(exact[:per_layer], noisy[:per_layer])
    _, _, all_three = _run(model, 3, depth=3)
    assert abs(all_three.packed_bytes - 3 * store.packed_bytes) <= 0.01 * all_three.packed_bytes


def test_what_is_saved_shrinks_to_a_third(model: TunableModel) -> None:
    _, _, store = _run(model, 6)
    unit = BATCH * LENGTH * 384 * 4
    # per layer: input, attention's output projection input is exact, two LayerNorm inputs, the inner
    # layer's input, GELU's input and output
    assert store.original_bytes == 6 * 12 * unit
    assert store.packed_bytes == store.original_bytes // 4 * 40 // 32


def test_a_tensor_saved_by_several_is_packed_once() -> None:
    weights = [torch.randn(64, 64, requires_grad=True) for _ in range(3)]

    class Layer(torch.nn.Module):
        def forward(self, hidden: Any) -> Any:
            return sum(hidden @ w for w in weights)

    layer, store = Layer(), ActivationStore(weights)
    hidden = torch.randn(4, 16, 64)
    with store.over({layer: PACKED}):
        out = layer(hidden)
    assert store.original_bytes == hidden.numel() * 4
    out.sum().backward()
    expected = hidden.flatten(0, 1).sum(0)[:, None].expand(64, 64)
    for weight in weights:
        assert torch.allclose(weight.grad, expected, rtol=0.05, atol=0.5)


def test_a_freed_address_is_not_mistaken_for_the_old_tensor() -> None:
    scales = torch.tensor([1.0, 10.0, 100.0], requires_grad=True)

    class Layer(torch.nn.Module):
        def forward(self, hidden: Any) -> Any:
            total = torch.zeros(())
            for i in range(3):
                fresh = hidden.detach() * float(i + 1)  # made, saved, freed: the next takes its address
                total = total + (fresh * scales[i]).sum()
                del fresh
                gc.collect()
            return total

    layer, store = Layer(), ActivationStore([scales])
    hidden = torch.rand(8, 4096) + 0.5
    with store.over({layer: PACKED}):
        layer(hidden).backward()
    sums = torch.stack([(hidden * (i + 1)).sum() for i in range(3)])
    assert torch.allclose(scales.grad, sums, rtol=0.01)


def test_the_layer_is_left_as_it_was() -> None:
    layer = torch.nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="odd"), ActivationStore([]).over({layer: PACKED}):
        assert "forward" in vars(layer)
        raise RuntimeError("odd")
    assert "forward" not in vars(layer)


def test_a_failed_forward_pass_keeps_nothing_alive(model: TunableModel) -> None:
    """Attention saves its own output: a pack hook that returned it would close a cycle through C++."""
    kept: list[bool] = []
    store = ActivationStore(model.net.parameters())
    model.set_depth(model.shape.layers)
    ids = torch.randint(1000, 2000, (2, 32))

    def fail(module: Any, arguments: Any) -> None:
        kept.append(True)
        raise MemoryError

    handle = model.layers[2].register_forward_pre_hook(fail)
    try:
        with store.over(dict.fromkeys(model.layers, PACKED)), pytest.raises(MemoryError):
            model.logits(ids, torch.ones_like(ids))
    finally:
        handle.remove()
    gc.collect()
    views = sum(type(thing) is Held for thing in gc.get_objects())
    assert views == 0 and kept

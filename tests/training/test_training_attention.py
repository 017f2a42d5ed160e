"""Attention inside the store: forward to the bit, gradients as autograd's, sound where it is peaked."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.train

from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from edge_sdk.errors import BaseModelError  # noqa: E402
from edge_sdk.training.activations import attention as room  # noqa: E402
from edge_sdk.training.activations.plan import PLAIN, Form, LayerPlan  # noqa: E402
from edge_sdk.training.activations.store import ActivationStore, Keeper  # noqa: E402

EXACT = LayerPlan(None, "outputs")


class _Module(torch.nn.Module):
    def __init__(self, keeper: Any, groups: int, causal: bool) -> None:
        super().__init__()
        self.keeper, self.num_key_value_groups, self.is_causal = keeper, groups, causal


def _tensors(batch: int, heads: int, kv_heads: int, length: int, size: int, gain: float = 1.0) -> Any:
    draw = torch.Generator().manual_seed(3)

    def one(count: int) -> Any:
        return torch.randn(batch, length, count, size, generator=draw).transpose(1, 2)

    return (one(heads) * gain, one(kv_heads) * gain, one(kv_heads)), torch.randn(
        batch, length, heads, size, generator=draw
    )


def _run(plan: LayerPlan | None, given: Any, grad: Any, mask: Any = None, causal: bool = False) -> Any:
    keeper = None if plan is None else Keeper(plan, ActivationStore([]))
    groups = given[0].shape[1] // given[1].shape[1]
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in given]
    out, weights = room.attention(_Module(keeper, groups, causal), *leaves, mask)
    assert weights is None
    return out.detach(), torch.autograd.grad(out, leaves, grad)


def _error(plan: LayerPlan, given: Any, grad: Any, **kwargs: Any) -> float:
    plain, exact = _run(None, given, grad, **kwargs)
    out, noisy = _run(plan, given, grad, **kwargs)
    assert torch.equal(out, plain)
    exact, noisy = (torch.cat([g.flatten() for g in grads]) for grads in (exact, noisy))
    return float((noisy - exact).norm() / exact.norm())


def _masks(batch: int, heads: int, length: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(4)
    seen = torch.rand(batch, 1, length, length, generator=draw) > 0.3
    seen[..., 0] = True
    return {
        "none": None,
        "causal": None,
        "boolean": seen,
        "padding": seen[:, :, :1].expand(-1, -1, length, -1),
        "additive": torch.randn(1, 1, length, length, generator=draw),
        "additive by head": torch.randn(batch, heads, length, length, generator=draw),
    }


@pytest.mark.parametrize(
    "shape", [(2, 4, 4, 40, 16), (2, 8, 2, 33, 16), (1, 4, 1, 300, 32), (1, 2, 2, 700, 8)]
)
def test_gradients_are_those_of_the_written_out_formula(shape: Any) -> None:
    given, grad = _tensors(*shape)
    batch, heads, kv_heads, length, _ = shape
    for name, mask in _masks(batch, heads, length).items():
        causal = name == "causal"
        out, made = _run(EXACT, given, grad, mask, causal)
        leaves = [t.clone().requires_grad_() for t in given]
        q, k, v = leaves
        with sdpa_kernel(SDPBackend.MATH):
            repeat = heads // kv_heads
            oracle = torch.nn.functional.scaled_dot_product_attention(
                q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), mask, is_causal=causal
            ).transpose(1, 2)
        assert torch.allclose(out, oracle, atol=1e-5), name
        for a, b in zip(made, torch.autograd.grad(oracle, leaves, grad), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=2e-5), name


@pytest.mark.parametrize("shape", [(2, 4, 4, 40, 16), (1, 4, 1, 300, 32)])
def test_packed_the_output_is_the_same_to_the_bit(shape: Any) -> None:
    given, grad = _tensors(*shape)
    for name, mask in _masks(shape[0], shape[1], shape[3]).items():
        assert _error(LayerPlan(Form(8)), given, grad, mask=mask, causal=name == "causal") < 0.02
        assert _error(LayerPlan(Form(4), "outputs"), given, grad, mask=mask, causal=name == "causal") < 0.2


def test_the_other_way_than_blocks_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given, grad = _tensors(2, 8, 2, 33, 16)
    _, blocks = _run(EXACT, given, grad, causal=True)
    monkeypatch.setattr(
        room,
        "_by_blocks",
        lambda q, k, v, g, mask, call, *into: room._by_kernel(
            q[None], k[None], v[None], g.transpose(0, 1)[None], mask, call, [t[None] for t in into]
        ),
    )
    _, kernel = _run(EXACT, given, grad, causal=True)
    for a, b in zip(blocks, kernel, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def _naive(bits: int, given: Any, grad: Any) -> float:
    """The fused kernel's own backward on packed tensors, as a store would have it that knows no attention."""

    class Layer(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def gradient(form: Form | None) -> Any:
        leaves = [t.clone().requires_grad_() for t in given]
        store = ActivationStore([])
        keeper = Keeper(LayerPlan(form), store)
        keeper.fused_attention = False
        with torch.autograd.graph.saved_tensors_hooks(
            keeper.saved, lambda kept: kept.get() if hasattr(kept, "get") else kept
        ):
            out = Layer()(*leaves)
        return torch.cat([g.flatten() for g in torch.autograd.grad(out, leaves, grad)])

    exact, noisy = gradient(None), gradient(Form(bits))
    return float((noisy - exact).norm() / exact.norm())


def test_peaked_attention_stays_sound_at_four_bits() -> None:
    """Queries and keys six times as large: scores of a spread of 36, nearly one token each."""
    calm = _tensors(2, 4, 4, 64, 32)
    wild = _tensors(2, 4, 4, 64, 32, gain=6**0.5)
    plan = LayerPlan(Form(4), "outputs")
    base = _error(plan, *calm)
    assert base < 0.2
    assert _error(plan, *wild) < 1.5 * base
    assert _naive(4, *wild) > 5 * base
    peaked = _tensors(2, 4, 4, 64, 32, gain=6.0)
    assert _error(plan, *peaked) < 3 * base
    assert _error(LayerPlan(Form(8), "outputs"), *peaked) < 0.02
    assert _naive(4, *peaked) > 10  # or not a number at all


def test_what_all_keys_share_costs_no_precision() -> None:
    (q, k, v), grad = _tensors(2, 4, 4, 64, 32)
    shifted = (q, k + 20 * torch.randn(1, 4, 1, 32, generator=torch.Generator().manual_seed(5)), v)
    plan = LayerPlan(Form(8), "outputs")
    assert _error(plan, shifted, grad) < 3 * _error(plan, (q, k, v), grad)


def test_plain_where_nothing_is_asked_for() -> None:
    given, grad = _tensors(1, 2, 2, 16, 8)
    for plan in (PLAIN, LayerPlan(Form(8), "layer")):
        assert _error(plan, given, grad) == 0.0


def test_what_is_not_the_plain_formula_is_left_to_sdpa_and_stays_exact() -> None:
    given, grad = _tensors(1, 2, 2, 64, 64)
    bias = torch.randn(1, 2, 64, 64, requires_grad=True)
    assert _error(LayerPlan(Form(4), "outputs"), given, grad, mask=bias) == 0.0
    keeper = Keeper(LayerPlan(Form(4)), ActivationStore([]))
    torch.manual_seed(0)
    out, _ = room.attention(_Module(keeper, 1, False), *given, None, dropout=0.5)
    torch.manual_seed(0)
    assert torch.equal(out, room.attention(_Module(None, 1, False), *given, None, dropout=0.5)[0])


@pytest.mark.parametrize("word", ["softcap", "s_aux"])
def test_what_sdpa_would_leave_out_is_refused(word: str) -> None:
    given, _ = _tensors(1, 2, 2, 16, 8)
    with pytest.raises(BaseModelError, match=word):
        room.attention(_Module(None, 1, False), *given, None, **{word: 1.0})


def test_rows_that_see_nothing_get_no_gradient() -> None:
    given, grad = _tensors(1, 2, 2, 16, 8)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    mask[0, 0, 3] = False
    _, (dq, dk, dv) = _run(EXACT, given, grad, mask)
    assert dq.isfinite().all() and dk.isfinite().all() and dv.isfinite().all()
    assert (dq[:, :, 3] == 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str) -> None:
    given, grad = _tensors(2, 4, 2, 48, 16)
    halves = tuple(t.to(getattr(torch, dtype)) for t in given)
    _, exact = _run(None, given, grad)
    _, made = _run(LayerPlan(Form(8), "outputs"), halves, grad.to(halves[0].dtype))
    for a, b in zip(exact, made, strict=True):
        assert b.dtype == halves[0].dtype
        assert (a - b.float()).norm() < 0.03 * a.norm()


def test_nothing_of_the_size_of_the_input_is_kept_but_packed() -> None:
    given, grad = _tensors(2, 4, 4, 64, 32)
    store = ActivationStore([])
    module = _Module(Keeper(LayerPlan(Form(4), "outputs"), store), 1, False)
    leaves = [t.clone().requires_grad_() for t in given]
    inner = [leaf * 1.0 for leaf in leaves]
    gone = [weakref.ref(t) for t in inner]
    out, _ = room.attention(module, *inner, None)
    del inner
    assert all(ref() is None for ref in gone)
    assert store.packed_bytes < 0.17 * store.original_bytes
    out.backward(grad)
    with pytest.raises(RuntimeError, match="backward"):
        out.backward(grad)


def test_queries_keys_and_values_may_be_one_tensor() -> None:
    (q, _, _), grad = _tensors(1, 2, 2, 64, 64)
    leaf = q.clone().requires_grad_()
    plain, _ = room.attention(_Module(None, 1, False), leaf, leaf, leaf, None)
    (exact,) = torch.autograd.grad(plain, leaf, grad)
    for plan in (EXACT, LayerPlan(Form(8), "outputs")):
        keeper = Keeper(plan, ActivationStore([]))
        out, _ = room.attention(_Module(keeper, 1, False), leaf, leaf, leaf, None)
        (made,) = torch.autograd.grad(out, leaf, grad)
        assert (made - exact).norm() < 0.01 * exact.norm()

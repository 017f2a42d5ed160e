"""Packed values: how large an error may be, unbiased rounding, slices, any shape and dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.train

from edge_sdk.training.activations import kernels, packing, triton_kernels  # noqa: E402
from edge_sdk.training.activations.packing import pack, pack_mask  # noqa: E402
from edge_sdk.training.activations.plan import Form  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(params=["fbgemm", "composed"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "composed":
        monkeypatch.setattr(kernels, "has_kernel", lambda device, bits=8: False)
    elif not kernels.has_kernel(CPU):
        pytest.skip("this torch has no FBGEMM")
    yield request.param


def _values(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _steps(values: Any, bits: int, group: int) -> Any:
    rows = values.float().reshape(-1, group)
    return ((rows.amax(1) - rows.amin(1)) / (2**bits - 1)).repeat_interleave(group).reshape(values.shape)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_an_error_is_at_most_half_a_step(bits: int, implementation: str) -> None:
    values = _values(40, 96)
    values[3] = 2.5  # a group without a range
    packed = pack(values, Form(bits))
    error = (packed.unpack() - values).abs()
    assert (error <= 0.52 * _steps(values, bits, 32) + 2e-3).all()
    assert torch.equal(packed.unpack()[3], values[3])
    assert packing.kernel(CPU, Form(bits)) == implementation
    assert packed.nbytes == values.numel() // 32 * (4 * bits + (8 if bits == 8 else 4))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_both_implementations_read_what_the_other_wrote(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels.has_kernel(CPU, bits):
        pytest.skip("this torch has no FBGEMM")
    values = _values(64, 64)
    fused = pack(values, Form(bits))
    read = fused.unpack()
    monkeypatch.setattr(kernels, "has_kernel", lambda device, bits=8: False)
    composed = pack(values, Form(bits))
    assert torch.allclose(fused.unpack(), read, atol=1e-5)
    # where a value lies half-way between two codes they may differ by one
    assert float((composed._codes != fused._codes).float().mean()) < 0.01


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_stochastic_rounding_is_unbiased(bits: int) -> None:
    values, draws = _values(64, 64), 400
    generator = torch.Generator().manual_seed(1)
    form = Form(bits, "stochastic")
    total, squares = torch.zeros_like(values), torch.zeros_like(values)
    for _ in range(draws):
        error = pack(values, form, generator).unpack() - values
        total += error
        squares += error.square()
    steps = _steps(values, bits, 32)
    # the mean of so many draws of a uniform remainder, and what float16 scales lose
    assert float((total / draws / steps).abs().mean()) < 1.5 / draws**0.5 * 0.41 + 4e-3
    assert float((total / draws / steps).mean().abs()) < 2e-3
    assert ((squares / draws).sqrt() <= 0.55 * steps + 2e-3).all()


def test_a_generator_makes_draws_again() -> None:
    values, form = _values(100, 64), Form(4, "stochastic")
    draws = [pack(values, form, torch.Generator().manual_seed(seed)).unpack() for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_shape_and_dtype(bits: int, dtype: str, implementation: str) -> None:
    for shape in ((3, 5, 7, 33), (1,), (17, 100), (1000, 1), (2, 3, 64), (257,)):
        values = _values(*shape).to(getattr(torch, dtype))
        packed = pack(values, Form(bits))
        back = packed.unpack()
        assert back.shape == values.shape and back.dtype == values.dtype
        limit = {8: 0.02, 4: 0.3, 2: 1.3}[bits]
        assert (back.float() - values.float()).abs().max() < limit * max(1.0, float(values.abs().max()) / 2)


def test_rows_are_slices() -> None:
    values = _values(4, 10, 100)
    for form in (Form(8), Form(4), Form(2, group=64)):
        packed = pack(values, form)
        whole = packed.unpack().view(-1, 100)
        for start, stop in ((0, 1), (7, 33), (39, 40), (30, 99)):
            assert torch.equal(packed.rows(start, stop), whole[start:stop])


@pytest.mark.parametrize("shape", [(8, 64), (3, 1), (9, 33)])
def test_what_float16_scales_cannot_hold_goes_to_eight_bits(shape: tuple[int, ...]) -> None:
    """Also where it stands in a last group that is filled up alone."""
    values = _values(*shape)
    values.view(-1)[-3:] *= 1e6
    back = pack(values, Form(4)).unpack()
    assert back.isfinite().all() and (back - values).norm() < 0.01 * values.norm()


def test_tensors_larger_than_a_block(implementation: str) -> None:
    values = _values(300, 2048).to(torch.bfloat16)
    packed = pack(values, Form(8))
    assert (packed.unpack() - values).float().norm() < 0.01 * values.float().norm()
    noisy = pack(values, Form(4, "stochastic"), torch.Generator().manual_seed(0)).unpack()
    assert (noisy - values).float().norm() < 0.13 * values.float().norm()


@pytest.mark.parametrize("shape", [(33, 77), (1,), (8,), (2, 3, 4, 5)])
def test_masks_are_exact_and_take_a_bit(shape: tuple[int, ...]) -> None:
    mask = _values(*shape) > 0.3
    packed = pack_mask(mask)
    assert torch.equal(packed.unpack(), mask)
    assert packed.nbytes == -(-mask.numel() // 8)


def test_triton_writes_the_same_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    values = _values(70, 32)
    values[5] = 2.5
    for bits in (8, 4, 2):
        packed = triton_kernels.pack_rows(values, bits)
        assert (packed != kernels.pack_rows(values, bits)).float().mean() < 0.03
        back = triton_kernels.unpack_rows(packed, bits, 32, torch.float32)
        assert torch.allclose(back, kernels.unpack_rows(packed, bits, 32), atol=1e-5)
        drawn = [
            triton_kernels.unpack_rows(triton_kernels.pack_rows(values, bits, seed), bits, 32, torch.float32)
            for seed in range(1, 17)
        ]
        assert not torch.equal(drawn[0], drawn[1])
        mean = (sum(drawn) / 16 - values).norm()
        assert mean < 0.4 * (drawn[0] - values).norm()


def test_where_triton_is_not_for_the_device_it_is_not_asked() -> None:
    assert not triton_kernels.available(torch.device("meta"))
    packing.warm("cpu")
    assert packing.kernel("cpu") in ("fbgemm", "composed")

"""Packing on CUDA by Triton, in the byte form of ``kernels.py``: one program a handful of rows.

Never run on a GPU yet: its arithmetic is tested by Triton's interpreter where Triton is installed, and it
compiles for sm_87; its speed is not known. Triton keeps what it compiled on disk (``TRITON_CACHE_DIR``), so
that ``warm`` takes seconds once per machine; call it outside rounds. Without Triton the composed ops pack.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from typing import Any

import torch

__all__ = ["available", "pack_rows", "unpack_rows", "warm"]

tl: Any = None
"""triton.language, once it is imported."""

_ROWS = 32
"""Rows of a program."""


@lru_cache(maxsize=32)
def available(device: Any, group: int = 32) -> bool:
    """Whether rows of ``group`` values on ``device`` are for these kernels."""
    fits = 8 <= group <= 1024 and group & (group - 1) == 0
    return device.type == "cuda" and fits and importlib.util.find_spec("triton") is not None


def pack_rows(rows: Any, bits: int, seed: int | None = None) -> Any:
    """(n, group) float32, bfloat16 or float16 -> (n, row bytes) uint8.

    Args:
        seed: of the random numbers of stochastic rounding (Philox, in the kernel); None: to nearest.
    """
    n, group = rows.shape
    wide = group * bits // 8
    packed = torch.empty((n, wide + (8 if bits == 8 else 4)), dtype=torch.uint8, device=rows.device)
    tails = torch.empty((n, 2), dtype=torch.float32 if bits == 8 else torch.float16, device=rows.device)
    pack, _ = _kernels()
    if n:
        pack[(-(-n // _ROWS),)](
            rows, packed, tails, seed or 0, n, packed.shape[1],
            GROUP=group, BITS=bits, PER=8 // bits, NOISY=seed is not None, ROWS=_ROWS,
        )  # fmt: skip
    packed[:, wide:] = tails.view(torch.uint8)
    return packed


def unpack_rows(packed: Any, bits: int, group: int, dtype: Any) -> Any:
    """(n, row bytes) uint8 -> (n, group) of ``dtype``."""
    n, wide = packed.shape[0], group * bits // 8
    tails = packed[:, wide:].contiguous().view(torch.float32 if bits == 8 else torch.float16)
    rows = torch.empty((n, group), dtype=dtype, device=packed.device)
    _, unpack = _kernels()
    if n:
        unpack[(-(-n // _ROWS),)](
            packed, tails, rows, n, packed.stride(0), GROUP=group, BITS=bits, PER=8 // bits, ROWS=_ROWS
        )
    return rows


def warm(device: Any) -> None:
    """Compiles what training will need, or finds it on disk."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = torch.zeros((_ROWS, 32), dtype=dtype, device=device)
        for bits in (8, 4, 2):
            for seed in (None, 1):
                packed = pack_rows(rows, bits, seed)
                unpack_rows(packed, bits, 32, dtype)
                unpack_rows(packed[1:], bits, 32, dtype)  # at no multiple of 16 bytes: compiled apart


@lru_cache(maxsize=1)
def _kernels() -> tuple[Any, Any]:
    triton = importlib.import_module("triton")
    # Triton reads a kernel's globals from where it was defined
    globals()["tl"] = importlib.import_module("triton.language")
    steady = triton.jit(do_not_specialize=["seed", "n"])  # or a seed of 1 would be compiled for
    return steady(_pack), triton.jit(do_not_specialize=["n"])(_unpack)


def _pack(  # type: ignore[no-untyped-def]
    rows, packed, tails, seed, n, stride,
    GROUP: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr, NOISY: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    there = (row < n)[:, None] & (tl.arange(0, GROUP)[None, :] < GROUP)
    x = tl.load(rows + place, mask=there, other=0.0).to(tl.float32)
    low = tl.min(x, axis=1)
    scale = (tl.max(x, axis=1) - low) / (2**BITS - 1)
    if BITS < 8:  # codes must fit the scale that is kept
        low = low.to(tl.float16).to(tl.float32)
        scale = scale.to(tl.float16).to(tl.float32)
    inverse = tl.where(scale > 0, 1.0 / tl.where(scale > 0, scale, 1.0), 0.0)
    code = (x - low[:, None]) * inverse[:, None]
    if NOISY:
        code += tl.rand(seed, place)
    else:
        code += 0.5
    code = tl.minimum(tl.maximum(code, 0.0), 2**BITS - 0.5).to(tl.int32)
    # neighbours share a byte, the first in the lowest bits
    shift = (tl.arange(0, PER) * BITS)[None, None, :]
    byte = tl.sum(tl.reshape(code, (ROWS, GROUP // PER, PER)) << shift, axis=2)
    into = row[:, None] * stride + tl.arange(0, GROUP // PER)[None, :]
    seen = (row < n)[:, None] & (tl.arange(0, GROUP // PER)[None, :] < GROUP)
    tl.store(packed + into, byte.to(tl.uint8), mask=seen)
    tl.store(tails + row * 2, scale.to(tails.dtype.element_ty), mask=row < n)
    tl.store(tails + row * 2 + 1, low.to(tails.dtype.element_ty), mask=row < n)


def _unpack(  # type: ignore[no-untyped-def]
    packed, tails, rows, n, stride,
    GROUP: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, GROUP)
    there = (row < n)[:, None] & (at[None, :] < GROUP)
    byte = tl.load(packed + row[:, None] * stride + (at // PER)[None, :], mask=there, other=0).to(tl.int32)
    code = (byte >> ((at % PER) * BITS)[None, :]) & (2**BITS - 1)
    scale = tl.load(tails + row * 2, mask=row < n, other=0.0).to(tl.float32)
    low = tl.load(tails + row * 2 + 1, mask=row < n, other=0.0).to(tl.float32)
    x = code.to(tl.float32) * scale[:, None] + low[:, None]
    tl.store(rows + row[:, None] * GROUP + at[None, :], x.to(rows.dtype.element_ty), mask=there)

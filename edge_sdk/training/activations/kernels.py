"""Rows of packed codes, each with the scale and offset of its one group: the byte form of torch's FBGEMM ops.

A row of g values in b bits is g·b/8 bytes of codes, the first value in the lowest bits, then scale and
offset: float32 each at 8 bits, float16 each below. x ~ code · scale + offset,
code = round((x - min) / scale), scale = (max - min) / (2^b - 1). Composed ops write and read the same form
where FBGEMM is not.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from edge_sdk.training.activations import triton_kernels

__all__ = ["has_kernel", "pack_rows", "row_bytes", "unpack_rows"]

_BLOCK = 1 << 18
"""Elements that the composed ops take at a time: their float temporaries stay in the cache."""

_OPS = {8: "byte", 4: "4bit", 2: "2bit"}
_POOL = 1 << 20


def row_bytes(bits: int, group: int) -> int:
    return group * bits // 8 + (8 if bits == 8 else 4)


def pack_rows(rows: Any, bits: int, generator: Any = None, *, stochastic: bool = False) -> Any:
    """(n, group) float32, bfloat16 or float16, contiguous -> (n, row_bytes) uint8.

    ``stochastic``: code = floor((x - min) / scale + u), u uniform in [0, 1), so that the mean over draws is
    x. float16 scales that overflow become infinite: the caller looks.
    """
    n, group = rows.shape
    if triton_kernels.available(rows.device, group):
        seed = None
        if stochastic:
            seed = int(torch.randint(1 << 31, (), generator=generator, device=_place(generator)))
        return triton_kernels.pack_rows(rows, bits, seed)
    kernel = not stochastic and has_kernel(rows.device, bits)
    if kernel and (rows.dtype != torch.bfloat16 or n * group <= _BLOCK):
        return _prepack(bits)(rows.float() if rows.dtype == torch.bfloat16 else rows)
    packed = torch.empty((n, row_bytes(bits, group)), dtype=torch.uint8, device=rows.device)
    step = max(1, _BLOCK // group)
    noise = _Noise(rows.device, -(-n // step), generator) if stochastic else None
    room = None if kernel else torch.empty((min(step, n), group), device=rows.device)
    for i, start in enumerate(range(0, n, step)):
        block = rows[start : start + step].float()
        if kernel:
            packed[start : start + step] = _prepack(bits)(block)
        else:
            place = packed[start : start + step]
            _compose(block, place, bits, None if noise is None else noise.block(i), room)
    return packed


def unpack_rows(packed: Any, bits: int, group: int, dtype: Any = torch.float32) -> Any:
    """(n, row_bytes) uint8 -> (n, group) of ``dtype``."""
    n = packed.shape[0]
    if triton_kernels.available(packed.device, group):
        return triton_kernels.unpack_rows(packed, bits, group, dtype)
    kernel = has_kernel(packed.device, bits)
    if kernel and (dtype == torch.float32 or n * group <= _BLOCK):
        return _unpack(bits)(packed).to(dtype)
    rows = torch.empty((n, group), dtype=dtype, device=packed.device)
    step = max(1, _BLOCK // group)
    for start in range(0, n, step):
        block = packed[start : start + step]
        rows[start : start + step] = _unpack(bits)(block) if kernel else _decompose(block, bits, group)
    return rows


def _prepack(bits: int) -> Any:
    return getattr(torch.ops.quantized, f"embedding_bag_{_OPS[bits]}_prepack")


def _unpack(bits: int) -> Any:
    return getattr(torch.ops.quantized, f"embedding_bag_{_OPS[bits]}_unpack")


@lru_cache(maxsize=32)
def has_kernel(device: Any, bits: int = 8) -> bool:
    """Whether this torch has the fused kernels for the device, and they do what is written above."""
    probe = torch.linspace(-1.0, 3.0, 64, device=device).reshape(2, 32)
    try:
        packed = _prepack(bits)(probe)
        back = _unpack(bits)(packed)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    composed = torch.empty((2, row_bytes(bits, 32)), dtype=torch.uint8, device=device)
    _compose(probe, composed, bits, None)
    return (
        packed.shape == composed.shape
        and bool(((back - probe).abs() <= 1.01 / (2**bits - 1)).all())
        and bool(((_unpack(bits)(composed) - back).abs() <= 2.02 / (2**bits - 1)).all())
    )


def _place(generator: Any) -> Any:
    return torch.device("cpu") if generator is None else generator.device


class _Noise:
    """Uniform numbers for rounding, cheap: a fixed shuffle of evenly spread ones, read from drawn places.

    Over the place each value's number is uniform, which is all that being unbiased needs.
    """

    def __init__(self, device: Any, blocks: int, generator: Any) -> None:
        starts = torch.randint(_POOL, (blocks,), generator=generator, device=_place(generator))
        self._starts = starts.tolist()
        self._pool = _pool(device)

    def block(self, i: int) -> Any:
        return self._pool[self._starts[i] :]


@lru_cache(maxsize=4)
def _pool(device: Any) -> Any:
    order = torch.randperm(_POOL, generator=torch.Generator().manual_seed(0x0EDCE))
    even = (order.to(torch.float32) + 0.5) / _POOL
    return torch.cat((even, even[:_BLOCK])).to(device)


def _compose(block: Any, packed: Any, bits: int, noise: Any, room: Any = None) -> None:
    """Packs (n, group) float32 into ``packed``. ``noise`` and ``room``: at least as large, float32."""
    n, group = block.shape
    low = block.amin(dim=1, keepdim=True)
    scale = (block.amax(dim=1, keepdim=True) - low).div_(2**bits - 1)
    if bits < 8:  # codes must fit the scale that is kept
        low, scale = low.half().float(), scale.half().float()
    work = torch.sub(block, low, out=None if room is None else room[:n])
    work.mul_(scale.reciprocal().nan_to_num_(0.0, 0.0))
    work.view(-1).add_(0.5 if noise is None else noise[: n * group])
    # cut off: floor; by way of int16, which is vectorized
    codes = work.clamp_(0, 2**bits - 0.5).to(torch.int16).to(torch.uint8)
    if bits == 4:
        pairs = codes.view(torch.int16)
        codes = pairs.bitwise_or_(pairs >> 4).to(torch.uint8)
    elif bits == 2:
        fours = codes.view(torch.int32)
        codes = (fours | fours >> 6 | fours >> 12 | fours >> 18).to(torch.uint8)
    wide = group * bits // 8
    packed[:, :wide] = codes
    tail = torch.cat((scale, low), dim=1)
    packed[:, wide:] = (tail if bits == 8 else tail.half()).view(torch.uint8)


def _decompose(block: Any, bits: int, group: int) -> Any:
    wide = group * bits // 8
    tail = block[:, wide:].contiguous().view(torch.float32 if bits == 8 else torch.float16).float()
    codes = block[:, :wide]
    if bits == 4:
        pairs = codes.to(torch.int16)
        codes = pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8)
    elif bits == 2:
        fours = codes.to(torch.int32)
        codes = (fours | fours << 6 | fours << 12 | fours << 18).bitwise_and_(0x03030303).view(torch.uint8)
    return torch.addcmul(tail[:, 1:], codes.to(torch.float32), tail[:, :1])

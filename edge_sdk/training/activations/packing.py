"""Values in 8, 4 or 2 bits, groups of the last axis with a scale and an offset each; masks in one bit.

The error of a value is at most half a scale when rounded to nearest, one scale when stochastic.
"""

from __future__ import annotations

from typing import Any

import torch

from edge_sdk.training.activations import kernels, triton_kernels
from edge_sdk.training.activations.plan import Form

__all__ = ["GROUPS", "Packed", "PackedMask", "kernel", "pack", "pack_flat", "pack_mask", "warm"]

GROUPS = {8: 32, 4: 32, 2: 32}
"""Values that share a scale, by bits. Outlier channels set a group's step: with groups of 16, 32, 64 and 128
all LoRA gradients of MiniLM are off by 0.63, 0.78, 0.90 and 1.1 % at 8 bits, by 11, 13, 15 and 18 % at 4, and
a value takes 12, 10, 9 and 8.5 bits, or 6, 5, 4.5 and 4.25."""


def kernel(device: Any, form: Form | None = None) -> str:
    """Which implementation packs: ``fbgemm``, ``triton`` or ``composed``."""
    form, device = Form() if form is None else form, torch.device(device)
    if triton_kernels.available(device, form.group or GROUPS[form.bits]):
        return "triton"
    fused = form.rounding == "nearest" and kernels.has_kernel(device, form.bits)
    return "fbgemm" if fused else "composed"


def warm(device: Any) -> None:
    """Makes ready what packs on ``device``, so that no round pays for it."""
    device = torch.device(device)
    for bits in GROUPS:
        if not triton_kernels.available(device, GROUPS[bits]):
            kernels.has_kernel(device, bits)
    if triton_kernels.available(device):
        triton_kernels.warm(device)


class Packed:
    """Packed values; ``nbytes`` are all that is held."""

    __slots__ = ("_bits", "_codes", "_count", "_group", "dtype", "shape")

    def __init__(self, codes: Any, bits: int, group: int, shape: Any, dtype: Any) -> None:
        self._codes, self._bits, self._group = codes, bits, group
        self.shape, self.dtype = torch.Size(shape), dtype
        self._count = self.shape.numel()

    @property
    def nbytes(self) -> int:
        return int(self._codes.numel())

    def unpack(self) -> Any:
        """The values, of their shape and dtype, contiguous."""
        return self.flat(0, self._count).view(self.shape)

    def rows(self, start: int, stop: int) -> Any:
        """Rows ``start`` to ``stop`` of the values as (rows, last axis)."""
        width = self.shape[-1]
        return self.flat(start * width, min(stop * width, self._count)).view(-1, width)

    def flat(self, start: int, stop: int) -> Any:
        """Values ``start`` to ``stop`` in their order in memory."""
        first = start // self._group
        codes = self._codes[first : -(-stop // self._group)]
        values = kernels.unpack_rows(codes, self._bits, self._group, self.dtype).view(-1)
        return values[start - first * self._group : stop - first * self._group]


def pack(values: Any, form: Form, generator: Any = None) -> Packed:
    """Packs float32, bfloat16 or float16 values of any shape.

    Args:
        generator: for stochastic rounding; None: torch's default one.
    """
    values = values.detach().contiguous()
    packed = pack_flat(values.view(-1), form, width=values.shape[-1], generator=generator)
    packed.shape = values.shape
    return packed


def pack_flat(flat: Any, form: Form, *, width: int, generator: Any = None) -> Packed:
    """Packs (n,) values; no group crosses a multiple of ``width`` where ``width`` has a fitting divisor."""
    count, bits = flat.numel(), form.bits
    group = _group(width, form.group or GROUPS[bits], count)
    codes = _codes(flat, bits, group, form, generator)
    if bits < 8 and flat.dtype != torch.float16:
        tails = codes[:, -4:].contiguous().view(torch.float16)
        if not bool(tails.float().sum().isfinite()):  # beyond 65504: eight bits have a float32 scale
            bits, codes = 8, _codes(flat, 8, group, form, generator)
    return Packed(codes, bits, group, (count,), flat.dtype)


def _codes(flat: Any, bits: int, group: int, form: Form, generator: Any) -> Any:
    """Rows of codes of all groups; the last one is filled up with its last value."""
    stochastic, full = form.rounding == "stochastic", flat.numel() // group * group
    codes = kernels.pack_rows(flat[:full].view(-1, group), bits, generator, stochastic=stochastic)
    if full == flat.numel():
        return codes
    rest = torch.cat((flat[full:], flat[-1:].expand(group - flat.numel() + full))).view(1, group)
    return torch.cat((codes, kernels.pack_rows(rest, bits, generator, stochastic=stochastic)))


def _group(width: int, wanted: int, count: int) -> int:
    """The largest divisor of ``width`` up to ``wanted`` that fills whole bytes; else ``wanted`` itself."""
    for group in range(min(wanted, width), max(3, wanted // 4), -1):
        if width % group == 0 and group % 4 == 0 and count % group == 0:
            return group
    return wanted


class PackedMask:
    """Booleans, one bit each, exact."""

    __slots__ = ("_bits", "dtype", "shape")

    def __init__(self, bits: Any, shape: Any) -> None:
        self._bits, self.shape, self.dtype = bits, torch.Size(shape), torch.bool

    @property
    def nbytes(self) -> int:
        return int(self._bits.numel())

    def unpack(self) -> Any:
        return self.flat(0, self.shape.numel()).view(self.shape)

    def flat(self, start: int, stop: int) -> Any:
        first = start // 8
        eights = self._bits[first : -(-stop // 8), None]
        places = torch.arange(8, dtype=torch.uint8, device=eights.device)
        values = (eights >> places).bitwise_and_(1).view(-1).to(torch.bool)
        return values[start - first * 8 : stop - first * 8]


def pack_mask(values: Any) -> PackedMask:
    """Packs booleans of any shape to bits."""
    flat = values.detach().contiguous().view(-1).view(torch.uint8)
    short = -flat.numel() % 8
    if short:
        flat = torch.nn.functional.pad(flat, (0, short))
    places = torch.arange(8, dtype=torch.uint8, device=flat.device)
    bits = (flat.view(-1, 8) << places).sum(dim=1, dtype=torch.uint8)
    return PackedMask(bits, values.shape)

"""NF4: 16 levels at the quantiles of a normal distribution, one scale for 64 values; 4.25 bits a weight.

QLoRA, arXiv 2305.14314. Codes lie as bitsandbytes lays them (the first value in the high half of a byte),
so that its kernels read what is encoded here; where it does not run, torch's own operations do.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from edge_sdk.training.precision import kernels
from edge_sdk.training.precision.packed import BLOCK, PackedWeight, row_blocks

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["LEVELS", "Nf4"]

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""The published table; in float32 the same as bitsandbytes'."""


class Nf4(PackedWeight):
    """``codes``: two values a byte."""

    word = "nf4"
    per_byte = 2

    @classmethod
    def encode(cls, weight: Any, device: Any = "cpu") -> Self:
        """From W (out, in) of any floating dtype, a block of rows at a time."""
        out, width = weight.shape
        blocks = -(-width // BLOCK)
        codes = torch.empty(out, blocks * BLOCK // 2, dtype=torch.uint8, device=device)
        scales = torch.empty(out, blocks, dtype=torch.float32, device=device)
        levels = torch.tensor(LEVELS)
        bounds = ((levels[:-1] + levels[1:]) / 2).tolist()
        for rows, values in row_blocks(weight, device):
            most = values.abs().amax(-1)
            scaled = values * (1.0 / most.clamp(min=1e-38)).unsqueeze(-1)
            # counting the bounds below: ten times as quick as a search for each value
            found = torch.zeros(scaled.shape, dtype=torch.uint8, device=scaled.device)
            for bound in bounds:
                found.add_(scaled > bound)
            found = found.flatten(1)
            codes[rows] = (found[:, ::2] << 4) | found[:, 1::2]
            scales[rows] = most
        return cls(width, codes, scales)

    def decode(self, codes: Any, scales: Any, dtype: Any) -> Any:
        if kernels.uses_bitsandbytes("nf4", codes.device):
            return kernels.dequantize_nf4(codes, scales, BLOCK, dtype)
        # one look-up of eight bytes gives both values
        pairs = _pairs(codes.device).index_select(0, codes.reshape(-1).to(torch.int32))
        values = pairs.view(torch.float32).view(*scales.shape, BLOCK)
        return values.mul_(scales.unsqueeze(-1)).view(codes.shape[0], -1).to(dtype)


@cache
def _pairs(device: Any) -> Any:
    """(256,) int64: the two float32 levels of each byte."""
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    both = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1).contiguous()
    return both.view(torch.int64).view(256).to(device)

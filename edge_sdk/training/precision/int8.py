"""8 bits: W = q s, q in -127..127, one scale for 64 values of a row; 8.25 bits a weight.

On normal weights the relative error is 0.6 %; with one scale for a whole row (bitsandbytes' LLM.int8
layout) it is 0.9 %, and outliers spread over the row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from edge_sdk.training.precision import kernels
from edge_sdk.training.precision.packed import BLOCK, PackedWeight, row_blocks

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Int8"]


class Int8(PackedWeight):
    """``codes``: q + 128 as uint8, what bitsandbytes' blockwise kernels read."""

    word = "int8"
    per_byte = 1

    @classmethod
    def encode(cls, weight: Any, device: Any = "cpu") -> Self:
        """From W (out, in) of any floating dtype, a block of rows at a time."""
        out, width = weight.shape
        blocks = -(-width // BLOCK)
        codes = torch.empty(out, blocks * BLOCK, dtype=torch.uint8, device=device)
        scales = torch.empty(out, blocks, dtype=torch.float32, device=device)
        for rows, values in row_blocks(weight, device):
            most = values.abs().amax(-1)
            inverse = 127.0 / most.clamp(min=1e-30)
            codes[rows] = values.mul(inverse.unsqueeze(-1)).round_().add_(128.0).to(torch.uint8).flatten(1)
            scales[rows] = most / 127.0
        return cls(width, codes, scales)

    def decode(self, codes: Any, scales: Any, dtype: Any) -> Any:
        if kernels.uses_bitsandbytes("int8", codes.device):
            return kernels.dequantize_int8(codes, scales, BLOCK, dtype)
        values = codes.to(torch.float32).sub_(128.0).view(*scales.shape, BLOCK)
        return values.mul_(scales.unsqueeze(-1)).view(codes.shape[0], -1).to(dtype)

"""2 bits: W = q s + o, q in 0..3, a scale and an offset for 64 values, in 8 bits each; 2.25 bits a weight.

Scale and offset are fitted by least squares, not taken from the ends. Relative error on normal weights, at
2.25 bits: this 0.325; a symmetric scale for 32 values with Lloyd's levels 0.325, for 64 with a float16
scale 0.334; from minimum and maximum 0.45 (2.5 bits); largest magnitude, best levels 0.348. On MiniLM's
weights: 0.338, 0.342, 0.353, 0.470, 0.378.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from edge_sdk.training.precision.packed import BLOCK, PackedWeight, row_blocks

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TwoBit"]

_FITS = 5
"""Rounds of fitting; a sixth gains less than 0.05 % of the error."""


class TwoBit(PackedWeight):
    """``codes``: four values a byte, the first in the lowest bits; ``levels`` (out, 2, blocks) int8.

    A block's scale is ``levels[:, 0]`` times its row's first factor of ``scales`` (out, 2), its offset
    ``levels[:, 1]`` times the second.
    """

    word = "int2"
    per_byte = 4

    def __init__(self, in_features: int, codes: Any, factors: Any, levels: Any) -> None:
        super().__init__(in_features, codes, factors)
        self.register_buffer("levels", levels, persistent=False)

    @classmethod
    def encode(cls, weight: Any, device: Any = "cpu") -> Self:
        """From W (out, in) of any floating dtype, a block of rows at a time."""
        out, width = weight.shape
        blocks = -(-width // BLOCK)
        codes = torch.empty(out, blocks * BLOCK // 4, dtype=torch.uint8, device=device)
        levels = torch.empty(out, 2, blocks, dtype=torch.int8, device=device)
        factors = torch.empty(out, 2, dtype=torch.float32, device=device)
        for rows, values in row_blocks(weight, device):
            scale, offset = _fit(values)
            both = torch.stack([scale, offset], dim=1).squeeze(-1)  # (rows, 2, blocks)
            factor = (both.abs().amax(-1) / 127.0).clamp(min=1e-30)
            level = (both / factor.unsqueeze(-1)).round_()
            # what is held decides which value is nearest
            made = level * factor.unsqueeze(-1)
            found = _nearest(values, made[:, 0].unsqueeze(-1), made[:, 1].unsqueeze(-1))
            quads = found.to(torch.uint8).flatten(1).view(found.shape[0], -1, 4)
            codes[rows] = quads[..., 0] | (quads[..., 1] << 2) | (quads[..., 2] << 4) | (quads[..., 3] << 6)
            levels[rows], factors[rows] = level.to(torch.int8), factor
        return cls(width, codes, factors, levels)

    def block_scales(self, rows: Any, blocks: slice) -> Any:
        """(rows, 2, blocks) float32: scales and offsets."""
        factors = super().block_scales(rows, slice(None))
        return self.levels[rows][..., blocks].to(torch.float32).mul_(factors.unsqueeze(-1))

    def decode(self, codes: Any, scales: Any, dtype: Any) -> Any:
        # one look-up of sixteen bytes gives all four values
        quads = _quads(codes.device).index_select(0, codes.reshape(-1).to(torch.int32))
        values = quads.view(torch.float32).view(codes.shape[0], -1, BLOCK)
        values.mul_(scales[:, 0].unsqueeze(-1)).add_(scales[:, 1].unsqueeze(-1))
        return values.view(codes.shape[0], -1).to(dtype)


def _fit(values: Any) -> tuple[Any, Any]:
    """Scale and offset (rows, blocks, 1) by turns of nearest codes and least squares on them."""
    mean = values.mean(-1, keepdim=True)
    scale = values.std(-1, keepdim=True).clamp(min=1e-30)
    offset = mean - 1.5 * scale
    for _ in range(_FITS):
        found = _nearest(values, scale, offset)
        middle = found.mean(-1, keepdim=True)
        found.sub_(middle)
        spread = found.square().sum(-1, keepdim=True)
        slope = (found.mul_(values)).sum(-1, keepdim=True) / spread.clamp(min=1e-30)
        # a block of one value has no slope: its offset is that value
        scale = slope.clamp(min=0.0)
        offset = mean - scale * middle
    return scale, offset


def _nearest(values: Any, scale: Any, offset: Any) -> Any:
    return ((values - offset) / scale.clamp(min=1e-30)).round_().clamp_(0.0, 3.0)


@cache
def _quads(device: Any) -> Any:
    """(256,) complex128, that is sixteen bytes: the four float32 codes of each byte."""
    byte = torch.arange(256)
    four = torch.stack([(byte >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1).to(torch.float32)
    return four.contiguous().view(torch.complex128).view(256).to(device)

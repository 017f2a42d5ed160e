"""What the quantized weights share: rows padded to whole blocks of 64, and scales that take 16 bits.

All arithmetic of the encoders is in torch's float32 elementwise operations, the same on every device: two
parties that quantize the same base hold the same bytes, whatever they decode them with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from edge_sdk.training.precision.weights import FrozenWeight

__all__ = ["BLOCK", "PackedWeight", "row_blocks"]

BLOCK = 64
"""Values that share a scale, along a row."""

_ENCODE_VALUES = 1 << 19
"""Rows are encoded so many values at a time: temporaries that stay in the cache."""


class PackedWeight(FrozenWeight):
    """``codes`` (out, bytes) uint8; ``scales`` (out, blocks) float16 as int16, times the one power ``top``.

    Scales are kept as integers, as codes are: what converts a model's floating tensors leaves them alone.
    """

    per_byte: int
    """Values in a byte of codes."""

    def __init__(self, in_features: int, codes: Any, scales: Any) -> None:
        """``scales`` (out, blocks) float32, not negative."""
        super().__init__()
        self.in_features, self.out_features = in_features, codes.shape[0]
        self.register_buffer("codes", codes, persistent=False)
        # below a power of two that is theirs alone, float16's range is enough for scales of any size
        _, exponent = torch.frexp(scales.max())
        self.top = 2.0 ** int(exponent)
        self.register_buffer("scales", (scales / self.top).half().view(torch.int16), persistent=False)

    @property
    def device(self) -> Any:
        return self.codes.device

    def block(self, rows: slice, columns: slice, dtype: Any) -> Any:
        first, last = columns.start // BLOCK, -(-columns.stop // BLOCK)
        span = slice(first * BLOCK // self.per_byte, last * BLOCK // self.per_byte)
        scales = self.block_scales(rows, slice(first, last))
        made = self.decode(self.codes[rows, span], scales, dtype)
        return made[:, : columns.stop - columns.start]

    def gather(self, index: Any, dtype: Any = torch.float32) -> Any:
        """Rows by number, as an embedding reads them: (n,) int -> (n, in)."""
        made = self.decode(self.codes[index], self.block_scales(index, slice(None)), dtype)
        return made[:, : self.in_features]

    def block_scales(self, rows: Any, blocks: slice) -> Any:
        """(rows, blocks) float32."""
        return self.scales[rows, blocks].view(torch.float16).to(torch.float32).mul_(self.top)

    def decode(self, codes: Any, scales: Any, dtype: Any) -> Any:
        """(rows, bytes) and (rows, blocks) -> (rows, blocks * 64)."""
        raise NotImplementedError


def row_blocks(weight: Any, device: Any) -> Iterator[tuple[slice, Any]]:
    """Some rows at a time as (rows, blocks, 64) float32 on ``device``; an uneven row is filled up."""
    out, width = weight.shape
    step = max(1, _ENCODE_VALUES // width)
    for start in range(0, out, step):
        rows = slice(start, min(start + step, out))
        values = weight[rows].detach().to(device=device, dtype=torch.float32)
        if tail := width % BLOCK:
            # a row's last values again: what is fitted to them stays fitted to them
            again = torch.arange(-width % BLOCK, device=device) % tail + (width - tail)
            values = torch.cat([values, values[:, again]], dim=1)
        yield rows, values.reshape(values.shape[0], -1, BLOCK)

"""Frozen weights of a linear, in the precision that they are held in."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

__all__ = ["BLOCK_BYTES", "Dense", "FrozenWeight"]

BLOCK_BYTES = 16 << 20
"""Of a weight that is held smaller than it is computed with, so much is made whole at a time. Measured on
(2048, 8192) and 1024 rows: as quick as a dense weight, and quicker than making it whole at once, since the
same memory is used again; at 1 MiB the products become small and take 1.2 to 2.2 times longer."""


class FrozenWeight(nn.Module):
    """W (out, in), never trained. Autograd does not see it; both directions are its own.

    What is held smaller than the weight is made whole in blocks: of rows for x Wᵀ, of columns for grad W, so
    that every value of the product is one sum, and nothing dense outlives a call.
    """

    in_features: int
    out_features: int
    word: str
    """The precision's word: ``fp32``, ``bf16``, ``fp16``, ``int8``, ``nf4`` or ``int2``."""

    @property
    def nbytes(self) -> int:
        """Bytes held, scales included."""
        held = [*self.buffers(), *self.parameters()]
        return sum(int(tensor.numel() * tensor.element_size()) for tensor in held)

    @property
    @abstractmethod
    def device(self) -> Any:
        """Where it lies."""

    @abstractmethod
    def block(self, rows: slice, columns: slice, dtype: Any) -> Any:
        """W[rows, columns]. A column block begins at a multiple of 64. May be the held tensor itself."""

    def dense_rows(self, start: int, stop: int, dtype: Any = torch.float32) -> Any:
        """W[start:stop] (stop - start, in), to be let go of soon; may be the held tensor itself."""
        return self.block(slice(start, stop), slice(0, self.in_features), dtype)

    def dense(self, dtype: Any = torch.float32) -> Any:
        """W (out, in), to be let go of at once; may be the held tensor itself."""
        return self.dense_rows(0, self.out_features, dtype)

    def forward(self, x: Any, bias: Any = None) -> Any:
        """x Wᵀ + bias, (..., in) -> (..., out)."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _FrozenFunction.apply(x, bias, self)
        return self._product(x, bias)

    def input_grad(self, grad: Any) -> Any:
        """grad W, (..., out) -> (..., in)."""
        whole = _block_size(self.in_features, self.out_features, grad)
        if whole >= self.in_features:
            return grad @ self.dense(grad.dtype)
        rows = grad.reshape(-1, self.out_features)
        result = rows.new_empty(rows.shape[0], self.in_features)
        every = slice(0, self.out_features)
        size = max(64, whole // 64 * 64)
        for start in range(0, self.in_features, size):
            part = slice(start, min(start + size, self.in_features))
            torch.mm(rows, self.block(every, part, grad.dtype), out=result[:, part])
        return result.view(*grad.shape[:-1], self.in_features)

    def _product(self, x: Any, bias: Any) -> Any:
        size = _block_size(self.out_features, self.in_features, x)
        if size >= self.out_features:
            return linear(x, self.dense(x.dtype), bias)
        rows = x.detach().reshape(-1, self.in_features)
        result = rows.new_empty(rows.shape[0], self.out_features)
        for start in range(0, self.out_features, size):
            part = slice(start, min(start + size, self.out_features))
            weight = self.dense_rows(part.start, part.stop, x.dtype).t()
            if bias is None:
                torch.mm(rows, weight, out=result[:, part])
            else:
                torch.addmm(bias.detach()[part], rows, weight, out=result[:, part])
        return result.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.word}"


class Dense(FrozenWeight):
    """Held as it is: fp32, bf16 or fp16."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    @property
    def word(self) -> str:  # type: ignore[override]
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(
            self.weight.dtype, str(self.weight.dtype)
        )

    @property
    def device(self) -> Any:
        return self.weight.device

    def block(self, rows: slice, columns: slice, dtype: Any) -> Any:
        return self.weight.detach()[rows, columns].to(dtype)

    def dense(self, dtype: Any = torch.float32) -> Any:
        return self.weight.detach().to(dtype)

    def input_grad(self, grad: Any) -> Any:
        if grad.dtype == self.weight.dtype:
            return grad @ self.weight.detach()
        return super().input_grad(grad)

    def _product(self, x: Any, bias: Any) -> Any:
        if x.dtype == self.weight.dtype:
            return linear(x, self.weight.detach(), bias)
        return super()._product(x, bias)


class _FrozenFunction(torch.autograd.Function):
    """For a weight without LoRA beside it: the input's gradient alone, and nothing saved."""

    @staticmethod
    def forward(ctx: Any, x: Any, bias: Any, weight: FrozenWeight) -> Any:
        ctx.weight = weight
        return weight._product(x, bias)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return ctx.weight.input_grad(grad), None, None


def _block_size(count: int, width: int, like: Any) -> int:
    """How many of ``count`` rows (or columns) of ``width`` values fit a block."""
    return min(count, max(1, BLOCK_BYTES // (width * int(like.element_size()))))

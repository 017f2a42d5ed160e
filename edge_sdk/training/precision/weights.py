"""Frozen weights of a linear, in the precision that they are held in."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

__all__ = ["Dense", "FrozenWeight"]


class FrozenWeight(nn.Module):
    """W (out, in), never trained. Autograd does not see it: ``LoraLinear`` calls both directions itself.

    What is smaller than the weight is made whole for a moment, in the dtype that is computed in.
    """

    in_features: int
    out_features: int

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held, scales included."""

    @abstractmethod
    def dense(self, dtype: Any = torch.float32) -> Any:
        """W (out, in), to be let go of at once; may be the held tensor itself."""

    def forward(self, x: Any, bias: Any = None) -> Any:
        """x Wᵀ + bias, (..., in) -> (..., out)."""
        return linear(x, self.dense(x.dtype), bias)

    def input_grad(self, grad: Any) -> Any:
        """grad W, (..., out) -> (..., in)."""
        return grad @ self.dense(grad.dtype)


class Dense(FrozenWeight):
    """Held as it is: fp32, bf16 or fp16."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    @property
    def nbytes(self) -> int:
        return int(self.weight.numel() * self.weight.element_size())

    def dense(self, dtype: Any = torch.float32) -> Any:
        return self.weight.detach().to(dtype)

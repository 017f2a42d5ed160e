"""How the base is held: what the loader asks for each frozen weight, and the modules of packed ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from edge_sdk.training.precision.weights import Dense, FrozenWeight

__all__ = ["FLOATS", "FP32", "BasePrecision", "EmbeddingWeight", "FrozenEmbedding", "FrozenLinear"]


class EmbeddingWeight(Protocol):
    """W (vocabulary, hidden), read by rows as an embedding, and as a FrozenWeight by an output layer."""

    in_features: int
    out_features: int

    def gather(self, index: Any, dtype: Any) -> Any:
        """Rows by number, (n,) -> (n, in)."""
        ...


@dataclass(frozen=True)
class BasePrecision:
    """What the base is held in.

    Args:
        word: as ``Candidate.base_precision`` has it.
        dtype: of the residual stream, of norms, biases and embeddings, and of every weight that no callback
            takes.
        make_weight: holds the weight (out, in) of a linear inside a layer, given as the checkpoint has it,
            on the device that is computed on; the key is ``"{layer}.{module}"``. None: held in ``dtype``.
            The weight may be a transposed view.
        make_embedding: likewise for embeddings of tokens and output layers (vocabulary, hidden), by their
            path in the model; may return None to leave one in ``dtype``. Output layers are also called as
            a FrozenWeight.
    """

    word: str = "fp32"
    dtype: Any = torch.float32
    make_weight: Callable[[str, Any], FrozenWeight] | None = None
    make_embedding: Callable[[str, Any], EmbeddingWeight | None] | None = None

    def weight(self, key: str, tensor: Any) -> FrozenWeight:
        if self.make_weight is not None:
            return self.make_weight(key, tensor)
        return Dense(tensor.to(self.dtype))


FP32 = BasePrecision()
FLOATS = {
    "fp32": FP32,
    "bf16": BasePrecision("bf16", torch.bfloat16),
    "fp16": BasePrecision("fp16", torch.float16),
}
"""Precisions that hold every weight as it is."""


class FrozenEmbedding(nn.Module):
    """An embedding whose table is packed. ``scale``: what some families multiply the rows by."""

    def __init__(self, frozen: EmbeddingWeight, dtype: Any, scale: Any = None) -> None:
        super().__init__()
        self.frozen = frozen
        self.dtype = dtype
        self.num_embeddings, self.embedding_dim = frozen.out_features, frozen.in_features
        self.scale: Any
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, ids: Any) -> Any:
        rows = self.frozen.gather(ids.reshape(-1), self.dtype).view(*ids.shape, self.embedding_dim)
        return rows if self.scale is None else rows * self.scale.to(self.dtype)


class FrozenLinear(nn.Module):
    """A linear without LoRA whose weight is packed: an output layer, or one that LoRA does not target."""

    def __init__(self, frozen: Any, bias: Any = None) -> None:
        super().__init__()
        self.frozen = frozen
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.bias = bias

    def forward(self, x: Any) -> Any:
        return self.frozen(x, self.bias)

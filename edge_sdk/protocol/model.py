"""The base model as both sides describe it: its shape, its LoRA, its fingerprint."""

from __future__ import annotations

import hashlib

import msgspec

from edge_sdk.protocol.base import Digest, NotNegative, Positive, Record, Text

__all__ = ["TASKS", "DensePart", "Fingerprint", "LoraModule", "LoraShape", "ModelShape"]

TASKS: tuple[str, ...] = ("classification", "causal-lm")
"""What a model can be trained for here."""


class LoraShape(Record, frozen=True, kw_only=True, cache_hash=True):
    """LoRA of a run. Effective weight: W + (alpha / rank) · B A, A of (rank, in), B of (out, rank)."""

    rank: Positive = 8
    alpha: float = 16.0
    targets: tuple[Text, ...] = ("all-linear",)
    """``all-linear``: every linear of a transformer layer; else the modules by name."""

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


class LoraModule(Record, frozen=True, kw_only=True):
    """One linear of a transformer layer that carries LoRA, by its path below the layer."""

    name: Text
    inputs: Positive
    outputs: Positive
    transposed: bool = False
    """The base holds its weight as (in, out); an exported adapter must say so."""


class DensePart(Record, frozen=True, kw_only=True):
    """One tensor of the task head: trained whole, averaged whole. ``name`` is its path in the model."""

    name: Text
    shape: tuple[Positive, ...]


class ModelShape(Record, frozen=True, kw_only=True, cache_hash=True):
    """All that planning, initialisation and export need to know of a base model.

    Layers are numbered from 0 at the input; LoRA depth d tunes the layers ``layers - d`` and above.
    """

    family: Text
    layers: Positive
    hidden: Positive
    intermediate: Positive
    heads: Positive
    kv_heads: NotNegative = 0
    """Heads of keys and values; 0: as many as ``heads``."""
    head_size: NotNegative = 0
    """Width of a head; 0: ``hidden`` over ``heads``."""
    gated: bool = False
    """The feed-forward block is down(f(gate) · up) rather than down(f(up))."""
    activation: Text = ""
    """Its function, by the word of the model's config."""
    norms: NotNegative = 2
    """Norms of a layer that are as wide as ``hidden``."""
    head_norms: bool = False
    """Queries and keys pass a norm of their own."""
    fused_attention: bool = True
    """Attention is inside the activation store; else its squares are kept."""
    vocabulary: Positive
    layer_path: Text
    """Path of the list of transformer layers in the model, ``bert.encoder.layer`` say."""
    modules: tuple[LoraModule, ...]
    """The LoRA modules of one layer; all layers have the same."""
    dense: tuple[DensePart, ...]
    parameters: NotNegative
    base_bytes: NotNegative
    """Bytes of the weights as they rest in the trainer."""

    @property
    def query_width(self) -> int:
        return self.heads * (self.head_size or self.hidden // self.heads)

    @property
    def key_width(self) -> int:
        return (self.kv_heads or self.heads) * (self.head_size or self.hidden // self.heads)

    @property
    def inner_width(self) -> int:
        """Width of what a feed-forward block computes before its last linear: gate and up together."""
        return (2 if self.gated else 1) * self.intermediate

    @property
    def linear_weights(self) -> int:
        """Weights of all linears of one layer, with LoRA or without."""
        attention = 2 * self.query_width + 2 * self.key_width
        return self.hidden * (attention + self.inner_width + self.intermediate)

    def lora_values(self, rank: int) -> int:
        """Values of A and B of one layer."""
        return sum(rank * (m.inputs + m.outputs) for m in self.modules)

    def dense_values(self) -> int:
        total = 0
        for part in self.dense:
            count = 1
            for size in part.shape:
                count *= size
            total += count
        return total


class Fingerprint(Record, frozen=True, kw_only=True):
    """What all parties of a run must agree on to mix their updates. Not the base precision."""

    base: Digest
    """sha256 over name, dtype, shape and bytes of the unquantized base's tensors, in name order."""
    tokenizer: Digest
    labels: Digest
    head: Text
    max_length: Positive
    template: Digest
    targets: tuple[Text, ...]
    rank: Positive
    alpha: float
    scaling: Text = "alpha/rank"

    @property
    def digest(self) -> Digest:
        """sha256 of the canonical JSON form; what records and containers carry."""
        # JSON tells 16 from 16.0, and a record that was never decoded may hold either.
        exact = msgspec.structs.replace(self, alpha=float(self.alpha))
        return hashlib.sha256(msgspec.json.encode(exact, order="deterministic")).hexdigest()

    def differing(self, other: Fingerprint) -> tuple[str, ...]:
        """Names of the parts in which ``other`` differs."""
        return tuple(n for n in self.__struct_fields__ if getattr(self, n) != getattr(other, n))

"""How a base is held, block by block, and what that saves: the record that ``quantize-base`` makes."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edge_sdk.protocol.base import Digest, NotNegative, Positive, Record, Text

__all__ = ["BASE_WORDS", "QUANTIZED_WORDS", "WORD_OF_BITS", "BasePlan", "Bits", "BlockPlan", "SalienceMethod"]

Bits = Literal[2, 4, 8, 16]
WORD_OF_BITS: dict[int, str] = {2: "int2", 4: "nf4", 8: "int8", 16: "fp16"}
"""16: a base that is given in bf16 stays so."""
QUANTIZED_WORDS = ("int8", "nf4", "int2", "plan")
"""Base precisions that hold the embeddings in 8 bits besides."""
BASE_WORDS = ("fp32", "bf16", "fp16", *QUANTIZED_WORDS)
"""Every base precision; ``plan``: each block as a ``BasePlan`` says."""

SalienceMethod = Literal["loss", "influence"]
"""``loss``: what the loss rises by when one block alone is lowered to 2 bits. ``influence``: 1 - mean cosine
between what enters a block and what leaves it."""

Figure = Annotated[float, msgspec.Meta(ge=0.0)]


class BlockPlan(Record, frozen=True, kw_only=True):
    """One transformer block: its linears at ``bits`` each."""

    block: NotNegative
    bits: Bits
    bytes: NotNegative
    """Of its linears as they are to be held, scales included."""
    bytes_before: NotNegative
    """As the checkpoint holds them."""
    salience: Figure
    error: Figure
    """Squared error of the block's output at these bits, over the one at 2 bits (``loss``), or over what the
    block adds to its input (``influence``)."""


class BasePlan(Record, frozen=True, kw_only=True):
    """Bits per block of one base, and what they were chosen by."""

    format: Literal[1] = 1
    base: Digest
    """Of the unquantized base that this was made for; another one is refused."""
    blocks: Annotated[tuple[BlockPlan, ...], msgspec.Meta(min_length=1, max_length=1024)]
    method: SalienceMethod
    calibration: Text
    """What the salience was measured on."""
    objective: Figure
    """Sum of salience times error."""
    bytes: Positive
    """Of the whole base, as it is to be held: blocks, embeddings in 8 bits, and the rest."""
    bytes_before: Positive
    """As the checkpoint holds it."""

    @property
    def bits(self) -> tuple[int, ...]:
        return tuple(block.bits for block in self.blocks)

    @property
    def saved_bytes(self) -> int:
        return self.bytes_before - self.bytes

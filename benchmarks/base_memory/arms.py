"""The ladder from plain LoRA to everything there is: each arm adds one lever to the one before it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BEST", "LADDER", "PLAIN", "Arm"]


@dataclass(frozen=True)
class Arm:
    """``lever`` tells what this arm adds, and whose idea it is where it is published.

    ``logits``: whether the loss holds them whole, as transformers' own does.
    """

    name: str
    lever: str
    base: str = "fp32"
    logits: bool = False
    bits: int = 0
    recompute: str = "none"
    optimizer: str = "adamw"


PLAIN = Arm("plain", "LoRA on all linears, base and everything else in fp32", logits=True)
LADDER = (
    PLAIN,
    Arm(
        "chunked loss",
        "logits of a few places at a time, of learnt tokens only (arXiv 2606.19528: loss over a subset of "
        "tokens, masked logits)",
    ),
    Arm("nf4 base", "base in NF4, embedding and output layer in 8 bits (QLoRA; arXiv 2606.19528)", "nf4"),
    Arm(
        "int4 activations",
        "saved activations in 4 bits, what follows cheaply from others made again (HyC-LoRA: compressed "
        "activations; arXiv 2604.22783)",
        "nf4", bits=4, recompute="inner",
    ),
    Arm(
        "layers run again",
        "only each layer's input is kept, in 4 bits and in memory (arXiv 2606.19528: selective "
        "checkpointing, offloaded to disk)",
        "nf4", bits=4, recompute="layer",
    ),
    Arm("8-bit AdamW", "moments in 8 bits", "nf4", bits=4, recompute="layer", optimizer="adamw8bit"),
    Arm("int2 base", "base in 2 bits of our own", "int2", bits=4, recompute="layer", optimizer="adamw8bit"),
)  # fmt: skip
BEST = "8-bit AdamW"
"""The arm of the claims; the 2-bit base goes beyond it at the price of the base's quality."""

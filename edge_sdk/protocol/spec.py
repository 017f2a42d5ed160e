"""TrainSpec and Candidate: everything that changes the mathematics on a device.

A method compiles to these two records; a device runs no code that it received. Mechanisms are named by
words rather than closed sets: ``needs`` spells them (``codec:int8``), and a device that lacks one declines
with that word, instead of failing to read the offer.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from edge_sdk.protocol.base import Fraction, Name, NotNegative, Positive, Record

__all__ = ["Candidate", "Levers", "Setting", "TrainSpec", "Word"]

Word = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{1,32}\Z")]
"""Name of one implementation of a mechanism."""


class Levers(Record, frozen=True, kw_only=True):
    """How tuned layers save memory. A cost fit holds for the levers that it was measured with.

    ``activation_bits`` and ``activation_rounding`` (``nearest``, ``stochastic``): of quantized layers.
    ``recompute``: what of all tuned layers' activations is made again rather than kept: ``none``,
    ``outputs``, ``inner`` or ``layer`` (see ``edge_sdk.training.activations.plan``).
    """

    activation_bits: Positive = 8
    activation_rounding: Word = "nearest"
    recompute: Word = "none"


class Setting(Record, frozen=True, kw_only=True):
    """All that decides how much memory and time a training step takes, besides the model and the device.

    Not how many steps there are. ``accumulation``: more than one batch a step means that gradients are held
    while the next is computed; seconds are always those of one batch. ``base_precision`` is what the device
    holds its base in, which its fit was measured with.
    """

    depth: NotNegative
    quantized_layers: NotNegative = 0
    levers: Levers = Levers()
    micro_batch: Positive = 16
    max_length: Positive = 128
    accumulation: Positive = 1
    factors: Word = "AB"
    optimizer: Word = "adamw"
    base_precision: Word = "fp32"


class Candidate(Record, frozen=True, kw_only=True):
    """One way for one device to take part in a round, with what the planner predicts for it.

    ``depth``: tuned layers counted from the output; ``quantized_layers``: how many of them, the lowest
    first, keep their saved activations at ``activation_bits``. Memory is above the resting trainer, in
    MB of 10^6 bytes; seconds are the whole round's, as seen from the device; gain has no unit.
    """

    id: Name
    depth: NotNegative
    quantized_layers: NotNegative = 0
    activation_bits: Positive = 8
    activation_rounding: Word = "nearest"
    recompute: Word = "none"
    base_precision: Word = "fp32"
    slots: tuple[NotNegative, ...] | None = None
    """Trainable slots; None: all of them."""
    codec: Word = "int8"
    micro_batch: Positive = 16
    accumulation: Positive = 1
    steps: Positive = 25
    max_length: Positive = 128
    peak_mb: float = 0.0
    seconds: float = 0.0
    bytes_up: NotNegative = 0
    bytes_down: NotNegative = 0
    gain: float = 0.0
    recommended: bool = False

    @property
    def levers(self) -> Levers:
        return Levers(
            activation_bits=self.activation_bits,
            activation_rounding=self.activation_rounding,
            recompute=self.recompute,
        )

    def setting(self, spec: TrainSpec) -> Setting:
        """What decides its memory and step time, with what the round says of all its candidates."""
        return Setting(
            depth=self.depth,
            quantized_layers=self.quantized_layers,
            levers=self.levers,
            micro_batch=self.micro_batch,
            max_length=self.max_length,
            accumulation=self.accumulation,
            factors=spec.factors,
            optimizer=spec.optimizer,
            base_precision=self.base_precision,
        )

    def needs(self) -> frozenset[str]:
        """The mechanisms that a device must have to take this candidate."""
        words = {f"base:{self.base_precision}", f"codec:{self.codec}", f"recompute:{self.recompute}"}
        if self.quantized_layers:
            words.add(f"activation:int{self.activation_bits}")
            words.add(f"rounding:{self.activation_rounding}")
        if self.slots is not None:
            words.add("slots:subset")
        return frozenset(words)


class TrainSpec(Record, frozen=True, kw_only=True):
    """The mathematics of a round that is the same for all its candidates."""

    seed: int = 0
    """With round, device and purpose the key of every random number."""
    objective: Word = "cross_entropy"
    optimizer: Word = "adamw"
    learning_rate: float = 2e-3
    head_learning_rate: float = 1e-2
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    warmup_steps: NotNegative = 0
    schedule: Word = "constant"
    """Of the learning rate after the warm-up, within the round: ``constant``, or ``linear`` towards 0."""
    prefix: Word = "exact"
    """In which form a device may keep what enters the lowest tuned layer, over the round's epochs:
    ``exact``, ``fp16`` or ``int8``. Whether and where it keeps it is its own affair."""
    dropout: Fraction = 0.0
    factors: Word = "AB"
    error_feedback: bool = True
    error_adapter: Word = "none"
    phases: Word = "single"
    reinit: Word = "none"
    fold: Word = "none"
    privacy: Word = "none"
    padding: Word = "max_length"
    """``max_length``: every row padded to the same length, so that no shape depends on the draw."""
    attention: Word = "sdpa"

    def needs(self) -> frozenset[str]:
        """The mechanisms that a device must have for any candidate of the round."""
        kinds = (
            "objective",
            "optimizer",
            "factors",
            "error_adapter",
            "phases",
            "reinit",
            "fold",
            "privacy",
            "padding",
            "attention",
        )
        words = {f"{kind.replace('_', '-')}:{getattr(self, kind)}" for kind in kinds}
        if self.error_feedback:
            words.add("error-feedback:on")
        if self.schedule != "constant":
            words.add(f"schedule:{self.schedule}")
        if self.prefix != "exact":
            words.add(f"prefix:{self.prefix}")
        return frozenset(words)

"""What a device knows of itself and of a round: profile, fit, measured figures. MB are 10^6 bytes."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edge_sdk.protocol.base import NotNegative, Positive, Record, Text
from edge_sdk.protocol.spec import Levers

__all__ = ["Budget", "Fit", "Link", "Measured", "Memory", "ProbePoint", "Profile"]

Budget = Literal["memory", "link", "compute", "traffic", "energy", "none"]
"""The budget that binds a choice: the one whose relaxation admits a better candidate."""

Figure = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
"""MB or seconds: far above any device, and far below where sums and products of such end being finite."""
Rate = Annotated[float, msgspec.Meta(ge=0.0, le=1e15)]
Loss = Annotated[float, msgspec.Meta(ge=-1e39, le=1e39)]
"""Any that a float32 holds."""


class Profile(Record, frozen=True, kw_only=True):
    """The machine, as read (not computed). None: could not be read; ``reasons`` says why."""

    machine: Text = ""
    processor: Text = ""
    cores: Positive = 1
    memory_mb: float | None = None
    free_mb: float | None = None
    disk_free_mb: float | None = None
    accelerators: tuple[Text, ...] = ()
    temperature_c: float | None = None
    battery_percent: float | None = None
    on_ac: bool | None = None
    reasons: dict[str, str] = msgspec.field(default_factory=dict)


class ProbePoint(Record, frozen=True, kw_only=True):
    """One setting, measured: peak above rest in MB, seconds per step (the least of its repeats)."""

    depth: NotNegative
    quantized_layers: NotNegative
    peak_mb: Figure
    step_s: Figure


class Fit(Record, frozen=True, kw_only=True):
    """The cost model's coefficients, fitted on this device's probes for one batch and length.

        peak(d, a) = head_mb + d · layer_mb − a · saved_mb + [a > 0] · work_mb      (MB above rest)
        step(d, a) = forward_s + d · layer_s + a · quantize_s                       (seconds)

    Linear in d, as the measurements of saved activations are. ``rest_mb`` is what the trainer process
    holds with the model loaded after one discarded warm-up step.
    """

    micro_batch: Positive
    max_length: Positive
    levers: Levers = Levers()
    rest_mb: Figure
    head_mb: Figure
    layer_mb: Figure
    saved_mb: Figure
    work_mb: Figure
    forward_s: Figure
    layer_s: Figure
    quantize_s: Figure
    probes: tuple[ProbePoint, ...]
    threads: NotNegative = 0
    machine: Text = ""
    """What the fit was made on; another machine, thread count or torch makes it void."""


class Memory(Record, frozen=True, kw_only=True):
    """Memory for training now: ``budget_mb`` is what may be used above the resting trainer."""

    budget_mb: Figure
    rest_mb: Figure
    free_mb: Figure | None = None
    limit_mb: Figure | None = None
    """``limits.memory_mb``: what the trainer process may hold in all; None: what is free."""


class Link(Record, frozen=True, kw_only=True):
    """Bits per second each way; None: not known yet. ``source`` says how it was got."""

    up_bps: Rate | None = None
    down_bps: Rate | None = None
    source: Literal["measured", "configured", "unknown"] = "unknown"


class Measured(Record, frozen=True, kw_only=True):
    """What a device measured while it trained a round."""

    rest_mb: Figure
    peak_mb: Figure
    """Highest memory above rest."""
    train_s: Figure
    step_s: Figure
    """Median step."""
    steps: Positive
    loss_first: Loss
    loss_last: Loss
    threads: NotNegative = 0

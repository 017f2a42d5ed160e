"""What a device knows of itself and of a round: profile, fit, measured figures. MB are 10^6 bytes."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edge_sdk.protocol.base import NotNegative, Positive, Record, Text
from edge_sdk.protocol.spec import Levers, Word

__all__ = [
    "Budget",
    "Correction",
    "Fit",
    "Gpu",
    "How",
    "Link",
    "Measured",
    "Memory",
    "ProbePoint",
    "Profile",
    "Reading",
    "Throughput",
]

Budget = Literal["memory", "link", "compute", "traffic", "energy", "none"]
"""The budget that binds a choice: the one whose relaxation admits a better candidate."""

Figure = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
"""MB or seconds: far above any device, and far below where sums and products of such end being finite."""
Offset = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
Factor = Annotated[float, msgspec.Meta(ge=0.01, le=100.0)]
Rate = Annotated[float, msgspec.Meta(ge=0.0, le=1e15)]
Loss = Annotated[float, msgspec.Meta(ge=-1e39, le=1e39)]
"""Any that a float32 holds."""


How = Literal["measured", "read", "datasheet"]
"""How a value was got: by doing it and timing it, from the system's files or drivers, or from its vendor."""


class Reading(Record, frozen=True, kw_only=True):
    """One value of a profile, as ``edge-agent profile`` shows it; the unit is the end of its name."""

    name: Text
    value: float | bool | Text | None
    how: How | None = None
    """None: there is no value."""
    at: float = 0.0
    """Wall clock, seconds."""
    spread: float | None = None
    """Of what was measured: (highest - lowest) / median of its repeats."""
    reason: Text = ""
    """Why there is no value."""


class Gpu(Record, frozen=True, kw_only=True):
    """A GPU with memory of its own, as its driver tells. None: ``reasons`` says why."""

    index: NotNegative = 0
    name: Text = ""
    memory_mb: float | None = None
    free_mb: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: float | None = None
    throttling: tuple[Text, ...] | None = None
    """What holds its clocks down now; empty: nothing."""
    reasons: dict[str, Text] = msgspec.field(default_factory=dict)


class Throughput(Record, frozen=True, kw_only=True):
    """What one compute device does in a second. By name: ``fp32``, ``bf16``, ``fp16``, ``int8`` (products of
    matrices, an addition and a multiplication are two), ``copy`` and ``triad`` (bytes read and written)."""

    device: Text
    """``cpu`` or ``cuda:N``."""
    name: Text = ""
    how: Literal["measured", "datasheet"] = "measured"
    at: float = 0.0
    gflops: dict[str, float] = msgspec.field(default_factory=dict)
    gb_s: dict[str, float] = msgspec.field(default_factory=dict)
    spread: dict[str, float] = msgspec.field(default_factory=dict)
    """(highest - lowest) / median of the repeats."""
    reasons: dict[str, Text] = msgspec.field(default_factory=dict)
    """Why a name is missing above."""


class Profile(Record, frozen=True, kw_only=True):
    """The machine, as read at one moment. None: could not be read; ``reasons`` says why, by field."""

    at: float = 0.0
    """Wall clock when it was read, seconds."""
    machine: Text = ""
    system: Text = ""
    """The operating system; on a Jetson its JetPack and L4T release."""
    processor: Text = ""
    cores: Positive = 1
    cpu_mhz: float | None = None
    """Fastest core now."""
    cpu_max_mhz: float | None = None
    """What the power mode lets the fastest core reach."""
    memory_mb: float | None = None
    free_mb: float | None = None
    shared_memory: bool | None = None
    """Processor and accelerator use one pool, which ``memory_mb`` is; None: there is no accelerator."""
    disk_mb: float | None = None
    disk_free_mb: float | None = None
    accelerators: tuple[Text, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    """Those with memory of their own; empty where they were not asked for."""
    power_mode: Text | None = None
    power_w: float | None = None
    """Draw of the whole machine, or of as much of it as has a meter (``rails_w``)."""
    rails_w: dict[str, float] = msgspec.field(default_factory=dict)
    temperature_c: float | None = None
    """The hottest sensor, GPUs included."""
    temperatures_c: dict[str, float] = msgspec.field(default_factory=dict)
    throttling: tuple[Text, ...] | None = None
    """What holds clocks down now, below what the power mode allows; empty: nothing."""
    battery_percent: float | None = None
    on_ac: bool | None = None
    throughput: tuple[Throughput, ...] = ()
    """Empty until it was measured; each with its own time."""
    reasons: dict[str, Text] = msgspec.field(default_factory=dict)


class ProbePoint(Record, frozen=True, kw_only=True):
    """One setting, measured: peak above rest in MB, seconds per step (the least of its repeats)."""

    depth: NotNegative
    quantized_layers: NotNegative
    peak_mb: Figure
    step_s: Figure
    micro_batch: NotNegative = 0
    """0: the fit's; so too ``max_length``, and ``levers`` where None."""
    max_length: NotNegative = 0
    levers: Levers | None = None


class Correction(Record, frozen=True, kw_only=True):
    """What rounds with these levers took, over what the fit says of them."""

    levers: Levers
    quantized: bool
    """With quantized layers; without any, bits and rounding of ``levers`` say nothing."""
    peak: Factor = 1.0
    step: Factor = 1.0
    rounds: NotNegative = 0
    """Trained and measured so far."""


class Fit(Record, frozen=True, kw_only=True, cache_hash=True):
    """The cost model's coefficients, fitted on this device's probes: figures of one setting, the reference.

        peak(d, a) = head_mb + d · layer_mb − a · saved_mb + [a = d] · work_mb      (MB above rest)
        step(d, a) = forward_s + d · layer_s + a · quantize_s + call_s              (seconds)

    Other settings (levers, batch, length, factors, optimizer) scale each figure by what is counted of the
    model's shape there and at the reference: see ``edge_sdk.planning.cost``. ``rest_mb`` is what the trainer
    process holds with the model loaded after one discarded warm-up step.
    """

    micro_batch: Positive
    max_length: Positive
    levers: Levers = Levers()
    factors: Word = "AB"
    optimizer: Word = "adamw"
    rest_mb: Figure
    head_mb: Figure
    layer_mb: Figure
    saved_mb: Figure
    work_mb: Figure
    """What going back through a quantized layer needs more than through a plain one."""
    fixed_mb: Offset = 0.0
    """Of ``head_mb``, what does not grow with batch and length; below 0 where the heap at rest has room."""
    forward_s: Figure
    layer_s: Figure
    quantize_s: Figure
    call_s: Figure = 0.0
    """Of a step with one tuned layer, what does not grow with batch and length; with depth as counted."""
    probes: tuple[ProbePoint, ...]
    """None: nothing was measured, and the figures are an estimate."""
    kernel: Word = "fbgemm"
    """What packs activations there: ``fbgemm``, ``composed`` or ``triton``."""
    corrections: tuple[Correction, ...] = ()
    """By which the device's own rounds correct all of the above, each for its levers."""
    peak_factor: Factor = 1.0
    """The same for levers that no round has tried yet; so too ``step_factor``."""
    step_factor: Factor = 1.0
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
    """Bits per second each way through the broker; None: not known yet. ``source`` says how it was got."""

    up_bps: Rate | None = None
    down_bps: Rate | None = None
    rtt_ms: Rate | None = None
    """There and back, through the broker, for a record of no size."""
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

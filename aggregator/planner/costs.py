"""What the planner knows of a device: the costs it predicts for every pair of depth and quantized layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edge_sdk.planning.choice import fits_memory, unpredictable
from edge_sdk.planning.cost import peak_mb, round_time, update_bytes, version_bytes
from edge_sdk.protocol.measure import Fit
from edge_sdk.protocol.model import LoraShape, ModelShape
from edge_sdk.protocol.spec import Levers, Setting
from edge_sdk.protocol.wire import Run, Status

__all__ = ["DeviceCosts", "Pair", "Situation", "Work", "device_costs", "frontier", "layer_gains"]

ERROR_PER_LAYER = {8: 0.0, 4: 0.01}
"""err(a) / a: what a quantized layer takes off a round's gain. At 8 bits the gradient's error is below 1 %,
which no depth is worth giving up for; equal gains are told apart by their seconds."""


@dataclass(frozen=True)
class Work:
    """A round's work, the same for all devices."""

    shape: ModelShape
    lora: LoraShape
    micro_batch: int
    max_length: int
    steps: int
    levers: Levers
    codec: str
    accumulation: int = 1
    factors: str = "AB"
    optimizer: str = "adamw"

    @classmethod
    def of(cls, run: Run, *, steps: int, levers: Levers, codec: str, accumulation: int = 1) -> Work:
        return cls(
            run.shape, run.lora, run.micro_batch, run.max_length, steps, levers, codec, accumulation,
            run.spec.factors, run.spec.optimizer,
        )  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A depth with its quantized layers, and what they cost one device. MB above rest, seconds of a round."""

    depth: int
    quantized: int
    peak_mb: float
    seconds: float
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class DeviceCosts:
    """One device: its fit, its budgets, its share of the data.

    A link of unknown rate counts as free: the device measures it with its first update, and decides
    with its own figures anyway.
    """

    device: str
    samples: int
    fit: Fit
    budget_mb: float
    up_bps: float | None
    down_bps: float | None
    may_quantize: bool
    """The device has the mechanism."""
    base_precision: str
    """What the device holds its base in: its owner's choice, which its fit was measured with."""
    work: Work

    def knows(self, depth: int, quantized: int) -> bool:
        """Whether the device can run the pair and its fit can tell what it costs."""
        if quantized and not self.may_quantize:
            return False
        work = self.work
        return not unpredictable(self.fit, work.shape, work.lora, self.setting(depth, quantized))

    def setting(self, depth: int, quantized: int) -> Setting:
        work = self.work
        return Setting(
            depth=depth,
            quantized_layers=quantized,
            levers=work.levers,
            micro_batch=work.micro_batch,
            max_length=work.max_length,
            factors=work.factors,
            optimizer=work.optimizer,
            base_precision=self.base_precision,
        )

    def peak_mb(self, depth: int, quantized: int) -> float:
        """Predicted memory above rest, of a pair that is known."""
        return peak_mb(self.fit, self.work.shape, self.work.lora, self.setting(depth, quantized))

    def fits(self, depth: int, quantized: int) -> bool:
        return self.knows(depth, quantized) and fits_memory(self.peak_mb(depth, quantized), self.budget_mb)

    def least_quantized(self, depth: int) -> int | None:
        """a_min(d): the fewest quantized layers with which the depth fits; None: it does not fit."""
        return next((a for a in range(depth + 1) if self.fits(depth, a)), None)

    def most_quantized(self, depth: int) -> int:
        """All of the layers, or none where quantizing is not possible or not known."""
        return depth if self.knows(depth, depth) else 0

    def pair(self, depth: int, quantized: int) -> Pair:
        """The costs of a pair, whether it fits or not."""
        work = self.work
        bytes_up = update_bytes(work.shape, work.lora, depth, work.codec, work.factors)
        bytes_down = version_bytes(work.shape, work.lora)
        time = round_time(
            self.fit,
            work.shape,
            work.lora,
            self.setting(depth, quantized),
            steps=work.steps * work.accumulation,
            bytes_up=bytes_up,
            bytes_down=bytes_down,
            up_bps=self.up_bps,
            down_bps=self.down_bps,
        )
        return Pair(depth, quantized, self.peak_mb(depth, quantized), time.total_s, bytes_up, bytes_down)


def device_costs(status: Status, work: Work) -> DeviceCosts:
    """Raises ValueError where the status holds no fit for this work; the text says what it holds."""
    fit = status.fit
    if fit is None:
        raise ValueError("it has not reported a probe")
    if (fit.micro_batch, fit.max_length) != (work.micro_batch, work.max_length):
        raise ValueError(
            f"its probe is of batch {fit.micro_batch} and length {fit.max_length}, "
            f"the run's are {work.micro_batch} and {work.max_length}"
        )
    for rate in (status.link.up_bps, status.link.down_bps):
        if rate is not None and 0 < rate < 1:
            raise ValueError(f"its link of {rate:.3g} bit/s is too slow to predict with")
    return DeviceCosts(
        device=status.device,
        samples=status.samples,
        fit=fit,
        budget_mb=status.memory.budget_mb,
        up_bps=status.link.up_bps,
        down_bps=status.link.down_bps,
        may_quantize=f"activation:int{work.levers.activation_bits}" in status.mechanisms,
        base_precision=_base_precision(status.mechanisms),
        work=work,
    )


def _base_precision(mechanisms: Sequence[str]) -> str:
    kind = "base:"
    return next((word.removeprefix(kind) for word in mechanisms if word.startswith(kind)), "fp32")


def frontier(costs: DeviceCosts) -> tuple[Pair, ...]:
    """The feasible and efficient pairs (d, a_min(d)), strictly growing in depth and in seconds.

    More than a_min(d) quantized layers cost time and buy nothing. A pair that takes as long as a deeper one
    (a noisy fit) is dropped. How much longer quantized steps may take is not limited here: the sweep weighs
    their seconds, and a limit that devices do not know would have them choose what was not recommended.
    """
    kept: list[Pair] = []
    for depth in range(1, costs.work.shape.layers + 1):
        quantized = costs.least_quantized(depth)
        if quantized is None:
            break  # memory grows with depth: nothing deeper fits
        pair = costs.pair(depth, quantized)
        while kept and kept[-1].seconds >= pair.seconds:
            kept.pop()
        kept.append(pair)
    return tuple(kept)


@dataclass(frozen=True)
class Situation:
    """What an allocation decides upon besides the devices' costs."""

    layers: int
    gains: tuple[float, ...]
    """G(d) for d = 0..layers: what training the top d layers is worth, 0..1; see ``layer_gains``."""
    activation_bits: int = 8
    round: int = 1
    target_s: float | None = None
    """How long a round shall take, where the operator fixed it."""
    previous: Mapping[str, int] = field(default_factory=dict)
    """Depth recommended to each device in the round before; empty: no hysteresis."""

    def gain(self, depth: int, quantized: int) -> float:
        """G(d) · (1 − err(a))."""
        return self.gains[depth] * (1.0 - ERROR_PER_LAYER.get(self.activation_bits, 0.01) * quantized)


def layer_gains(layers: int, utilities: Sequence[float] | None) -> tuple[float, ...]:
    """G(d) = sum of the utilities of the top d layers, normalised to sum 1; d = 0..layers.

    ``utilities``: one per layer, from the input up, not negative: how much the merged adapter moves there.
    None, or all zero: uniform.
    """
    values = [1.0] * layers if utilities is None or not any(utilities) else [float(u) for u in utilities]
    if len(values) != layers or not all(math.isfinite(v) and v >= 0 for v in values):
        raise ValueError(f"{layers} finite utilities of at least 0 are needed, received {values}")
    total = math.fsum(values)
    return tuple(math.fsum(values[layers - depth :]) / total for depth in range(layers + 1))

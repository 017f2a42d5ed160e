"""What the planner knows of a device: the costs it predicts for every pair of depth and quantized layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from aggregator.planner.lessons import Lessons
from edge_sdk.planning.choice import fits_memory, unpredictable
from edge_sdk.planning.cost import peak_mb, round_time, update_bytes, version_bytes
from edge_sdk.planning.frontier import fewest
from edge_sdk.planning.memory import BITS, RECOMPUTE
from edge_sdk.protocol.base_plan import BASE_WORDS
from edge_sdk.protocol.measure import Fit
from edge_sdk.protocol.model import LoraShape, ModelShape
from edge_sdk.protocol.spec import Levers, Setting
from edge_sdk.protocol.wire import Run, Status

__all__ = [
    "DeviceCosts",
    "Pair",
    "Situation",
    "Way",
    "Work",
    "device_costs",
    "feasible",
    "frontier",
    "layer_gains",
]

ERROR_PER_LAYER = {8: 0.0, 4: 0.01, 2: 0.05}
"""err(a) / a: what a quantized layer takes off a round's gain. At 8 bits the gradient's error is below 1 %,
which no depth is worth giving up for; equal gains are told apart by their seconds."""


FEWEST_STEPS = 0.25
"""The least share of a round's steps that a device is offered where time binds."""


@dataclass(frozen=True)
class Way:
    """How a depth is trained: all of a candidate that costs memory or time besides its layers."""

    levers: Levers
    micro_batch: int
    accumulation: int
    steps: int
    share: float = 1.0
    """``steps`` over those of the round."""


@dataclass(frozen=True)
class Work:
    """A round's work, the same for all devices.

    ``ways``: the method's own first; the others are for devices that it leaves too little memory.
    """

    shape: ModelShape
    lora: LoraShape
    max_length: int
    ways: tuple[Way, ...]
    codec: str
    factors: str = "AB"
    optimizer: str = "adamw"

    @classmethod
    def of(
        cls,
        run: Run,
        *,
        steps: int,
        levers: Levers,
        codec: str,
        accumulation: int = 1,
        others: Sequence[Levers] = (),
    ) -> Work:
        """``others``: levers besides the method's own. Where there are any, a batch may be split too: half
        of it, twice as often, is the same mathematics in less memory."""
        own = Way(levers, run.micro_batch, accumulation, steps)
        ways = [own, *(replace(own, levers=other) for other in others)]
        if others and run.micro_batch % 2 == 0:
            ways.append(replace(own, micro_batch=run.micro_batch // 2, accumulation=2 * accumulation))
        return cls(
            run.shape, run.lora, run.max_length, tuple(ways), codec, run.spec.factors, run.spec.optimizer
        )

    @property
    def own(self) -> Way:
        return self.ways[0]


@dataclass(frozen=True)
class Pair:
    """A depth with its quantized layers, and what they cost one device. MB above rest, seconds of a round."""

    depth: int
    quantized: int
    peak_mb: float
    seconds: float
    train_s: float
    bytes_up: int
    bytes_down: int
    way: Way


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
    reported_mb: float
    """What it said last; ``budget_mb`` may be less."""
    up_bps: float | None
    down_bps: float | None
    mechanisms: frozenset[str]
    base_precision: str
    """What the device holds its base in: its owner's choice, which its fit was measured with."""
    work: Work
    lessons: Lessons = field(default_factory=Lessons)
    """What earlier rounds taught of its figures."""

    def knows(self, depth: int, quantized: int, way: Way | None = None) -> bool:
        """Whether the device can run the pair and its fit can tell what it costs."""
        way, work = way or self.work.own, self.work
        levers, needs = way.levers, set()
        if quantized:
            needs.add(f"activation:int{levers.activation_bits}")
        if levers != work.own.levers:
            needs.add(f"recompute:{levers.recompute}")
            if quantized:
                needs.add(f"rounding:{levers.activation_rounding}")
        if not needs <= self.mechanisms:
            return False
        return not unpredictable(self.fit, work.shape, work.lora, self.setting(depth, quantized, way))

    def setting(self, depth: int, quantized: int, way: Way | None = None) -> Setting:
        way, work = way or self.work.own, self.work
        return Setting(
            depth=depth,
            quantized_layers=quantized,
            levers=way.levers,
            micro_batch=way.micro_batch,
            max_length=work.max_length,
            accumulation=way.accumulation,
            factors=work.factors,
            optimizer=work.optimizer,
            base_precision=self.base_precision,
        )

    def peak_mb(self, depth: int, quantized: int, way: Way | None = None) -> float:
        """Predicted memory above rest, of a pair that is known."""
        peak = peak_mb(self.fit, self.work.shape, self.work.lora, self.setting(depth, quantized, way))
        return self.lessons.memory_factor * peak

    def fits(self, depth: int, quantized: int, way: Way | None = None) -> bool:
        return self.knows(depth, quantized, way) and self._has_room(self.peak_mb(depth, quantized, way))

    def _has_room(self, peak: float) -> bool:
        """By measured figures within the budget, and by predicted ones within what did not fail."""
        lessons = self.lessons
        return fits_memory(peak, self.budget_mb) and fits_memory(
            peak / lessons.memory_factor, lessons.held_mb(self.budget_mb)
        )

    def least_quantized(self, depth: int, way: Way | None = None) -> int | None:
        """a_min(d): the fewest quantized layers with which the depth fits; None: it does not fit.

        A fit made of some probes only may know the plain form, or the mix, and not all of them quantized.
        """
        return fewest(depth, lambda quantized: self.fits(depth, quantized, way))

    def most_quantized(self, depth: int) -> int:
        """All of the layers, or none where quantizing is not possible or not known."""
        return depth if self.knows(depth, depth) else 0

    def pair(self, depth: int, quantized: int, way: Way | None = None) -> Pair:
        """The costs of a pair, whether it fits or not."""
        way, work = way or self.work.own, self.work
        bytes_up = update_bytes(work.shape, work.lora, depth, work.codec, work.factors)
        bytes_down = version_bytes(work.shape, work.lora)
        time = round_time(
            self.fit,
            work.shape,
            work.lora,
            self.setting(depth, quantized, way),
            steps=way.steps * way.accumulation,
            bytes_up=bytes_up,
            bytes_down=bytes_down,
            up_bps=self.up_bps,
            down_bps=self.down_bps,
        )
        train_s = self.lessons.time_factor * time.train_s
        return Pair(
            depth,
            quantized,
            self.peak_mb(depth, quantized, way),
            train_s + time.link_s,
            train_s,
            bytes_up,
            bytes_down,
            way,
        )

    def shortened(self, pair: Pair, target_s: float) -> Pair | None:
        """The pair with as many steps as there is time for; None where that is no round worth its name."""
        way, link_s = pair.way, pair.seconds - pair.train_s
        steps = min(way.steps - 1, int(way.steps * (target_s - link_s) / max(pair.train_s, 1e-9) + 1e-9))
        if steps < max(1.0, FEWEST_STEPS * way.steps):
            return None
        fewer = replace(way, steps=steps, share=way.share * steps / way.steps)
        return self.pair(pair.depth, pair.quantized, fewer)

    def has_room(self, pair: Pair) -> bool:
        return self._has_room(pair.peak_mb)

    def own_room(self, pair: Pair) -> bool:
        """Whether the device thinks so, which knows nothing of earlier rounds."""
        return fits_memory(pair.peak_mb / self.lessons.memory_factor, self.reported_mb)

    def own_seconds(self, pair: Pair) -> float:
        """What it predicts."""
        return pair.seconds - pair.train_s + pair.train_s / self.lessons.time_factor


def device_costs(status: Status, work: Work, lessons: Lessons | None = None) -> DeviceCosts:
    """The status as it came; what earlier rounds taught is put to it here.

    Raises ValueError where the status holds no fit for this work; the text says what it holds.
    """
    lessons = lessons or Lessons()
    planned = lessons.planned(status)
    fit = planned.fit
    if fit is None:
        raise ValueError("it has not reported a probe")
    if (fit.micro_batch, fit.max_length) != (work.own.micro_batch, work.max_length):
        raise ValueError(
            f"its probe is of batch {fit.micro_batch} and length {fit.max_length}, "
            f"the run's are {work.own.micro_batch} and {work.max_length}"
        )
    if fit.levers.activation_bits not in BITS or fit.levers.recompute not in RECOMPUTE:
        raise ValueError(f"its probe is of {fit.levers}, of which nothing is known")
    held = _base_precision(status.mechanisms)
    if held not in BASE_WORDS:
        raise ValueError(f"it holds its base in {held[:32]!r}; known are {', '.join(BASE_WORDS)}")
    for rate in (status.link.up_bps, status.link.down_bps):
        if rate is not None and rate < 1:
            raise ValueError(f"its link of {rate:.3g} bit/s is too slow to predict with")
    return DeviceCosts(
        device=status.device,
        samples=status.samples,
        fit=fit,
        budget_mb=planned.memory.budget_mb,
        reported_mb=status.memory.budget_mb,
        up_bps=status.link.up_bps,
        down_bps=status.link.down_bps,
        mechanisms=frozenset(status.mechanisms),
        base_precision=held,
        work=work,
        lessons=lessons,
    )


def _base_precision(mechanisms: Sequence[str]) -> str:
    kind = "base:"
    return next((word.removeprefix(kind) for word in mechanisms if word.startswith(kind)), "fp32")


def frontier(costs: DeviceCosts, gain: Callable[[Pair], float] = lambda pair: pair.depth) -> tuple[Pair, ...]:
    """The feasible and efficient pairs, of growing seconds and gain, and of no less depth.

    Of a depth that fits in the method's own way that is (d, a_min(d)): more quantized layers cost time and
    buy nothing. Where none do, it is that of every other way. A pair that takes as long as a deeper one (a
    noisy fit) is dropped. How much longer quantized steps may take is not limited here: the sweep weighs
    their seconds, and a limit that devices do not know would have them choose what was not recommended.
    """
    kept: list[Pair] = []
    for depth in range(1, costs.work.shape.layers + 1):
        pairs = feasible(costs, depth)
        if not pairs:
            break  # memory grows with depth: nothing deeper fits
        for pair in sorted(pairs, key=lambda one: (gain(one), one.seconds)):
            if kept and _worse(pair, kept[-1], gain):
                continue
            while kept and kept[-1].seconds >= pair.seconds:
                kept.pop()
            kept.append(pair)
    return tuple(kept)


def _worse(pair: Pair, than: Pair, gain: Callable[[Pair], float]) -> bool:
    """Less gain; or, of one depth, no more. A deeper one of equal gain is kept: layers are to be covered."""
    if gain(pair) == gain(than):
        return pair.depth == than.depth and pair.seconds >= than.seconds
    return gain(pair) < gain(than)


def feasible(costs: DeviceCosts, depth: int) -> list[Pair]:
    """The method's own way of training so deep, or, where that does not fit, all others that do."""
    own, *others = costs.work.ways
    quantized = costs.least_quantized(depth, own)
    if quantized is not None:
        return [costs.pair(depth, quantized, own)]
    found = ((costs.least_quantized(depth, way), way) for way in others)
    return [costs.pair(depth, quantized, way) for quantized, way in found if quantized is not None]


@dataclass(frozen=True)
class Situation:
    """What an allocation decides upon besides the devices' costs."""

    layers: int
    gains: tuple[float, ...]
    """G(d) for d = 0..layers: what training the top d layers is worth, 0..1; see ``layer_gains``."""
    round: int = 1
    target_s: float | None = None
    """How long a round shall take, where the operator fixed it."""
    previous: Mapping[str, int] = field(default_factory=dict)
    """Depth recommended to each device in the round before; empty: no hysteresis."""

    def gain(self, pair: Pair) -> float:
        """G(d) · (1 − err(a)), and the share of the round's steps."""
        error = ERROR_PER_LAYER.get(pair.way.levers.activation_bits, 0.05) * pair.quantized
        return pair.way.share * self.gains[pair.depth] * max(0.0, 1.0 - error)


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

"""What fits in a memory, depth by depth: the feasible frontier of one way of training."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from edge_sdk.planning.choice import fits_memory
from edge_sdk.planning.cost import peak_mb, round_time, step_s, update_bytes, version_bytes
from edge_sdk.protocol.measure import Fit
from edge_sdk.protocol.model import LoraShape, ModelShape
from edge_sdk.protocol.spec import Setting

__all__ = ["Point", "Round", "fewest", "frontier", "least_quantized"]


@dataclass(frozen=True)
class Round:
    """What a round asks besides a setting. Bits per second; None: not known, and then of no weight."""

    steps: int
    codec: str
    up_bps: float | None = None
    down_bps: float | None = None


@dataclass(frozen=True)
class Point:
    """A depth with the fewest quantized layers with which it fits, and what it takes.

    ``step_s`` is of one batch. ``round_s`` includes a full version fetched and the update sent.
    """

    depth: int
    quantized_layers: int
    peak_mb: float
    step_s: float
    bytes_up: int
    bytes_down: int
    round_s: float


def least_quantized(
    fit: Fit, shape: ModelShape, lora: LoraShape, setting: Setting, budget_mb: float
) -> int | None:
    """The fewest quantized layers with which the setting's depth fits; None where it does not."""

    def fits(quantized: int) -> bool:
        wanted = replace(setting, quantized_layers=quantized)
        return fits_memory(peak_mb(fit, shape, lora, wanted), budget_mb)

    return fewest(setting.depth, fits)


def fewest(depth: int, fits: Callable[[int], bool]) -> int | None:
    """The fewest quantized layers of a depth that fit; None where no number does.

    Each more of them needs less, but for two: the first may need more than none, as quantizing takes room
    too, and so may the last, as the room of a plain layer is then not enough.
    """
    if fits(0):
        return 0
    if not fits(depth):
        return next((quantized for quantized in range(1, depth) if fits(quantized)), None)
    return 1 + bisect_left(range(1, depth + 1), True, key=fits)


def frontier(
    fit: Fit,
    shape: ModelShape,
    lora: LoraShape,
    setting: Setting,
    *,
    budget_mb: float,
    work: Round,
    quantize: bool = True,
) -> tuple[Point, ...]:
    """One point for each depth that fits. ``setting``: all but depth and quantized layers."""
    found = []
    for depth in range(1, shape.layers + 1):
        wanted = replace(setting, depth=depth)
        quantized = least_quantized(fit, shape, lora, wanted, budget_mb)
        if quantized is None or (quantized and not quantize):
            break  # memory grows with depth: nothing deeper fits
        found.append(_point(fit, shape, lora, replace(wanted, quantized_layers=quantized), work))
    return tuple(found)


def _point(fit: Fit, shape: ModelShape, lora: LoraShape, setting: Setting, work: Round) -> Point:
    bytes_up = update_bytes(shape, lora, setting.depth, work.codec, setting.factors)
    bytes_down = version_bytes(shape, lora)
    time = round_time(
        fit, shape, lora, setting, steps=work.steps * setting.accumulation, bytes_up=bytes_up,
        bytes_down=bytes_down, up_bps=work.up_bps, down_bps=work.down_bps,
    )  # fmt: skip
    return Point(
        setting.depth, setting.quantized_layers, peak_mb(fit, shape, lora, setting),
        step_s(fit, shape, lora, setting), bytes_up, bytes_down, time.total_s,
    )  # fmt: skip

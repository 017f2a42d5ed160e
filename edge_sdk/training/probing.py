"""The probe: a few settings, run for real, so that the cost model is fitted and not assumed.

At most five, in ascending memory. The first two are the smallest there are; each further one is run only
where what was measured so far predicts that it fits the limit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from msgspec.structs import replace

from edge_sdk.planning.fitting import fit_cost
from edge_sdk.protocol.measure import Fit, ProbePoint
from edge_sdk.protocol.model import ModelShape
from edge_sdk.protocol.spec import Candidate, Levers
from edge_sdk.protocol.trainer import Setup
from edge_sdk.training.failures import MemoryLimitError
from edge_sdk.training.loop import train
from edge_sdk.training.memory import Meter, is_out_of_memory
from edge_sdk.training.resident import Resident

__all__ = ["MAX_SETTINGS", "probe"]

_log = logging.getLogger(__name__)

MAX_SETTINGS = 5
_STEPS = 3
"""The first takes its time for what later ones find ready; the least of the others counts, of two passes."""
_MARGIN = 0.9
"""Share of the limit that a prediction may fill."""


def probe(
    resident: Resident,
    setup: Setup,
    levers: Levers,
    check: Callable[[], None],
    report: Callable[[int, int], None],
) -> Fit:
    """Measures and fits. Raises MemoryLimitError where not even one layer fits the limit."""
    before = resident.model.adapter()
    points: list[ProbePoint] = []
    growth = resident.growth_mb()
    prior = counted_fit(resident.model.shape, setup, levers)
    try:
        for stage in range(MAX_SETTINGS):
            setting = _setting(stage, points, resident.model.shape.layers, growth, prior)
            if setting is None:
                continue
            report(stage, MAX_SETTINGS + 1)
            point = _measure(resident, setup, levers, *setting, check)
            if point is None:
                break
            points.append(point)
        # Once more, the other way round: what else the machine did meanwhile passes for nobody's cost.
        for index in reversed(range(len(points))):
            report(MAX_SETTINGS, MAX_SETTINGS + 1)
            setting = (points[index].depth, points[index].quantized_layers)
            again = _measure(resident, setup, levers, *setting, check)
            if again is not None and again.step_s < points[index].step_s:
                points[index] = replace(points[index], step_s=again.step_s)
    finally:
        resident.model.set_adapter(before)
    if not points:
        raise MemoryLimitError(
            f"not even one layer can be trained in {growth or 0:.0f} MB above rest",
            "raise limits.memory_mb, or lower training.batch or training.max_length in run.toml",
        )
    report(MAX_SETTINGS + 1, MAX_SETTINGS + 1)
    return _fit(points, setup, levers, resident, prior)


def _fit(points: list[ProbePoint], setup: Setup, levers: Levers, resident: Resident, prior: Fit) -> Fit:
    return fit_cost(
        points,
        micro_batch=setup.micro_batch,
        max_length=setup.max_length,
        levers=levers,
        rest_mb=resident.rest_mb,
        threads=resident.threads(setup),
        machine=resident.machine(setup),
        prior=prior,
    )


def counted_fit(shape: ModelShape, setup: Setup, levers: Levers) -> Fit:
    """Memory by counting, before anything was measured: fp32, LoRA on all linears.

    Of a layer autograd saves 8 batch · length · hidden values, and two for each of the feed-forward's inner
    ones; with its outputs made again 5 and one, without inner values 5, of a layer that runs again its input.
    LoRA's values come with their gradient and two moments. A pass takes a handful of such tensors besides.
    """
    unit = setup.micro_batch * setup.max_length * shape.hidden * 4 / 1e6
    ups = sum(m.outputs == shape.intermediate for m in shape.modules) or 1
    inner = ups * unit * shape.intermediate / shape.hidden
    kept = {
        "none": 8 * unit + 2 * inner,
        "outputs": 5 * unit + inner,
        "inner": 5 * unit,
        "layer": unit,
    }[levers.recompute]
    packed = (1.25 * levers.activation_bits + (levers.activation_bits == 2) * 0.5) / 32
    return Fit(
        micro_batch=setup.micro_batch, max_length=setup.max_length, levers=levers, rest_mb=0.0,
        head_mb=4 * unit + 2 * inner,
        layer_mb=kept + 12 * shape.lora_values(setup.lora.rank) / 1e6,
        saved_mb=(1 - packed) * kept, work_mb=inner,
        forward_s=0.0, layer_s=0.0, quantize_s=0.0, probes=(),
    )  # fmt: skip


def _setting(
    stage: int, points: list[ProbePoint], layers: int, growth: float | None, prior: Fit
) -> tuple[int, int] | None:
    """(depth, quantized layers) of a stage, None where nothing fits or nothing new would be learnt.

    One layer packed and plain tell what the head and a layer cost; the deepest settings that fit, packed
    and plain, give the slopes; one half as deep holds the line against noise.
    """

    def deepest(packed: bool) -> int:
        depths = range(layers, 1, -1)
        return next((d for d in depths if _fits((d, d if packed else 0), points, growth, prior)), 0)

    if stage == 0:
        return (1, 1)
    if not points:
        return None
    if stage == 1:
        return (1, 0) if _fits((1, 0), points, growth, prior) else None
    if stage == 2:
        middle = (deepest(packed=True) + 1) // 2
        return (middle, middle) if middle > 1 else None
    depth = deepest(packed=stage == 3)
    setting = (depth, depth if stage == 3 else 0)
    return setting if depth and setting not in {(p.depth, p.quantized_layers) for p in points} else None


def _fits(setting: tuple[int, int], points: list[ProbePoint], growth: float | None, prior: Fit) -> bool:
    """Whether it stays below the limit by counting on from the deepest point measured, of its kind if any."""
    if growth is None:
        return True
    counted = _counted(prior, *setting)
    alike = [p for p in points if (p.quantized_layers > 0) == (setting[1] > 0)] or points
    if alike:
        anchor = max(alike, key=lambda p: p.depth)
        counted += anchor.peak_mb - _counted(prior, anchor.depth, anchor.quantized_layers)
    return counted <= _MARGIN * growth


def _counted(prior: Fit, depth: int, quantized: int) -> float:
    saved = prior.work_mb - quantized * prior.saved_mb if quantized else 0.0
    return prior.head_mb + depth * prior.layer_mb + saved


def _measure(
    resident: Resident,
    setup: Setup,
    levers: Levers,
    depth: int,
    quantized: int,
    check: Callable[[], None],
) -> ProbePoint | None:
    """One setting; None where it ran out of memory after all."""
    candidate = Candidate(
        id="probe", depth=depth, quantized_layers=quantized, steps=_STEPS,
        micro_batch=setup.micro_batch, max_length=setup.max_length,
        activation_bits=levers.activation_bits, activation_rounding=levers.activation_rounding,
        recompute=levers.recompute,
    )  # fmt: skip
    meter = Meter(resident.device)

    def watch() -> None:
        check()
        resident.check_limit(meter)

    try:
        trace = train(
            resident.model, resident.random_batches(candidate, setup), candidate, setup.spec,
            task=resident.task, check=watch, report=lambda *_: None,
        )  # fmt: skip
    except Exception as error:
        if not (isinstance(error, MemoryLimitError) or is_out_of_memory(error)):
            raise
        _log.warning("probe of depth %d, %d quantized: out of memory", depth, quantized)
        return None
    return ProbePoint(
        depth=depth, quantized_layers=quantized, peak_mb=meter.peak_mb(), step_s=min(trace.step_s[1:])
    )

"""The probe: a few settings, run for real, so that the cost model is fitted and not assumed.

At most five. One layer packed comes first, the least there is. It runs where the machine has as much free as
is counted for it; the owner's limit is enforced, and finds out by itself. Every further setting is counted on
from what was measured so far, and runs only where that stays below the limit and below what is free. They
differ in what matters: depth, packed or not, and the number of tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from msgspec.structs import replace

from edge_sdk.device.machine import free_memory_mb
from edge_sdk.planning.cost import peak_mb
from edge_sdk.planning.fitting import estimate, fit_cost, setting_of
from edge_sdk.protocol.measure import Fit, ProbePoint
from edge_sdk.protocol.model import ModelShape
from edge_sdk.protocol.spec import Candidate, Levers, Setting
from edge_sdk.protocol.trainer import Setup
from edge_sdk.training.activations.packing import kernel
from edge_sdk.training.activations.plan import Form
from edge_sdk.training.allocator import HEAP, allocator_kind
from edge_sdk.training.failures import MemoryLimitError
from edge_sdk.training.loop import train
from edge_sdk.training.memory import Meter, is_out_of_memory
from edge_sdk.training.resident import Resident

__all__ = ["MAX_SETTINGS", "Probing", "probe"]

_log = logging.getLogger(__name__)

MAX_SETTINGS = 5
_STEPS = 3
"""The first takes its time for what later ones find ready; the least of the others counts, of all passes."""
_MOST_PASSES = 3
_ENOUGH_S = 12.0
"""After the second pass none begins later than this: few steps of a busy machine tell little."""
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
    began = time.monotonic()
    points: list[ProbePoint] = []
    free = _free_mb(resident)
    limit = min((room for room in (resident.growth_mb(), free) if room is not None), default=None)
    form = Form(levers.activation_bits, levers.activation_rounding)  # type: ignore[arg-type]
    probing = Probing(
        resident.model.shape, setup, levers, kernel(resident.device, form), limit, free, _heap(resident)
    )
    for stage in range(MAX_SETTINGS):
        wanted = probing.wanted(stage, points)
        if wanted is None:
            continue
        report(stage, MAX_SETTINGS + 1)
        point = _measure(resident, setup, setting_of(wanted, probing.reference), wanted, check)
        if point is None:
            break
        points.append(point)
    # Again, the other way round: what else the machine did meanwhile passes for nobody's cost.
    for number in range(1, _MOST_PASSES):
        if number > 1 and time.monotonic() - began > _ENOUGH_S:
            break
        for index in reversed(range(len(points))):
            report(MAX_SETTINGS, MAX_SETTINGS + 1)
            wanted = points[index]
            again = _measure(resident, setup, setting_of(wanted, probing.reference), wanted, check)
            if again is not None:
                points[index] = replace(
                    wanted,
                    step_s=min(again.step_s, wanted.step_s),
                    # The first pass loads what later trainings find: libraries, and room in the heap. Of a
                    # heap in pieces the higher peak is the one to reckon with.
                    peak_mb=again.peak_mb if number == 1 else max(again.peak_mb, wanted.peak_mb),
                )
    if not points:
        raise MemoryLimitError(
            f"not even one layer can be trained in {limit or 0:.0f} MB above rest",
            "raise limits.memory_mb, or lower training.batch or training.max_length in run.toml",
        )
    report(MAX_SETTINGS + 1, MAX_SETTINGS + 1)
    return probing.fit(
        points, rest_mb=resident.rest_mb, threads=resident.threads(setup), machine=resident.machine(setup)
    )


class Probing:
    """Which settings to run, given what was measured."""

    def __init__(
        self,
        shape: ModelShape,
        setup: Setup,
        levers: Levers,
        kernel: str,
        limit_mb: float | None,
        free_mb: float | None = None,
        heap: float = 1.0,
    ) -> None:
        self.shape, self.lora, self.kernel = shape, setup.lora, kernel
        self.limit_mb, self.free_mb, self.heap = limit_mb, free_mb, heap
        self.reference = Setting(
            depth=1, levers=levers, micro_batch=setup.micro_batch, max_length=setup.max_length,
            factors=setup.spec.factors, optimizer=setup.spec.optimizer, base_precision=setup.base_precision,
        )  # fmt: skip

    def fit(self, points: list[ProbePoint], **about: float | int | str) -> Fit:
        return fit_cost(
            points, shape=self.shape, lora=self.lora, reference=self.reference, kernel=self.kernel,
            heap=self.heap, **about,  # type: ignore[arg-type]
        )  # fmt: skip

    def wanted(self, stage: int, points: list[ProbePoint]) -> ProbePoint | None:
        """What to measure at a stage; None where nothing fits or nothing new would be learnt.

        One layer packed and plain tell what the head and a layer cost; the deepest settings that fit, packed
        and plain, give the slopes; a quarter of the tokens tells what does not grow with them.
        """
        if stage == 0:
            return self._if_fits(_point(1, 1), points)
        if not points:
            return None
        if stage == 1:
            return self._if_fits(_point(1, 0), points)
        if stage == 2:
            return self._few_tokens(points)
        packed = stage == 3
        for depth in range(self.shape.layers, 1, -1):
            found = self._if_fits(_point(depth, depth if packed else 0), points)
            if found is not None:
                return found
        return None

    def _few_tokens(self, points: list[ProbePoint]) -> ProbePoint | None:
        batch, length = self.reference.micro_batch, self.reference.max_length
        few = {"micro_batch": batch // 4} if batch >= 4 else {"max_length": max(8, length // 4)}
        for depth in range(self.shape.layers, 0, -1):
            found = self._if_fits(replace(_point(depth, depth), **few), points)
            if found is not None:
                return found
        return None

    def _if_fits(self, wanted: ProbePoint, points: list[ProbePoint]) -> ProbePoint | None:
        """It, where counting on from what was measured says that it stays below the limit."""
        limit = self.limit_mb if points else self.free_mb
        if limit is None:
            return wanted
        fit = self._so_far(points)

        def counted(point: ProbePoint) -> float:
            return peak_mb(fit, self.shape, self.lora, setting_of(point, self.reference))

        # by as much as it was passed before it may be passed again
        passed = max((point.peak_mb / max(1e-6, counted(point)) for point in points), default=1.0)
        return wanted if max(1.0, passed) * counted(wanted) <= _MARGIN * limit else None

    def _so_far(self, points: list[ProbePoint]) -> Fit:
        if points:
            return self.fit(points, rest_mb=0.0)
        return estimate(self.shape, self.lora, self.reference, heap=self.heap)


def _heap(resident: Resident) -> float:
    """What is held for a byte of tensors: CUDA's figures are of the tensors themselves."""
    return HEAP if resident.device.type == "cpu" and allocator_kind() != "glibc" else 1.0


def _free_mb(resident: Resident) -> float | None:
    """What the machine has free beside the resting trainer; None: not known."""
    if resident.device.type == "cuda":
        return float(torch.cuda.mem_get_info(resident.device)[0]) / 1e6
    return free_memory_mb()


def _point(depth: int, quantized: int) -> ProbePoint:
    return ProbePoint(depth=depth, quantized_layers=quantized, peak_mb=0.0, step_s=0.0)


def _measure(
    resident: Resident, setup: Setup, setting: Setting, wanted: ProbePoint, check: Callable[[], None]
) -> ProbePoint | None:
    """One setting; None where it ran out of memory after all."""
    levers = setting.levers
    candidate = Candidate(
        id="probe", depth=setting.depth, quantized_layers=setting.quantized_layers, steps=_STEPS,
        micro_batch=setting.micro_batch, max_length=setting.max_length,
        activation_bits=levers.activation_bits, activation_rounding=levers.activation_rounding,
        recompute=levers.recompute,
    )  # fmt: skip
    meter = Meter(resident.device)
    before = resident.model.adapter()  # as a round holds the version that it began from

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
        _log.warning(
            "probe of depth %d, %d quantized: out of memory", setting.depth, setting.quantized_layers
        )
        return None
    finally:
        resident.model.set_adapter(before)
    return replace(wanted, peak_mb=meter.peak_mb(), step_s=min(trace.step_s[1:]))

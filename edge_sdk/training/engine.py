"""Answers trainer requests, one at a time, in whatever thread calls ``handle``.

torch, transformers and peft are imported by the first request that computes: ``Export`` does without.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edge_sdk.errors import MechanismError, TrainerError
from edge_sdk.protocol.measure import Measured
from edge_sdk.protocol.trainer import (
    BasePlanned,
    Describe,
    Described,
    Evaluate,
    Evaluated,
    Export,
    Exported,
    Failed,
    Interrupt,
    Measure,
    PlanBase,
    Probe,
    Probed,
    Progress,
    Setup,
    Timed,
    Train,
    Trained,
    TrainerReply,
    TrainerRequest,
)
from edge_sdk.training.allocator import allocator_word, empty_gpu_cache, trim
from edge_sdk.training.base import gpu_uuid
from edge_sdk.training.failures import InterruptError, failed
from edge_sdk.training.lean import keep_lean
from edge_sdk.training.words import mechanisms_of, refuse_missing, refuse_missing_levers

if TYPE_CHECKING:
    from edge_sdk.training.memory import Meter
    from edge_sdk.training.resident import Resident

__all__ = ["Engine"]

_log = logging.getLogger(__name__)

_PROGRESS_S = 0.5
"""Least time between two progress replies of a request."""
_ALIVE_S = 60.0
"""The last one is repeated where so long nothing was said: a host takes a silent trainer for dead."""
_LEAST_MEASURE_S = 0.5

Stage = Literal["loading", "probing", "training", "evaluating", "planning", "measuring"]


class Engine:
    """The trainer behind both hosts.

    Args:
        deliver: takes every reply: any number of ``Progress``, then exactly one other.
        enforce: whether this process is the trainer's own, so that memory limits may be set on it.
    """

    def __init__(self, deliver: Callable[[TrainerReply], None], *, enforce: bool) -> None:
        self._deliver = deliver
        self._enforce = enforce
        self._resident: Resident | None = None
        self._counting = threading.Lock()
        self._accepted = self._handled = self._ended = 0
        """Requests received, begun, and received before the last interrupt: it ends these."""
        self._told = self._heard = 0.0
        self._said = Progress(id=0, stage="loading", done=0, total=1)

    @property
    def loaded(self) -> bool:
        """Whether a model is held."""
        return self._resident is not None

    def accept(self) -> None:
        """A request was received: an interrupt before it was not meant for it."""
        with self._counting:
            self._accepted += 1

    def interrupt(self) -> None:
        """Ends the current request within a step, and what waits behind it; from any thread."""
        with self._counting:
            self._ended = max(self._accepted, self._handled)

    def unload(self) -> None:
        """Lets go of the model. What the process keeps of its memory is the allocator's affair."""
        if self._resident is not None:
            self._resident.release()
            self._resident = None

    def handle(self, request: TrainerRequest) -> None:
        """Answers a request; never raises."""
        self._handled += 1
        self._told, self._heard = 0.0, time.monotonic()
        self._said = Progress(id=getattr(request, "id", 0), stage="loading", done=0, total=1)
        failure: Failed | None = None
        try:
            reply = self._answer(request)
            empty_gpu_cache()
            self._deliver(reply)
        except Exception as error:
            failure = failed(getattr(request, "id", 0), error)
        # only now, with the exception and its frames gone, is the memory of the failed request free
        if failure is not None:
            if failure.cause == "memory" and self._resident is not None:
                self._resident.recover()
            else:
                trim()
            try:
                self._deliver(failure)
            except Exception:  # the host's own fault, which must not end the thread that serves it
                _log.exception("request %d failed, and its host failed to take that", failure.id)

    def _answer(self, request: TrainerRequest) -> TrainerReply:
        if isinstance(request, Describe):
            return self._describe(request)
        if isinstance(request, Probe):
            return self._probe(request)
        if isinstance(request, Train):
            return self._train(request)
        if isinstance(request, Evaluate):
            return self._evaluate(request)
        if isinstance(request, Export):
            return self._export(request)
        if isinstance(request, PlanBase):
            return self._plan_base(request)
        if isinstance(request, Measure):
            return self._measure(request)
        if isinstance(request, Interrupt):
            raise TrainerError("an interrupt is not a request to answer")
        raise TrainerError(f"no request of kind {type(request).__name__} is known")

    def _check(self) -> None:
        if self._handled <= self._ended:
            raise InterruptError
        if time.monotonic() - self._heard >= _ALIVE_S:
            self._heard = time.monotonic()
            self._deliver(self._said)

    def _progress(self, request: int, stage: Stage, done: int, total: int, **more: float | None) -> None:
        now = time.monotonic()
        self._said = Progress(id=request, stage=stage, done=done, total=total, **more)
        if done < total and now - self._told < _PROGRESS_S:
            return
        self._told = self._heard = now
        self._deliver(self._said)

    def _ready(self, request: int, setup: Setup) -> Resident:
        """The resident model of a setup, loaded where another one or none is there."""
        refuse_missing(setup.spec)
        if self._enforce:
            keep_lean()
        from edge_sdk.training.base import local_base

        folder = local_base(setup.base, self._check)
        # what a training needs is loaded now, and so part of the memory at rest
        from edge_sdk.training import update as _  # noqa: F401
        from edge_sdk.training.resident import Resident, resident_key

        self._check()
        if self._resident is None or self._resident.key != resident_key(setup, folder):
            self.unload()
            self._progress(request, "loading", 0, 1)
            self._resident = Resident(setup, folder, self._check, enforce=self._enforce)
            self._progress(request, "loading", 1, 1)
        self._resident.threads(setup)
        return self._resident

    def _watch(self, resident: Resident, meter: Meter) -> Callable[[], None]:
        def watch() -> None:
            self._check()
            resident.check_limit(meter)

        return watch

    def _describe(self, request: Describe) -> Described:
        import torch

        resident = self._ready(request.id, request.setup)
        samples = dropped = 0
        counts: tuple[int, ...] = ()
        if request.setup.data is not None:
            rows = resident.rows(request.setup)
            samples, dropped, counts = len(rows), rows.dropped, rows.counts
        resident.settle(request.setup)
        return Described(
            id=request.id,
            base=str(resident.folder),
            shape=resident.model.shape,
            rest_mb=resident.rest_mb,
            samples=samples,
            dropped=dropped,
            label_counts=counts,
            device=str(resident.device),
            gpu=gpu_uuid(resident.device),
            mechanisms=mechanisms_of(request.setup.base_precision, str(resident.device)),
            base_held=resident.base_held,
            torch=str(torch.__version__),
            allocator=allocator_word(),
        )

    def _probe(self, request: Probe) -> Probed:
        refuse_missing_levers(request.levers)
        resident = self._ready(request.id, request.setup)
        from edge_sdk.training.probing import probe

        if request.setup.data is not None:
            resident.rows(request.setup)  # part of what lies at rest
        resident.settle(request.setup)

        def report(done: int, total: int) -> None:
            self._progress(request.id, "probing", done, total)

        return Probed(id=request.id, fit=probe(resident, request.setup, request.levers, self._check, report))

    def _train(self, request: Train) -> Trained:
        refuse_missing(request.spec, request.candidate, request.setup.base_precision)
        resident = self._ready(request.id, request.setup)
        from edge_sdk.training.loop import StepDone, train
        from edge_sdk.training.memory import Meter
        from edge_sdk.training.randomness import draw_rows, torch_generator
        from edge_sdk.training.update import Start, write_results

        candidate, setup = request.candidate, request.setup
        if not (candidate.depth or resident.task.has_head):
            raise MechanismError(
                f"at depth 0 the head alone is trained, and a {resident.task.name} has none",
                "offer a depth of 1 or more",
            )
        if candidate.depth > (layers := resident.model.shape.layers):
            raise MechanismError(
                f"a depth of {candidate.depth} is offered, and this base has {layers} layers",
                "offer no more layers than there are",
            )
        rows = resident.rows(setup, candidate.max_length)
        resident.settle(setup)
        meter = Meter(resident.device)
        watch = self._watch(resident, meter)
        start = Start.read(request)
        resident.model.set_adapter(start.adapter)
        drawn = draw_rows(
            len(rows), candidate.micro_batch, candidate.steps * candidate.accumulation,
            seed=request.spec.seed, round=request.round, device=request.device,
        )  # fmt: skip

        def report(done: StepDone) -> None:
            self._progress(
                request.id, "training", done.number, candidate.steps,
                loss=done.loss, tokens_per_s=done.tokens_per_s, left_s=done.left_s,
            )  # fmt: skip

        trace = train(
            resident.model,
            resident.batches(rows, candidate, drawn),
            candidate,
            request.spec,
            task=resident.task,
            check=watch,
            report=report,
            generator=torch_generator(
                request.spec.seed, request.round, request.device, "rounding", on=resident.device
            ),
            prefix=resident.prefix(setup, rows, candidate, request.spec, drawn, Path(request.folder)),
        )
        files = write_results(request, start, resident.model)
        watch()
        return Trained(
            id=request.id,
            update=str(files.update),
            residual=str(files.residual) if files.residual else None,
            samples=len(rows),
            measured=Measured(
                rest_mb=meter.rest_mb,
                peak_mb=meter.peak_mb(),
                train_s=trace.train_s,
                step_s=sorted(trace.step_s)[len(trace.step_s) // 2],
                steps=candidate.steps,
                loss_first=trace.losses[0],
                loss_last=trace.losses[-1],
                threads=resident.threads(setup),
            ),
        )

    def _evaluate(self, request: Evaluate) -> Evaluated:
        resident = self._ready(request.id, request.setup)
        from edge_sdk.training.checking import checked
        from edge_sdk.training.memory import Meter
        from edge_sdk.updates.versions import read_adapter

        setup = request.setup
        rows = resident.rows(setup)
        resident.settle(setup)
        started = time.perf_counter()
        watch = self._watch(resident, Meter(resident.device))
        resident.model.set_adapter(read_adapter([Path(p) for p in request.versions]))

        def report(done: int) -> None:
            self._progress(request.id, "evaluating", done, len(rows))

        with checked(resident.model, watch):
            found = resident.task.evaluate(
                resident.model, resident.every(rows, setup.micro_batch), check=watch, report=report
            )
        return Evaluated(id=request.id, seconds=time.perf_counter() - started, **asdict(found))

    def _export(self, request: Export) -> Exported:
        from edge_sdk.updates.peft import write_peft
        from edge_sdk.updates.versions import read_adapter

        folder = Path(request.folder)
        if request.merged:
            return self._merge(request)
        write_peft(
            folder,
            read_adapter([Path(p) for p in request.versions]),
            shape=request.shape,
            lora=request.lora,
            base=request.base,
            labels=request.labels,
            task=request.task,
            card=request.card,
        )
        return Exported(id=request.id, folder=str(folder))

    def _merge(self, request: Export) -> Exported:
        from edge_sdk.training.base import local_base
        from edge_sdk.training.merged import write_merged
        from edge_sdk.updates.versions import VersionChain

        folder = write_merged(
            Path(request.folder),
            local_base(request.base, self._check),
            VersionChain([Path(path) for path in request.versions]),
            shape=request.shape,
            lora=request.lora,
            labels=request.labels,
            task=request.task,
            card=request.card,
            check=self._check,
        )
        return Exported(id=request.id, folder=str(folder))

    def _plan_base(self, request: PlanBase) -> BasePlanned:
        from edge_sdk.training.base import local_base

        started = time.perf_counter()
        folder = local_base(request.setup.base, self._check)
        import torch

        from edge_sdk.training.precision.planning import plan_base

        if request.setup.threads:
            torch.set_num_threads(request.setup.threads)
        self._check()
        self.unload()  # what is planned for is a base that hardly fits: not beside another
        self._progress(request.id, "loading", 0, 1)

        def report(done: int, total: int) -> None:
            self._progress(request.id, "planning", done, total)

        plan = plan_base(request, folder, self._check, report)
        return BasePlanned(id=request.id, plan=plan, seconds=time.perf_counter() - started)

    def _measure(self, request: Measure) -> Timed:
        if self._enforce:
            keep_lean()
        import torch

        from edge_sdk.training.throughput import compute_devices, measure_throughput

        started = time.perf_counter()
        if request.threads:
            torch.set_num_threads(request.threads)
        seconds = request.seconds
        if request.until is not None:
            seconds = max(_LEAST_MEASURE_S, min(seconds, request.until - time.monotonic()))
        devices, found = compute_devices(), []
        for done, device in enumerate(devices):
            self._progress(request.id, "measuring", done, len(devices))
            found.append(measure_throughput(device, seconds / len(devices), self._check))
        self._progress(request.id, "measuring", len(devices), len(devices))
        return Timed(
            id=request.id,
            throughput=tuple(found),
            torch=str(torch.__version__),
            seconds=time.perf_counter() - started,
        )

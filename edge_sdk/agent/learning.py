"""What rounds teach a device of its own fit: how far off it is, for each way of training that was tried.

A probe is a few settings on one day. Every trained round measures another one, and a training that ran out
of the memory that its owner allows shows at least how much it would have needed. Both are kept as ratios to
what the probe alone predicts, by levers, and correct what this device predicts from then on, for itself and
in what it reports.

Memory is believed at once where it is more, and late where it is less: the correction is the highest of the
last rounds, those before the first taken as predicted, and falls by a twentieth a round at most. Time is a
moving average. Levers that were not tried count as the best of those that were, and of memory never as
better than predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace as varied

from msgspec.structs import replace

from edge_sdk.agent.budgets import memory_now, prefix_room
from edge_sdk.agent.context import Context
from edge_sdk.agent.record import Knowledge, Lesson, Shortfall
from edge_sdk.planning.choice import Budgets, PrefixRoom, predict
from edge_sdk.planning.cost import peak_mb, tried
from edge_sdk.protocol.measure import Correction, Fit, Measured
from edge_sdk.protocol.spec import Candidate, Setting, TrainSpec
from edge_sdk.protocol.trainer import Described
from edge_sdk.protocol.wire import Run

__all__ = ["Experience", "corrected", "needed_more", "ratios", "taught"]

_ROUNDS = 8
"""Of which the highest peak counts."""
_FALL = 0.95
_LEAST_STEP_SHARE = 0.2
_LOWEST, _HIGHEST = 0.5, 4.0
_MOST = 16
"""Of lessons, and of shortfalls; the oldest go."""
_BYTE_MB = 1e-6
"""For what sums round off."""


class Experience:
    """All that is known of one fit since it was probed. Durable with the agent's ``Knowledge``."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.begin(None)

    def begin(
        self, probed: Fit | None, shortfalls: tuple[Shortfall, ...] = (), lessons: tuple[Lesson, ...] = ()
    ) -> None:
        """With a fit, and what was known of it before a restart."""
        self._probed, self.shortfalls, self._lessons = probed, shortfalls, lessons
        self.fit = None if probed is None else corrected(probed, lessons)

    def knowledge(self, described: Described) -> Knowledge:
        return Knowledge(
            described=described, fit=self._probed, shortfalls=self.shortfalls, lessons=self._lessons
        )

    def fell_short(self, run: Run, described: Described, candidate: Candidate, spec: TrainSpec) -> None:
        """A candidate ran out of memory.

        Where the budget was the owner's limit, its peak was above that; of free memory another program
        may have taken its part, which says nothing of the fit.
        """
        if self._probed is None or self.fit is None:
            return
        memory = memory_now(self._context, self.fit, described.device, described.gpu)
        setting = candidate.setting(spec)
        lasting = memory.limit_mb is not None and memory.limit_mb - memory.rest_mb <= memory.budget_mb
        one = Shortfall(
            setting=setting, kept_mb=_kept_mb(self.fit, run, candidate, setting),
            budget_mb=memory.budget_mb, lasting=lasting, at=self._context.clock.wall(),
        )  # fmt: skip
        others = [other for other in self.shortfalls if other.setting != setting]
        self.shortfalls = (*others[1 - _MOST :], one)
        if lasting:
            self._take(
                setting, needed_more(self._probed, self.fit, run, spec, candidate, memory.budget_mb), None
            )

    def trained(
        self, run: Run, described: Described, candidate: Candidate, spec: TrainSpec, measured: Measured
    ) -> None:
        """A candidate was trained, and measured."""
        if self._probed is not None and self.fit is not None:
            room = prefix_room(self._context, described, spec)
            found = ratios(self._probed, self.fit, run, spec, candidate, measured, room)
            self._take(candidate.setting(spec), *found)

    def _take(self, setting: Setting, peak: float, step: float | None) -> None:
        self._lessons = taught(self._lessons, setting, self._context.clock.wall(), peak, step)
        self.begin(self._probed, self.shortfalls, self._lessons)
        one = self._lessons[-1]
        self._context.emit(
            "fit.corrected", recompute=one.levers.recompute, quantized=one.quantized,
            bits=one.levers.activation_bits, rounds=one.rounds, peak=round(one.peak, 3),
            step=round(one.step, 3), last_peak=round(peak, 3),
            last_step=None if step is None else round(step, 3),
        )  # fmt: skip


def corrected(fit: Fit, lessons: Sequence[Lesson]) -> Fit:
    """The probe's fit with all that rounds taught."""
    if not lessons:
        return fit
    return replace(
        fit,
        corrections=tuple(
            Correction(
                levers=one.levers, quantized=one.quantized, peak=one.peak, step=one.step, rounds=one.rounds
            )
            for one in lessons
        ),
        peak_factor=max(1.0, min(one.peak for one in lessons)),
        step_factor=min(one.step for one in lessons),
    )  # fmt: skip


def ratios(
    probed: Fit,
    fit: Fit,
    run: Run,
    spec: TrainSpec,
    candidate: Candidate,
    measured: Measured,
    room: PrefixRoom | None,
) -> tuple[float, float]:
    """Measured over predicted by the probe alone: of the peak above rest, and of the seconds.

    Args:
        fit: what the choice was predicted with; ``candidate`` holds that.
        room: for kept hidden states. Of the rows that memory was reckoned for there may have been fewer:
            such a round does not show that training needs less.
    """
    setting = candidate.setting(spec)
    kept = _kept_mb(fit, run, candidate, setting)
    alone = peak_mb(probed, run.shape, run.lora, setting)
    if room is not None and room.in_memory:
        room = varied(room, mb=kept + _BYTE_MB if kept else 0.0)
    _, time = predict(
        candidate, fit=probed, budgets=Budgets(memory_mb=math.inf, prefix=room), shape=run.shape,
        lora=run.lora, spec=spec, down_bytes=0,
    )  # fmt: skip
    peak = _over(measured.peak_mb - kept, alone)
    if kept:
        peak = max(peak, peak_mb(fit, run.shape, run.lora, setting) / alone)
    return peak, _over(measured.train_s, time.train_s)


def needed_more(
    probed: Fit, fit: Fit, run: Run, spec: TrainSpec, candidate: Candidate, budget_mb: float
) -> float:
    """The least ratio of a peak that went beyond the budget."""
    setting = candidate.setting(spec)
    kept = _kept_mb(fit, run, candidate, setting)
    return _over(budget_mb - kept, peak_mb(probed, run.shape, run.lora, setting))


def taught(
    lessons: Sequence[Lesson], setting: Setting, at: float, peak: float, step: float | None
) -> tuple[Lesson, ...]:
    """With one more ratio of the peak, and of the seconds where a round was trained to its end."""
    quantized, levers = tried(setting)
    others = [one for one in lessons if (one.quantized, one.levers) != (quantized, levers)]
    known = [one for one in lessons if one not in others]
    before = known[0] if known else Lesson(levers=levers, quantized=quantized, peaks=(1.0,) * _ROUNDS, at=at)
    peaks = (*before.peaks[1:], _bounded(peak))
    after = replace(before, peaks=peaks, peak=max(*peaks, _FALL * before.peak), at=at)
    if step is not None:
        share = max(_LEAST_STEP_SHARE, 1.0 / (before.rounds + 2))
        moved = before.step * (_bounded(step) / before.step) ** share
        after = replace(after, step=_bounded(moved), rounds=before.rounds + 1)
    return (*others[1 - _MOST :], after)


def _kept_mb(fit: Fit, run: Run, candidate: Candidate, setting: Setting) -> float:
    """What of the candidate's peak is room for hidden states."""
    kept = candidate.peak_mb - peak_mb(fit, run.shape, run.lora, setting)
    return kept if kept > _BYTE_MB else 0.0


def _over(measured: float, predicted: float) -> float:
    """1 where nothing was predicted: there is nothing to correct."""
    return max(0.0, measured) / predicted if predicted > 0 else 1.0


def _bounded(ratio: float) -> float:
    return min(max(ratio, _LOWEST), _HIGHEST)

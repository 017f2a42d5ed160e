"""The device's choice: the candidate of the best gain that meets its budgets, and which budget binds.

The planner uses the same rules (``fits_memory``, ``unpredictable``), so that what it recommends is what a
device chooses while the two measure the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from edge_sdk.planning.cost import (
    RoundTime,
    peak_mb,
    prefix_row_bytes,
    prefix_share,
    round_time,
    update_bytes,
)
from edge_sdk.planning.memory import BITS, RECOMPUTE
from edge_sdk.protocol.measure import Budget, Fit
from edge_sdk.protocol.model import LoraShape, ModelShape
from edge_sdk.protocol.spec import Candidate, Setting, TrainSpec

__all__ = [
    "MEMORY_SAFETY",
    "STEP_DOWN_MARGIN",
    "Budgets",
    "Chosen",
    "Infeasible",
    "PrefixRoom",
    "choose",
    "fits_memory",
    "predict",
    "step_down",
    "unpredictable",
]

MEMORY_SAFETY = 0.9
"""Share of the memory budget that a prediction may fill (kappa of the FedQuad memory rule)."""

STEP_DOWN_MARGIN = 0.1
"""After an out-of-memory the next candidate is predicted to need at least this share less."""


@dataclass(frozen=True)
class PrefixRoom:
    """Room for kept hidden states of ``rows`` rows, in a form of ``cost.prefix_row_bytes``.

    ``in_memory``: it is taken from the memory budget, and never more than training leaves of that.
    """

    mb: float
    rows: int
    in_memory: bool
    form: str = "exact"


@dataclass(frozen=True)
class Budgets:
    """What a round may use on this device.

    ``memory_mb``: above the resting trainer, as ``Memory.budget_mb``, before the safety factor.
    ``deadline_s``: what a predicted round may take (``Offer.time_budget_s``); None: as long as it likes.
    ``up_bps``, ``down_bps``: None: not known, and then no reason to exclude anything.
    ``latest_s``: until the round closes, where that is later: where nothing meets ``deadline_s``, which is
    only aimed at, the quickest candidate is taken as long as it meets this one. None: no such room.
    ``prefix``: room for what enters the lowest tuned layer, kept over the epochs; None: it is not kept.
    ``traffic_bytes``: what may still go over the link today, both ways; None: any amount.
    ``energy_s``: how long the device may train on what drives it, its battery; None: as long as it likes.
    """

    memory_mb: float
    deadline_s: float | None = None
    up_bps: float | None = None
    down_bps: float | None = None
    latest_s: float | None = None
    prefix: PrefixRoom | None = None
    traffic_bytes: float | None = None
    energy_s: float | None = None


@dataclass(frozen=True)
class Chosen:
    """The candidate taken, with the device's own predictions in it."""

    candidate: Candidate
    binding: Budget
    time: RoundTime
    reason: str
    """Why no better one, with numbers; empty when nothing better was offered."""


@dataclass(frozen=True)
class Infeasible:
    """No candidate meets the budgets. ``reason`` is a ``DeclineReason``.

    ``trainer``: the fit says nothing about what is offered. ``gate``: the day's traffic or the battery's time
    is too little.
    """

    reason: Literal["memory", "deadline", "trainer", "gate"]
    message: str


@dataclass(frozen=True)
class _Option:
    candidate: Candidate
    time: RoundTime
    memory_use: float
    """Predicted peak over what may be filled; above 1: does not fit."""
    time_use: float
    traffic_use: float = 0.0
    energy_use: float = 0.0

    @property
    def rank(self) -> tuple[float, float, str]:
        return (-self.candidate.gain, self.candidate.seconds, self.candidate.id)

    @property
    def exceeds(self) -> tuple[Budget, ...]:
        late: Budget = "link" if self.time.link_s > self.time.train_s else "compute"
        over: list[tuple[float, Budget]] = [
            (self.memory_use, "memory"),
            (self.time_use, late),
            (self.traffic_use, "traffic"),
            (self.energy_use, "energy"),
        ]
        return tuple(budget for use, budget in sorted(over, reverse=True) if use > 1.0)


def fits_memory(peak: float, budget_mb: float) -> bool:
    """Whether a predicted peak above rest fits: peak <= 0.9 · budget."""
    return peak <= MEMORY_SAFETY * budget_mb


def unpredictable(fit: Fit, shape: ModelShape, lora: LoraShape, setting: Setting) -> str:  # noqa: ARG001
    """Why the fit says nothing about a setting; empty where it does.

    Counting tells bits, levers, batch and length apart; whether layers run plain, or quantized, and what that
    takes on this device, a probe must have shown. An estimate, without any probe, tells all.
    """
    levers, quantized = setting.levers, setting.quantized_layers
    if levers.activation_bits not in BITS or levers.recompute not in RECOMPUTE:
        return f"nothing is known of {levers}"
    if quantized < setting.depth and fit.probes and not any(p.quantized_layers == 0 for p in fit.probes):
        return "plain layers did not fit when this device was probed"
    if quantized and fit.probes and not any(p.quantized_layers > 0 for p in fit.probes):
        return "quantized layers were not probed"
    return ""


def predict(
    candidate: Candidate,
    *,
    fit: Fit,
    budgets: Budgets,
    shape: ModelShape,
    lora: LoraShape,
    spec: TrainSpec,
    down_bytes: int,
) -> tuple[Candidate, RoundTime]:
    """The candidate with this device's own peak, seconds and bytes in it, and its seconds apart."""
    setting = candidate.setting(spec)
    bytes_up = update_bytes(shape, lora, candidate.depth, candidate.codec, spec.factors)
    peak = peak_mb(fit, shape, lora, setting)
    read, kept_mb = _prefix(candidate, shape, budgets, peak)
    time = round_time(
        fit,
        shape,
        lora,
        setting,
        steps=candidate.steps * candidate.accumulation,
        bytes_up=bytes_up,
        bytes_down=down_bytes,
        up_bps=budgets.up_bps,
        down_bps=budgets.down_bps,
        prefix_read=read,
    )
    own = msgspec.structs.replace(
        candidate,
        peak_mb=peak + kept_mb,
        seconds=time.total_s,
        bytes_up=bytes_up,
        bytes_down=down_bytes,
    )
    return own, time


def _prefix(candidate: Candidate, shape: ModelShape, budgets: Budgets, peak: float) -> tuple[float, float]:
    """Share of row visits whose frozen layers are read, and the MB of memory that this takes."""
    room = budgets.prefix
    if room is None or not 0 < candidate.depth < shape.layers:
        return 0.0, 0.0
    visits = candidate.steps * candidate.accumulation * candidate.micro_batch
    size = prefix_row_bytes(shape, candidate.max_length, room.form) / 1e6
    most = min(room.mb, MEMORY_SAFETY * budgets.memory_mb - peak) if room.in_memory else room.mb
    kept = min(room.rows, max(0, int(most / size)))
    read = prefix_share(room.rows, visits, kept)
    return read, kept * size if room.in_memory and read else 0.0


def choose(
    candidates: Sequence[Candidate],
    *,
    fit: Fit,
    budgets: Budgets,
    shape: ModelShape,
    lora: LoraShape,
    spec: TrainSpec,
    down_bytes: int,
) -> Chosen | Infeasible:
    """Best gain first, then the fewest seconds, then the id, among those that meet every budget.

    ``spec``: the round's; of it count what is trained of each LoRA pair, and so sent, and the optimizer.
    ``down_bytes``: what the device has to fetch before it can train; the same for all candidates.

    The binding budget is the one whose relaxation alone admits a better candidate, the best one first; if no
    budget alone does, the most exceeded one of the next better candidate. The plain form of a candidate with
    quantized layers counts as a better one, though an offer need not hold it and whatever the predicted
    seconds: it is exact, and what more memory admits.
    """
    options = _options(candidates, fit, budgets, shape, lora, spec, down_bytes)
    if not options:
        return _unpredictable(candidates, fit, shape, lora, spec)
    fitting = [o for o in options if not o.exceeds]
    if not fitting:
        return _late(options, budgets) or _infeasible(options, budgets)
    best = min(fitting, key=lambda o: o.rank)
    plain = [
        msgspec.structs.replace(o.candidate, id=f"{o.candidate.id}-plain", quantized_layers=0)
        for o in options
        if o.candidate.quantized_layers
    ]
    better = [o for o in options if o.rank < best.rank]
    better += [
        o
        for o in _options(plain, fit, budgets, shape, lora, spec, down_bytes)
        if o.rank < best.rank or (best.candidate.quantized_layers and o.candidate.gain >= best.candidate.gain)
    ]
    binding, because = _binding([o for o in better if o.exceeds])
    return Chosen(best.candidate, binding, best.time, _explain(because, budgets) if because else "")


def step_down(
    candidates: Sequence[Candidate],
    failed: Candidate,
    *,
    fit: Fit,
    budgets: Budgets,
    shape: ModelShape,
    lora: LoraShape,
    spec: TrainSpec,
    down_bytes: int,
) -> Chosen | None:
    """What to try after ``failed`` ran out of memory: the best that is predicted to need at least
    ``STEP_DOWN_MARGIN`` less, and meets the budgets; None when there is none. No hidden states are kept in
    memory then."""
    if budgets.prefix is not None and budgets.prefix.in_memory:
        budgets = replace(budgets, prefix=None)
    ceiling = (1.0 - STEP_DOWN_MARGIN) * peak_mb(fit, shape, lora, failed.setting(spec))
    smaller = [
        o
        for o in _options(candidates, fit, budgets, shape, lora, spec, down_bytes)
        if not o.exceeds and o.candidate.peak_mb <= ceiling
    ]
    if not smaller:
        return None
    best = min(smaller, key=lambda o: o.rank)
    return Chosen(best.candidate, "memory", best.time, f"{_name(failed)} ran out of memory")


def _options(
    candidates: Sequence[Candidate],
    fit: Fit,
    budgets: Budgets,
    shape: ModelShape,
    lora: LoraShape,
    spec: TrainSpec,
    down_bytes: int,
) -> list[_Option]:
    options = []
    for candidate in candidates:
        if unpredictable(fit, shape, lora, candidate.setting(spec)):
            continue
        own, time = predict(
            candidate, fit=fit, budgets=budgets, shape=shape, lora=lora, spec=spec, down_bytes=down_bytes
        )  # fmt: skip
        options.append(
            _Option(
                own,
                time,
                memory_use=_use(own.peak_mb, MEMORY_SAFETY * budgets.memory_mb),
                time_use=_use(own.seconds, budgets.deadline_s),
                traffic_use=_use(own.bytes_up + own.bytes_down, budgets.traffic_bytes),
                energy_use=_use(time.train_s, budgets.energy_s),
            )
        )
    return options


def _use(need: float, room: float | None) -> float:
    """Share of a budget; above 1 exactly where it is exceeded."""
    if room is None or need <= room:
        return need / room if room else 0.0
    return max(need / room, 1.0 + 1e-9) if room > 0 else float("inf")


_GATED: tuple[Budget, ...] = ("traffic", "energy")


def _binding(excluded: Sequence[_Option]) -> tuple[Budget, _Option | None]:
    if not excluded:
        return "none", None
    ordered = sorted(excluded, key=lambda o: o.rank)
    for option in ordered:
        if len(option.exceeds) == 1:
            return option.exceeds[0], option
    return ordered[-1].exceeds[0], ordered[-1]


def _late(options: Sequence[_Option], budgets: Budgets) -> Chosen | None:
    """The quickest option that fits in memory and still counts; None where none does."""
    in_time = [
        o
        for o in options
        if not {"memory", *_GATED}.intersection(o.exceeds)
        and budgets.latest_s is not None
        and o.candidate.seconds <= budgets.latest_s
    ]
    if not in_time:
        return None
    best = min(in_time, key=lambda o: (o.candidate.seconds, o.candidate.id))
    return Chosen(best.candidate, best.exceeds[0], best.time, "even " + _explain(best, budgets))


def _name(candidate: Candidate) -> str:
    return f"depth {candidate.depth} with {candidate.quantized_layers} quantized layers"


def _explain(option: _Option, budgets: Budgets) -> str:
    told = []
    for budget in option.exceeds:
        if budget == "memory":
            told.append(
                f"needs {option.candidate.peak_mb:.0f} MB above rest and "
                f"{MEMORY_SAFETY * budgets.memory_mb:.0f} MB may be used"
            )
        elif budget == "traffic":
            moved = (option.candidate.bytes_up + option.candidate.bytes_down) / 1e6
            left = (budgets.traffic_bytes or 0.0) / 1e6
            told.append(f"moves {moved:.2f} MB and {left:.2f} MB are left for today")
        elif budget == "energy":
            allowed = budgets.energy_s or 0.0
            told.append(f"trains {option.time.train_s:.1f} s and {allowed:.1f} s are allowed on battery")
        else:
            told.append(
                f"takes {option.candidate.seconds:.1f} s ({option.time.train_s:.1f} s training, "
                f"{option.time.link_s:.1f} s on the link) of {budgets.deadline_s:.1f} s"
            )
    return f"{_name(option.candidate)} " + " and ".join(told)


def _infeasible(options: Sequence[_Option], budgets: Budgets) -> Infeasible:
    in_memory = [o for o in options if o.memory_use <= 1.0]
    allowed = [o for o in in_memory if not set(_GATED).intersection(o.exceeds)]
    if in_memory and not allowed:
        least = min(in_memory, key=lambda o: (max(o.traffic_use, o.energy_use), o.candidate.seconds))
        return Infeasible("gate", "even " + _explain(least, budgets))
    if in_memory:
        in_memory = allowed
        return Infeasible(
            "deadline", "even " + _explain(min(in_memory, key=lambda o: o.candidate.seconds), budgets)
        )
    return Infeasible("memory", "even " + _explain(min(options, key=lambda o: o.candidate.peak_mb), budgets))


def _unpredictable(
    candidates: Sequence[Candidate], fit: Fit, shape: ModelShape, lora: LoraShape, spec: TrainSpec
) -> Infeasible:
    reasons = {unpredictable(fit, shape, lora, one.setting(spec)) for one in candidates}
    told = f"this device's fit says nothing about the candidates offered: {'; '.join(sorted(reasons))}"
    return Infeasible("memory" if all("did not fit" in one for one in reasons) else "trainer", told)

"""What the server learned of a device: averages of what it reported, and what its rounds corrected.

Three things are kept apart, as they are corrected in different ways:

- what a device reports (seconds of its fit, memory) is averaged, so that one odd report does not change a
  plan. Less memory than the average counts at once;
- what it measured over what was predicted, as a ratio. A plan multiplies by it where it is above 1: a device
  that is better than it predicts would refuse what is planned for better figures, as it chooses by its own;
- what failed. A device that stepped down is offered no more than what it then could do; one that took longer
  than the plan aims at is slower from then on; one that declined for memory is left alone for twice as many
  rounds each time, until it reports more of it.

A device corrects its fit by its own rounds, too, and reports it so. What was learned over its earlier
predictions is then told over the new ones. What fails is judged by the memory that it was offered for, as the
device reports less of it from then on. So nothing counts twice, whichever of the two is heard first.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from aggregator.state.base import ParticipationRow
from edge_sdk.planning.choice import MEMORY_SAFETY, STEP_DOWN_MARGIN
from edge_sdk.planning.cost import peak_mb, step_s
from edge_sdk.protocol.base import NotNegative, Record
from edge_sdk.protocol.measure import Correction, Fit
from edge_sdk.protocol.spec import Candidate, Levers
from edge_sdk.protocol.wire import Announce, Choice, Decline, Offer, Run, Status

__all__ = ["MEMORY", "Lessons"]

MEMORY = 0.8
"""Weight of the past (lambda) in every moving average."""

MORE_MEMORY = 1.1
"""Who declined for memory is asked at once when it reports so many times what it had then."""

LEAST_MORE_MB = 1.0
"""And so much more, where that was next to nothing."""

_STEADY = 8
"""Rounds without running out of memory before more than what fitted is tried again; after a second failure
twice as many, and so on up to eight times."""
_REGAINED = 1.1
"""What the share of memory grows by with every round from then on: one odd reading is not for ever."""

_LEAST_SLOWER, _MOST_SLOWER = 1.25, 2.0
"""By what a device counts as slower that did not deliver: all that is known is that it takes longer."""

Ratio = Annotated[float, msgspec.Meta(ge=0.25, le=8.0)]


class Lessons(Record, frozen=True, kw_only=True):
    """Immutable: every event gives a new one. ``forward_s`` to ``budget_mb`` are averages of reports."""

    of: str = ""
    """What the fit was made on and for; another one makes all that follows void."""
    forward_s: float | None = None
    layer_s: float | None = None
    quantize_s: float | None = None
    call_s: float | None = None
    budget_mb: float | None = None
    rounds: NotNegative = 0
    """Rounds whose measured figures are in the ratios."""
    memory_ratio: Ratio = 1.0
    time_ratio: Ratio = 1.0
    memory_share: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 1.0
    """Of what may be filled of the memory, the part up to which the device's own predictions held."""
    share_mb: float = 0.0
    """The memory that this is a share of; of what is more, too."""
    offered_mb: float | None = None
    """The memory that the device reported before its last offer."""
    failures: NotNegative = 0
    """By how many failures that share fell; ``steady``: rounds delivered since the last one."""
    steady: NotNegative = 0
    declined: NotNegative = 0
    """Declines for memory in a row; ``declined_round`` the last one's round, ``declined_mb`` the budget: that
    of its offer where a training failed, else what was reported by the round's end."""
    declined_round: NotNegative = 0
    declined_mb: float = 0.0
    corrections: tuple[Correction, ...] = ()
    """The device's own, as it reported them last: what the ratios and the share above do not hold."""
    why: str = ""
    """The last correction, in words."""

    @property
    def memory_factor(self) -> float:
        return max(1.0, self.memory_ratio)

    @property
    def time_factor(self) -> float:
        return max(1.0, self.time_ratio)

    def held_mb(self, budget_mb: float) -> float:
        """Of a budget, what the device's own predictions held up to; more than the budget: all of it."""
        return self.memory_share * max(budget_mb, self.share_mb)

    def waits(self, round: int, budget_mb: float) -> str:
        """Why the device is not asked in this round; empty: it is."""
        until = self.declined_round + 2 ** min(self.declined, 5)
        more_mb = max(MORE_MEMORY * self.declined_mb, self.declined_mb + LEAST_MORE_MB)
        if not self.declined or round >= until or budget_mb > more_mb:
            return ""
        return (
            f"it declined round {self.declined_round} for memory and reports no more of it since; "
            f"it is asked again in round {until}"
        )

    # What a device reports

    def after_status(self, status: Status) -> Lessons:
        fit = status.fit
        if fit is None:
            return self
        before = self if self.of == _of(fit) else Lessons(of=_of(fit))
        before = before._over(fit.corrections)
        return msgspec.structs.replace(
            before,
            forward_s=_average(before.forward_s, fit.forward_s),
            layer_s=_average(before.layer_s, fit.layer_s),
            quantize_s=_average(before.quantize_s, fit.quantize_s),
            call_s=_average(before.call_s, fit.call_s),
            budget_mb=_average(before.budget_mb, status.memory.budget_mb),
        )

    def _over(self, corrections: tuple[Correction, ...]) -> Lessons:
        """The same, over what the device predicts from now on."""
        if corrections == self.corrections:
            return self
        known = {(one.quantized, one.levers): one for one in self.corrections}
        none = Correction(levers=Levers(), quantized=False)
        pairs = [(one, known.get((one.quantized, one.levers), none)) for one in corrections]
        peak = max((now.peak / then.peak for now, then in pairs), default=1.0)
        step = max((now.step / then.step for now, then in pairs), default=1.0)
        return msgspec.structs.replace(
            self,
            corrections=corrections,
            memory_ratio=_ratio(self.memory_ratio / max(1.0, peak)),
            time_ratio=_ratio(self.time_ratio / max(1.0, step)),
            memory_share=min(1.0, self.memory_share * max(1.0, peak)),
        )

    def planned(self, status: Status) -> Status:
        """The status with averages in it. A limit that the owner set is exact at once."""
        fit, memory = status.fit, status.memory
        if fit is None or self.of != _of(fit):
            return status
        fit = msgspec.structs.replace(
            fit,
            forward_s=fit.forward_s if self.forward_s is None else self.forward_s,
            layer_s=fit.layer_s if self.layer_s is None else self.layer_s,
            quantize_s=fit.quantize_s if self.quantize_s is None else self.quantize_s,
            call_s=fit.call_s if self.call_s is None else self.call_s,
        )
        if memory.limit_mb is None and self.budget_mb is not None:
            memory = msgspec.structs.replace(memory, budget_mb=min(memory.budget_mb, self.budget_mb))
        return msgspec.structs.replace(status, fit=fit, memory=memory)

    # What a round teaches

    def after_offer(self, status: Status) -> Lessons:
        return msgspec.structs.replace(self, offered_mb=status.memory.budget_mb)

    def after_round(
        self, row: ParticipationRow, run: Run, status: Status, open_s: float, *, online: bool
    ) -> Lessons:
        """``row``: of a round that closed after ``open_s``; ``online``: the device was there at its end."""
        offer = msgspec.json.decode(row.offer, type=Offer)
        offered = {one.id: one for one in offer.candidates}
        choice = None if row.choice is None else msgspec.json.decode(row.choice, type=Choice)
        taken = None if choice is None else offered.get(choice.candidate.id)
        reported_mb, learned = status.memory.budget_mb, self
        budget_mb = reported_mb if self.offered_mb is None else self.offered_mb
        if row.decline is not None:
            decline = msgspec.json.decode(row.decline, type=Decline)
            if decline.reason == "memory":
                if choice is None:
                    return learned._declined(row.round, reported_mb)
                why = (
                    f"round {row.round}: it ran out of memory with {choice.candidate.id}, the smallest that "
                    "it could take"
                )
                least_mb = (1.0 - STEP_DOWN_MARGIN) * _predicted_mb(choice.candidate, run, status)
                learned = learned._no_more_than(least_mb, budget_mb, why)._declined(row.round, budget_mb)
            return learned
        if taken is None or choice is None:
            return learned
        learned = msgspec.structs.replace(learned, declined=0)
        if choice.attempt:
            why = f"round {row.round}: it ran out of memory and stepped down to {taken.id}"
            learned = learned._no_more_than(_predicted_mb(choice.candidate, run, status), budget_mb, why)
        if row.state == "received" and row.announce is not None:
            announce = msgspec.json.decode(row.announce, type=Announce)
            learned = learned if choice.attempt else learned._held()
            return learned._measured(announce, run, status, offer.target_s, row.upload_s)
        if row.state == "missed" and online and open_s > taken.seconds:
            slower = min(max(open_s / max(taken.seconds, 1e-9), _LEAST_SLOWER), _MOST_SLOWER)
            return msgspec.structs.replace(
                learned,
                time_ratio=_ratio(learned.time_factor * slower),
                why=f"round {row.round}: {taken.id} was predicted to take {taken.seconds:.1f} s and was not "
                f"there after {open_s:.1f} s",
            )
        return learned

    def _declined(self, round: int, budget_mb: float) -> Lessons:
        return msgspec.structs.replace(
            self, declined=self.declined + 1, declined_round=round, declined_mb=budget_mb
        )

    def _no_more_than(self, peak_mb: float, budget_mb: float, why: str) -> Lessons:
        """``peak_mb``: by the device's own prediction."""
        learned = msgspec.structs.replace(self, failures=self.failures + 1, steady=0, why=why)
        share = max((1.0 + 1e-9) * peak_mb / max(MEMORY_SAFETY * budget_mb, 1e-9), 0.01)
        if share * budget_mb >= self.held_mb(budget_mb):
            return learned
        return msgspec.structs.replace(learned, memory_share=min(share, 1.0), share_mb=budget_mb)

    def _held(self) -> Lessons:
        """After a round that ran out of nothing. What failed once is come to again in small steps."""
        if self.memory_share == 1.0:
            return msgspec.structs.replace(self, failures=0, steady=0)
        steady = self.steady + 1
        regained = _REGAINED if steady > _STEADY * 2 ** min(max(self.failures - 1, 0), 3) else 1.0
        return msgspec.structs.replace(
            self, steady=steady, memory_share=min(1.0, regained * self.memory_share)
        )

    def _measured(
        self, announce: Announce, run: Run, status: Status, target_s: float | None, upload_s: float | None
    ) -> Lessons:
        """Seconds count from the fit; memory from the device's own prediction, which knows what it kept of
        the frozen layers' outputs. Whoever took longer than the plan's target is slower at once, whoever kept
        to it on the average."""
        if status.fit is None:
            return self
        measured, one = announce.measured, announce.candidate
        batch_s = step_s(status.fit, run.shape, run.lora, one.setting(run.spec))
        time = _over(measured.train_s, one.steps * one.accumulation * batch_s)
        memory = _over(measured.peak_mb, _predicted_mb(one, run, status))
        target_s = float("inf") if target_s is None else target_s
        late = measured.train_s + (upload_s or 0.0) > target_s
        why = self.why
        if late and time > self.time_ratio:
            why = (
                f"round {announce.round}: it trained {time:.2f} times as long as predicted, and took longer "
                f"than the {target_s:.1f} s that the plan aims at"
            )
        return msgspec.structs.replace(
            self,
            rounds=self.rounds + 1,
            time_ratio=_ratio(max(time if late else 0.0, _average(self.time_ratio, time))),
            memory_ratio=_ratio(max(memory, _average(self.memory_ratio, memory))),
            why=why,
        )


def _predicted_mb(one: Candidate, run: Run, status: Status) -> float:
    """As the device chose by; more where it corrected itself since, and has said so already."""
    if status.fit is None:
        return one.peak_mb
    return max(one.peak_mb, peak_mb(status.fit, run.shape, run.lora, one.setting(run.spec)))


def _of(fit: Fit) -> str:
    levers = fit.levers
    return f"{fit.machine}/{fit.micro_batch}x{fit.max_length}/{levers.activation_bits}/{levers.recompute}"


def _average(before: float | None, now: float) -> float:
    return now if before is None else MEMORY * before + (1.0 - MEMORY) * now


def _over(measured: float, predicted: float) -> float:
    return measured / predicted if predicted > 0.0 else 1.0


def _ratio(value: float) -> float:
    return min(max(value, 0.25), 8.0)

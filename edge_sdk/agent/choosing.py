"""The device's own judgement of an offer: mechanisms, memory and link as measured now, time that is left."""

from __future__ import annotations

from msgspec.structs import replace

from edge_sdk.agent.budgets import energy_now, link_now, prefix_room, traffic_now
from edge_sdk.agent.context import Context
from edge_sdk.agent.joining import Joining, setup_for
from edge_sdk.agent.record import RoundRow
from edge_sdk.planning.choice import Budgets, Infeasible, choose, step_down
from edge_sdk.planning.cost import peak_mb
from edge_sdk.protocol.measure import Fit
from edge_sdk.protocol.spec import TrainSpec
from edge_sdk.protocol.trainer import Described, Setup
from edge_sdk.protocol.wire import Choice, Decline, DeclineReason, Offer, Run

__all__ = ["decline_of", "first_choice", "smaller_choice", "training_setup"]


_FOLD = "fold:low-rank"


def _lacking(missing: frozenset[str], known: set[str]) -> str:
    held = sorted(word.removeprefix("base:") for word in known if word.startswith("base:"))
    told = f"this device lacks {', '.join(sorted(missing))}"
    if missing == {_FOLD}:
        told += f": nothing can be folded into a quantized base, and it holds its own in {', '.join(held)}"
    return told


def first_choice(context: Context, joining: Joining, row: RoundRow, now: float) -> Choice | Decline:
    """The best candidate that this device has the mechanisms, memory and time for."""
    run, described, fit = _known(joining)
    offer, known = row.offer, set(described.mechanisms)
    missing = offer.spec.needs() - known
    candidates = [one for one in offer.candidates if one.needs() <= known]
    if not candidates:
        missing = missing or frozenset().union(*(one.needs() - known for one in offer.candidates))
    if missing:
        return decline_of(context, row, "mechanism", _lacking(missing, known))
    found = choose(
        candidates, fit=fit, budgets=_budgets(context, joining, row, now),
        shape=run.shape, lora=run.lora, spec=offer.spec, down_bytes=_missing_bytes(context, offer),
    )  # fmt: skip
    if isinstance(found, Infeasible):
        return decline_of(context, row, found.reason, found.message)
    return Choice(
        device=context.device, run=offer.run, round=offer.round, candidate=found.candidate,
        binding=found.binding, reason=found.reason,
    )  # fmt: skip


def smaller_choice(
    context: Context, joining: Joining, row: RoundRow, failed: Choice, now: float, message: str
) -> Choice | Decline:
    """What to try after the trainer ran out of memory with ``failed``."""
    run, described, fit = _known(joining)
    known = set(described.mechanisms)
    found = step_down(
        [one for one in row.offer.candidates if one.needs() <= known], failed.candidate, fit=fit,
        budgets=_budgets(context, joining, row, now), shape=run.shape, lora=run.lora,
        spec=row.offer.spec, down_bytes=_missing_bytes(context, row.offer),
    )  # fmt: skip
    if found is None:
        return decline_of(context, row, "memory", f"out of memory with the smallest candidate: {message}")
    return replace(
        failed, candidate=found.candidate, binding="memory", attempt=failed.attempt + 1, reason=found.reason
    )


def decline_of(context: Context, row: RoundRow, reason: DeclineReason, message: str) -> Decline:
    """``message`` is cut to what a record may hold."""
    return Decline(
        device=context.device, run=row.offer.run, round=row.round, reason=reason, message=message[:4096]
    )


def training_setup(context: Context, joining: Joining, run: Run, spec: TrainSpec, choice: Choice) -> Setup:
    """What the trainer holds: of the cache in memory, what the choice reckoned with."""
    setup, one = setup_for(context, run, spec), choice.candidate
    if joining.fit is None or joining.described is None:
        return replace(setup, prefix_mb=0.0)
    if setup.prefix_place != "memory" or joining.described.device != "cpu":
        return setup
    kept = one.peak_mb - peak_mb(joining.fit, run.shape, run.lora, one.setting(spec))
    return replace(setup, prefix_mb=kept + 1e-6 if kept > 1e-6 else 0.0)  # a byte, for what sums round off


def _known(joining: Joining) -> tuple[Run, Described, Fit]:
    run, described, fit = joining.run, joining.described, joining.fit
    if run is None or described is None or fit is None:
        raise RuntimeError("an offer was judged before the agent was ready")
    return run, described, fit


def _budgets(context: Context, joining: Joining, row: RoundRow, now: float) -> Budgets:
    """Measured now; the time is the plan's, or what the deadline leaves."""
    (_, described, _), memory, link = _known(joining), joining.memory(), link_now(context)
    left_s = row.received + row.offer.deadline_s - now
    return Budgets(
        memory_mb=memory.budget_mb, deadline_s=min(row.offer.time_budget_s, left_s), latest_s=left_s,
        up_bps=link.up_bps, down_bps=link.down_bps,
        prefix=prefix_room(context, described, row.offer.spec),
        traffic_bytes=traffic_now(context), energy_s=energy_now(context),
    )  # fmt: skip


def _missing_bytes(context: Context, offer: Offer) -> int:
    return sum(ref.bytes for ref in offer.versions if not context.store.has(ref.object))

"""What this device may use now: memory above the resting trainer, link, battery, the day's traffic."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from edge_sdk.agent.context import Context
from edge_sdk.agent.link import kept_link
from edge_sdk.agent.record import Shortfall
from edge_sdk.device.capacity import GPU_SYSTEM_MB
from edge_sdk.errors import MissingExtraError
from edge_sdk.planning.choice import PrefixRoom
from edge_sdk.planning.cost import peak_mb
from edge_sdk.planning.work import prices
from edge_sdk.protocol.measure import Fit, Link, Memory
from edge_sdk.protocol.spec import TrainSpec
from edge_sdk.protocol.trainer import Described
from edge_sdk.protocol.wire import Run

__all__ = [
    "allowed_memory",
    "energy_now",
    "keep_rate",
    "link_now",
    "memory_now",
    "prefix_room",
    "traffic_now",
]

_FORGET_S = 86_400.0
"""After so long what ran out of free memory is tried again: another program may have held it."""
_TRIED_AGAIN = 1.1
"""So much more of the memory that was there when it failed, and it is tried again at once."""


def memory_now(context: Context, known: Fit | Described, device: str, gpu_uuid: str = "") -> Memory:
    """Measured anew at every call; of the GPU where the trainer's ``device`` is one with its own memory.

    The budget is the owner's limit for the trainer less what the trainer holds at rest, and never more
    than the machine has left: free memory, and what a resident trainer holds already, less its rest.

    Raises MissingExtraError where there is neither a limit nor a way to read the GPU's free memory.
    """
    limit = context.config.limits.memory_mb
    gpu = _own_memory(context, device)
    free = context.machine.free_memory_mb() if gpu is None else context.machine.gpu_free_mb(gpu, gpu_uuid)
    if gpu is not None and free is None and limit is None:
        raise MissingExtraError(
            f"the free memory of {device} cannot be read",
            "install edge-sdk[nvidia], or set limits.memory_mb",
        )
    budgets = []
    if limit is not None:
        budgets.append(limit - known.rest_mb)
    if free is not None:
        budgets.append(free + _held_mb(context, known, device, own=gpu is not None) - known.rest_mb)
    return Memory(
        budget_mb=max(0.0, min(budgets, default=0.0)), rest_mb=known.rest_mb, free_mb=free, limit_mb=limit
    )


def allowed_memory(
    context: Context, fit: Fit, described: Described, run: Run, shortfalls: Iterable[Shortfall]
) -> Memory:
    """As ``memory_now``, and no more than what a training needed, by the fit, that ran out of as much.

    So neither this device nor the server, which is told, plans with that again.
    """
    memory = memory_now(context, fit, described.device, described.gpu)
    now = context.clock.wall()
    budget = memory.budget_mb
    for one in shortfalls:
        past = not one.lasting and not 0 <= now - one.at < _FORGET_S
        if not past and memory.budget_mb < _TRIED_AGAIN * one.budget_mb:
            budget = min(budget, peak_mb(fit, run.shape, run.lora, one.setting) + one.kept_mb)
    return replace(memory, budget_mb=budget)


def _own_memory(context: Context, device: str) -> int | None:
    """Index of the GPU that ``device`` is; None for a processor, and where both share one memory."""
    kind, _, index = device.partition(":")
    if kind != "cuda" or any("integrated" in name for name in context.machine.read_profile().accelerators):
        return None
    return int(index or 0)


def _held_mb(context: Context, known: Fit | Described, device: str, *, own: bool) -> float:
    """What a trainer holds of its rest already, and free memory therefore lacks.

    Of CUDA, be the memory its own or the machine's, rest is what torch allocated there. What the process and
    CUDA take besides is gone from free memory once they run; until then it is taken off, as assumed
    elsewhere (``planning.work.prices``, ``device.capacity``).
    """
    trainer, on_cuda = context.desk.trainer, device.startswith("cuda")
    if not trainer.loaded:
        return -(GPU_SYSTEM_MB + (0.0 if own else prices().process_mb)) if on_cuda else 0.0
    pid = getattr(trainer, "pid", None)
    held = None if pid is None or on_cuda else context.machine.process_rss_mb(pid)
    return known.rest_mb if held is None else held


def prefix_room(context: Context, described: Described, spec: TrainSpec) -> PrefixRoom | None:
    """Room that the owner gives for kept hidden states; None: they are not kept."""
    limits = context.config.limits
    if not limits.prefix_cache_mb or spec.dropout:
        return None
    return PrefixRoom(
        mb=limits.prefix_cache_mb, rows=described.samples, form=spec.prefix,
        in_memory=limits.prefix_cache == "memory" and described.device == "cpu",
    )  # fmt: skip


def link_now(context: Context) -> Link:
    """What was measured, or transfers showed; of the way up no more than the owner's limit."""
    link, _ = kept_link(context.record)
    limit = context.config.limits.uplink_kbps
    if limit is None:
        return link
    up_bps = 1000 * limit if link.up_bps is None else min(1000 * limit, link.up_bps)
    return replace(link, up_bps=up_bps, source="configured" if up_bps == 1000 * limit else "measured")


def traffic_now(context: Context) -> float | None:
    """Bytes that a round may still move today, the updates on their way taken off; None: any amount."""
    if context.traffic.most_mb is None:
        return None
    owed = sum(max(0, one.announce.bytes - one.bytes_sent) for one in context.record.outbox.items())
    return max(0.0, context.traffic.left - owed)


def energy_now(context: Context) -> float | None:
    """Seconds that a round may train; None: as long as it likes, the machine not being on battery."""
    allowed = context.config.gates.battery_training_s
    if allowed is None or context.machine.read_profile(disk=context.folder).on_ac is not False:
        return None
    return allowed


def keep_rate(context: Context, way: str, bits_per_second: float) -> None:
    """Keeps a measured rate, smoothed over transfers."""
    key = f"link.{way}_bps"
    before = context.record.get(key)
    if before is not None:
        bits_per_second = 0.5 * float(before) + 0.5 * bits_per_second
    context.record.put(key, str(round(bits_per_second)))
    context.record.put("link.at", str(context.clock.wall()))

"""What the operator, and the method, set for all rounds."""

from __future__ import annotations

from dataclasses import dataclass, field

from aggregator.methods.base import Method
from aggregator.scheduling.schedule import Buffered, Schedule, Synchronous
from aggregator.scheduling.selection import SELECTIONS, All, Selection
from edge_sdk.config.run import RunConfig
from edge_sdk.errors import ConfigError

__all__ = ["Terms", "terms_of"]


@dataclass(frozen=True)
class Terms:
    """See ``RoundsSection`` for those of the same name."""

    total: int
    min_devices: int
    evaluate_every: int | None
    """None: there is nothing to evaluate on."""
    chunk_bytes: int
    window: int
    seed: int = 0
    schedule: Schedule = field(default_factory=Synchronous)
    selection: Selection = field(default_factory=All)
    devices_per_round: float | None = None
    over_select: float = 1.0
    quorum: float = 1.0
    merge_late: bool = True
    max_staleness: int = 10


def terms_of(config: RunConfig, method: Method) -> Terms:
    """Raises ConfigError where what the method names does not go with what the operator set."""
    rounds = config.rounds
    schedule = rounds.schedule or method.schedule or "synchronous"
    chance = "all" if rounds.devices_per_round is None else "uniform"
    selection = rounds.selection or method.selection or chance
    if selection not in SELECTIONS:
        raise ConfigError(
            f"method {method.name!r} selects devices by {selection!r}; there are {', '.join(SELECTIONS)}"
        )
    if schedule not in ("synchronous", "buffered"):
        raise ConfigError(
            f"method {method.name!r} has the schedule {schedule!r}; there are synchronous, buffered"
        )
    if schedule == "buffered" and rounds.late == "refuse":
        raise ConfigError(
            f'method {method.name!r} has the schedule "buffered", in which every update may be late, '
            'and rounds.late is "refuse"',
            "take rounds.late out",
        )
    if selection != "all" and rounds.devices_per_round is None:
        raise ConfigError(
            f"method {method.name!r} selects devices by {selection!r}; rounds.devices_per_round is missing",
            "say how many: a count such as 10, or a share such as 0.1",
        )
    return Terms(
        total=rounds.total,
        min_devices=rounds.min_devices,
        evaluate_every=None if config.evaluation is None else config.evaluation.every,
        chunk_bytes=config.transfer.chunk_kib * 1024,
        window=config.transfer.window,
        seed=config.run.seed,
        schedule=Buffered(rounds.buffer) if schedule == "buffered" else Synchronous(),
        selection=SELECTIONS[selection](),
        devices_per_round=rounds.devices_per_round,
        over_select=rounds.over_select,
        quorum=rounds.quorum,
        merge_late=rounds.late == "merge" and method.merge.keeps_slots,
        max_staleness=rounds.max_staleness,
    )

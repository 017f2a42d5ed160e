"""What a run is: its record, made once from the config and the base model, and held to afterwards."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from aggregator.evaluation import Evaluator, failure, setup_of
from aggregator.methods.base import Method
from aggregator.state.base import RunRow, Store
from edge_sdk.clock import Clock
from edge_sdk.config.run import MergeSection, RunConfig
from edge_sdk.data.base_files import check_whole, find_base, fingerprint_of
from edge_sdk.errors import BaseModelError, FingerprintError, StateError
from edge_sdk.faults import reached
from edge_sdk.protocol.model import Fingerprint, LoraShape, ModelShape
from edge_sdk.protocol.trainer import Described, Died, Failed
from edge_sdk.protocol.wire import Run, encode

__all__ = ["begin_run", "check_same", "make_run", "mathematics", "run_fingerprint"]

_RUN_KEYS = ("method", "task", "labels", "seed")
_SINCE = {f"merge.{key}": value for key, value in msgspec.structs.asdict(MergeSection()).items()}
"""What a run began with that was made before there were these keys."""


def mathematics(config: RunConfig) -> dict[str, Any]:
    """The config's keys that change what the run computes, by dotted name. The base is not among them:
    where it lies may change, what it is may not, and the fingerprint tells."""
    sections = {"lora": config.lora, "training": config.training, "merge": config.merge}
    values = {f"run.{key}": getattr(config.run, key) for key in _RUN_KEYS}
    values["run.template"] = config.run.row_template
    for name, section in sections.items():
        values |= {f"{name}.{key}": value for key, value in msgspec.structs.asdict(section).items()}
    # By way of JSON, as it is compared with what was stored.
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(values))
    return plain


def run_fingerprint(config: RunConfig, base: Path, cache: Path) -> Fingerprint:
    """Raises BaseModelError."""
    return fingerprint_of(
        base,
        labels=config.run.labels,
        task=config.run.task,
        max_length=config.training.max_length,
        template=config.run.row_template,
        lora=_lora(config),
        cache=cache,
    )


def begin_run(
    config: RunConfig,
    method: Method,
    cache: Path,
    *,
    store: Store,
    evaluator: Evaluator,
    clock: Clock,
    done: Callable[[Run, Path], None],
) -> None:
    """No such run yet: the trainer tells the model's shape; then the run is stored, and handed to ``done``
    with the folder of its base.

    Raises BaseModelError for a base on this disk that is none.
    """
    wanted, known = config.base.path, None
    try:
        found = find_base(wanted)
        check_whole(found)
    except BaseModelError:
        if Path(wanted).is_absolute():
            raise
        # A hub id that is not, or not whole, on this disk: the trainer fetches it.
    else:
        wanted, known = str(found), run_fingerprint(config, found, cache)

    def described(reply: Described | Failed | Died) -> None:
        if not isinstance(reply, Described):
            raise failure(reply)
        base = Path(reply.base)
        run = make_run(config, method, reply.shape, known or run_fingerprint(config, base, cache))
        encode(run)  # too large a record is the operator's to know before anything is written
        store.add_run(_row(run, config, base, clock.wall()))
        reached("run.made")
        done(run, base)

    evaluator.describe(setup_of(config, method.spec(config), wanted), described)


def _row(run: Run, config: RunConfig, base: Path, wall: float) -> RunRow:
    return RunRow(
        run=run.run,
        method=config.run.method,
        mathematics=msgspec.json.encode(mathematics(config)).decode(),
        record=msgspec.json.encode(run).decode(),
        base_folder=str(base),
        fingerprint=run.fingerprint.digest,
        rounds=config.rounds.total,
        finished=False,
        created_at=wall,
    )


def make_run(config: RunConfig, method: Method, shape: ModelShape, fingerprint: Fingerprint) -> Run:
    """The record of a new run. Its nonce tells it from every other one, also of the same name."""
    return Run(
        run=config.run.name,
        nonce=uuid.uuid4().hex,
        task=config.run.task,
        base=config.base.path,
        labels=config.run.labels,
        template=config.run.row_template,
        max_length=config.training.max_length,
        micro_batch=config.training.batch,
        lora=_lora(config),
        layers=config.base.layers,
        spec=method.spec(config),
        levers=method.levers,
        shape=shape,
        fingerprint=fingerprint,
    )


def check_same(row: RunRow, config: RunConfig, cache: Path) -> Path:
    """Whether the stored run and the config are one; returns the folder of the base.

    Raises:
        StateError: keys that change the mathematics differ; all are named.
        FingerprintError: the base is not the one that the run began with.
        BaseModelError: there is no base any more.
    """
    before, now = msgspec.json.decode(row.mathematics), mathematics(config)
    changed = list(_differing(before, now))
    if changed:
        raise StateError(
            f"run {row.run!r} began with other values: {'; '.join(changed)}",
            "set them back, or begin another run: give it another run.name or run.state_dir",
        )
    try:
        base = find_base(config.base.path)
    except BaseModelError:
        # A hub id may have been fetched to a place of its own when the run began.
        if not Path(row.base_folder).is_dir():
            raise
        base = Path(row.base_folder)
    run = msgspec.json.decode(row.record, type=Run)
    parts = run.fingerprint.differing(run_fingerprint(config, base, cache))
    if parts:
        raise FingerprintError(
            f"run {row.run!r} began with another {', '.join(parts)} than {base} has",
            "set base.path to the model that the run began with, or begin another run",
        )
    return base


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted({*before, *now}):
        was = before.get(key, _SINCE.get(key))
        if was != now.get(key):
            yield f"{key} was {was!r} and is {now.get(key)!r}"


def _lora(config: RunConfig) -> LoraShape:
    return LoraShape(rank=config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets)

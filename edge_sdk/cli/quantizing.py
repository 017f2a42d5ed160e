"""``edge-agent quantize-base``: bits for each block of the base, and what they save."""

from __future__ import annotations

import json
import queue
import tempfile
from pathlib import Path
from typing import Any, Literal

import msgspec
import typer

from edge_sdk.agent.joining import error_of
from edge_sdk.agent.process_trainer import ProcessTrainer
from edge_sdk.config.agent import TrainerSection
from edge_sdk.config.base_plan import write_plan
from edge_sdk.config.loading import load_agent_config
from edge_sdk.data.base_files import find_base
from edge_sdk.errors import BaseModelError, ConfigError, TrainerError
from edge_sdk.planning.shapes import task_of
from edge_sdk.protocol.base_plan import BasePlan, Bits, SalienceMethod
from edge_sdk.protocol.model import LoraShape
from edge_sdk.protocol.spec import TrainSpec
from edge_sdk.protocol.trainer import (
    BasePlanned,
    DataSource,
    Died,
    Failed,
    PlanBase,
    Progress,
    Setup,
    TrainerReply,
)

__all__ = ["Word", "quantize_base"]

Word = Literal["fp16", "bf16", "int8", "nf4", "int2"]
_BITS: dict[str, Bits] = {"fp16": 16, "bf16": 16, "int8": 8, "nf4": 4, "int2": 2}
_LABELS = ("0", "1")
"""A head is no part of the plan, but a classifier is not loaded without one."""
_MICRO_BATCH = 8


def quantize_base(
    *,
    config: Path | None,
    base: str | None,
    budget_mb: float | None,
    precision: Word | None,
    calibration: Path | None,
    text: str | None,
    method: SalienceMethod,
    rows: int,
    length: int,
    task: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Raises ConfigError for options that do not go together, and whatever the trainer fails with."""
    if (budget_mb is None) is (precision is None):
        raise ConfigError(
            "one of --budget-mb and --precision is needed, and not both",
            "--budget-mb 400 plans bits for each block; --precision nf4 shows one precision for all",
        )
    base, source, section = _inputs(config, base, calibration, text)
    request = PlanBase(
        id=1,
        setup=Setup(
            base=base, task=task or _task_of(base), labels=_LABELS, max_length=length,
            micro_batch=min(rows, _MICRO_BATCH), lora=LoraShape(rank=1), spec=TrainSpec(),
            device=section.device, threads=section.threads, data=source,
        ),
        budget_bytes=None if budget_mb is None else round(budget_mb * 1e6),
        bits=None if precision is None else _BITS[precision],
        method=method, rows=rows,
    )  # fmt: skip
    done = _ask(request, tell=not as_json)
    if out is not None:
        write_plan(out, done.plan)
    if as_json:
        told = msgspec.to_builtins(done.plan)
        told |= {"saved_bytes": done.plan.saved_bytes, "seconds": done.seconds}
        typer.echo(json.dumps(told | {"written": None if out is None else str(out)}))
        return
    for line in _table(done.plan, base):
        typer.echo(line)
    if request.budget_bytes is not None and done.plan.bytes_before <= request.budget_bytes:
        typer.echo(_needless(done.plan))
    if out is not None:
        typer.echo(f'wrote {out}; use it with trainer.base_plan = "{out}"')


def _inputs(
    config: Path | None, base: str | None, calibration: Path | None, text: str | None
) -> tuple[str, DataSource | None, TrainerSection]:
    """The base, the calibration rows, and where to compute: from the config, or all by option."""
    if base is not None and config is not None:
        raise ConfigError("--config and --base name a base each", "take one of the two out")
    if base is not None:
        path = Path(base).expanduser()
        found, source, section = str(path.absolute()) if path.exists() else base, None, TrainerSection()
    else:
        loaded = load_agent_config(config or Path("agent.toml"))
        found, source, section = loaded.base.path, loaded.data.source(), loaded.trainer
    if calibration is not None:
        if not calibration.is_file():
            raise ConfigError(f"{calibration}: there is no such file", "--calibration names a file of rows")
        columns = msgspec.structs.asdict(source) if source is not None else {}
        source = DataSource(**{**columns, "path": str(calibration.absolute())})
    if text is not None and source is not None:
        source = msgspec.structs.replace(source, text=text)
    return found, source, section


def _task_of(base: str) -> str:
    """By the base's config.json: one that is a language model is measured by its own loss."""
    try:
        file = find_base(base) / "config.json"
    except BaseModelError:
        if Path(base).is_absolute():
            raise
        return "classification"  # a hub id that is not on this disk: the trainer fetches it
    try:
        return task_of(msgspec.json.decode(file.read_bytes(), type=dict[str, Any]))
    except (OSError, msgspec.DecodeError) as error:
        raise BaseModelError(f"base model {base}: config.json cannot be read: {error}") from None


def _ask(request: PlanBase, *, tell: bool) -> BasePlanned:
    """The trainer's answer. Raises the error that it failed with."""
    replies: queue.SimpleQueue[TrainerReply] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="edge-quantize-") as folder:
        trainer = ProcessTrainer(Path(folder), offline=Path(request.setup.base).is_absolute())
        trainer.start(replies.put)
        try:
            trainer.request(request)
            while True:
                reply = replies.get()
                if isinstance(reply, Progress):
                    if tell:
                        typer.echo(_progress(reply), err=True)
                elif isinstance(reply, BasePlanned):
                    return reply
                elif isinstance(reply, Failed | Died):
                    raise error_of(reply)
                else:
                    raise TrainerError(f"the trainer answered with a {type(reply).__name__}")
        finally:
            trainer.close()


def _progress(reply: Progress) -> str:
    if reply.stage == "loading":
        return "loading the base as it is"
    return f"measured {reply.done} of {reply.total} blocks"


def _needless(plan: BasePlan) -> str:
    """Said where the budget allows the base as its checkpoint is. At 16 bits fp32 blocks are halved."""
    halved = any(block.bytes < block.bytes_before for block in plan.blocks)
    word = '"fp32", the default,' if halved else '"bf16" or "fp16", as the checkpoint is,'
    return (
        f"no plan is needed: with trainer.base_precision = {word} the whole base takes "
        f"{plan.bytes_before / 1e6:.1f} MB, which the budget allows"
    )


def _table(plan: BasePlan, base: str) -> list[str]:
    how = "the loss's rise" if plan.method == "loss" else "influence"
    lines = [
        f"base {base}",
        f"salience by {how}, calibrated on {plan.calibration}",
        "",
        f"{'block':>5}  {'salience':>10}  {'bits':>4}  {'MB before':>9}  {'MB after':>8}  {'error':>9}",
    ]
    lines += [
        f"{block.block:>5}  {block.salience:>10.4g}  {block.bits:>4}  {block.bytes_before / 1e6:>9.2f}  "
        f"{block.bytes / 1e6:>8.2f}  {block.error:>9.3g}"
        for block in plan.blocks
    ]
    rest = plan.bytes - sum(block.bytes for block in plan.blocks)
    before = plan.bytes_before - sum(block.bytes_before for block in plan.blocks)
    lines += [
        f"{'rest':>5}  {'':>10}  {'':>4}  {before / 1e6:>9.2f}  {rest / 1e6:>8.2f}",
        "",
        f"in all {plan.bytes_before / 1e6:.1f} MB before, {plan.bytes / 1e6:.1f} MB after: "
        f"{plan.saved_bytes / 1e6:.1f} MB less, {plan.bytes_before / plan.bytes:.1f} times smaller",
        f"salience times error, summed: {plan.objective:.4g}",
    ]
    return lines

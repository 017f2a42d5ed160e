"""A version as files for others: a PEFT adapter, or folded into its base, with a card that tells the run."""

from __future__ import annotations

import contextlib
import queue
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aggregator.evaluation import failure
from edge_sdk.clock import next_within
from edge_sdk.config.run import RunConfig
from edge_sdk.console import counted
from edge_sdk.errors import MechanismError, TrainerError
from edge_sdk.protocol.trainer import Died, Export, Exported, Failed, Progress, TrainerHost, TrainerReply
from edge_sdk.protocol.wire import Run
from edge_sdk.updates.peft import write_peft
from edge_sdk.updates.versions import read_adapter

__all__ = ["Origin", "export_merged", "export_peft"]

_WHOLE = ("fp32", "bf16", "fp16")
_MOST_NAMED = 50
_INTERRUPT_S = 30.0
"""How long the trainer may take to end an export that is not wanted any more, and to remove what it wrote."""


@dataclass(frozen=True)
class Origin:
    """How a version came to be, for its card."""

    number: int
    rounds: int
    """That led to it."""
    method: str
    accuracy: float | None = None
    perplexity: float | None = None
    loss: float | None = None
    best: int | None = None
    """Number of the version that does best on the held-out rows."""
    versions: int = 1
    """There are in the run."""
    devices: Sequence[str] = ()
    """Whose updates are in it."""
    updates: int = 0
    mean_depth: float | None = None
    layers: int = 0
    """Of the base; ``mean_depth`` is of these."""

    def lines(self, run: Run) -> list[str]:
        score = "not evaluated"
        if self.perplexity is not None:
            score = f"perplexity {self.perplexity:.4f}"
        elif self.accuracy is not None:
            score = f"accuracy: {self.accuracy:.4f}"
        if self.loss is not None:
            score += f", loss {self.loss:.4f}"
        named = ", ".join(self.devices[:_MOST_NAMED]) + (", ..." if len(self.devices) > _MOST_NAMED else "")
        lines = [
            "## The run",
            "",
            f"- Run `{run.run}`, version {self.number} of {self.versions} "
            f"after {counted(self.rounds, 'round')}",
            f"- Method: {self.method}",
            f"- Devices: {len(self.devices)} ({named})" if self.devices else "- Devices: none yet",
            f"- Held-out {score}",
        ]
        if self.mean_depth is not None:
            lines.append(
                f"- Updates: {self.updates}, mean LoRA depth {self.mean_depth:.1f} of {self.layers} layers"
            )
        if self.best is not None and self.best != self.number:
            lines.append(f"- The best version on the held-out rows is {self.best}")
        return [
            *lines,
            f"- Maximum length {run.max_length}, template `{run.template}`",
            f"- Fingerprint `{run.fingerprint.digest}`",
        ]


def export_peft(folder: Path, versions: Sequence[Path], run: Run, *, base: str, origin: Origin) -> Path:
    """Writes the version that the chain ``versions`` leads to; replaces an older folder.

    ``base``: where the base model lies, for the adapter's config. Raises ContainerError
    for versions that are damaged or not of this run.
    """
    return write_peft(
        folder,
        read_adapter(versions, run.fingerprint.digest),
        shape=run.shape,
        lora=run.lora,
        base=base,
        labels=run.labels,
        task=run.task,
        card="\n".join(origin.lines(run)),
    )


def export_merged(
    folder: Path,
    versions: Sequence[Path],
    run: Run,
    *,
    base: str,
    origin: Origin,
    config: RunConfig,
    trainer: TrainerHost | None = None,
) -> Path:
    """Writes base and version as one transformers model, in a trainer process of its own.

    After Ctrl-C it waits until the trainer has removed what it wrote so far. Raises MechanismError where the
    base is held in so few bits that there is nothing to fold into, and what the trainer failed with.
    """
    held, _ = config.trainer.base_held()
    if held not in _WHOLE:
        raise MechanismError(
            f"trainer.base_precision is {held!r}: folding into a quantized base would round it anew, "
            "and its full-precision weights are not the model that was evaluated",
            "export the adapter without --merged, or set trainer.base_precision to fp32, bf16 or fp16",
        )
    replies: queue.SimpleQueue[TrainerReply] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory() as scratch:
        host = trainer or _process(Path(scratch), config)
        host.start(replies.put)
        try:
            host.request(
                Export(
                    id=1,
                    base=base,
                    task=run.task,
                    labels=run.labels,
                    lora=run.lora,
                    shape=run.shape,
                    fingerprint=run.fingerprint,
                    versions=tuple(str(path.absolute()) for path in versions),
                    folder=str(folder.absolute()),
                    merged=True,
                    card="\n".join(origin.lines(run)),
                )
            )
            try:
                return _answer(replies)
            except KeyboardInterrupt:
                host.interrupt()
                _await_end(replies)
                raise
        finally:
            host.close()


def _answer(replies: queue.SimpleQueue[TrainerReply]) -> Path:
    while True:
        reply = replies.get()
        if isinstance(reply, Exported):
            return Path(reply.folder)
        if isinstance(reply, Failed | Died):
            raise failure(reply)
        if not isinstance(reply, Progress):
            raise TrainerError(f"the trainer answered an export with {type(reply).__name__}")


def _await_end(replies: queue.SimpleQueue[TrainerReply]) -> None:
    until = time.monotonic() + _INTERRUPT_S
    with contextlib.suppress(queue.Empty):
        while isinstance(next_within(replies, until - time.monotonic()), Progress):
            pass


def _process(folder: Path, config: RunConfig) -> TrainerHost:
    from edge_sdk.agent.process_trainer import ProcessTrainer

    return ProcessTrainer(folder, allocator=config.trainer.allocator)

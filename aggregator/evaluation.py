"""The server's own trainer: it tells the model's shape once, and how well each version does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.clock import Clock
from edge_sdk.config.run import RunConfig
from edge_sdk.errors import (
    BaseModelError,
    ContainerError,
    DataError,
    EdgeError,
    MechanismError,
    MissingExtraError,
    TrainerError,
)
from edge_sdk.protocol.model import LoraShape
from edge_sdk.protocol.spec import TrainSpec
from edge_sdk.protocol.trainer import (
    Describe,
    Described,
    Died,
    Evaluate,
    Evaluated,
    Failed,
    Progress,
    Setup,
    TrainerHost,
    TrainerReply,
    TrainerRequest,
)

__all__ = ["Evaluator", "failure", "setup_of"]

_TRIES = 2
"""A trainer that died is started again once; twice dead is an answer."""
_SILENCE_S = 600.0
"""An evaluation that nothing is heard of for so long hangs. Loading a base takes less, and then it tells of
every batch; fetching one, before the run is made, may take any time."""

_ERRORS: dict[str, type[EdgeError]] = {
    "data": DataError,
    "base": BaseModelError,
    "mechanism": MechanismError,
    "extra": MissingExtraError,
    "container": ContainerError,
}


def failure(reply: Failed | Died) -> EdgeError:
    """The error that a failed request of the server's own trainer is for the operator."""
    if isinstance(reply, Died):
        return TrainerError(f"the server's trainer ended with {reply.exit}: {reply.message}")
    return _ERRORS.get(reply.cause, TrainerError)(reply.message, reply.hint)


def setup_of(config: RunConfig, spec: TrainSpec, base: str) -> Setup:
    """What the server's trainer holds. ``base``: a local folder, or what the config names."""
    section = config.evaluation
    base_precision, base_plan = config.trainer.base_held()
    return Setup(
        base=base,
        task=config.run.task,
        labels=config.run.labels,
        template=config.run.row_template,
        max_length=config.training.max_length,
        micro_batch=config.training.batch,
        lora=LoraShape(rank=config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets),
        layers=config.base.layers,
        spec=spec,
        device=config.trainer.device,
        threads=config.trainer.threads,
        data=None if section is None else section.data.source(),
        base_precision=base_precision,
        base_plan=base_plan,
    )


@dataclass
class _Task:
    make: Callable[[int], TrainerRequest]
    done: Callable[[TrainerReply], None]
    silence_s: float | None
    heard: float
    """Monotonic time of the last sign of it."""
    tries: int = 1


class Evaluator:
    """One request at a time; its answer comes to ``on_reply`` through the server's inbox.

    Args:
        progress: called with every ``Progress``.
    """

    def __init__(self, trainer: TrainerHost, clock: Clock, progress: Callable[[Progress], None]) -> None:
        self._trainer = trainer
        self._clock = clock
        self._progress = progress
        self._id = 0
        self._task: _Task | None = None

    @property
    def busy(self) -> bool:
        return self._task is not None

    def describe(self, setup: Setup, done: Callable[[Described | Failed | Died], None]) -> None:
        self._ask(lambda id: Describe(id=id, setup=setup), done, None)

    def evaluate(
        self, setup: Setup, versions: Sequence[Path], done: Callable[[Evaluated | Failed | Died], None]
    ) -> None:
        """How well the version does that the chain of files leads to."""
        paths = tuple(str(path) for path in versions)
        self._ask(lambda id: Evaluate(id=id, setup=setup, versions=paths), done, _SILENCE_S)

    def on_reply(self, reply: TrainerReply) -> None:
        """Answers to requests given up are ignored."""
        task = self._task
        if task is None or reply.id != self._id:
            return
        task.heard = self._clock.monotonic()
        if isinstance(reply, Progress):
            self._progress(reply)
            return
        if isinstance(reply, Died) and task.tries < _TRIES:
            task.tries += 1
            self._send(task)
            return
        self._task = None
        task.done(reply)

    def watch(self) -> float | None:
        """Gives up on a trainer that hangs: it is ended, and its task failed.

        Returns after how many seconds to look again; None: there is nothing to wait for.
        """
        task = self._task
        if task is None or task.silence_s is None:
            return None
        left = task.heard + task.silence_s - self._clock.monotonic()
        if left > 0:
            return left
        self._trainer.unload()
        message = f"nothing was heard of the server's trainer for {task.silence_s:g} s; it was ended"
        self.on_reply(Failed(id=self._id, cause="internal", message=message))
        return None

    def give_up(self) -> None:
        """Nobody waits for the present answer any more."""
        if self._task is not None:
            self._task = None
            self._trainer.unload()

    def close(self) -> None:
        self._task = None
        self._trainer.close()

    def _ask(
        self, make: Callable[[int], TrainerRequest], done: Callable[..., None], silence_s: float | None
    ) -> None:
        self._task = _Task(make, done, silence_s, self._clock.monotonic())
        self._send(self._task)

    def _send(self, task: _Task) -> None:
        self._id += 1
        self._trainer.request(task.make(self._id))

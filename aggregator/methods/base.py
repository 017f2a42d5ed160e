"""What a method is: one implementation named for each mechanism. And how a word finds it."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points

from aggregator.merging.base import MergeRule
from aggregator.planner.allocation import Allocation
from aggregator.server_optimizers.base import ServerOptimizer
from edge_sdk.config.run import RunConfig
from edge_sdk.errors import ConfigError, EdgeError, MechanismError
from edge_sdk.protocol.spec import Levers, TrainSpec

__all__ = ["BUILT_IN", "GROUP", "UNQUANTIZED", "Method", "find_method", "method_names"]

GROUP = "edge_sdk.methods"
"""Entry point group in which other packages offer methods."""

BUILT_IN = {
    "fedavg": "aggregator.methods.fedavg:METHOD",
    "fedquad": "aggregator.methods.fedquad:METHOD",
}
UNQUANTIZED = ("fp32", "bf16", "fp16")
_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*\Z")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A federated method. Devices get what it compiles to, a ``TrainSpec`` and candidates; never its code.

    A method of your own is an instance of this class, anywhere: see ``find_method``.

    Attributes:
        name: its own; told when a run begins, beside what ``run.method`` names it by.
        allocation: which device trains how deep, with how many quantized layers.
        merge: how updates become the next version.
        server_optimizer: how far the adapter goes along the merged change; None: as far as it says.
        levers: how tuned layers save memory; devices probe with the same.
        other_levers: what a device may be offered where those leave too little, if it has them and its fit
            can tell what they cost. With any, half a batch twice as often and fewer steps are offered too.
        codec: how updates travel.
        error_feedback: devices keep what the codec lost and add it to their next update.
        base_precision: what every device must hold its base in; None: what its owner chose.
        selection, schedule: as in ``[rounds]`` of run.toml, where the operator may name others.
        objective, factors, error_adapter, phases, reinit, fold, privacy, attention: see ``TrainSpec``.
    """

    name: str
    allocation: Allocation
    merge: MergeRule
    server_optimizer: ServerOptimizer | None = None
    levers: Levers = field(default_factory=Levers)
    other_levers: tuple[Levers, ...] = ()
    codec: str = "int8"
    error_feedback: bool = False
    base_precision: str | None = None
    selection: str | None = None
    schedule: str | None = None
    objective: str = "cross_entropy"
    factors: str = "AB"
    error_adapter: str = "none"
    phases: str = "single"
    reinit: str = "none"
    fold: str = "none"
    privacy: str = "none"
    attention: str = "sdpa"
    summary: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for refused, why in self._refusals():
            raise MechanismError(f"method {self.name!r} joins {refused}", why)

    def _refusals(self) -> Iterator[tuple[str, str]]:
        """What makes no sense together, and why."""
        rule = self.merge
        if self.error_feedback and self.privacy != "none":
            yield (
                f"error feedback with privacy {self.privacy!r}",
                "what the codec lost would carry a round's data past its noise: drop one of the two",
            )
        if (self.reinit, self.fold) != (rule.reinit, rule.fold):
            yield (
                f"reinit {self.reinit!r} and fold {self.fold!r} with the merge rule {rule.name}",
                f"that rule needs reinit {rule.reinit!r} and fold {rule.fold!r} on the devices",
            )
        if self.error_feedback and not rule.keeps_slots:
            yield (
                f"error feedback with the merge rule {rule.name}",
                "a residual belongs to slots, and that rule makes all slots anew: turn error feedback off",
            )
        if self.server_optimizer is not None and not rule.keeps_slots:
            yield (
                f"the server optimizer {self.server_optimizer.name} with the merge rule {rule.name}",
                "its state belongs to slots, and that rule makes all slots anew: set it to none",
            )
        if rule.fold != "none" and self.base_precision not in (None, *UNQUANTIZED):
            yield (
                f"the merge rule {rule.name}, which folds, with a base in {self.base_precision}",
                "a fold is added to a base's weights, and a quantized base has none: use "
                + " or ".join(UNQUANTIZED),
            )

    def spec(self, config: RunConfig) -> TrainSpec:
        """What devices are told of the mathematics: the mechanisms from here, the figures from the config."""
        training = config.training
        return TrainSpec(
            seed=config.run.seed,
            objective=self.objective,
            optimizer=training.optimizer,
            learning_rate=training.learning_rate,
            head_learning_rate=training.head_learning_rate,
            weight_decay=training.weight_decay,
            clip_norm=training.clip_norm,
            warmup_steps=training.warmup_steps,
            schedule=training.schedule,
            prefix=training.prefix_form,
            factors=training.factors or self.factors,
            error_feedback=self.error_feedback,
            error_adapter=self.error_adapter,
            phases=self.phases,
            reinit=self.reinit,
            fold=self.fold,
            privacy=self.privacy,
            attention=self.attention,
        )


def method_names() -> tuple[str, ...]:
    """Names of the built-in and installed methods."""
    return tuple(sorted({*BUILT_IN, *_installed()}))


def find_method(name: str) -> Method:
    """The method called ``name``: a built-in one, an entry point of ``GROUP``, or ``package.module:name``.

    What is found may be a ``Method`` or something that gives one when called without arguments.

    Raises:
        ConfigError: there is none (names those there are, and the nearest), or it cannot be imported.
    """
    if name in BUILT_IN:
        return _load(name, BUILT_IN[name])
    installed = _installed()
    if name in installed:
        return _load(name, installed[name].value)
    if _PATH.match(name):
        return _load(name, name)
    known = method_names()
    near = difflib.get_close_matches(name, known, n=1)
    raise ConfigError(
        f"run.method: there is no method {name!r}; there are {', '.join(known)}",
        (f"did you mean {near[0]!r}? " if near else "")
        + "a method of your own is named package.module:name, or installed as an entry point of "
        + GROUP,
    )


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _load(name: str, path: str) -> Method:
    module_name, _, attribute = path.partition(":")
    try:
        found: object = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
        if not isinstance(found, Method) and callable(found):
            found = found()
    except EdgeError:
        raise
    except Exception as error:  # whatever a user's module does when it is imported
        raise ConfigError(
            f"run.method: {name!r} cannot be had from {path!r}: {type(error).__name__}: {error}",
            "the aggregator must be able to import it: install it, or put its folder on PYTHONPATH",
        ) from error
    if not isinstance(found, Method):
        raise ConfigError(
            f"run.method: {path!r} is a {type(found).__name__}, not a method",
            "name an instance of aggregator.methods.base.Method, or a function that makes one",
        )
    return found

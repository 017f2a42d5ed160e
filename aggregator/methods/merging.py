"""The merge that ``[merge]`` in run.toml asks for, put in the place of the method's own."""

from __future__ import annotations

import dataclasses

from aggregator.find import find
from aggregator.merging.base import MergeRule
from aggregator.methods.base import UNQUANTIZED, Method, find_method
from aggregator.server_optimizers.base import ServerOptimizer
from edge_sdk.config.run import MergeSection, RunConfig
from edge_sdk.errors import ConfigError, MechanismError

__all__ = ["find_optimizer", "find_rule", "method_of"]

_FIGURES = ("server_learning_rate", "momentum", "second_moment", "adaptivity")


def find_rule(name: str) -> MergeRule:
    """The merge rule called so. Raises ConfigError."""
    return find(
        name, MergeRule, key="merge.rule", package="aggregator.merging", attribute="RULE",
        group="edge_sdk.merge_rules",
    )  # fmt: skip


def find_optimizer(name: str) -> ServerOptimizer:
    """The server optimizer called so. Raises ConfigError."""
    return find(
        name, ServerOptimizer, key="merge.server_optimizer", package="aggregator.server_optimizers",
        attribute="OPTIMIZER", group="edge_sdk.server_optimizers",
    )  # fmt: skip


def method_of(config: RunConfig) -> Method:
    """The config's method, with the merge that the config asks for.

    Raises:
        ConfigError: something named is not there, or a figure is of no use.
        MechanismError: the parts make no sense together.
    """
    method, section = find_method(config.run.method), config.merge
    if section.rule is not None:
        rule = find_rule(section.rule)
        method = dataclasses.replace(method, merge=rule, reinit=rule.reinit, fold=rule.fold)
    if (config.rounds.schedule or method.schedule) == "buffered" and not method.merge.keeps_slots:
        raise MechanismError(
            f"the buffered schedule does not go with the merge rule {method.merge.name}",
            "its updates are of older versions, and that rule makes all slots anew: use the synchronous one",
        )
    held, _ = config.trainer.base_held()
    if method.fold != "none" and config.evaluation is not None and held not in UNQUANTIZED:
        raise MechanismError(
            f"trainer.base_precision is {held!r}, and the rule {method.merge.name} folds into the base: "
            "the server could evaluate none of its versions",
            f"set trainer.base_precision to {' or '.join(UNQUANTIZED)}, or take [evaluation] out",
        )
    return dataclasses.replace(method, server_optimizer=_optimizer(method.server_optimizer, section))


def _optimizer(own: ServerOptimizer | None, section: MergeSection) -> ServerOptimizer | None:
    optimizer = own
    if section.server_optimizer is not None:
        name = section.server_optimizer
        optimizer = None if name == "none" else find_optimizer(name)
    given = {key: value for key in _FIGURES if (value := getattr(section, key)) is not None}
    has = {} if optimizer is None else optimizer.figures()
    odd = sorted(given.keys() - has.keys())
    if odd:
        what = "no server optimizer is set" if optimizer is None else f"{optimizer.name} has no such figure"
        raise ConfigError(f"merge.{odd[0]} is of no use: {what}", "take the line out of run.toml")
    return optimizer if optimizer is None else dataclasses.replace(optimizer, **given)

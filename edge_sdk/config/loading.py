"""Loading ``agent.toml`` and ``run.toml``: one ConfigError tells all that is wrong with a file.

What a single value shows is checked against the schema; here stand the rules that need more than that.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TypeVar

import msgspec

from edge_sdk.config.agent import AgentConfig, AgentSection, DataSection, GatesSection, TrainerSection
from edge_sdk.config.bounds import MAX_LABELS
from edge_sdk.config.broker import BrokerConfig, check_broker, is_embedded
from edge_sdk.config.checking import Rules, Schema, check, read_toml
from edge_sdk.config.problems import Problem, shown
from edge_sdk.config.run import (
    TEMPLATES,
    EvaluationSection,
    LoraSection,
    RoundsSection,
    RunConfig,
    RunSection,
)
from edge_sdk.data.rows import FORMATS
from edge_sdk.device.classes import device_class
from edge_sdk.errors import ConfigError

__all__ = ["load_agent_config", "load_run_config"]

_S = TypeVar("_S", bound=msgspec.Struct)
_AGENT = Schema(AgentConfig, "agent.toml", "the device", "edge-agent init")
_RUN = Schema(RunConfig, "run.toml", "the server", "edge-aggregator init")


def load_agent_config(path: str | Path, *, files: bool = True) -> AgentConfig:
    """The device's config. Paths in it are absolute. Raises ConfigError with every error of the file.

    ``files``: false where nothing is made of the files that it names, so that they may be away.
    """
    rules: Rules = {
        "agent": _check_agent,
        "broker": _check_agent_broker,
        "data": _check_data,
        "trainer": _check_trainer if files else _check_precision,
        "gates": _check_gates,
    }
    return _load(path, AgentConfig, _AGENT, _RUN, rules, files)


def load_run_config(path: str | Path, *, files: bool = True) -> RunConfig:
    """The server's config, as ``load_agent_config`` does it."""
    rules: Rules = {
        "run": _check_run,
        "broker": check_broker,
        "lora": _check_lora,
        "rounds": _check_rounds,
        "evaluation": _check_evaluation,
        "trainer": _check_trainer if files else _check_precision,
    }
    return _load(path, RunConfig, _RUN, _AGENT, rules, files)


def _load(path: str | Path, kind: type[_S], own: Schema, other: Schema, rules: Rules, files: bool) -> _S:
    file = Path(path).expanduser()
    data = read_toml(file, own.init)
    folder = file.absolute().parent
    return check(file, data, kind, folder=folder, other=other, rules=rules, init=own.init, files=files)


def _check_agent(agent: AgentSection) -> list[Problem]:
    if agent.device_class is None:
        what = Problem(
            "agent.emulated", "is true without agent.device_class", "name the class that is emulated"
        )
        return [what] if agent.emulated else []
    try:
        device_class(agent.device_class)
    except ConfigError as error:
        return [Problem("agent.device_class", error.message, error.hint)]
    return []


def _check_agent_broker(broker: BrokerConfig) -> list[Problem]:
    if not is_embedded(broker.url):
        return check_broker(broker)
    what = f'is missing or "{broker.url}", which only the server has'
    return [Problem("broker.url", what, "set the url that `edge-aggregator run` prints")]


def _check_data(data: DataSection, key: str = "data") -> list[Problem]:
    problems = []
    suffix = Path(data.path).suffix.lower()
    if suffix not in FORMATS:
        what = f'received a file with the suffix "{suffix}"'
        problems.append(Problem(f"{key}.path", what, f"rows are read from {', '.join(FORMATS)}"))
    for one, other in (("text", "label"), ("prompt", "response")):
        if getattr(data, one) == getattr(data, other):
            what = f'is "{getattr(data, other)}", as {key}.{one} is'
            problems.append(Problem(f"{key}.{other}", what, "name two columns"))
    return problems


def _check_trainer(trainer: TrainerSection) -> list[Problem]:
    problems = _check_precision(trainer)
    if problems:
        return problems
    try:
        trainer.base_held()
    except ConfigError as error:
        return [Problem("trainer.base_plan", error.message, error.hint)]
    return []


def _check_precision(trainer: TrainerSection) -> list[Problem]:
    if trainer.base_plan is None or trainer.base_precision == "fp32":
        return []
    what = f'is "{trainer.base_precision}", and trainer.base_plan says otherwise'
    return [Problem("trainer.base_precision", what, "take one of the two out")]


def _check_gates(gates: GatesSection) -> list[Problem]:
    problems = []
    most, margin = gates.max_temperature_c, gates.temperature_margin_c
    if most is not None and margin >= most:
        what = f"is {margin:g}, and gates.max_temperature_c {most:g}: once closed it would never open again"
        problems.append(
            Problem("gates.temperature_margin_c", what, "a margin is a few degrees; 5 if not told")
        )
    for window in gates.quiet_hours:
        begin, _, end = window.partition("-")
        if begin == end:
            what = f"received {shown(window)}, which begins as it ends"
            problems.append(Problem("gates.quiet_hours", what, "for a whole day write two windows"))
    return problems


def _check_run(run: RunSection) -> list[Problem]:
    classifies = run.task == "classification"
    return [*(_check_labels(run) if classifies else _no_labels(run)), *_check_template(run)]


def _check_labels(run: RunSection) -> list[Problem]:
    problems = []
    if len(run.labels) < 2:
        got = f"received a list of {len(run.labels)}" if run.labels else "is missing"
        allowed = f"allowed: a list of 2 to {MAX_LABELS} values"
        problems.append(Problem("run.labels", f"{got}; {allowed}", 'or set run.task = "causal-lm"'))
    twice = [label for label, count in Counter(run.labels).items() if count > 1]
    if twice:
        problems.append(Problem("run.labels", f"holds {', '.join(map(shown, twice))} more than once"))
    if "" in run.labels:
        problems.append(Problem("run.labels", "holds an empty label"))
    return problems


def _no_labels(run: RunSection) -> list[Problem]:
    if not run.labels:
        return []
    what = f'received a list of {len(run.labels)}, but run.task is "{run.task}", which has no labels'
    return [Problem("run.labels", what, 'take the key out, or set run.task = "classification"')]


def _check_template(run: RunSection) -> list[Problem]:
    """Every place of the task's own template, once and in this order."""
    wanted = re.findall(r"{\w+}", TEMPLATES[run.task])
    places = re.findall("|".join(map(re.escape, wanted)), run.row_template)
    if places == wanted or (wanted == ["{text}"] and places):
        return []
    order = ", then ".join(wanted)
    what = f"received {shown(run.row_template)}; allowed for {run.task}: text that holds {order}"
    return [Problem("run.template", what, f"{order} is where the row's columns go")]


def _check_lora(lora: LoraSection) -> list[Problem]:
    if lora.targets:
        return []
    return [Problem("lora.targets", "is empty", 'use ["all-linear"], or name modules')]


def _check_rounds(rounds: RoundsSection) -> list[Problem]:
    problems = []
    if rounds.schedule == "buffered" and rounds.late == "refuse":
        what = 'is "refuse", and rounds.schedule is "buffered", in which every update may be late'
        problems.append(Problem("rounds.late", what, "take one of the two out"))
    if rounds.selection == "all" and rounds.devices_per_round is not None:
        what = f'is {shown(rounds.devices_per_round)}, and rounds.selection is "all"'
        hint = 'set rounds.selection = "uniform" or "utility", or take one of the two out'
        problems.append(Problem("rounds.devices_per_round", what, hint))
    if rounds.selection in ("uniform", "utility") and rounds.devices_per_round is None:
        what = f'is "{rounds.selection}", and rounds.devices_per_round is missing'
        hint = "say how many: a count such as 10, or a share such as 0.1"
        problems.append(Problem("rounds.selection", what, hint))
    return problems


def _check_evaluation(evaluation: EvaluationSection | None) -> list[Problem]:
    return [] if evaluation is None else _check_data(evaluation.data, "evaluation.data")

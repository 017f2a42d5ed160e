"""``edge-agent doctor``: what of this device works, what does not, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edge_sdk.agent.doctor.broker import broker_findings
from edge_sdk.agent.doctor.clock import clock_findings
from edge_sdk.agent.doctor.files import file_findings
from edge_sdk.agent.doctor.finding import Finding, exit_code, of_error
from edge_sdk.agent.doctor.machine import machine_findings
from edge_sdk.agent.doctor.training import training_findings
from edge_sdk.clock import Clock, SystemClock
from edge_sdk.config.agent import AgentConfig, TrainerSection
from edge_sdk.config.loading import load_agent_config
from edge_sdk.errors import ConfigError

__all__ = ["Finding", "examine", "exit_code"]

_ROOT = Path("/")
_OF_CONFIG = ("state", "disk", "base", "data", "certificates", "broker")


def examine(file: Path, *, root: Path = _ROOT, clock: Clock | None = None) -> Iterator[Finding]:
    """Findings as they are made, each before the next is begun. Nothing is changed and nothing is left.

    Args:
        file: the agent's config; where it cannot be used the machine is looked at all the same.
        root: where ``proc``, ``sys`` and ``etc`` are looked for.
    """
    config: AgentConfig | None = None
    try:
        config = load_agent_config(file)
    except ConfigError as error:
        yield of_error("config", error)
    else:
        yield Finding(id="config", level="ok", text=f"{file} is in order")
    refused = False
    for finding in machine_findings(root, config):
        refused |= finding.id == "jetpack" and finding.level == "error"
        yield finding
    yield from clock_findings(clock or SystemClock(), config, file)
    if refused:
        yield Finding(id="torch", level="skipped", text="training was not tried: see jetpack")
    else:
        yield from training_findings(
            root,
            TrainerSection() if config is None else config.trainer,
            "auto" if config is None else config.allocator(),
            limited=config is not None and config.limits.memory_mb is not None,
        )
    if config is None:
        for name in _OF_CONFIG:
            yield Finding(id=name, level="skipped", text="not looked at: see config")
        return
    yield from file_findings(config)
    yield from broker_findings(config)

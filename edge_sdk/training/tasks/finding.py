"""From a task's name to its implementation."""

from __future__ import annotations

from edge_sdk.errors import MechanismError
from edge_sdk.training.tasks.base import Task
from edge_sdk.training.tasks.causal_lm import CausalLM
from edge_sdk.training.tasks.classification import Classification

__all__ = ["task_of"]

_TASKS: tuple[Task, ...] = (Classification(), CausalLM())


def task_of(name: str) -> Task:
    """Raises MechanismError for a task that this trainer does not have."""
    for task in _TASKS:
        if task.name == name:
            return task
    raise MechanismError(
        f"this trainer does not know the task {name!r}; it knows {', '.join(t.name for t in _TASKS)}",
        "update edge-sdk on the device",
    )

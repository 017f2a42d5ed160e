"""Unequal devices fine-tune one language model together; their data stays with them.

The public surface: ``Agent``, ``Event`` and the errors. Everything is imported on first use, so that
``import edge_sdk`` costs next to nothing and brings neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_sdk.agent.api import Agent
    from edge_sdk.errors import (
        BaseModelError,
        BrokerError,
        ConfigError,
        ContainerError,
        CredentialsError,
        DataError,
        EdgeError,
        FingerprintError,
        MechanismError,
        MissingExtraError,
        ProtocolError,
        StateError,
        TrainerError,
    )
    from edge_sdk.events import Event

__version__ = "0.1.0"

__all__ = [
    "Agent",
    "BaseModelError",
    "BrokerError",
    "ConfigError",
    "ContainerError",
    "CredentialsError",
    "DataError",
    "EdgeError",
    "Event",
    "FingerprintError",
    "MechanismError",
    "MissingExtraError",
    "ProtocolError",
    "StateError",
    "TrainerError",
    "__version__",
]

_HOMES = {"Agent": "edge_sdk.agent.api", "Event": "edge_sdk.events"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, "edge_sdk.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

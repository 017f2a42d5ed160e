"""From an exception to a ``Failed``: every request that fails says why, in one line, and what to do."""

from __future__ import annotations

import logging
import sys

from edge_sdk.errors import (
    BaseModelError,
    ContainerError,
    DataError,
    EdgeError,
    MechanismError,
    MissingExtraError,
    TrainerError,
)
from edge_sdk.protocol.trainer import Failed, FailureCause

__all__ = ["InterruptError", "MemoryLimitError", "failed"]

_log = logging.getLogger(__name__)

_CAUSES: tuple[tuple[type[BaseException], FailureCause], ...] = (
    (DataError, "data"),
    (BaseModelError, "base"),
    (MechanismError, "mechanism"),
    (MissingExtraError, "extra"),
    (ContainerError, "container"),
)
_EXTRA = (
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "tokenizers",
    "numpy",
    "huggingface_hub",
    "accelerate",
)


class InterruptError(Exception):
    """The request was ended by an ``Interrupt``."""


class MemoryLimitError(TrainerError):
    """A memory limit does not allow what was asked."""


def failed(request: int, error: Exception) -> Failed:
    """What went wrong with the request of that id."""
    if isinstance(error, InterruptError):
        return Failed(id=request, cause="interrupted", message="the request was interrupted")
    if isinstance(error, MemoryLimitError) or _out_of_memory(error):
        message = error.message if isinstance(error, MemoryLimitError) else f"out of memory: {_line(error)}"
        hint = error.hint if isinstance(error, MemoryLimitError) else "a smaller candidate may fit"
        return Failed(id=request, cause="memory", message=message, hint=hint)
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] in _EXTRA:
        return Failed(
            id=request,
            cause="extra",
            message=f"training needs {error.name}, which is not installed",
            hint="pip install 'edge-sdk[train]'",
        )
    if isinstance(error, EdgeError):
        cause: FailureCause = "internal"
        for kind, named in _CAUSES:
            if isinstance(error, kind):
                cause = named
        return Failed(id=request, cause=cause, message=_line(error.message), hint=_line(error.hint))
    _log.error("request %d failed unexpectedly", request, exc_info=error)
    return Failed(
        id=request,
        cause="internal",
        message=f"{type(error).__name__}: {_line(error)}",
        hint="the trainer's log holds the traceback",
    )


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if "torch" not in sys.modules:
        return False
    from edge_sdk.training.memory import is_out_of_memory

    return is_out_of_memory(error)


def _line(what: object) -> str:
    return " ".join(str(what).split())[:1000]

"""Interrupts that take effect within a step: checks between layers, forward and backward, and between the
parts of a large output layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from edge_sdk.training.model import TunableModel

__all__ = ["checked"]

_EVERY_S = 0.1
"""A check reads the clock, and asks the caller no more often than this."""


@contextmanager
def checked(model: TunableModel, check: Callable[[], None], every_s: float | None = None) -> Iterator[None]:
    """Within the context ``check`` is called between layers, and by ``model.check``; what it raises ends the
    pass, either way."""
    asked, pause = time.monotonic(), _EVERY_S if every_s is None else every_s

    def ask() -> None:
        nonlocal asked
        if time.monotonic() - asked >= pause:
            check()
            asked = time.monotonic()

    def backward(_gradient: Any) -> None:
        ask()

    def forward(_layer: Any, _args: Any, output: Any) -> None:
        ask()
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            hidden.register_hook(backward)

    handles = [layer.register_forward_hook(forward) for layer in model.layers]
    before, model.check = model.check, ask
    try:
        yield
    finally:
        model.check = before
        for handle in handles:
            handle.remove()

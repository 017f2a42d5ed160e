"""The optimizer of a round: two learning rates, a schedule, clipping; state for what is trained, alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from edge_sdk.errors import MechanismError
from edge_sdk.protocol.spec import TrainSpec
from edge_sdk.training.adamw8bit import AdamW8bit

__all__ = ["LossScale", "RoundOptimizer", "rate_share"]


def rate_share(step: int, spec: TrainSpec, steps: int) -> float:
    """Share of the learning rate at a step, counted from 1, of a round of ``steps``.

    It rises in a line over ``warmup_steps``; then it stays (``constant``), or falls in a line and would be
    0 one step after the last (``linear``). Optimizer state and schedule begin anew with every round.
    """
    if step <= spec.warmup_steps:
        return step / (spec.warmup_steps + 1)
    if spec.schedule == "linear":
        return max(0.0, (steps - step + 1) / max(1, steps - spec.warmup_steps))
    return 1.0


class RoundOptimizer:
    """Made anew for every round. LoRA factors and head have a learning rate each; biases do not decay.

    Args:
        trained: what may move, by part key (``dense.`` begins the head's). Frozen parts are never seen
            here: neither state nor weight decay can reach them.
        steps: of the round.
        generator: on the parameters' device; draws the rounding of 8-bit moments.

    Raises:
        MechanismError: an optimizer that does not run here, with the reason.
    """

    def __init__(
        self, trained: Mapping[str, Any], spec: TrainSpec, *, steps: int, generator: Any = None
    ) -> None:
        groups: dict[tuple[bool, bool], list[Any]] = {}
        for key, parameter in trained.items():
            groups.setdefault((key.startswith("dense."), parameter.dim() > 1), []).append(parameter)
        self._parameters = list(trained.values())
        self._spec = spec
        self._steps = steps
        self._step = 0
        made = [
            {
                "params": parameters,
                "lr": spec.head_learning_rate if dense else spec.learning_rate,
                "weight_decay": spec.weight_decay if decays else 0.0,
            }
            for (dense, decays), parameters in groups.items()
        ]
        self._inner = _made(spec.optimizer, made, self._parameters, generator)
        self._rates = [group["lr"] for group in self._inner.param_groups]

    @property
    def state_bytes(self) -> int:
        """What the state holds now."""
        return sum(_bytes(value) for state in self._inner.state.values() for value in state.values())

    def step(self, scale: LossScale | None = None) -> bool:
        """Clips, steps at the rate of this step, and clears the gradients.

        ``scale``: of the loss that the gradients are of. Where it made them infinite nothing moves: False,
        and the step is to be done again, with the smaller scale.

        Raises MechanismError where no smaller one is left.
        """
        finite = scale is None or scale.take_out(self._parameters)
        if finite:
            self._step += 1
            torch.nn.utils.clip_grad_norm_(self._parameters, self._spec.clip_norm, foreach=False)
            share = rate_share(self._step, self._spec, self._steps)
            for group, rate in zip(self._inner.param_groups, self._rates, strict=True):
                group["lr"] = rate * share
            self._inner.step()
        self._inner.zero_grad(set_to_none=True)
        return finite

    def close(self) -> None:
        """Gives gradients and state back."""
        self._inner.zero_grad(set_to_none=True)
        self._inner.state.clear()


class LossScale:
    """Keeps gradients within fp16, where they are computed in it: the loss times a power of two.

    Halved when a gradient overflows, down to 1; doubled after so many steps without. bf16 and fp32 need none.
    """

    def __init__(self, value: float = 2.0**14, patience: int = 200) -> None:
        self.value = value
        self._patience = patience
        self._calm = 0

    def take_out(self, parameters: list[Any]) -> bool:
        """Divides all gradients by the scale; False, and a smaller scale, where one is not finite.

        Raises MechanismError where that is so at a scale of 1.
        """
        finite = True
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self.value)
                finite = finite and bool(torch.isfinite(parameter.grad).all())
        self._calm = self._calm + 1 if finite else 0
        if not finite and self.value <= 1.0:
            raise MechanismError(
                "the gradients of a step leave the range of fp16, however small the loss is made",
                "hold the base in bf16 or fp32 on this device (trainer.base_precision)",
            )
        if not finite:
            self.value /= 2.0
        elif self._calm % self._patience == 0:
            self.value = min(2.0**24, self.value * 2.0)
        return finite


def _made(name: str, groups: list[dict[str, Any]], parameters: list[Any], generator: Any) -> Any:
    if name == "adamw":
        return torch.optim.AdamW(groups, foreach=False)
    if name == "sgd":
        return torch.optim.SGD(groups, foreach=False)
    if name == "adamw8bit":
        return AdamW8bit(groups, generator=generator)
    if name == "paged-adamw8bit":
        return _paged(groups, parameters)
    raise MechanismError(f"this trainer has no optimizer {name!r}", "take adamw, adamw8bit or sgd")


def _paged(groups: list[dict[str, Any]], parameters: list[Any]) -> Any:
    """bitsandbytes' own: state in unified memory, which CUDA moves to the host where the GPU runs short."""
    if any(parameter.device.type != "cuda" for parameter in parameters):
        raise MechanismError(
            "the optimizer paged-adamw8bit pages between a GPU and its host, and this trains on the CPU",
            "set training.optimizer = adamw8bit: its state is as small",
        )
    try:
        from bitsandbytes.optim import PagedAdamW8bit
    except ImportError as missing:
        raise MechanismError(
            "the optimizer paged-adamw8bit needs bitsandbytes, which is not installed",
            "pip install 'edge-sdk[bnb]', or set training.optimizer = adamw8bit",
        ) from missing
    return PagedAdamW8bit(groups)


def _bytes(value: Any) -> int:
    if isinstance(value, tuple):
        return sum(_bytes(item) for item in value)
    return int(value.numel() * value.element_size()) if isinstance(value, torch.Tensor) else 0

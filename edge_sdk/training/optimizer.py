"""The optimizer of a round: two learning rates, linear warm-up, clipping; state for tuned parts alone."""

from __future__ import annotations

from typing import Any

import torch

from edge_sdk.protocol.spec import TrainSpec
from edge_sdk.training.model import TunableModel

__all__ = ["RoundOptimizer"]


class RoundOptimizer:
    """Made anew for every round. LoRA factors and head have a learning rate each; biases do not decay."""

    def __init__(self, model: TunableModel, tuned: list[str], spec: TrainSpec) -> None:
        groups: dict[tuple[bool, bool], list[Any]] = {}
        for key in tuned:
            parameter = model.parts[key]
            groups.setdefault((key.startswith("dense."), parameter.dim() > 1), []).append(parameter)
        self._parameters = [model.parts[key] for key in tuned]
        self._spec = spec
        self._step = 0
        made = [
            {
                "params": parameters,
                "lr": spec.head_learning_rate if dense else spec.learning_rate,
                "weight_decay": spec.weight_decay if decays else 0.0,
            }
            for (dense, decays), parameters in groups.items()
        ]
        if spec.optimizer == "adamw":
            self._inner: Any = torch.optim.AdamW(made, foreach=False)
        else:
            self._inner = torch.optim.SGD(made, foreach=False)
        self._rates = [group["lr"] for group in self._inner.param_groups]

    def step(self) -> None:
        """Clips, steps at the rate of this step, and clears the gradients."""
        torch.nn.utils.clip_grad_norm_(self._parameters, self._spec.clip_norm, foreach=False)
        self._step += 1
        warm = min(1.0, self._step / (self._spec.warmup_steps + 1))
        for group, rate in zip(self._inner.param_groups, self._rates, strict=True):
            group["lr"] = rate * warm
        self._inner.step()
        self._inner.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Gives gradients and state back."""
        self._inner.zero_grad(set_to_none=True)
        self._inner.state.clear()

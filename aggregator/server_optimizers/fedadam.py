"""FedAdam: the merged change, with momentum, scaled by how large changes of the value have been.

    m <- beta1 m + (1 - beta1) change ;   v <- beta2 v + (1 - beta2) change²
    theta <- theta + eta m / (sqrt(v) + tau)

Adaptive Federated Optimization, Reddi et al., 2021: no bias correction, and v begins at tau². The default
rate is ours, for LoRA's factors: a value moves by about so much a round once its changes agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.merging.base import Doubles
from aggregator.server_optimizers.base import ServerOptimizer, State

__all__ = ["OPTIMIZER", "FedAdam"]


@dataclass(frozen=True)
class FedAdam(ServerOptimizer):
    server_learning_rate: float = 1e-2
    momentum: float = 0.9
    second_moment: float = 0.99
    adaptivity: float = 1e-3

    name = "fedadam"
    states = ("momentum", "second-moment")

    def begin(self, state: str) -> float:
        return 0.0 if state == "momentum" else self.adaptivity**2

    def step(self, change: Doubles, state: State) -> Doubles:
        first, second = state["momentum"], state["second-moment"]
        first = self.momentum * first + (1 - self.momentum) * change
        second = self.second_moment * second + (1 - self.second_moment) * change**2
        state["momentum"], state["second-moment"] = first, second
        step: Doubles = self.server_learning_rate * first / (np.sqrt(second) + self.adaptivity)
        return step


OPTIMIZER = FedAdam()

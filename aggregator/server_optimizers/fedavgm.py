"""FedAvgM: the merged change with momentum.

    v <- beta v + change ;   theta <- theta + eta v

Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification, Hsu et al.,
2019.
"""

from __future__ import annotations

from dataclasses import dataclass

from aggregator.merging.base import Doubles
from aggregator.server_optimizers.base import ServerOptimizer, State

__all__ = ["OPTIMIZER", "FedAvgM"]


@dataclass(frozen=True)
class FedAvgM(ServerOptimizer):
    server_learning_rate: float = 1.0
    momentum: float = 0.9

    name = "fedavgm"
    states = ("momentum",)

    def begin(self, state: str) -> float:  # noqa: ARG002 - it has one
        return 0.0

    def step(self, change: Doubles, state: State) -> Doubles:
        state["momentum"] = self.momentum * state["momentum"] + change
        return self.server_learning_rate * state["momentum"]


OPTIMIZER = FedAvgM()

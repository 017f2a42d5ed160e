"""What a method is: one implementation named for each mechanism, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field

from aggregator.merging.base import MergeRule
from aggregator.planner.allocation import Allocation
from edge_sdk.config.run import RunConfig
from edge_sdk.errors import MechanismError
from edge_sdk.protocol.spec import TrainSpec

__all__ = ["Method"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A federated method. Devices get what it compiles to, a ``TrainSpec`` and candidates; never its code.

    A method of your own is an instance of this class, anywhere: see ``finding.find_method``.

    Attributes:
        name: what ``run.method`` calls it; told in status and summaries.
        allocation: which device trains how deep, with how many quantized layers.
        merge: how updates become the next version.
        activation_bits: of quantized activation stores.
        codec: how updates travel.
        error_feedback: devices keep what the codec lost and add it to their next update.
        recompute, base_precision: the same for all candidates.
        objective, factors, error_adapter, phases, reinit, fold, privacy, attention: see ``TrainSpec``.
    """

    name: str
    allocation: Allocation
    merge: MergeRule
    activation_bits: int = 8
    codec: str = "int8"
    error_feedback: bool = False
    recompute: str = "none"
    base_precision: str = "fp32"
    objective: str = "cross_entropy"
    factors: str = "AB"
    error_adapter: str = "none"
    phases: str = "single"
    reinit: str = "none"
    fold: str = "none"
    privacy: str = "none"
    attention: str = "sdpa"
    summary: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.error_feedback and self.privacy != "none":
            raise MechanismError(
                f"method {self.name!r} joins error feedback with privacy {self.privacy!r}",
                "what the codec lost would carry a round's data past its noise: drop one of the two",
            )

    def spec(self, config: RunConfig) -> TrainSpec:
        """What devices are told of the mathematics: the mechanisms from here, the figures from the config."""
        training = config.training
        return TrainSpec(
            seed=config.run.seed,
            objective=self.objective,
            optimizer=training.optimizer,
            learning_rate=training.learning_rate,
            head_learning_rate=training.head_learning_rate,
            weight_decay=training.weight_decay,
            clip_norm=training.clip_norm,
            warmup_steps=training.warmup_steps,
            factors=self.factors,
            error_feedback=self.error_feedback,
            error_adapter=self.error_adapter,
            phases=self.phases,
            reinit=self.reinit,
            fold=self.fold,
            privacy=self.privacy,
            attention=self.attention,
        )

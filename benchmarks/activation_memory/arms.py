"""What is compared: each arm is a line of data."""

from __future__ import annotations

from dataclasses import dataclass

from edge_sdk.training.activations.plan import Form, LayerPlan, Recompute

__all__ = ["ARMS", "Arm", "find_arms"]

INT8, INT4, INT2 = Form(8), Form(4), Form(2)
INT8_DRAWN, INT4_DRAWN = Form(8, "stochastic"), Form(4, "stochastic")


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        kind: its family in plot and claims: plain, checkpoint, lora-fa, exact, int8, int4, int2, layer or
            mixture.
        every: torch's gradient checkpointing over groups of so many layers; 0: none.
        plans: shares of the layers, the lowest first, and how each of them keeps its activations.
        factors: the LoRA factors that are trained.
        chunked_loss: the loss of a causal LM without ever holding its logits.
        only: shapes that it is measured on; empty: all.
    """

    name: str
    kind: str
    every: int = 0
    plans: tuple[tuple[float, LayerPlan], ...] = ()
    factors: str = "AB"
    chunked_loss: bool = True
    only: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        return bool(self.plans)

    @property
    def levers(self) -> bool:
        """Whether something is made again, and all factors are trained."""
        return self.factors == "AB" and any(plan.recompute != "none" for _, plan in self.plans)

    @property
    def stochastic(self) -> bool:
        return any(plan.form is not None and plan.form.rounding == "stochastic" for _, plan in self.plans)

    @property
    def bits(self) -> int:
        """The fewest that anything is kept in; 32 where nothing is packed."""
        return min((plan.form.bits for _, plan in self.plans if plan.form is not None), default=32)

    def layer_plans(self, layers: int) -> list[LayerPlan]:
        """One plan a layer, the lowest first."""
        result: list[LayerPlan] = []
        done = 0.0
        for share, plan in self.plans:
            done += share
            result += [plan] * (round(done * layers) - len(result))
        return result


def _all(name: str, kind: str, form: Form | None, recompute: Recompute, factors: str = "AB") -> Arm:
    return Arm(name, kind, plans=((1.0, LayerPlan(form, recompute)),), factors=factors)


def _two(name: str, low: LayerPlan, high: LayerPlan, share: float) -> Arm:
    """``share`` of the layers, the lowest, by ``low``; what works hard there works when little is kept."""
    return Arm(name, "mixture", plans=((share, low), (1.0 - share, high)))


ARMS: tuple[Arm, ...] = (
    Arm("plain", "plain", chunked_loss=False),
    Arm("plain, chunked loss", "plain", only=("llama",)),
    *(Arm(f"checkpoint every {k}", "checkpoint", every=k, chunked_loss=False) for k in (1, 2, 3, 4, 6)),
    Arm("checkpoint every 1, chunked loss", "checkpoint", every=1, only=("llama",)),
    Arm("checkpoint every 2, chunked loss", "checkpoint", every=2, only=("llama",)),
    Arm("checkpoint every 4, chunked loss", "checkpoint", every=4, only=("llama",)),
    Arm("LoRA-FA", "lora-fa", factors="B", chunked_loss=False),
    _all("exact, outputs", "exact", None, "outputs"),
    _all("exact, inner", "exact", None, "inner"),
    _all("int8, none", "int8", INT8, "none"),
    _all("int8, outputs", "int8", INT8, "outputs"),
    _all("int8, inner", "int8", INT8, "inner"),
    _all("int4, outputs", "int4", INT4, "outputs"),
    _all("int4, inner", "int4", INT4, "inner"),
    _all("int4 drawn, outputs", "int4", INT4_DRAWN, "outputs"),
    _all("int2, inner", "int2", INT2, "inner"),
    _all("int4, inner, LoRA-FA", "lora-fa", INT4, "inner", "B"),
    _all("layer, exact", "layer", None, "layer"),
    _all("layer, int8", "layer", INT8, "layer"),
    _all("layer, int4", "layer", INT4, "layer"),
    _two("1/4 layer int4 + int4 inner", LayerPlan(INT4, "layer"), LayerPlan(INT4, "inner"), 0.25),
)


def find_arms(shape: str, names: list[str] | None = None) -> list[Arm]:
    """The arms of a shape, or those of them whose name has one of ``names`` in it; plain is always there."""
    mine = [arm for arm in ARMS if not arm.only or shape in arm.only]
    if not names:
        return mine
    return [arm for arm in mine if arm.name == "plain" or any(name in arm.name for name in names)]

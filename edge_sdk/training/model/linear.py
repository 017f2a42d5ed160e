"""A linear with a frozen weight in any precision and a LoRA pair: y = x Wᵀ + b + s (x Aᵀ) Bᵀ.

One autograd function instead of five operations: the pair's product is added in place, and of the input
only what the trained factors need is saved. With A frozen (LoRA-FA) that is (rows, rank).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from edge_sdk.training.precision.weights import FrozenWeight

__all__ = ["LoraLinear"]


class LoraLinear(nn.Module):
    """Attributes: ``A`` (rank, in) and ``B`` (out, rank), float32; ``scaling``; ``frozen``; ``bias`` or None.

    ``tune`` says which of A and B are trained, and in which slots; ``trained`` are the tensors that an
    optimizer may move. ``keeper``: the activation store's, while it is over the layer.
    """

    keeper: Any = None

    def __init__(self, frozen: FrozenWeight, bias: Any, *, rank: int, scaling: float) -> None:
        super().__init__()
        self.frozen = frozen
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.scaling = scaling
        self.A = nn.Parameter(torch.zeros(rank, self.in_features), requires_grad=False)
        self.B = nn.Parameter(torch.zeros(self.out_features, rank), requires_grad=False)
        self._slots: Any = None
        self._A: Any = None
        self._B: Any = None

    def tune(self, factors: str = "AB", slots: Sequence[int] | None = None) -> None:
        """Trains ``factors`` (``AB``, ``A``, ``B``, or none: "") in ``slots`` (None: all)."""
        self._settle()
        self.A.grad = self.B.grad = None
        whole = slots is None or len(slots) == self.A.shape[0]
        self.A.requires_grad_("A" in factors and whole)
        self.B.requires_grad_("B" in factors and whole)
        if not whole and factors:
            self._slots = torch.as_tensor(slots, dtype=torch.long, device=self.A.device)
            # split, not masked: moments and weight decay must not reach the other slots
            self._A = nn.Parameter(self.A.detach()[self._slots], requires_grad="A" in factors)
            self._B = nn.Parameter(self.B.detach()[:, self._slots], requires_grad="B" in factors)

    def trained(self) -> dict[str, Any]:
        """The trained tensors by factor."""
        pair = {"A": self.A, "B": self.B} if self._slots is None else {"A": self._A, "B": self._B}
        return {name: tensor for name, tensor in pair.items() if tensor.requires_grad}

    def factors(self) -> tuple[Any, Any]:
        """A (rank, in) and B (out, rank) as they stand; differentiable where slots are trained."""
        if self._slots is None:
            return self.A, self.B
        A, B = self.A.index_copy(0, self._slots, self._A), self.B.index_copy(1, self._slots, self._B)
        if self.keeper is not None:
            self.keeper.leave_exact(A, B)  # put together anew, and yet no activations
        return A, B

    def _settle(self) -> None:
        """Trained slots go back into the whole factors."""
        if self._slots is not None:
            with torch.no_grad():
                self.A[self._slots] = self._A.detach()
                self.B[:, self._slots] = self._B.detach()
        self._slots = self._A = self._B = None

    def forward(self, x: Any) -> Any:
        A, B = self.factors()
        if torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad):
            return _LoraFunction.apply(x, A, B, self)
        return lora_forward(self, x, A, B)[0]

    def extra_repr(self) -> str:
        return (
            f"{self.in_features} -> {self.out_features}, rank {self.A.shape[0]}, {type(self.frozen).__name__}"
        )


def lora_forward(module: LoraLinear, x: Any, A: Any, B: Any, frozen: Any = None) -> tuple[Any, Any]:
    """y (..., out), and A xᵀ (rank, rows).

    What is as narrow as the rank is kept slot-major, (rank, rows): with the long axis last, these products
    take a half to an eighth of the time of their transposes.

    Args:
        frozen: in the place of ``module.frozen``, where the caller holds its weight unpacked.
    """
    y = (frozen or module.frozen)(x, module.bias)
    if not A.shape[0]:
        return y, None
    down = A.detach().to(x.dtype) @ x.reshape(-1, x.shape[-1]).t()
    y.view(-1, y.shape[-1]).addmm_(down.t(), B.detach().to(x.dtype).t(), alpha=module.scaling)
    return y, down


def lora_backward(
    module: LoraLinear, grad: Any, x: Any, down: Any, A: Any, B: Any, needs: Any, frozen: Any = None
) -> Any:
    """Gradients of x, A and B; None where not needed. x may be None where A's gradient is not needed.

    Args:
        grad: (..., out). x: (..., in). down: (rank, rows). needs: three truth values.
        frozen: as in ``lora_forward``.
    """
    wants_x, wants_A, wants_B = needs
    rows = grad.reshape(-1, grad.shape[-1])
    grad_x: Any = None
    grad_A = grad_B = None
    if wants_x or wants_A:
        up = B.detach().to(grad.dtype).t() @ rows.t()  # (rank, rows)
        if wants_x:
            grad_x = (frozen or module.frozen).input_grad(rows)
        if wants_x and A.shape[0]:
            grad_x.addmm_(up.t(), A.detach().to(grad.dtype), alpha=module.scaling)
        if wants_A:
            grad_A = (up @ x.reshape(-1, x.shape[-1])).to(A.dtype).mul_(module.scaling)
    if wants_B:
        grad_B = (down @ rows).to(B.dtype).mul_(module.scaling).t()
    if grad_x is not None:
        grad_x = grad_x.view(*grad.shape[:-1], -1)
    return grad_x, grad_A, grad_B


class _LoraFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, A: Any, B: Any, module: LoraLinear) -> Any:
        y, down = lora_forward(module, x, A, B)
        # A's gradient alone needs x: without it nothing as wide as the layer is saved
        ctx.module = module
        ctx.save_for_backward(x if A.requires_grad else None, down if B.requires_grad else None, A, B)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, down, A, B = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        return (*lora_backward(ctx.module, grad, x, down, A, B, needs), None)

"""Cross entropy over a large vocabulary, without ever holding its logits.

The output layer and the softmax are one autograd function that works through the learnt places a few at a
time. The gradient of the hidden states is made in the forward pass, where the logits of a few places are at
hand, and is all that is kept: (learnt places, hidden). Places that are not learnt cost nothing.

    loss = 1/n Σ_i (log Σ_v exp z_iv - z_i,t(i)),   z = h Wᵀ + b,   ∂loss/∂h = 1/n (softmax z - e_t) W
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from edge_sdk.training.precision.weights import Dense, FrozenWeight

__all__ = ["SCRATCH_BYTES", "Output", "score_tokens", "token_loss"]

SCRATCH_BYTES = 32 << 20
"""What logits, and rows of a weight that is not held as it is computed with, may take."""
_WEIGHT_SHARE = 4
"""One part in so many of the scratch is for such rows."""


@dataclass(frozen=True)
class Output:
    """The frozen output layer: weight (vocabulary, hidden), bias (vocabulary,) or None. ``check`` is called
    between parts; raises to end the computation."""

    weight: FrozenWeight
    bias: Any = None
    check: Callable[[], None] = lambda: None


def token_loss(
    hidden: Any, output: Output, targets: Any, count: int | None = None, *, scratch: int = SCRATCH_BYTES
) -> Any:
    """Mean loss of the learnt places, float32, differentiable in ``hidden``.

    Args:
        hidden: (..., hidden), any floating dtype; logits are computed in it, the softmax in float32.
        targets: (...) int64, an id or -100.
        count: divides the sum; None: the number of learnt places.
        scratch: bytes for logits.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    flat = targets.reshape(-1)
    places = (flat >= 0).nonzero().squeeze(1)
    divisor = float(places.numel() if count is None else count)
    return _TokenLoss.apply(rows, output, places, flat[places], divisor, scratch)


def score_tokens(
    hidden: Any, output: Output, targets: Any, *, scratch: int = SCRATCH_BYTES
) -> tuple[int, float, int]:
    """Learnt places, the sum of their losses, and how many have their target as the likeliest id."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    flat = targets.reshape(-1)
    places = (flat >= 0).nonzero().squeeze(1)
    loss, right = 0.0, 0
    with torch.no_grad():
        for part in _parts(rows, output, places, flat[places], scratch):
            right += int((part.logits.argmax(1) == part.targets).sum())
            loss += float(part.losses().double().sum())
    return places.numel(), loss, right


class _Part:
    """A few places: their logits, (places, vocabulary) float32, which ``losses`` turns into exponentials."""

    def __init__(self, places: Any, targets: Any, hidden: Any, logits: Any, step: int) -> None:
        self.places = places
        self.targets = targets
        self.hidden = hidden
        self.logits = logits
        self.step = step
        self._sums: Any = None

    def losses(self) -> Any:
        """-log softmax at the target, (places,). The logits are used up."""
        z = self.logits
        highest = z.amax(1, keepdim=True)
        wanted = z.gather(1, self.targets.unsqueeze(1)) - highest
        z.sub_(highest).exp_()
        self._sums = z.sum(1, keepdim=True)
        return (self._sums.log() - wanted).squeeze(1)

    def error(self) -> Any:
        """softmax - one at the target, (places, vocabulary), in place of the exponentials."""
        z = self.logits.div_(self._sums)
        return z.scatter_add_(1, self.targets.unsqueeze(1), torch.full_like(self._sums, -1.0))


def _parts(rows: Any, output: Output, places: Any, targets: Any, scratch: int) -> Iterator[_Part]:
    """All places with their logits, as many at a time as the scratch holds; each must be done with before
    the next is asked for."""
    weight = output.weight
    vocabulary = weight.out_features
    direct = _ready(weight, rows.dtype)
    room = scratch if direct else scratch - scratch // _WEIGHT_SHARE
    copies = 1 if rows.dtype == torch.float32 else 1 + rows.element_size() / 4
    most = max(1, min(places.numel(), int(room / (4 * vocabulary * copies))))
    step = vocabulary
    if not direct:
        step = max(1, scratch // _WEIGHT_SHARE // (weight.in_features * rows.element_size()))
    buffer = torch.empty(most, vocabulary, dtype=torch.float32, device=rows.device)
    for begin in range(0, places.numel(), most):
        output.check()
        chosen = places[begin : begin + most]
        hidden = rows[chosen]
        logits = buffer[: len(chosen)]
        for start, stop, part in _weight_rows(weight, rows.dtype, step):
            if hidden.dtype == torch.float32:
                torch.mm(hidden, part.t(), out=logits[:, start:stop])
            else:
                logits[:, start:stop] = hidden @ part.t()
        if output.bias is not None:
            logits += output.bias
        yield _Part(chosen, targets[begin : begin + most], hidden, logits, step)


def _ready(weight: FrozenWeight, dtype: Any) -> bool:
    """Whether the weight is held in the dtype that is computed in."""
    return isinstance(weight, Dense) and weight.weight.dtype == dtype


def _weight_rows(weight: FrozenWeight, dtype: Any, step: int) -> Iterator[tuple[int, int, Any]]:
    """The weight's rows [start, stop), (stop - start, hidden), ``step`` at a time."""
    for start in range(0, weight.out_features, step):
        stop = min(start + step, weight.out_features)
        yield start, stop, weight.dense_rows(start, stop, dtype)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Any, output: Output, places: Any, targets: Any, divisor: float, scratch: int
    ) -> Any:
        # Where most places are learnt, the gradient is made where it is wanted in the end.
        spread = 2 * len(places) >= len(rows)
        made = None
        if ctx.needs_input_grad[0]:
            made = torch.zeros_like(rows) if spread else rows.new_empty(len(places), rows.shape[1])
        total, done = 0.0, 0
        for part in _parts(rows, output, places, targets, scratch):
            total += float(part.losses().sum(dtype=torch.float64))
            if made is not None:
                at = part.places if spread else slice(done, done + len(part.places))
                made[at] = _back(part.error(), output.weight, rows.dtype, part.step).to(rows.dtype)
                done += len(part.places)
        # Not saved as tensors: nothing that packs activations may touch a gradient. It is divided last, so
        # that half precision holds it.
        ctx.made, ctx.spread, ctx.places, ctx.rows, ctx.divisor = made, spread, places, len(rows), divisor
        return torch.tensor(total / divisor, dtype=torch.float32, device=rows.device)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        made, ctx.made = ctx.made, None
        if made is None:
            raise RuntimeError("the loss was differentiated twice: its gradient is kept for once")
        made.mul_((grad / ctx.divisor).to(made.dtype))
        if not ctx.spread:
            whole = made.new_zeros(ctx.rows, made.shape[1])
            whole[ctx.places] = made
            made = whole
        return made, None, None, None, None, None


def _back(error: Any, weight: FrozenWeight, dtype: Any, step: int) -> Any:
    """error W, (places, hidden), summed up in float32."""
    total: Any = None
    for start, stop, rows in _weight_rows(weight, dtype, step):
        part = error[:, start:stop].to(dtype) @ rows
        total = part.float() if total is None else total.add_(part)
    return total

"""Attention inside the store: keeps packed queries, keys and values, nothing of the size of a square.

Forward is transformers' own call of torch's fused kernel, to the bit. That kernel's backward makes the
probabilities again from saved queries and keys *and a saved sum*: of rounded queries and keys these no
longer sum to one, and with peaked attention the gradient is lost at 4 bits. Here backward makes scores and
their softmax anew from the very values that were kept, so that rounding moves the probabilities a little
and never their sum; where scores are large, queries and keys get more bits.
With P = softmax(s q kᵀ + mask) and o = P v:

    ∂v = Pᵀ ∂o,  ∂P = ∂o vᵀ,  ∂S = P (∂P - rowsum(P ∂P)),  ∂q = s ∂S k,  ∂k = s ∂Sᵀ q

by the fused kernel run again, or where rows are long, on processors, in blocks of heads or of query rows,
which take less memory and more time.
The output is offered as a recipe: who saves it has it computed from the same packed values. It is asked for
just before its own gradient is: where all fits in little memory, one run of the kernel serves both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from edge_sdk.errors import BaseModelError
from edge_sdk.planning.memory import AGAIN_BYTES, KERNEL_BYTES, SCORES
from edge_sdk.training.activations.store import Held

__all__ = ["NAME", "attention", "register"]

NAME = "edge"
"""What to load a model with: ``attn_implementation=NAME``, after ``register()``."""


def register() -> None:
    """Makes ``attention`` known to transformers under ``NAME``, with the masks that sdpa takes."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Any, None]:
    """transformers' attention function.

    With ``module.keeper`` None or its plan plain: sdpa itself. So too, its tensors exact, where
    what it computes is not the plain formula: dropout, a mask or position bias that is trained, a cache.

    Args:
        query: (batch, heads, queries, size). key, value: (batch, kv heads, keys, size).
        attention_mask: boolean (true: seen) or added to the scores, broadcast to
            (batch, heads, queries, keys); a sliding window is in it.

    Returns:
        (batch, queries, heads, size), None.

    Raises:
        BaseModelError: capped scores or attention sinks, which sdpa would leave out.
    """
    for word in ("softcap", "s_aux"):
        if kwargs.get(word) is not None:
            raise BaseModelError(
                f"the attention of {type(module).__name__} has {word}, which torch's fused attention has not",
                'load this base with attn_implementation="eager"',
            )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1

    def plain(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return sdpa_attention_forward(
            module, q, k, v, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )[0]

    keeper = getattr(module, "keeper", None)
    if keeper is None or not keeper.packs_attention or not torch.is_grad_enabled():
        return plain(query, key, value, attention_mask), None
    if (
        dropout
        or kwargs.get("position_bias") is not None
        or kwargs.get("cache") is not None
        or (attention_mask is not None and attention_mask.requires_grad)
        or (causal and query.shape[2] != key.shape[2])
    ):
        with keeper.exact():
            return plain(query, key, value, attention_mask), None
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return _Attention.apply(query, key, value, _Call(plain, attention_mask, scale, causal, keeper)), None


@dataclass(frozen=True)
class _Call:
    plain: Callable[..., Any]
    mask: Any
    scale: float
    causal: bool
    keeper: Any

    def mask_of(self, start: int, stop: int) -> Any:
        """The mask of some rows of the batch."""
        if self.mask is None or self.mask.shape[0] == 1:
            return self.mask
        return self.mask[start:stop]


def _hold(q: Any, k: Any, v: Any, call: _Call) -> tuple[Held, Held, Held]:
    keeper, form = call.keeper, call.keeper.plan.form
    if form is None:
        return keeper.hold(q), keeper.hold(k), keeper.hold(v)
    # the softmax does not see what all keys share, and rounding is finer without it
    k = k - k.mean(dim=2, keepdim=True)
    bits = _bits_for_scores(form.bits, q, k, call.scale)
    if bits > 8:
        return Held(_half(q), None), Held(_half(k), None), keeper.hold(v)
    finer = form if bits == form.bits else replace(form, bits=bits, group=0)
    return keeper.hold(q, finer), keeper.hold(k, finer), keeper.hold(v)


_NOISE = {8: 0.0065, 4: 0.11, 2: 0.55}
"""Noise of a score by bits, for q and k of normal numbers, as a share of the scores' own spread."""

_TOLERATED = {8: 0.03, 4: 0.25, 2: 0.5}
"""Noise of a score that adds little to the error that a layer's other values have at so many bits."""


def _bits_for_scores(bits: int, q: Any, k: Any, scale: float) -> int:
    """Bits for queries and keys: more where scores are so large that their noise would move the softmax.

    The spread of the scores is taken from the norms of q and k by head, as of independent ones.
    """
    norms = (_squares(q).unflatten(0, (k.shape[1], -1)).mean(dim=1) * _squares(k)).mean()
    spread = scale * float(norms / q.shape[3]) ** 0.5
    enough = (b for b in (2, 4, 8) if b >= bits and _NOISE[b] * spread <= _TOLERATED[bits])
    return next(enough, 16)


def _squares(values: Any) -> Any:
    """(batch, heads, positions, size) -> (heads,) mean squared norm."""
    norms = torch.linalg.vector_norm(values.transpose(1, 2), dim=3, dtype=torch.float32)
    return norms.square_().mean(dim=(0, 1))


def _half(values: Any) -> Any:
    return values.half() if values.dtype == torch.float32 else values


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, call: _Call) -> Any:
        out = call.plain(q, k, v, call.mask)
        ctx.call, ctx.held = call, _hold(q, k, v, call)
        ctx.again = _Again(ctx.held, call)
        call.keeper.offer(out, ctx.again.output)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        grads = ctx.again.gradients(grad)
        if grads is None:
            grads = _gradients(ctx.held, grad, ctx.call)
        for h in ctx.held:
            h.release()
        return (*grads, None)


def _gradients(held: tuple[Held, Held, Held], grad: Any, call: _Call) -> tuple[Any, ...]:
    """Of queries, keys and values, a few rows of the batch at a time."""
    batch = held[0].shape[0]
    by_blocks = grad.device.type == "cpu" and _row_bytes(held) > KERNEL_BYTES
    if by_blocks and batch == 1:
        # what is unpacked is not needed once its gradient is there: one room for both
        grads = tuple(h.own().to(grad.dtype) for h in held)
        q, k, v = (g[0] for g in grads)
        _by_blocks(q, k, v, grad[0].transpose(0, 1), call.mask, call, q, k, v)
        return grads
    grads = tuple(_like_given(h, grad) for h in held)
    step = _slab(held, grad.device)
    for start in range(0, batch, step):
        stop = start + step
        q, k, v = (h.part(start, stop).to(grad.dtype) for h in held)
        mask, given = call.mask_of(start, stop), grad[start:stop]
        slabs = tuple(g[start:stop] for g in grads)
        if by_blocks:
            dq, dk, dv = (s[0] for s in slabs)
            _by_blocks(q[0], k[0], v[0], given[0].transpose(0, 1), mask, call, dq, dk, dv)
        else:
            _by_kernel(q, k, v, given, mask, call, slabs)
    return grads


def _slab(held: Any, device: Any) -> int:
    """Rows of the batch unpacked at a time: few, for memory; not so few that a GPU waits for its launches."""
    if device.type == "cpu":
        return max(1, KERNEL_BYTES // _row_bytes(held))
    return -(-int(held[0].shape[0]) // 4)


def _row_bytes(held: Any) -> int:
    """Of the queries of one row of the batch, or of its keys where there are more, in float32."""
    return max(4 * int(math.prod(h.shape[1:])) for h in held)


def _like_given(held: Any, grad: Any) -> Any:
    """Room for a gradient (batch, heads, positions, size), positions outermost as projections give them."""
    batch, heads, positions, size = held.shape
    return torch.empty((batch, positions, heads, size), dtype=grad.dtype, device=grad.device).transpose(1, 2)


class _Again:
    """The output again, from what is kept; where that is small, with its graph, for its gradient."""

    def __init__(self, held: tuple[Held, Held, Held], call: _Call) -> None:
        self._held, self._call = held, call
        self._made: tuple[tuple[Any, ...], Any] | None = None

    def output(self) -> Any:
        held, call = self._held, self._call
        batch, dtype = held[0].shape[0], held[2].dtype
        small = sum(math.prod(h.shape) for h in held) * dtype.itemsize <= AGAIN_BYTES
        step = batch if small else _slab(held, held[0].device)
        made = []
        for start in range(0, batch, step):
            stop = start + step
            parts = tuple(h.part(start, stop).to(dtype).detach().requires_grad_(small) for h in held)
            with torch.set_grad_enabled(small):
                made.append(call.plain(*parts, call.mask_of(start, stop)))
            if small:
                self._made = parts, made[0]
        return made[0].detach() if len(made) == 1 else torch.cat(made)

    def gradients(self, grad: Any) -> tuple[Any, ...] | None:
        """Of queries, keys and values, if the output was made with its graph; that is let go of."""
        if self._made is None:
            return None
        (leaves, out), self._made = self._made, None
        return tuple(torch.autograd.grad(out, leaves, grad))


def _by_kernel(q: Any, k: Any, v: Any, grad: Any, mask: Any, call: _Call, into: Any) -> None:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        out = call.plain(*leaves, mask)
    for room, made in zip(into, torch.autograd.grad(out, leaves, grad), strict=True):
        room.copy_(made)


def _by_blocks(q: Any, k: Any, v: Any, grad: Any, mask: Any, call: _Call, dq: Any, dk: Any, dv: Any) -> None:
    """One row of the batch: q, grad, dq (heads, queries, size); k, v, dk, dv (kv heads, keys, size).

    dq, dk and dv may be q, k and v themselves: each block is read for the last time before it is written.
    """
    heads, queries, size = q.shape
    kv_heads, keys, _ = k.shape
    group = heads // kv_heads
    at_once = max(1, min(kv_heads, SCORES // (group * queries * keys)))
    rows = max(1, min(queries, SCORES // (at_once * group * keys)))
    if call.causal and rows == queries > 256:
        rows //= 2
    for first in range(0, kv_heads, at_once):
        kv = slice(first, first + at_once)
        hs = slice(first * group, (first + at_once) * group)
        kf, vf = k[kv].float(), v[kv].float()
        sums = None if rows >= queries else (torch.zeros_like(kf), torch.zeros_like(vf))
        for top in range(0, queries, rows):
            part = slice(top, min(top + rows, queries))
            seen = part.stop if call.causal else keys
            qf, gf = _grouped(q[hs, part], group), _grouped(grad[hs, part], group)
            kp, vp = kf[:, :seen], vf[:, :seen]
            P = torch.baddbmm(qf.new_empty(1), qf, kp.transpose(1, 2), beta=0, alpha=call.scale)
            _mask(P.view(-1, group, part.stop - top, seen), mask, call.causal, hs, part)
            torch.softmax(P, dim=-1, out=P)
            if mask is not None and bool(P[..., 0].isnan().any()):
                P.nan_to_num_(0.0)  # rows that see nothing
            dP = torch.bmm(gf, vp.transpose(1, 2))
            dS = torch._softmax_backward_data(dP, P, -1, torch.float32)
            del dP
            dqf = torch.bmm(dS, kp).mul_(call.scale)
            if sums is None:
                dk[kv] = torch.bmm(dS.transpose(1, 2), qf).mul_(call.scale)
                dv[kv] = torch.bmm(P.transpose(1, 2), gf)
            else:
                sums[0][:, :seen].baddbmm_(dS.transpose(1, 2), qf, alpha=call.scale)
                sums[1][:, :seen].baddbmm_(P.transpose(1, 2), gf)
            dq[hs, part] = dqf.view(-1, group, part.stop - top, size).flatten(0, 1)
        if sums is not None:
            dk[kv], dv[kv] = sums


def _grouped(values: Any, group: int) -> Any:
    """(heads, rows, size) -> (kv heads, group · rows, size), float32."""
    heads, rows, size = values.shape
    return values.reshape(heads // group, group * rows, size).float()


def _mask(scores: Any, mask: Any, causal: bool, heads: slice, rows: slice) -> None:
    """Masks ``scores`` (kv heads, group, rows, keys) in place."""
    if causal:
        n = rows.stop - rows.start
        ahead = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu_(1)
        scores[..., rows.start :].masked_fill_(ahead, float("-inf"))
    elif mask is not None:
        part = mask[0]
        part = part[:, rows] if part.shape[1] > 1 else part
        if part.shape[0] > 1:
            part = part[heads].unflatten(0, scores.shape[:2])
        if part.dtype == torch.bool:
            scores.masked_fill_(part.logical_not(), float("-inf"))
        else:
            scores.add_(part)

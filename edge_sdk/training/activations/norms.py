"""A norm that keeps its output instead of its input.

LayerNorm gives y = w x̂ + b, RMSNorm y = w x̂ (in some families (1 + w) x̂). The linears after a norm keep y
for their LoRA factors anyway: kept once for both, the norm's own share is a number per row. Backward takes
x̂ = (y - b) / w, and with r = 1 / deviation, u = w ∂y:

    LayerNorm:  ∂x = r (u - mean(u) - x̂ mean(u x̂))        RMSNorm:  ∂x = r (u - x̂ mean(u x̂))

Channels whose weight is next to nothing do not tell their x̂: those few are kept beside, exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["KeptNorm", "kept_norm"]

_TINY = 0.05
"""Below this share of the median weight a channel's x̂ is not taken from its output."""

_MOST_TINY = 0.05
"""With a larger share of such channels the norm keeps its input, as it came."""

_BLOCK = 1 << 18
"""Elements that backward takes at a time."""


class KeptNorm(nn.Module):
    """Attributes: ``plain``, the norm as it was; ``keeper``: set around training, None: ``plain`` itself.

    Args:
        plain: a LayerNorm over the last axis, or an RMSNorm with one 1-D ``weight``.
        eps: what is added to the variance.
        centred: whether the mean is taken away (LayerNorm).
        offset: 1 where the weight counts from one, else 0.
    """

    keeper: Any = None

    def __init__(self, plain: Any, *, eps: float, centred: bool, offset: float) -> None:
        super().__init__()
        self.plain = plain
        self.eps, self.centred, self.offset = eps, centred, offset
        weight = self.scale().abs()
        tiny = torch.nonzero(~(weight > _TINY * weight.median())).flatten()
        self.register_buffer("tiny", tiny if tiny.numel() else None, persistent=False)

    def scale(self) -> Any:
        """The factor of x̂, float32."""
        return self.plain.weight.detach().float() + self.offset

    def shift(self) -> Any:
        bias = getattr(self.plain, "bias", None)
        return None if bias is None else bias.detach().float()

    def forward(self, x: Any) -> Any:
        keeper = self.keeper
        if (
            keeper is None
            or keeper.plan.recompute not in ("outputs", "inner")
            or not (torch.is_grad_enabled() and x.requires_grad)
            or any(parameter.requires_grad for parameter in self.plain.parameters())
        ):
            return self.plain(x)
        return _KeptNorm.apply(x, self)


class _KeptNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, norm: KeptNorm) -> Any:
        mean = None
        if norm.centred:
            plain = norm.plain
            y, mean, rstd = torch.native_layer_norm(
                x, plain.normalized_shape, plain.weight, plain.bias, plain.eps
            )
        else:
            y = norm.plain(x)
            square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
            rstd = square.div_(x.shape[-1]).add_(norm.eps).rsqrt_()
        beside = None
        if norm.tiny is not None:
            beside = x[..., norm.tiny].float()
            beside = (beside if mean is None else beside - mean).mul_(rstd)
        ctx.norm, ctx.rstd, ctx.beside = norm, rstd, beside
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (y,) = ctx.saved_tensors
        norm, width = ctx.norm, grad.shape[-1]
        weight, shift = norm.scale(), norm.shift()
        inverse = weight.reciprocal()
        offset = None if shift is None else shift * -inverse
        y, rows = y.reshape(-1, width), grad.reshape(-1, width)
        rstd = ctx.rstd.reshape(-1, 1).float()
        beside = None if ctx.beside is None else ctx.beside.reshape(rows.shape[0], -1)
        result = torch.empty_like(rows)
        zeros, ones = torch.zeros_like(rstd), torch.ones_like(rstd)
        step = max(1, _BLOCK // width)
        for start in range(0, rows.shape[0], step):
            part = slice(start, start + step)
            kept = y[part].float()
            hat = kept * inverse if offset is None else torch.addcmul(offset, kept, inverse)
            if beside is not None:
                hat[:, norm.tiny] = beside[part]
            g = rows[part].float()
            if norm.centred:
                # the native backward of a row whose mean is 0 and whose deviation is 1
                partial, _, _ = torch.ops.aten.native_layer_norm_backward(
                    g, hat, [width], zeros[part], ones[part], weight, None, [True, False, False]
                )
            else:
                scaled = g * weight
                along = (scaled * hat).mean(dim=-1, keepdim=True)
                partial = scaled.addcmul_(hat, along, value=-1)
            result[part] = partial.mul_(rstd[part])
        return result.view(grad.shape), None


def kept_norm(module: Any) -> KeptNorm | str | None:
    """``module`` as a KeptNorm; a reason where it is a norm that cannot be; None where it is none.

    Found by structure: a LayerNorm over one axis, or a module with a 1-D ``weight`` and an ``eps`` that
    gives w x̂ or (1 + w) x̂ on random input.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or list(module.children()):
        return None
    if isinstance(module, nn.LayerNorm):
        return _unless_tiny(KeptNorm(module, eps=module.eps, centred=True, offset=0.0))
    if len(list(module.parameters())) != 1:
        return None
    eps = _eps(module)
    if eps is None:
        return None
    probe = torch.randn(3, weight.numel(), device=weight.device, generator=_generator(weight.device))
    probe = probe.to(weight.dtype)
    hat = probe.float() * torch.rsqrt(probe.float().square().mean(-1, keepdim=True) + eps)
    with torch.no_grad():
        try:
            given = module(probe)
        except (RuntimeError, TypeError, ValueError):
            return None
    if given.shape != probe.shape:
        return None
    tolerance = 1e-4 if weight.dtype == torch.float32 else 3e-2
    for offset in (0.0, 1.0):
        expected = hat * (weight.detach().float() + offset)
        if torch.allclose(given.float(), expected, rtol=tolerance, atol=tolerance * 0.1):
            return _unless_tiny(KeptNorm(module, eps=eps, centred=False, offset=offset))
    return "a norm of a form that is not known here"


def _unless_tiny(norm: KeptNorm) -> KeptNorm | str:
    if norm.tiny is not None and norm.tiny.numel() > _MOST_TINY * norm.plain.weight.numel():
        return f"{norm.tiny.numel()} of {norm.plain.weight.numel()} weights are next to zero"
    return norm


def _eps(module: Any) -> float | None:
    for name in ("eps", "variance_epsilon", "epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    # torch's own RMSNorm takes the dtype's where none is given
    return torch.finfo(module.weight.dtype).eps if isinstance(module, nn.RMSNorm) else None


def _generator(device: Any) -> Any:
    return torch.Generator(device=device).manual_seed(0)

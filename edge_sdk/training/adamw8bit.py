"""AdamW whose moments rest in 8 bits: 2 bytes a trained value instead of 8. torch alone, on any device.

Blocks of 256 values share a float32 scale, their largest magnitude s. The codes are spaced for what Adam
does with them, finer towards zero:

    first moment   m = s · c |c| / 127²,  c = -127..127, rounded to the nearest
    second moment  v = s · (c / 255)⁴,    c = 1..255,    rounded by chance, so that a slow decay is not lost

v never comes back as 0, and so a step never is a division by ``eps`` alone: what is 10⁻⁵ of a block's largest
gradient is still told apart. (Dettmers et al., arXiv 2110.02861, hold both by a table instead.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

__all__ = ["AdamW8bit"]

_BLOCK = 256
_SMALLEST = 4096
"""Parameters below so many values keep float32 moments: there is nothing to gain."""
_TINY = 1e-37


class AdamW8bit(torch.optim.Optimizer):
    """torch.optim.AdamW (betas 0.9 and 0.999, eps 1e-8) with moments in 8 bits.

    One parameter's moments are whole at a time. ``generator`` draws the rounding of v: the same one, on the
    parameters' device, gives the same steps.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        generator: Any = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._generator = generator

    def step(self, closure: Any = None) -> None:
        if closure is not None:
            raise ValueError("this optimizer takes no closure")
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, group)

    def _move(self, parameter: Any, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        grad = parameter.grad.to(torch.float32)
        first, second = self._moments(state, grad)
        state["step"] = step = state.get("step", 0) + 1
        low, high = group["betas"]
        first.lerp_(grad, 1.0 - low)
        second.mul_(high).addcmul_(grad, grad, value=1.0 - high)
        spread = (second / (1.0 - high**step)).sqrt_().add_(group["eps"])
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(first, spread, value=-group["lr"] / (1.0 - low**step))
        if parameter.numel() < _SMALLEST:
            state["first"], state["second"] = first, second
        else:
            state["first"] = _pack_first(first)
            state["second"] = _pack_second(second, self._generator)

    def _moments(self, state: dict[str, Any], like: Any) -> tuple[Any, Any]:
        if not state:
            return torch.zeros_like(like), torch.zeros_like(like)
        if like.numel() < _SMALLEST:
            return state["first"], state["second"]
        codes, scales = state["first"]
        values = codes.to(torch.float32)
        first = _whole(values.mul_(values.abs()).mul_(scales / 127.0**2), like)
        codes, scales = state["second"]
        values = codes.to(torch.float32).div_(255.0).square_().square_()
        second = _whole(values.mul_(scales), like)
        return first, second


def _blocks(values: Any) -> Any:
    flat = values.reshape(-1)
    return pad(flat, (0, -flat.numel() % _BLOCK)).view(-1, _BLOCK)


def _whole(blocks: Any, like: Any) -> Any:
    return blocks.view(-1)[: like.numel()].view(like.shape)


def _pack_first(values: Any) -> tuple[Any, Any]:
    blocks = _blocks(values)
    size = blocks.abs()
    scales = size.amax(dim=1, keepdim=True)
    codes = size.div_(scales.clamp(min=_TINY)).sqrt_().mul_(127.0).round_().copysign_(blocks)
    return codes.to(torch.int8), scales


def _pack_second(values: Any, generator: Any) -> tuple[Any, Any]:
    blocks = _blocks(values)
    scales = blocks.amax(dim=1, keepdim=True)
    codes = (blocks / scales.clamp(min=_TINY)).sqrt_().sqrt_().mul_(255.0)
    codes.add_(torch.rand(codes.shape, generator=generator, device=codes.device)).floor_().clamp_(1.0, 255.0)
    return codes.to(torch.uint8), scales

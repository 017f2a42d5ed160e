"""A layer that keeps its input alone and runs again in backward (recompute ``layer``).

The input is held by the layer's keeper: packed where the plan has a form. What else the layer takes
(masks, rotary tables) is shared by all layers and held as it is. The second run keeps what it must by lever
``outputs``, so that one layer's backward is small as well: the feed-forward's inner values by the plan's
form, all else exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from edge_sdk.training.activations.feed_forward import FeedForward, keeps_graph
from edge_sdk.training.activations.held import Held
from edge_sdk.training.activations.norms import KeptNorm
from edge_sdk.training.activations.plan import LayerPlan, Recompute

__all__ = ["ExactKeeper", "checkpointed"]


class ExactKeeper:
    """A keeper that packs nothing."""

    def __init__(self, recompute: Recompute = "outputs") -> None:
        self.plan = LayerPlan(form=None, recompute=recompute)

    def hold(self, tensor: Any) -> Any:
        return Held(tensor, None)

    def offer(self, tensor: Any, build: Callable[[], Any]) -> None:
        """Nothing is rebuilt."""


class _Again(ExactKeeper):
    """What a layer's blocks keep by while it runs again."""

    def __init__(self, keeper: Any) -> None:
        super().__init__("outputs")
        self._keeper = keeper

    def hold(self, tensor: Any) -> Any:
        return self._keeper.hold(tensor)


def checkpointed(forward: Callable[..., Any], layer: Any, keeper: Any) -> Callable[..., Any]:
    """``forward`` of ``layer``, keeping its first tensor by ``keeper.hold`` and nothing else.

    Works for whatever positional and keyword arguments the layer takes and for tensors, tuples and lists
    as its result. A key-value cache is left out: a second run would append to it again.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = tree_flatten((args, kwargs))
        leaves = [None if hasattr(leaf, "get_seq_length") else leaf for leaf in leaves]
        floats = [i for i, leaf in enumerate(leaves) if _is_float(leaf)]
        tensors = floats[:1] + [i for i in floats[1:] if leaves[i].requires_grad]
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        wanted = bool(trained) or any(leaves[i].requires_grad for i in tensors)
        if not (torch.is_grad_enabled() and wanted and tensors):
            return forward(*args, **kwargs)
        call = _Call(forward, layer, keeper, leaves, tree, tensors)
        given = [leaves[i] for i in tensors]
        for i in tensors:
            leaves[i] = None  # what is kept of these is for the keeper to say
        result = _Checkpoint.apply(call, *given, *trained)
        return tree_unflatten(list(result), call.result_tree)

    return run


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


class _Call:
    """One run of a layer: how to run it again."""

    def __init__(
        self, forward: Any, layer: Any, keeper: Any, leaves: list[Any], tree: Any, tensors: list[int]
    ) -> None:
        self.forward, self.layer, self.keeper = forward, layer, keeper
        self.leaves, self.tree, self.tensors = leaves, tree, tensors
        self.result_tree: Any = None

    def run(self, given: Any) -> list[Any]:
        leaves = list(self.leaves)
        for i, tensor in zip(self.tensors, given, strict=True):
            leaves[i] = tensor
        args, kwargs = tree_unflatten(leaves, self.tree)
        with _keepers(self.layer, self.keeper):
            flat, self.result_tree = tree_flatten(self.forward(*args, **kwargs))
        return list(flat)


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> Any:
        count = len(call.tensors)
        ctx.call, ctx.needs = call, [tensor.requires_grad for tensor in tensors[:count]]
        ctx.random = torch.get_rng_state() if call.layer.training else None
        ctx.device = tensors[0].device
        ctx.device_random = (
            torch.cuda.get_rng_state(ctx.device)
            if ctx.random is not None and ctx.device.type == "cuda"
            else None
        )
        ctx.autocast = (torch.is_autocast_enabled(ctx.device.type), torch.get_autocast_dtype(ctx.device.type))
        flat = call.run(tensors[:count])
        ctx.held = [call.keeper.hold(tensor) for tensor in tensors[:count]]
        ctx.save_for_backward(*tensors[count:])
        return tuple(flat)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        trained = ctx.saved_tensors
        given = [
            held.get().detach().requires_grad_(needs) for held, needs in zip(ctx.held, ctx.needs, strict=True)
        ]
        with torch.enable_grad(), _same_state(ctx):
            flat = ctx.call.run(given)
        pairs = [
            (value, grad)
            for value, grad in zip(flat, grads, strict=True)
            if grad is not None and isinstance(value, torch.Tensor) and value.requires_grad
        ]
        inputs = [tensor for tensor in given if tensor.requires_grad] + list(trained)
        found = iter(
            torch.autograd.grad(
                [value for value, _ in pairs], inputs, [grad for _, grad in pairs], allow_unused=True
            )
        )
        if not keeps_graph():
            ctx.held = ctx.call = None
        return None, *(next(found) if needs else None for needs in ctx.needs), *found


@contextmanager
def _keepers(layer: Any, keeper: Any) -> Iterator[None]:
    """Within, the layer's blocks keep as little as they can; the rest runs as it came."""
    before = [(m, m.keeper) for m in layer.modules() if hasattr(m, "keeper")]
    again = _Again(keeper)
    try:
        for module, _ in before:
            module.keeper = again if isinstance(module, (FeedForward, KeptNorm)) else None
        yield
    finally:
        for module, earlier in before:
            module.keeper = earlier


@contextmanager
def _same_state(ctx: Any) -> Iterator[None]:
    """Random numbers and autocast as they were in the first run."""
    enabled, dtype = ctx.autocast
    devices = [ctx.device] if ctx.device_random is not None else []
    with (
        torch.random.fork_rng(devices=devices, enabled=ctx.random is not None),
        torch.autocast(ctx.device.type, dtype=dtype, enabled=enabled),
    ):
        if ctx.random is not None:
            torch.set_rng_state(ctx.random)
            if ctx.device_random is not None:
                torch.cuda.set_rng_state(ctx.device_random, ctx.device)
        yield

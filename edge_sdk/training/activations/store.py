"""The activation store: what autograd saves in chosen layers is packed, shared, or made again.

The forward pass is exact to the bit; only gradients are rounded. Parameters, buffers, integers and what is
smaller than half of the layer's input pass through; booleans become bits.

Traps that shape the code. A tensor is saved several times (queries, keys and values share one input, and a
layer's output is the next one's), so the users of one storage share one packed copy. A freed address is
used again, so a storage is known by a weak reference to it, never by its address alone. And a fused
attention recomputes probabilities from what it saved, and from rounded queries and keys these no longer
sum to one: unless attention is ours (``attention.py``), 4-D tensors stay exact.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from edge_sdk.training.activations.checkpoint import checkpointed
from edge_sdk.training.activations.held import Held, Kept, is_plain
from edge_sdk.training.activations.packing import Packed, PackedMask, pack_flat, pack_mask
from edge_sdk.training.activations.plan import PLAIN, Form, LayerPlan

__all__ = ["ActivationStore", "Held", "Keeper"]

_SMALL = 4096
"""Elements below which packing is not worth its calls."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Keeper:
    """What a layer's modules ask to keep or to make again, as the layer's ``plan`` has it."""

    def __init__(self, plan: LayerPlan, store: ActivationStore) -> None:
        self.plan = plan
        self._store = store
        self.smallest = _SMALL
        """Elements below which what autograd saves passes."""
        self.fused_attention = True
        """Whether 4-D tensors may belong to a fused attention that is not ours."""

    def hold(self, tensor: Any, form: Form | None = None) -> Held:
        """Keeps ``tensor`` by ``form``, or else the plan's; what is shared with others is kept once."""
        return self._store._hold(tensor, self.plan.form if form is None else form, _SMALL)

    def offer(self, tensor: Any, build: Callable[[], Any]) -> None:
        """Says that ``tensor`` can be made again: who saves a view of its storage then keeps ``build``.

        ``build`` gives a tensor of the same shape; it may hold what ``hold`` gave, never ``tensor`` itself.
        Nothing happens where the plan makes nothing again or ``tensor`` is but a part of its storage.
        """
        if self.plan.recompute != "none":
            self._store._offer(tensor, self.plan.form, build)

    def leave_exact(self, *tensors: Any) -> None:
        """Says that these are parameters, whatever storage they are in."""
        for tensor in tensors:
            self._store._leave_exact(tensor, self.plan.form)

    def exact(self) -> Any:
        """Context in which what operations save stays exact, and so do all other views of it."""

        def keep(tensor: Any) -> Any:
            self._store._leave_exact(tensor, self.plan.form)
            return tensor.detach()

        return saved_tensors_hooks(keep, lambda tensor: tensor)

    @property
    def packs_attention(self) -> bool:
        """Whether an attention of ours keeps less than the fused kernel would."""
        return self.plan.recompute != "layer" and self.plan != PLAIN

    def saved(self, tensor: Any) -> Any:
        """Hook: what autograd keeps in the place of a tensor that an operation of this layer saves."""
        floats = tensor.is_floating_point()
        if not (floats or tensor.dtype == torch.bool):
            return tensor.detach()
        if tensor.numel() < (self.smallest if floats else _SMALL):
            return tensor.detach()
        if self.fused_attention and tensor.dim() > 3:
            self._store._leave_exact(tensor, self.plan.form)
            return tensor.detach()
        held = self._store._hold(tensor, self.plan.form, 0)
        return tensor.detach() if held.is_exact else held


def _restored(kept: Any) -> Any:
    return kept.get() if isinstance(kept, Held) else kept


class ActivationStore:
    """Keeps saved activations of the layers that it is put ``over`` by a plan for each.

    Attributes: ``packed_bytes`` and ``original_bytes`` count what was packed or replaced by a recipe since
    the start, each storage once.
    """

    def __init__(self, parameters: Iterable[Any], *, generator: Any = None) -> None:
        """Args: generator: for stochastic rounding; None: torch's default one."""
        self._frozen = {p.untyped_storage()._cdata for p in parameters}
        # Packed copies live with the graph; the table serves to find them while their storage lives too.
        self._live: dict[tuple[Any, ...], tuple[StorageWeakRef, weakref.ref[Kept] | Kept | None]] = {}
        self._generator = generator
        self.packed_bytes = 0
        self.original_bytes = 0

    @contextmanager
    def over(self, plans: Mapping[Any, LayerPlan]) -> Iterator[None]:
        """Within the context, forward passes through the layers keep what their plan says.

        Every submodule with an attribute ``keeper``, and every attention of ours, finds its layer's there.
        """
        told: list[Any] = []
        try:
            for layer, plan in plans.items():
                keeper = Keeper(plan, self)
                self._frozen.update(b.untyped_storage()._cdata for b in layer.buffers())
                kinds = [_attention_kind(module) for module in layer.modules()]
                keeper.fused_attention = not {"edge", "eager"} & set(kinds)
                for module, kind in zip(layer.modules(), kinds, strict=True):
                    if kind == "edge" or hasattr(module, "keeper"):
                        module.keeper = keeper
                        told.append(module)
                forward = layer.forward
                if plan.recompute == "layer":
                    forward = checkpointed(forward, layer, keeper)
                layer.forward = self._covered(forward, keeper)
            yield
        finally:
            for layer in plans:
                vars(layer).pop("forward", None)
            for module in told:
                vars(module).pop("keeper", None)
            self._live.clear()

    def _covered(self, forward: Any, keeper: Keeper) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            given = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
            keeper.smallest = _SMALL if given is None else max(_SMALL, given.numel() // 2)
            try:
                with saved_tensors_hooks(keeper.saved, _restored):
                    return forward(*args, **kwargs)
            finally:
                self._forget_dead()

        return run

    def _forget_dead(self) -> None:
        dead = [key for key, (storage, _) in self._live.items() if storage.expired()]
        for key in dead:
            del self._live[key]

    def _hold(self, tensor: Any, form: Form | None, smallest: int) -> Held:
        storage = tensor.untyped_storage()
        if tensor.layout != torch.strided or storage._cdata in self._frozen:
            return Held(tensor, None)
        key = (storage._cdata, tensor._version, tensor.dtype, form)
        if self._live.get(key, (None, key))[1] is None:  # stays exact
            return Held(tensor, None)
        kept = self._find(key)
        if kept is not None:
            return Held(tensor, kept, tensor.storage_offset())
        if tensor.numel() < smallest:
            return Held(tensor, None)
        if tensor.dtype == torch.bool:
            if not _is_whole(tensor):
                return Held(tensor, None)
            return Held(tensor, self._keep(key, storage, pack_mask(_flat(tensor)), storage.nbytes()))
        if form is None or tensor.dtype not in _FLOATS:
            return Held(tensor, None)
        if tensor.numel() * tensor.element_size() * 2 <= storage.nbytes():
            return self._hold_alone(tensor, storage, key, form)
        packed = pack_flat(_flat(tensor), form, width=_width(tensor), generator=self._generator)
        return Held(tensor, self._keep(key, storage, packed, storage.nbytes()), tensor.storage_offset())

    def _hold_alone(self, tensor: Any, storage: Any, key: tuple[Any, ...], form: Form) -> Held:
        """A part of a storage of which no more may be wanted: shared with who wants the very same part."""
        key = (*key, tensor.storage_offset(), tensor.shape, tensor.stride())
        kept = self._find(key)
        tensor = tensor.detach().contiguous()
        if kept is None:
            packed = pack_flat(tensor.view(-1), form, width=tensor.shape[-1], generator=self._generator)
            kept = self._keep(key, storage, packed, tensor.numel() * tensor.element_size())
        return Held(tensor, kept)

    def _find(self, key: tuple[Any, ...]) -> Kept | None:
        storage, kept = self._live.get(key, (None, None))
        if storage is None or storage.expired():
            return None
        if isinstance(kept, Kept):  # a recipe's first user
            self._count(kept.original, 0)
            self._live[key] = (storage, weakref.ref(kept))
            return kept
        return None if kept is None else kept()

    def _leave_exact(self, tensor: Any, form: Form | None) -> None:
        """From now on views of the storage of ``tensor`` are not packed: it is kept as it is anyway."""
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor._version, tensor.dtype, form)
        if self._find(key) is None:
            self._live[key] = (StorageWeakRef(storage), None)

    def _keep(self, key: tuple[Any, ...], storage: Any, packed: Packed | PackedMask, original: int) -> Kept:
        kept = Kept(original, packed)
        self._live[key] = (StorageWeakRef(storage), weakref.ref(kept))
        self._count(kept.original, kept.nbytes)
        return kept

    def _count(self, original: int, packed: int) -> None:
        self.original_bytes += original
        self.packed_bytes += packed

    def _offer(self, tensor: Any, form: Form | None, build: Callable[[], Any]) -> None:
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor._version, tensor.dtype, form)
        if not _is_whole(tensor) or storage._cdata in self._frozen or self._find(key) is not None:
            return
        size, stride = tensor.shape, tensor.stride()

        def flat() -> Any:
            made = build()
            if made.stride() != stride:
                made = torch.empty_strided(size, stride, dtype=made.dtype, device=made.device).copy_(made)
            return made.as_strided((made.numel(),), (1,), made.storage_offset())

        # until somebody saves it a recipe lives in the table, and with its storage goes from there
        self._live[key] = (StorageWeakRef(storage), Kept(storage.nbytes(), None, flat))


def _attention_kind(module: Any) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _is_whole(tensor: Any) -> bool:
    """Whether a tensor is all of its storage, each value once, its axes in any order."""
    if tensor.storage_offset() or tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes():
        return False
    order = sorted(range(tensor.dim()), key=lambda axis: (tensor.stride(axis), tensor.size(axis)))
    order.reverse()
    return is_plain([tensor.size(a) for a in order], [tensor.stride(a) for a in order])


def _flat(tensor: Any) -> Any:
    """All of the storage of ``tensor``."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((count,), (1,), 0)


def _width(tensor: Any) -> int:
    """What groups had better not cross: the common divisor of the strides of the outer axes."""
    width = math.gcd(*(s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and s > 1))
    return width or tensor.numel()

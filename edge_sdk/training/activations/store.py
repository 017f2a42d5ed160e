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
from edge_sdk.training.activations.packing import Packed, PackedMask, pack_flat, pack_mask
from edge_sdk.training.activations.plan import PLAIN, Form, LayerPlan

__all__ = ["ActivationStore", "Held", "Keeper"]

_SMALL = 4096
"""Elements below which packing is not worth its calls."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class _Kept:
    """One storage's values, packed or as a recipe, shared by all that saved a view of it."""

    __slots__ = ("__weakref__", "_build", "_packed", "_values", "_waiting", "nbytes", "original")

    def __init__(self, original: int, packed: Any, build: Callable[[], Any] | None = None) -> None:
        self._packed: Packed | PackedMask | None = packed
        self._build = build
        self.original = original
        self.nbytes = 0 if packed is None else packed.nbytes
        self._waiting = 0
        self._values: Any = None

    def join(self) -> None:
        self._waiting += 1

    def leave(self) -> None:
        """Called by each user once: when it has read, or ends without having read."""
        self._waiting -= 1
        if self._waiting == 0:
            self._values = None

    def values(self) -> Any:
        """The storage's values, flat. Kept from the first to the last of several users."""
        values = self._values
        if values is None:
            values = self._build() if self._build is not None else self._packed.unpack()  # type: ignore[union-attr]
            if self._waiting > 1:
                self._values = values
        return values

    def part(self, start: int, stop: int) -> Any:
        """Values ``start`` to ``stop``; None where all are to be made again for it."""
        if self._values is not None:
            return self._values[start:stop]
        return None if self._packed is None else self._packed.flat(start, stop)


class Held:
    """A tensor as it is kept for the backward pass: exact, or a view of something packed or made again."""

    __slots__ = ("_exact", "_kept", "_made", "_offset", "_read", "_stride", "device", "shape")

    def __init__(self, tensor: Any, kept: _Kept | None, offset: int = 0) -> None:
        self.shape, self.device = tensor.shape, tensor.device
        self._stride, self._offset = tensor.stride(), offset
        self._kept = kept
        self._read = kept is None
        self._made: Any = None
        # An operation's saved output points back at it: kept as it is, the two would keep each other,
        # and with them the whole graph, alive where no backward pass lets go of it.
        self._exact = tensor.detach() if kept is None else None
        if kept is not None:
            kept.join()

    @property
    def is_exact(self) -> bool:
        return self._exact is not None

    def get(self) -> Any:
        """The tensor, in its shape, strides and dtype."""
        if self._kept is None:
            return self._given()
        values = self._kept.values()
        self._leave()
        return values.as_strided(self.shape, self._stride, self._offset)

    def part(self, start: int, stop: int) -> Any:
        """``get()[start:stop]``, unpacking no more than that where the first axis is the outermost."""
        stop = min(stop, self.shape[0])
        if self._kept is None:
            return self._given()[start:stop]
        shape = (stop - start, *self.shape[1:])
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, self._stride, strict=True))
        whole = max(self._stride) == self._stride[0]
        flat = self._slice(self._offset + start * self._stride[0], extent) if whole else None
        if flat is None:
            return self._made_whole(stop == self.shape[0])[start:stop]
        return flat.as_strided(shape, self._stride)

    def rows(self, start: int, stop: int) -> Any:
        """Rows ``start`` to ``stop`` of the tensor as (rows, last axis)."""
        width = self.shape[-1]
        total = self.shape.numel() // width
        stop = min(stop, total)
        if self._kept is None:
            return self._given().reshape(-1, width)[start:stop]
        plain = _is_plain(self.shape, self._stride)
        flat = self._slice(self._offset + start * width, (stop - start) * width) if plain else None
        if flat is None:
            return self._made_whole(stop == total).reshape(-1, width)[start:stop]
        return flat.view(-1, width)

    def release(self) -> None:
        """Lets go; reading fails from here on."""
        self._leave()
        self._kept = self._exact = self._made = None

    def _slice(self, start: int, count: int) -> Any:
        if self._kept is None or self._made is not None:
            return None
        flat = self._kept.part(start, start + count)
        if flat is not None:
            self._leave()
        return flat

    def _made_whole(self, last: bool) -> Any:
        """The whole tensor, kept from the first slice that is asked for to the last."""
        made = self.get() if self._made is None else self._made
        self._made = None if last else made
        return made

    def _given(self) -> Any:
        if self._exact is None:
            raise RuntimeError("what this layer kept is let go of: a graph can be run backward once")
        return self._exact

    def _leave(self) -> None:
        if not self._read and self._kept is not None:
            self._read = True
            self._kept.leave()

    def __del__(self) -> None:
        self._leave()


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
        self._live: dict[tuple[Any, ...], tuple[StorageWeakRef, weakref.ref[_Kept] | _Kept | None]] = {}
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

    def _find(self, key: tuple[Any, ...]) -> _Kept | None:
        storage, kept = self._live.get(key, (None, None))
        if storage is None or storage.expired():
            return None
        if isinstance(kept, _Kept):  # a recipe's first user
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

    def _keep(self, key: tuple[Any, ...], storage: Any, packed: Packed | PackedMask, original: int) -> _Kept:
        kept = _Kept(original, packed)
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
        self._live[key] = (StorageWeakRef(storage), _Kept(storage.nbytes(), None, flat))


def _attention_kind(module: Any) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _is_plain(shape: Any, stride: Any) -> bool:
    """Whether a tensor of this shape and stride is contiguous."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size > 1 and step != expected:
            return False
        expected *= size
    return True


def _is_whole(tensor: Any) -> bool:
    """Whether a tensor is all of its storage, each value once, its axes in any order."""
    if tensor.storage_offset() or tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes():
        return False
    order = sorted(range(tensor.dim()), key=lambda axis: (tensor.stride(axis), tensor.size(axis)))
    order.reverse()
    return _is_plain([tensor.size(a) for a in order], [tensor.stride(a) for a in order])


def _flat(tensor: Any) -> Any:
    """All of the storage of ``tensor``."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((count,), (1,), 0)


def _width(tensor: Any) -> int:
    """What groups had better not cross: the common divisor of the strides of the outer axes."""
    width = math.gcd(*(s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and s > 1))
    return width or tensor.numel()

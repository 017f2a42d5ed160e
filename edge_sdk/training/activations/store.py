"""The activation store: what autograd saves in chosen layers is kept in 8 bits.

The forward pass is exact to the bit; only gradients are rounded. Parameters, integers and what is smaller
than the layer's input pass through, and so do the fused attention's own tensors (4-D; its log-sum-exp is
small): its backward recomputes probabilities from them, and from rounded ones these no longer sum to one.

Two traps shape the code. A tensor is saved several times (queries, keys and values share one input), so
the users of one storage share one packed copy. And a freed address is used again, so a storage is known by
a weak reference to it, never by its address alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from edge_sdk.training.activations.packing import GROUP, pack, unpack

__all__ = ["ActivationStore"]


class _Packed:
    """One packed storage, shared by all that saved a view of it."""

    def __init__(self, rows: Any) -> None:
        self._codes = pack(rows)
        self._waiting = 0
        self._values: Any = None

    @property
    def nbytes(self) -> int:
        return int(self._codes.numel())

    def add_user(self) -> None:
        self._waiting += 1

    def values(self) -> Any:
        """The storage's values, flat. Kept between the first and the last of several users."""
        values = self._values if self._values is not None else unpack(self._codes).flatten()
        self._waiting -= 1
        self._values = values if self._waiting > 0 else None
        return values


class _View:
    """What autograd holds in the place of a tensor: a view of a packed storage."""

    __slots__ = ("packed", "size", "stride")

    def __init__(self, packed: _Packed, tensor: Any) -> None:
        self.packed = packed
        self.size = tensor.size()
        self.stride = tensor.stride()
        packed.add_user()


class ActivationStore:
    """Keeps saved activations of the layers that it is put ``over`` at 8 bits.

    Attributes: ``packed_bytes`` and ``original_bytes`` count what was packed since the start, each storage
    once. ``attention`` also packs the fused attention's 4-D tensors; for measurements only.
    """

    def __init__(self, parameters: Iterable[Any], *, attention: bool = False) -> None:
        self._frozen = {p.untyped_storage()._cdata for p in parameters}
        self._live: dict[tuple[int, int], tuple[StorageWeakRef, _Packed | None]] = {}
        self._attention = attention
        self._smallest = 0
        self.packed_bytes = 0
        self.original_bytes = 0

    @contextmanager
    def over(self, layers: Iterable[Any]) -> Iterator[None]:
        """Within the context, forward passes through ``layers`` save packed tensors."""
        covered = list(layers)
        for layer in covered:
            layer.forward = self._covered(layer.forward)
        try:
            yield
        finally:
            for layer in covered:
                del layer.forward
            self._live.clear()

    def _covered(self, forward: Any) -> Any:
        def run(hidden: Any, *args: Any, **kwargs: Any) -> Any:
            # the packed copies live with the graph; the table only serves to share them within a layer
            self._live.clear()
            self._smallest = hidden.numel()
            try:
                with saved_tensors_hooks(self._pack, self._unpack):
                    return forward(hidden, *args, **kwargs)
            finally:
                self._live.clear()

        return run

    def _pack(self, tensor: Any) -> Any:
        packed = self._packed_view(tensor)
        # An operation's saved output points back at it: handed on as it is, the two would keep each other,
        # and with them the whole graph, alive where no backward pass lets go of it.
        return tensor.detach() if packed is None else packed

    def _packed_view(self, tensor: Any) -> _View | None:
        if tensor.dtype != torch.float32 or tensor.numel() < self._smallest:
            return None
        storage = tensor.untyped_storage()
        if storage._cdata in self._frozen or tensor.layout != torch.strided:
            return None
        rows = _rows(tensor)
        if rows is None:
            return None
        key = (storage._cdata, tensor._version)
        known = self._live.get(key)
        if known is None or known[0].expired():
            packed = None
            if tensor.dim() < 4 or (self._attention and tensor.size(1) > 1):
                packed = _Packed(rows)
                self.packed_bytes += packed.nbytes
                self.original_bytes += storage.nbytes()
            self._live[key] = (StorageWeakRef(storage), packed)
        else:
            packed = known[1]
        return None if packed is None else _View(packed, tensor)

    def _unpack(self, held: Any) -> Any:
        if not isinstance(held, _View):
            return held
        return held.packed.values().as_strided(held.size, held.stride)


def _rows(tensor: Any) -> Any:
    """The storage of ``tensor`` as rows of at most ``GROUP`` values; None where it is but a part of one."""
    count = tensor.numel()
    if tensor.untyped_storage().nbytes() != count * tensor.element_size() or tensor.storage_offset():
        return None
    order = sorted(range(tensor.dim()), key=lambda axis: tensor.stride(axis), reverse=True)
    plain = tensor.permute(order)
    if not plain.is_contiguous():
        return None
    width = plain.size(-1)
    group = next((g for g in range(min(GROUP, width), 0, -1) if width % g == 0), width)
    return plain.detach().reshape(-1, group if group >= 16 else width)

"""What is kept of a tensor for the backward pass: itself, packed values, or how to make it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edge_sdk.training.activations.packing import Packed, PackedMask

__all__ = ["Held", "Kept", "is_plain"]


class Kept:
    """One storage's values, packed or as a recipe, shared by all that saved a view of it."""

    __slots__ = ("__weakref__", "_build", "_packed", "_values", "_waiting", "nbytes", "original")

    def __init__(self, original: int, packed: Any, build: Callable[[], Any] | None = None) -> None:
        self._packed: Packed | PackedMask | None = packed
        self._build = build
        self.original = original
        self.nbytes = 0 if packed is None else packed.nbytes
        self._waiting = 0
        self._values: Any = None

    @property
    def shared(self) -> bool:
        """Whether what ``values`` gives next may be seen by others, now or later."""
        return self._values is not None or self._waiting > 1 or self._build is not None

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

    __slots__ = ("_exact", "_kept", "_made", "_offset", "_read", "_stride", "device", "dtype", "shape")

    def __init__(self, tensor: Any, kept: Kept | None, offset: int = 0) -> None:
        self.shape, self.device, self.dtype = tensor.shape, tensor.device, tensor.dtype
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

    def own(self) -> Any:
        """``get()``, in memory that is the caller's to write on."""
        if self._kept is None:
            return self._given().clone()
        shared = self._kept.shared
        tensor = self.get()
        return tensor.clone() if shared else tensor

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
        plain = is_plain(self.shape, self._stride)
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


def is_plain(shape: Any, stride: Any) -> bool:
    """Whether a tensor of this shape and stride is contiguous."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size > 1 and step != expected:
            return False
        expected *= size
    return True

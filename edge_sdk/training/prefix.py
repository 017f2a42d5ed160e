"""Frozen-prefix reuse: below the lowest tuned layer the forward pass is a constant of the round.

What enters the lowest tuned layer is kept for each row at its first visit and fed in at later ones: the
layers below then hand their input through. Found by structure: hooks see the calls of the base model and of
the lowest tuned layer; masks and rotary embeddings, which the model makes for each call, are made as ever.
It needs no dropout below, and rows that come again. A few tokens, computed in full and once more from what
enters that layer, show that the model is of that structure; else nothing is reused, and ``off`` says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from edge_sdk.training.memory import is_out_of_memory
from edge_sdk.training.prefix_store import KeptRows, MemoryShelf, RowForm, Shelf

__all__ = ["Prefix"]

_log = logging.getLogger(__name__)
_TRIED = 16
"""Tokens of one row that the model is tried with."""


class _ReachedError(BaseException):  # no handler in a model's code may take it for a failure
    """The lowest tuned layer was reached: the rest of this pass is not needed."""


class Prefix:
    """Reuse over one training.

    Args:
        base: the module that takes token ids and calls the layers, batch first in all its tensors.
        layers: all its transformer layers; those from number ``bottom`` up are tuned.
        drawn: the row numbers of the whole training, in the order of its batches, (n,) int64.
        rows: how many rows there are.
        budget_bytes: what may be kept; rows beyond it are computed every time.
        form: see ``RowForm``.
        shelf: makes the place to keep rows in from (rows, bytes of a row).

    Attributes:
        computed, read: row visits whose prefix was computed, and was read.
        kept_bytes: what rows take, or will.
        off: why nothing is reused; None while something is, or may be.
    """

    def __init__(
        self,
        base: Any,
        layers: Any,
        bottom: int,
        *,
        drawn: Any,
        rows: int,
        budget_bytes: float,
        form: str = "exact",
        shelf: Callable[[int, int], Shelf] = MemoryShelf,
    ) -> None:
        self._base, self._below, self._bottom = base, list(layers[:bottom]), layers[bottom]
        self._drawn, self._rows = np.asarray(drawn), rows
        self._budget_bytes = budget_bytes
        self._form = form
        self._shelf = shelf
        self._kept: KeptRows | None = None
        self._tuples: dict[int, int] = {}
        """Length of the tuple that a layer returns, by its number; 0: a tensor alone."""
        self._visited = 0
        self._expected: Any = None
        self._storing: Any = None
        self._feeding: Any = None
        self._tried = self._reaching = False
        self._reached: Any = None
        self.computed = self.read = self.kept_bytes = 0
        self.off: str | None = None
        if not bottom:
            self.off = "every layer is tuned"
        elif len(np.unique(self._drawn)) == len(self._drawn):
            self.off = "no row comes twice in this round"

    def expect(self, count: int) -> None:
        """The next forward pass of the base is of the next ``count`` rows drawn. Others pass untouched."""
        self._expected = torch.from_numpy(self._drawn[self._visited : self._visited + count])
        self._visited += count

    def again(self, count: int) -> None:
        """The last ``count`` rows expected come once more."""
        self._visited -= count

    @contextmanager
    def over(self) -> Iterator[None]:
        """Within the context expected passes store and reuse; after it nothing is kept."""
        if self.off is not None:
            yield
            return
        handles = [
            self._base.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._base.register_forward_hook(self._end, always_call=True),
            self._bottom.register_forward_pre_hook(self._enter, with_kwargs=True),
        ]
        before = [vars(layer).get("forward") for layer in self._below]
        for number, layer in enumerate(self._below):
            layer.forward = self._passing(number, layer.forward)
        try:
            yield
        finally:
            for layer, forward in zip(self._below, before, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward
            for handle in handles:
                handle.remove()
            if self._kept is not None:
                self._kept.close()
            self._kept = self._expected = None

    def _begin(self, _module: Any, args: Any, kwargs: Any) -> None:
        """Before the base: finds what is there of the rows expected."""
        rows, self._expected = self._expected, None
        if rows is None or self.off is not None:
            return
        if not (self._tried or self._try(args, kwargs, len(rows))):
            return
        kept = self._kept
        if kept is None:  # at the first visit of all
            self._storing = rows
            self.computed += len(rows)
            return
        there = kept.has(rows)
        count = int(there.sum())
        self.computed += len(rows) - count
        if not count:
            self._storing = rows
            return
        try:
            hidden = kept.get(rows[there], next(self._bottom.parameters()).device)
        except OSError as error:
            self.computed += count
            self._give_up(f"kept hidden states cannot be read: {error}")
            return
        self.read += count
        if count < len(rows):
            fresh = self._reach(*_part(args, kwargs, ~there))
            self._put(kept, rows[~there], fresh)
            places = there.to(fresh.device)
            whole = fresh.new_empty((len(rows), *fresh.shape[1:]))
            whole[places], whole[~places] = hidden, fresh
            hidden = whole
        self._feeding = hidden

    def _end(self, *_: Any) -> None:
        self._storing = self._feeding = None

    def _enter(self, _layer: Any, args: Any, kwargs: Any) -> Any:
        """Before the lowest tuned layer."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        if self._reaching:
            self._reached = hidden
            raise _ReachedError
        if self._storing is not None:
            self._store(self._storing, hidden)
        if self._feeding is None:
            return None
        if args:
            return (self._feeding, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._feeding}

    def _passing(self, number: int, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._feeding is None:
                output = forward(*args, **kwargs)
                self._tuples[number] = len(output) if isinstance(output, tuple) else 0
                return output
            hidden = args[0] if args else kwargs["hidden_states"]
            size = self._tuples[number]
            return (hidden, *[None] * (size - 1)) if size else hidden

        return run

    def _reach(self, args: Any, kwargs: Any) -> Any:
        """What enters the lowest tuned layer; nothing above it is computed."""
        self._reaching = True
        try:
            with torch.no_grad():
                self._base.forward(*args, **kwargs)
        except _ReachedError:
            pass
        finally:
            self._reaching = False
        hidden, self._reached = self._reached, None
        return hidden

    def _try(self, args: Any, kwargs: Any, batch: int) -> bool:
        """Whether the model, fed with what enters its lowest tuned layer, computes what it did."""

        def few(value: Any) -> Any:
            batched = isinstance(value, torch.Tensor) and value.dim() > 1 and len(value) == batch
            return value[:1, :_TRIED] if batched else value

        args, kwargs = _each(few, args, kwargs)
        hidden = self._reach(args, kwargs)
        if not isinstance(hidden, torch.Tensor):
            self._give_up("the layers of this model are not called with hidden states first")
            return False
        with torch.no_grad():
            whole = self._base.forward(*args, **kwargs)[0]
            try:
                self._feeding = hidden
                fed = self._base.forward(*args, **kwargs)[0]
            finally:
                self._feeding = None
        if not torch.allclose(whole.float(), fed.float(), rtol=1e-4, atol=1e-5):
            self._give_up("more than their input goes from layer to layer of this model")
        self._tried = True
        return self.off is None

    def _store(self, rows: Any, hidden: Any) -> None:
        if self._kept is None:
            self._begin_keeping(hidden, len(rows))
        if self._kept is not None:
            self._put(self._kept, rows, hidden)

    def _put(self, kept: KeptRows, rows: Any, hidden: Any) -> None:
        try:
            kept.put(rows, hidden)
        except OSError as error:  # some file systems promise room that they have not got
            self._give_up(f"hidden states cannot be kept: {error}")

    def _begin_keeping(self, hidden: Any, batch: int) -> None:
        """``hidden``: of the first batch."""
        if hidden.requires_grad or len(hidden) != batch:
            self._give_up("what enters the lowest tuned layer is trained itself, or not one entry a row")
            return
        form = RowForm(self._form, hidden)
        chosen = self._worth_keeping(int(self._budget_bytes // form.nbytes))
        if not len(chosen):
            self._give_up(f"a row takes {form.nbytes} bytes, and {self._budget_bytes:.0f} may be kept")
            return
        try:
            self._kept = KeptRows(torch.from_numpy(chosen), self._rows, form, self._shelf)
        except (OSError, RuntimeError, MemoryError) as error:
            if not (isinstance(error, OSError) or is_out_of_memory(error)):
                raise
            size, why = len(chosen) * form.nbytes / 1e6, getattr(error, "strerror", None) or "no memory"
            self._give_up(f"there is no room for {size:.0f} MB of hidden states: {why}")
            return
        self.kept_bytes = self._kept.nbytes

    def _give_up(self, why: str) -> None:
        self.off = why
        if self._kept is not None:
            self._kept.close()
        self._kept, self.kept_bytes = None, 0
        _log.warning("the frozen layers are computed at every visit: %s", why)

    def _worth_keeping(self, most: int) -> Any:
        """Row numbers: those that come most often, of these those that come first; at most ``most``."""
        rows, first, visits = np.unique(self._drawn, return_index=True, return_counts=True)
        order = np.lexsort((first, -visits))
        return rows[order[visits[order] > 1]][:most]


def _part(args: Any, kwargs: Any, chosen: Any) -> tuple[Any, Any]:
    """The inputs of the chosen rows; ``chosen`` (batch,) bool."""

    def part(value: Any) -> Any:
        batched = isinstance(value, torch.Tensor) and value.dim() and len(value) == len(chosen)
        return value[chosen.to(value.device)] if batched else value

    return _each(part, args, kwargs)


def _each(change: Callable[[Any], Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    return tuple(change(value) for value in args), {name: change(value) for name, value in kwargs.items()}

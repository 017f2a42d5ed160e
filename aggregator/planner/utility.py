"""What each layer is worth: a moving average of how much the merged adapter moved there.

    u_l    = sqrt(sum over the modules m of layer l of |B'_m A'_m - B_m A_m|_F^2)         one merge
    gbar_l <- lambda · gbar_l + (1 - lambda) · u_l,   scaled to what those layers held before

The norm is of the change of the product BA, the only thing that the model sees: A and B alone can grow and
shrink against each other without any effect, and while B is 0, as at the start, no change of A has one. The
product is never made: with the change as [dB; B]^T [A'; dA], of 2r rows, its norm follows from two matrices
of 2r x 2r, and no large equal terms are subtracted.

Layers that nobody trained in a round keep what they had: that they did not move says nothing of them, and
a utility that falls because nobody trains would make sure that nobody ever does.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, sqrt

import msgspec
import numpy as np
import numpy.typing as npt

from edge_sdk.updates.codecs import Floats
from edge_sdk.updates.keys import layer_of

__all__ = ["UTILITY_MEMORY", "ProductChanges", "moved", "read_utilities", "write_utilities"]

UTILITY_MEMORY = 0.8
"""Weight of the past (lambda) in the moving average."""
_STRIP = 2048
"""Columns of a factor that are looked at together: what is made of them stays in the cache."""


class ProductChanges:
    """u_l of every layer of a merge whose parts come one at a time, the A of a module before its B."""

    def __init__(self, layers: int) -> None:
        self._squares: list[list[float]] = [[] for _ in range(layers)]
        self._a: tuple[str, Floats | None, Floats] | None = None

    def add(self, key: str, before: Floats | None, after: Floats) -> None:
        """A part as it was and as it is, slot-major; None: it was not there. Heads and folds do not count."""
        layer = layer_of(key)
        if layer is None or key.startswith("fold."):
            return
        module, _, factor = key.rpartition(".")
        if factor == "A":
            self._a = module, before, after
            return
        if self._a is None or self._a[0] != module:
            raise ValueError(f"{key} came without its A")
        (_, old_a, new_a), self._a = self._a, None
        left, right = _gram(before, after, change_first=True), _gram(old_a, new_a, change_first=False)
        self._squares[layer].append(max(0.0, float(np.sum(left * right))))

    def result(self) -> tuple[float, ...]:
        return tuple(sqrt(fsum(squares)) for squares in self._squares)


def _gram(before: Floats | None, after: Floats, *, change_first: bool) -> npt.NDArray[np.float64]:
    """[change; before] times its transpose; or of [after; change]."""
    rows, width = after.shape
    total = np.zeros((2 * rows, 2 * rows))
    both = np.zeros((2 * rows, min(width, _STRIP)))
    top, bottom = both[:rows], both[rows:]
    for start in range(0, width, _STRIP):
        strip = slice(start, min(width, start + _STRIP))
        size = strip.stop - start
        now = after[:, strip]
        was = 0.0 if before is None else before[:, strip]
        np.subtract(now, was, out=(top if change_first else bottom)[:, :size], dtype=np.float64)
        (bottom if change_first else top)[:, :size] = was if change_first else now
        part = both[:, :size]
        total += part @ part.T
    return total


def moved(utilities: Sequence[float], norms: Sequence[float | None]) -> tuple[float, ...]:
    """The moving average after one more merge; of the same sum, and scaled to 1 against rounding."""
    held = fsum(u for u, norm in zip(utilities, norms, strict=True) if norm is not None)
    total = fsum(norm for norm in norms if norm is not None)
    if total <= 0.0:
        return tuple(utilities)
    new = [
        u if norm is None else UTILITY_MEMORY * u + (1.0 - UTILITY_MEMORY) * held * norm / total
        for u, norm in zip(utilities, norms, strict=True)
    ]
    whole = fsum(new)
    return tuple(u / whole for u in new)


def read_utilities(text: str | None) -> tuple[float, ...] | None:
    """Utilities as they lie in a version's row."""
    return None if text is None else msgspec.json.decode(text, type=tuple[float, ...])


def write_utilities(utilities: Sequence[float]) -> str:
    return msgspec.json.encode(utilities).decode()

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

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from math import fsum, sqrt
from pathlib import Path

import msgspec
import numpy as np

from edge_sdk.errors import ContainerError
from edge_sdk.protocol.model import ModelShape
from edge_sdk.updates.codecs import Floats
from edge_sdk.updates.container import Container, read_container

__all__ = [
    "UTILITY_MEMORY",
    "change_norms",
    "layer_utilities",
    "moved",
    "read_utilities",
    "write_utilities",
]

UTILITY_MEMORY = 0.8
"""Weight of the past (lambda) in the moving average."""

Rows = Callable[[str], Floats]
"""Gives the rows of a part by its key, slot-major."""


def layer_utilities(
    shape: ModelShape,
    before: Sequence[Path],
    after: Sequence[Path],
    trained: int,
    utilities: Sequence[float] | None,
) -> tuple[float, ...]:
    """The utilities after a merge, which sum to 1, from the input up.

    The two versions are read one part at a time.

    Args:
        before, after: the chains that lead to the version built on and to the new one.
        trained: the greatest depth of the updates that were merged.
        utilities: of the version built on; None: uniform.
    """
    with ExitStack() as stack:
        old, new = (
            [stack.enter_context(read_container(path, "version")) for path in chain]
            for chain in (before, after)
        )
        norms = change_norms(shape, _reader(old), _reader(new), trained)
    return moved(utilities or [1.0 / shape.layers] * shape.layers, norms)


def change_norms(shape: ModelShape, before: Rows, after: Rows, trained: int) -> tuple[float | None, ...]:
    """u_l of every layer, from the input up; None for those below the ``trained`` top ones."""
    untouched = shape.layers - trained
    return tuple(
        None
        if layer < untouched
        else sqrt(fsum(_squared(f"{layer}.{m.name}", before, after) for m in shape.modules))
        for layer in range(shape.layers)
    )


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


def _squared(module: str, before: Rows, after: Rows) -> float:
    a, b = f"{module}.A", f"{module}.B"
    old_a, old_b = before(a).astype(np.float64), before(b).astype(np.float64)
    new_a, new_b = after(a).astype(np.float64), after(b).astype(np.float64)
    left, right = np.vstack([new_b - old_b, old_b]), np.vstack([new_a, new_a - old_a])
    return max(0.0, float(np.sum((left @ left.T) * (right @ right.T))))


def _reader(chain: Sequence[Container]) -> Rows:
    def rows(key: str) -> Floats:
        if not chain or key not in chain[0].parts:
            raise ContainerError(f"the version to compare with has no part {key!r}")
        found = chain[0].tensor(key)
        for delta in chain[1:]:
            if key in delta.parts:
                delta.add_to(found, key)
        return found

    return rows

"""Where in a layer a feed-forward block may be: candidates by the shapes of linears and the functions near.

Two forms are known. *Whole*: one module holds the linears and the function. *In two*: one module holds the
first linear and the function, a later one the last linear and what follows it. A candidate is a guess; it
is for ``blocks`` to compare it with the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from torch import nn

from edge_sdk.training.activations.feed_forward import FeedForward, Parts
from edge_sdk.training.activations.nonlinear import Nonlinear, nonlinear
from edge_sdk.training.activations.norms import KeptNorm
from edge_sdk.training.model.frozen import FrozenLinear
from edge_sdk.training.model.linear import LoraLinear
from edge_sdk.training.model.structure import is_transposed, turned
from edge_sdk.training.precision.weights import Dense

__all__ = ["Candidate", "candidates", "parent_of"]

_UNNAMED: tuple[Callable[[Any], Any], ...] = (nn.functional.gelu, nn.functional.relu, nn.functional.silu)
"""Tried where a block has no function among its attributes."""

_NO_FUNCTION = (
    nn.Dropout,
    nn.Identity,
    nn.LayerNorm,
    nn.Linear,
    FrozenLinear,
    LoraLinear,
    KeptNorm,
    FeedForward,
)


@dataclass
class Candidate:
    """Attributes:
    name: its path in the layer.
    plain: a module that computes what the block would.
    tries: the ways to take it apart, likeliest first; empty where its function is not known.
    around: what calls it, if that is known: (x, beside) -> what must stay the same.
    """

    name: str
    plain: Any
    tries: list[Parts]
    around: Callable[[Any, Any], Any] | None = None
    _places: list[tuple[Any, str, Any]] = field(default_factory=list)  # (holder, attribute, new or None)
    _before: list[tuple[Any, str, Any]] = field(default_factory=list)

    def put(self, block: FeedForward) -> None:
        """``block`` goes into the layer."""
        for holder, name, new in self._places:
            self._before.append((holder, name, getattr(holder, name)))
            setattr(holder, name, block if new is None else new)

    def undo(self) -> None:
        while self._before:
            setattr(*self._before.pop())


def candidates(layer: Any) -> Iterator[Candidate]:
    for name, module in list(layer.named_modules()):
        if _linear(module) is not None:
            continue
        if name:
            linears = _linears(module)
            arranged = list(_arranged([linear for _, linear in linears])) if len(linears) in (2, 3) else []
            if arranged:
                functions = _functions(module)
                tries = [Parts(ups, down, f, halves) for f in functions for ups, down, halves in arranged]
                yield Candidate(name, module, tries, _places=[(*parent_of(layer, name), None)])
        yield from _in_two(name, module)


def parent_of(root: Any, path: str) -> tuple[Any, str]:
    """The module that holds ``path``, and the attribute's name there."""
    parent, _, last = path.rpartition(".")
    return root.get_submodule(parent), last


def _arranged(linears: list[Any]) -> Iterator[tuple[tuple[Any, ...], Any, bool]]:
    """Which linear may be which, by their shapes: (ups, down, halves)."""
    for down in linears:
        ups = [linear for linear in linears if linear is not down]
        if any(up.in_features != down.out_features for up in ups):
            continue
        if all(up.out_features == down.in_features for up in ups):
            for order in permutations(ups):
                yield order, down, False
        elif len(ups) == 1 and ups[0].out_features == 2 * down.in_features:
            yield (ups[0],), down, True


def _in_two(path: str, parent: Any) -> Iterator[Candidate]:
    children = [(name, child, _linears(child)) for name, child in parent.named_children()]
    single = [(name, child, found[0]) for name, child, found in children if len(found) == 1 and found[0][0]]
    for i, (first_name, first, (_, up)) in enumerate(single):
        for second_name, second, (down_path, down) in single[i + 1 :]:
            if up.out_features != down.in_features or up.in_features != down.out_features:
                continue

            def around(
                x: Any, beside: Any, parent: Any = parent, first_name: str = first_name, second: Any = second
            ) -> Any:
                return second(getattr(parent, first_name)(x), beside)

            yield Candidate(
                name=f"{path}.{first_name} + {second_name}".lstrip("."),
                plain=nn.Sequential(first, second.get_submodule(down_path)),
                tries=[Parts((up,), down, function) for function in _functions(first)],
                around=around,
                _places=[(*parent_of(second, down_path), None), (parent, first_name, nn.Identity())],
            )


def _linears(module: Any) -> list[tuple[str, LoraLinear]]:
    """The linears in ``module`` by path; "": it is one itself."""
    if isinstance(module, FeedForward):
        return []
    return [(name, linear) for name, m in module.named_modules() if (linear := _linear(m)) is not None]


def _linear(module: Any) -> LoraLinear | None:
    """A linear as a LoraLinear: as it is, or with a pair of rank 0 beside the same weight."""
    if isinstance(module, LoraLinear):
        return module
    if isinstance(module, FrozenLinear):
        return LoraLinear(module.frozen, module.bias, rank=0, scaling=1.0)
    if isinstance(module, nn.Linear) or is_transposed(module):
        return LoraLinear(Dense(turned(module, module.weight)), module.bias, rank=0, scaling=1.0)
    return None


def _functions(module: Any) -> list[Nonlinear]:
    """Elementwise functions among the attributes of ``module``."""
    members = [m for m in module.children() if not isinstance(m, _NO_FUNCTION)]
    members += [value for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    found = [made for made in map(nonlinear, members) if made is not None]
    return found or [made for made in map(nonlinear, _UNNAMED) if made is not None]

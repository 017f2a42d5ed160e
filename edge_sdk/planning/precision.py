"""Bits for each transformer block of the base under a byte budget, and what a weight takes at each.

Minimise Σ s_l e_l(b_l) subject to Σ bytes_l(b_l) <= budget, b_l in {2, 4, 8, 16}: s_l a block's salience, e_l
its error at b bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edge_sdk.errors import MechanismError

__all__ = ["BlockCosts", "Option", "allocate", "greedy", "held_bytes", "objective"]

_BLOCK = 64
_FRONTIER = 5000
"""Partial plans kept at a time. All of them up to six blocks (4^6 = 4096), so that the answer is exact; with
more blocks mostly too, since blocks of one size have few distinct sums of bytes."""


_Chain = Any
"""(option, chain of the blocks before) or None: a type that mypy cannot tell within a list."""
_Partial = tuple[int, float, float, _Chain]


@dataclass(frozen=True)
class Option:
    """One way to hold a block. ``error``: squared, in any unit that all options of the block share."""

    bits: int
    bytes: int
    error: float


@dataclass(frozen=True)
class BlockCosts:
    salience: float
    options: tuple[Option, ...]
    """Most bits first."""

    def cost(self, option: Option) -> float:
        return self.salience * option.error


def held_bytes(word: str, rows: int, width: int) -> int:
    """Bytes of a (rows, width) weight held as ``word``, scales included."""
    blocks = -(-width // _BLOCK)
    values = blocks * _BLOCK
    if word == "int8":
        return rows * (values + 2 * blocks)
    if word == "nf4":
        return rows * (values // 2 + 2 * blocks)
    if word == "int2":
        return rows * (values // 4 + 2 * blocks + 4)
    return rows * width * (4 if word == "fp32" else 2)


def objective(blocks: Sequence[BlockCosts], chosen: Sequence[Option]) -> float:
    return sum(block.cost(option) for block, option in zip(blocks, chosen, strict=True))


def allocate(blocks: Sequence[BlockCosts], budget: int) -> tuple[Option, ...]:
    """The plan of the least objective within ``budget`` bytes; of equal ones the one of the least error.

    Partial plans are extended block by block; one that takes as many bytes as another and costs no less is
    dropped. Where more than ``_FRONTIER`` remain they are thinned, and the greedy plan, if better, is taken.

    Raises MechanismError where not even the fewest bits of every block fit: it names the least budget.
    """
    rough = greedy(blocks, budget)
    least = [0]
    for block in reversed(blocks):
        least.append(least[-1] + min(option.bytes for option in block.options))
    least.reverse()
    # (bytes, cost, error, plan); the plan as a chain, so that extending it copies nothing
    front: list[_Partial] = [(0, 0.0, 0.0, None)]
    for place, block in enumerate(blocks):
        room = budget - least[place + 1]
        longer = [
            (size + option.bytes, cost + block.cost(option), error + option.error, (option, plan))
            for size, cost, error, plan in front
            for option in block.options
            if size + option.bytes <= room
        ]
        front = _thinned(_undominated(longer), room)
    _, cost, error, plan = min(front, key=lambda partial: (partial[1], partial[2], partial[0]))
    if (objective(blocks, rough), sum(option.error for option in rough)) < (cost, error):
        return rough
    return _unchained(plan)


def greedy(blocks: Sequence[BlockCosts], budget: int) -> tuple[Option, ...]:
    """From the most bits down: lowers whichever block costs the least per byte saved, until the rest fits.

    Raises MechanismError as ``allocate``.
    """
    steps = [sorted(block.options, key=lambda option: -option.bytes) for block in blocks]
    fewest = sum(options[-1].bytes for options in steps)
    if fewest > budget:
        raise MechanismError(
            f"a budget of {budget} bytes is below the {fewest} ({fewest / 1e6:.1f} MB) that all blocks take "
            f"at {min(option.bits for block in blocks for option in block.options)} bits",
            "give more, or take a smaller base model",
        )
    at = [0] * len(blocks)
    size = sum(options[0].bytes for options in steps)
    while size > budget:
        rates = []
        for place, (block, options) in enumerate(zip(blocks, steps, strict=True)):
            if at[place] + 1 < len(options):
                now, lower = options[at[place]], options[at[place] + 1]
                saved = now.bytes - lower.bytes
                if saved:
                    rates.append(((block.cost(lower) - block.cost(now)) / saved, place))
                else:
                    at[place] += 1
        if rates:
            _, place = min(rates)
            size -= steps[place][at[place]].bytes - steps[place][at[place] + 1].bytes
            at[place] += 1
    return tuple(options[index] for options, index in zip(steps, at, strict=True))


def _undominated(partials: list[_Partial]) -> list[_Partial]:
    partials.sort(key=lambda partial: partial[:3])
    kept: list[_Partial] = []
    best = (float("inf"), float("inf"))
    for partial in partials:
        if partial[1:3] < best:
            best = partial[1:3]
            kept.append(partial)
    return kept


def _thinned(front: list[_Partial], room: int) -> list[_Partial]:
    """The best of each of ``_FRONTIER`` equal ranges of bytes."""
    if len(front) <= _FRONTIER:
        return front
    kept: dict[int, _Partial] = {}
    for partial in front:  # cost falls as bytes rise: the last of a range is its best
        kept[partial[0] * _FRONTIER // (room + 1)] = partial
    return list(kept.values())


def _unchained(plan: _Chain) -> tuple[Option, ...]:
    options = []
    while plan is not None:
        option, plan = plan
        options.append(option)
    return tuple(reversed(options))

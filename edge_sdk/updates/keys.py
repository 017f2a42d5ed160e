"""Part keys of a run's adapter, and their stored shapes. An adapter is a mapping from key to float32 rows."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from edge_sdk.errors import ContainerError
from edge_sdk.protocol.container import ContainerHeader
from edge_sdk.protocol.model import DensePart, LoraShape, ModelShape
from edge_sdk.updates.codecs import Floats

__all__ = [
    "Adapter",
    "all_keys",
    "check_shape",
    "dense_keys",
    "dense_size",
    "layer_of",
    "lora_keys",
    "part_sizes",
    "tuned_keys",
]

Adapter = dict[str, Floats]
"""By ``Part.key``, slot-major: A (rank, in), B transposed (rank, out), dense (rows, rest)."""


def lora_keys(shape: ModelShape, layer: int, factors: str = "AB") -> tuple[str, ...]:
    """Keys of one layer's ``factors`` (``AB``, ``A`` or ``B``), A before B, in the order of the modules."""
    return tuple(f"{layer}.{module.name}.{factor}" for module in shape.modules for factor in factors)


def dense_keys(shape: ModelShape) -> tuple[str, ...]:
    return tuple(f"dense.{part.name}" for part in shape.dense)


def tuned_keys(shape: ModelShape, depth: int, factors: str = "AB") -> tuple[str, ...]:
    """What LoRA depth ``depth`` trains: ``factors`` of the top layers, and the dense parts."""
    layers = range(shape.layers - depth, shape.layers)
    return tuple(key for layer in layers for key in lora_keys(shape, layer, factors)) + dense_keys(shape)


def all_keys(shape: ModelShape) -> tuple[str, ...]:
    return tuned_keys(shape, shape.layers)


def layer_of(key: str) -> int | None:
    """The layer that a part's slots, or what is folded there, belong to; None: a dense part."""
    name = key.removeprefix("fold.").partition(".")[0]
    return int(name) if name.isdecimal() else None


def part_sizes(shape: ModelShape, lora: LoraShape) -> dict[str, tuple[int, int]]:
    """Stored (rows, width) of every part of a whole adapter, by key."""
    sizes: dict[str, tuple[int, int]] = {}
    for layer in range(shape.layers):
        for module in shape.modules:
            sizes[f"{layer}.{module.name}.A"] = (lora.rank, module.inputs)
            sizes[f"{layer}.{module.name}.B"] = (lora.rank, module.outputs)
    for part in shape.dense:
        sizes[f"dense.{part.name}"] = dense_size(part)
    return sizes


def dense_size(part: DensePart) -> tuple[int, int]:
    """Stored (rows, rest) of a dense part; (1, n) for a vector."""
    if len(part.shape) == 1:
        return 1, part.shape[0]
    return part.shape[0], prod(part.shape[1:])


def check_shape(
    header: ContainerHeader,
    shape: ModelShape,
    lora: LoraShape,
    depth: int | None = None,
    factors: str = "AB",
) -> None:
    """The run decides which parts there are and how large; the sender does not.

    ``depth``: the parts must be just those that this LoRA depth trains, of each pair ``factors``; None: those
    of a whole adapter.
    Raises ContainerError that names the first part that is wrong.
    """
    known = part_sizes(shape, lora)
    wanted = set(known if depth is None else tuned_keys(shape, depth, factors))
    sent = {part.key for part in header.parts}
    if sent != wanted:
        odd = min(sent ^ wanted)
        raise ContainerError(
            f"the container has {len(sent)} parts where {len(wanted)} belong: "
            f"{odd!r} is {'too many' if odd in sent else 'missing'}",
            "it belongs to another run, LoRA shape or depth",
        )
    for part in header.parts:
        rows, width = known[part.key]
        count = rows if part.slots is None else len(part.slots)
        if (part.rows, part.width) != (count, width):
            raise ContainerError(
                f"part {part.key!r} is {part.rows} x {part.width}, the run's is {count} x {width}"
            )
        if part.role != ("dense" if part.layer is None else "slot"):
            raise ContainerError(f"part {part.key!r} has the role {part.role}, which this run does not use")
        if part.slots is not None and not _ascending(part.slots, rows):
            raise ContainerError(f"part {part.key!r} names slots outside 0..{rows - 1}, or not ascending")


def _ascending(slots: tuple[int, ...], count: int) -> bool:
    return all(a < b for a, b in pairwise(slots)) and all(s < count for s in slots)

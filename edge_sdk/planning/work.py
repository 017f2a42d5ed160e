"""How long a step takes, counted from the model's shape and priced: seconds of the machine of the prices.

Counted is what costs time: products of the linears and of attention, the weights that they read, values that
pass elementwise operations, LoRA's narrow products, calls, values packed and unpacked. What each costs is
data, measured on one machine (``prices.toml``); a device's fit scales it by what the device measured.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any, Literal

from edge_sdk.planning.memory import BITS, Targets, kept_values
from edge_sdk.protocol.model import LoraShape, ModelShape
from edge_sdk.protocol.spec import Setting

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["FORWARD", "PriceSource", "Prices", "Worked", "counts", "prices", "read_prices", "worked"]

_GIGA = 1e9
Counts = dict[str, float]


@dataclass(frozen=True)
class PriceSource:
    """Where a price is from: measured ``by`` a benchmark on a day, ``on`` a machine; or taken ``by`` whom."""

    how: Literal["measured", "taken"]
    by: str
    date: str
    on: str = ""


@dataclass(frozen=True)
class Prices:
    """Seconds for 10^9 of each; ``packing``: of packing a value and unpacking it again, by kernel and bits.

    ``gflops``: what the machine does at best in a large product; ``process_mb``: what a trainer holds at rest
    besides the base's weights; ``fixed_mb``: what a training takes whatever its size. ``got``: where each is
    from, by its place in the file, as ``seconds.linear``.
    """

    seconds: Mapping[str, float]
    packing: Mapping[str, Mapping[str, float]]
    gflops: float
    process_mb: float
    fixed_mb: float
    got: Mapping[str, PriceSource]

    def of(self, counts: Mapping[str, float]) -> float:
        return sum(self.seconds[name] * count for name, count in counts.items()) / _GIGA

    def pack(self, kernel: str, bits: int, rounding: str) -> float:
        """For a kernel without a price that of the composed operations: which are priced everywhere.

        For bits without one, which a record from elsewhere may hold, that of the nearest.
        """
        table = self.packing.get(kernel) or self.packing["composed"]
        extra = self.packing["composed"]["stochastic"] if rounding == "stochastic" else 0.0
        nearest = min(BITS, key=lambda known: abs(known - bits))
        return (table[str(nearest)] + extra) / _GIGA

    def all(self) -> dict[str, float]:
        """Every price by its place in the file."""
        return {
            **{name: getattr(self, name) for name in _ALONE},
            **{f"seconds.{name}": price for name, price in self.seconds.items()},
            **{f"packing.{kernel}.{form}": price
               for kernel, table in self.packing.items() for form, price in table.items()},
        }  # fmt: skip


_ALONE = ("gflops", "process_mb", "fixed_mb")


@cache
def prices() -> Prices:
    """Those that are shipped."""
    return read_prices(
        resources.files("edge_sdk.planning").joinpath("prices.toml").read_text(encoding="utf-8")
    )


def read_prices(text: str) -> Prices:
    """Each price is a table of its ``value`` and the name of its ``source``; KeyError for one without."""
    told = tomllib.loads(text)
    sources = {name: PriceSource(**about) for name, about in told.pop("sources").items()}
    got: dict[str, PriceSource] = {}

    def value(place: str, price: Mapping[str, Any]) -> float:
        got[place] = sources[price["source"]]
        return float(price["value"])

    return Prices(
        seconds={name: value(f"seconds.{name}", price) for name, price in told["seconds"].items()},
        packing={
            kernel: {form: value(f"packing.{kernel}.{form}", price) for form, price in table.items()}
            for kernel, table in told["packing"].items()
        },
        got=got,
        **{name: value(name, told[name]) for name in _ALONE},
    )


@dataclass(frozen=True)
class Worked:
    """Seconds of one batch on the machine of the prices."""

    forward_s: float
    """Of the forward pass with head and loss."""
    layer_s: float
    """Of a tuned layer's backward pass."""
    again_s: float
    """Of a tuned layer's forward pass where lever ``layer`` has it run again."""
    quantize_s: float
    """Of packing what a quantized layer keeps."""
    call_s: float
    """Of the forward pass, whatever it computes; ``tuned_s``: of a tuned layer."""
    tuned_s: float


_AT_A_TIME = 40.0
"""Values as wide as the layer that go through elementwise operations, besides those that are remade, where a
block works in chunks and attention is inside the store: set by 64 settings of four shapes."""

FORWARD = ("linear", "weight", "attention", "element", "lora", "call")


def counts(shape: ModelShape, lora: LoraShape, setting: Setting) -> tuple[Counts, Counts, float]:
    """Of the forward pass, of a tuned layer, and the values that a quantized layer packs."""
    rows, length = setting.micro_batch * setting.max_length, setting.max_length
    one = _layer_forward(shape, lora, rows, length)
    forward = {name: shape.layers * one[name] for name in FORWARD}
    if not shape.dense:  # logits and their gradient are made in the forward pass
        forward["linear"] += 4 * rows * shape.hidden * shape.vocabulary
        forward["weight"] += 8 * shape.hidden * shape.vocabulary
        forward["element"] += 4 * rows * shape.vocabulary
    forward["trained"] = float(shape.dense_values())
    layer = _layer_backward(shape, lora, setting, one)
    targets = Targets.of(shape, setting.factors)
    packed = kept_values(shape, targets, setting.levers.recompute, length, inside=shape.fused_attention)
    return forward, layer, rows * packed


def _layer_forward(shape: ModelShape, lora: LoraShape, rows: int, length: int) -> Counts:
    widths = sum(m.inputs + m.outputs for m in shape.modules)
    return {
        "linear": 2.0 * rows * shape.linear_weights,
        "weight": 4.0 * shape.linear_weights,
        "attention": 4.0 * rows * length * shape.query_width,
        "element": float(rows * (8 * shape.hidden + 2 * shape.inner_width)),
        "lora": 2.0 * rows * lora.rank * widths,
        "call": 1.0,
    }


def _layer_backward(shape: ModelShape, lora: LoraShape, setting: Setting, one: Counts) -> Counts:
    rows, recompute = setting.micro_batch * setting.max_length, setting.levers.recompute
    trained = sum(
        lora.rank * (m.inputs * ("A" in setting.factors) + m.outputs * ("B" in setting.factors))
        for m in shape.modules
    )
    layer = {
        "linear": one["linear"],
        "weight": one["weight"],
        "attention": 2.5 * one["attention"],
        "element": 1.5 * one["element"],
        "lora": one["lora"] + 2.0 * rows * trained,
        "tuned": 1.0,
        "trained": float(trained),
    }
    if recompute in ("outputs", "inner"):
        layer["attention"] += one["attention"]
        layer["element"] += rows * shape.intermediate
    if recompute != "none":
        layer["element"] += _AT_A_TIME * rows * shape.hidden
    if recompute == "inner":
        share = shape.inner_width * shape.hidden / shape.linear_weights
        for name in ("linear", "weight"):
            layer[name] += share * one[name]
    if recompute == "layer":
        layer["tuned"] += 1.0
    return layer


@lru_cache(maxsize=4096)
def worked(shape: ModelShape, lora: LoraShape, setting: Setting, kernel: str = "fbgemm") -> Worked:
    """Depth and number of quantized layers do not matter here."""
    table = prices()
    forward, layer, packed = counts(shape, lora, setting)
    price = table.pack(kernel, setting.levers.activation_bits, setting.levers.activation_rounding)
    call, tuned = table.of({"call": forward.pop("call")}), table.of({"tuned": layer.pop("tuned")})
    return Worked(
        forward_s=table.of(forward),
        layer_s=table.of(layer),
        again_s=_again_s(shape, lora, setting),
        quantize_s=packed * price,
        call_s=call,
        tuned_s=tuned,
    )


def _again_s(shape: ModelShape, lora: LoraShape, setting: Setting) -> float:
    if setting.levers.recompute != "layer":
        return 0.0
    one = _layer_forward(shape, lora, setting.micro_batch * setting.max_length, setting.max_length)
    return prices().of({name: count for name, count in one.items() if name != "call"})

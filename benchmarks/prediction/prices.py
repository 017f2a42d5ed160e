"""Makes ``edge_sdk/planning/prices.toml``: what each counted thing costs on this machine.

``python -m benchmarks.prediction.prices`` writes it; with ``--show`` it prints what it measured beside what
is shipped, and writes nothing. Most prices are the least of many short repeats of that thing alone, so that
they need no quiet machine. The others are of a whole model that computes next to nothing, trained by the
trainer's own loop, which tells what a layer's call takes besides its arithmetic; of settings of moderate
size, which tell what the heap holds beyond what is counted; and of a trainer's own process at rest.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.prediction.run import drawn, setting_of
from benchmarks.processes import emit, measure
from benchmarks.results import machine
from edge_sdk.agent.process_trainer import ProcessTrainer
from edge_sdk.planning.cost import peak_mb
from edge_sdk.planning.fitting import estimate
from edge_sdk.planning.shapes import held_base_bytes
from edge_sdk.planning.work import Prices, counts, prices
from edge_sdk.protocol.model import LoraShape, ModelShape
from edge_sdk.protocol.spec import TrainSpec
from edge_sdk.protocol.trainer import Describe, Described, Setup
from examples.demo.asking import Asker

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["main", "run"]

FOLDER = Path(__file__).parent
DATA = FOLDER.parents[1] / "edge_sdk" / "planning" / "prices.toml"
OF_SMALL = ("seconds.call", "seconds.tuned")
_OTHERWISE = {"fixed_mb": "settings", "process_mb": "process"}


def least(work: Callable[[], Any], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return best


def run(what: dict[str, Any]) -> None:
    """In the measuring process: seconds for 10^9 of each thing."""
    import torch
    from torch.nn import functional

    from edge_sdk.training.activations import kernels

    repeats = what["repeats"]
    torch.manual_seed(0)
    rows, width, inner, length, heads = 128, 512, 1024, 64, 8
    x, weight = torch.randn(rows, width), torch.randn(inner, width)
    product = least(lambda: functional.linear(x, weight), repeats)
    few = torch.randn(8, width)
    thin = least(lambda: functional.linear(few, weight), repeats)
    flops = 2.0 * rows * width * inner
    linear = product / flops
    q = torch.randn(rows // length, heads, length, width // heads)
    attention = least(lambda: functional.scaled_dot_product_attention(q, q, q), repeats)
    wide = torch.randn(1 << 20)
    gelu = least(lambda: functional.gelu(wide), repeats)
    add = least(lambda: wide + wide, repeats)
    narrow = torch.randn(8, width)
    lora = least(lambda: narrow @ x.t(), repeats)
    parameter = torch.randn(1 << 18, requires_grad=True)
    parameter.grad = torch.randn_like(parameter)
    adam = torch.optim.AdamW([parameter], foreach=False)
    trained = least(adam.step, repeats)

    def packed(bits: int, *, composed: bool, stochastic: bool = False) -> float:
        grouped = wide.view(-1, 32)
        known = kernels.has_kernel
        if composed:
            kernels.has_kernel = lambda *_: False  # type: ignore[assignment]
        try:
            codes = kernels.pack_rows(grouped, bits, stochastic=stochastic)
            seconds = least(lambda: kernels.pack_rows(grouped, bits, stochastic=stochastic), repeats)
            return (seconds + least(lambda: kernels.unpack_rows(codes, bits, 32), repeats)) / wide.numel()
        finally:
            kernels.has_kernel = known

    composed = {str(bits): 1e9 * packed(bits, composed=True) for bits in (8, 4, 2)}
    drawn = 1e9 * packed(8, composed=True, stochastic=True) - composed["8"]
    emit(
        gflops=flops / product / 1e9,
        seconds={
            "linear": 1e9 * linear,
            "weight": 1e9 * max(0.0, thin - 8 * 2 * width * inner * linear) / (4 * width * inner),
            "attention": 1e9 * attention / (4 * rows * length * width),
            # a layer's operations: some like an activation function, most like an addition
            "element": 1e9 * (0.3 * gelu + 0.7 * add) / wide.numel(),
            "lora": 1e9 * lora / (2 * 8 * rows * width),
            "trained": 1e9 * trained / parameter.numel(),
        },
        packing={
            "fbgemm": {str(bits): 1e9 * packed(bits, composed=False) for bits in (8, 4, 2)},
            "composed": {**composed, "stochastic": max(0.0, drawn)},
        },
    )


def small_settings(layers: int) -> list[dict[str, Any]]:
    """One layer tuned, and all of them, in the plainest way."""
    about = {
        "quantized": 0, "bits": 8, "recompute": "none", "rounding": "nearest", "batch": 1, "length": 8,
        "factors": "AB", "optimizer": "adamw",
    }  # fmt: skip
    return [{"depth": depth, **about} for depth in (1, layers)]


def of_small(rows: list[dict[str, Any]], lora: LoraShape, known: Prices) -> dict[str, float]:
    """``seconds.call`` and ``seconds.tuned`` from visits of the small settings.

    A step of depth d over L layers takes, beyond what its counted work costs at the ``known`` prices,
    L · call + d · tuned: two depths tell both. Each is the least of its repeats, and not below 0.
    """
    shape = msgspec.convert(next(row["shape"] for row in rows if row["kind"] == "shape"), ModelShape)
    beyond: dict[int, float] = {}
    for row in rows:
        if row["kind"] != "visit":
            continue
        setting = setting_of(row["setting"])
        forward, layer, _ = counts(shape, lora, setting)
        forward["call"] = layer["tuned"] = 0.0
        more = row["step_s"] - known.of(forward) - setting.depth * known.of(layer)
        beyond[setting.depth] = min(more, beyond.get(setting.depth, math.inf))
    tuned = max(0.0, (beyond[shape.layers] - beyond[1]) / (shape.layers - 1))
    return {
        "seconds.call": 1e9 * max(0.0, (beyond[1] - tuned) / shape.layers),
        "seconds.tuned": 1e9 * tuned,
    }


def process_mb(small: dict[str, Any], threads: int) -> float:
    """MB that a trainer's own process holds at rest besides the base."""
    from benchmarks.models import write_base
    from benchmarks.prediction.measure import write_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder) / "base", small)
        write_tokenizer(base)
        setup = Setup(
            base=str(base), task="classification", labels=("a", "b"), max_length=8, micro_batch=1,
            lora=LoraShape(rank=8), spec=TrainSpec(), threads=threads,
        )  # fmt: skip
        asker = Asker(ProcessTrainer(Path(folder) / "trainer", allocator="glibc"))
        try:
            told = asker.ask(lambda id: Describe(id=id, setup=setup), Described)
        finally:
            asker.close()
    return told.rest_mb - held_base_bytes(told.shape, "fp32") / 1e6


def beyond_counted(rows: list[dict[str, Any]], lora: LoraShape, known: Prices) -> list[float]:
    """MB that each visit held beyond what is counted of its setting: what a heap has besides its tensors."""
    shape = msgspec.convert(next(row["shape"] for row in rows if row["kind"] == "shape"), ModelShape)
    found = []
    for row in rows:
        if row["kind"] == "visit":
            setting = setting_of(row["setting"])
            counted_mb = peak_mb(estimate(shape, lora, setting), shape, lora, setting) - known.fixed_mb
            found.append(row["peak_mb"] - counted_mb)
    return found


def measured(whole: dict[str, Any]) -> dict[str, float]:
    """Every price by its place in the file."""
    config = whole["prices"]
    threads, small = config["threads"], config["small"]
    (alone,) = measure("benchmarks.prediction.prices", config, threads=threads, allocator="glibc")
    found = {
        "gflops": alone["gflops"],
        **{f"seconds.{name}": value for name, value in alone["seconds"].items()},
    }
    for kernel, table in alone["packing"].items():
        found |= {f"packing.{kernel}.{form}": value for form, value in table.items()}
    lora = LoraShape(rank=8)
    what = {
        "model": "small", "shape": small, "batch": 1, "length": 8, "rank": lora.rank, "threads": threads,
        "probe": False, "repeats": config["small_repeats"],
        "settings": small_settings(small["num_hidden_layers"]),
    }  # fmt: skip
    rows = list(measure("benchmarks.prediction.measure", what, threads=threads, allocator="glibc"))
    known = replace(prices(), seconds={**prices().seconds, **alone["seconds"]})
    found |= of_small(rows, lora, known) | {"process_mb": process_mb(small, threads)}
    beyond: list[float] = []
    draw = random.Random(config["seed"])
    for name, shape in whole["models"].items():
        settings = drawn(whole, shape["num_hidden_layers"], config["settings"], draw)
        what |= {
            "model": name, "shape": shape, "batch": whole["batch"], "length": whole["length"], "repeats": 1,
            "settings": settings, "threads": whole["threads"],
        }  # fmt: skip
        rows = list(
            measure("benchmarks.prediction.measure", what, threads=whole["threads"], allocator="glibc")
        )
        beyond += beyond_counted(rows, lora, known)
    return found | {"fixed_mb": max(0.0, statistics.median(beyond))}


def table(shipped: Prices, found: Mapping[str, float]) -> list[str]:
    """Measured beside shipped, and where that is from."""
    lines = [f"{'':<28}{'shipped':>11}{'measured':>11}{'ratio':>8}  shipped is"]
    for place, value in shipped.all().items():
        source, now = shipped.got[place], found.get(place)
        cells = f"{'-':>11}{'-':>8}" if now is None else f"{now:>11.4g}{now / value if value else 0:>8.2f}"
        lines.append(f"{place:<28}{value:>11.4g}{cells}  {source.how} {source.date}")
    return lines


def as_toml(found: Mapping[str, float], about: Mapping[str, Any], threads: int, repeats: int) -> str:
    """The file of these prices, all of them measured today on this machine."""
    lines = [
        "# Seconds for 10^9 of each counted thing. Made by `python -m benchmarks.prediction.prices`;",
        "# with --show it prints them beside those that are shipped. Each price names its source.",
    ]
    sections: dict[str, list[str]] = {}
    for place, value in found.items():
        section, _, name = place.rpartition(".")
        source = "small-steps" if place in OF_SMALL else _OTHERWISE.get(place, "alone")
        sections.setdefault(section, []).append(f'{name} = {{ value = {value:.4g}, source = "{source}" }}')
    lines += sections.pop("")
    for section, members in sections.items():
        lines += ["", f"[{section}]", *members]
    on = f"{about['processor']}, {threads} thread, torch {about['versions']['torch']}"
    today = f"{datetime.now(timezone.utc):%Y-%m-%d}"
    by = "benchmarks/prediction/prices.py, "
    for name, how in (("alone", f"each thing alone, the least of {repeats} repeats"),
                      ("small-steps", "small steps of a whole model"),
                      ("process", "a trainer's process with a small base at rest"),
                      ("settings", "median beyond what is counted, of drawn settings")):  # fmt: skip
        lines += ["", f"[sources.{name}]", 'how = "measured"', f'by = "{by}{how}"', f'date = "{today}"',
                  f'on = "{on}"']  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    config = tomllib.loads((FOLDER / "config.toml").read_text(encoding="utf-8"))
    found = measured(config)
    for line in table(prices(), found):
        print(line)
    if "--show" in sys.argv[1:]:
        return
    DATA.write_text(
        as_toml(found, machine(), config["prices"]["threads"], config["prices"]["repeats"]), encoding="utf-8"
    )
    print(f"wrote {DATA}")


if __name__ == "__main__":
    main()

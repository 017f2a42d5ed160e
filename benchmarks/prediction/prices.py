"""Makes ``edge_sdk/planning/prices.toml``: what each counted thing costs on this machine.

``python -m benchmarks.prediction.prices``: each price is the least of many short repeats of that thing alone,
so that it needs no quiet machine; what a call costs besides is what small steps of a whole model take more.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.processes import emit, measure
from benchmarks.results import machine

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["main", "run"]

FOLDER = Path(__file__).parent
DATA = FOLDER.parents[1] / "edge_sdk" / "planning" / "prices.toml"


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
    from edge_sdk.training.memory import read_status

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
        process_mb=read_status()["VmRSS"],
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


def main() -> None:
    config = tomllib.loads((FOLDER / "config.toml").read_text(encoding="utf-8"))
    (found,) = measure("benchmarks.prediction.prices", config["prices"], threads=config["prices"]["threads"])
    seconds = {**found["seconds"], **config["prices"]["calls"]}
    about, alone = machine(), config["prices"]["threads"]
    lines = [
        "# Made by benchmarks/prediction/prices.py: seconds for 10^9 of each counted thing.",
        f'made = "{datetime.now(timezone.utc):%Y-%m-%d}"',
        f'machine = "{about["processor"]}, {alone} thread, torch {about["versions"]["torch"]}"',
        f"gflops = {found['gflops']:.3g}",
        f"process_mb = {config['prices']['process_mb']}",
        f"fixed_mb = {config['prices']['fixed_mb']}",
        "",
        "[seconds]",
        *(f"{name} = {value:.4g}" for name, value in seconds.items()),
    ]
    for kernel, table in found["packing"].items():
        lines += ["", f"[packing.{kernel}]", *(f"{name} = {value:.4g}" for name, value in table.items())]
    DATA.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {DATA}")


if __name__ == "__main__":
    main()

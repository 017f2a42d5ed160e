"""The cost model against the trainer: peak memory and step time of settings that no probe has seen.

For each model one process: the trainer's own probe (at most five settings), then every other setting, several
times in turn. ``--quick`` draws few settings and repeats; its result is not written.
"""

from __future__ import annotations

import random
import statistics
import sys
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.prediction.plot import plot
from benchmarks.processes import measure
from benchmarks.results import Claim, at_least, at_most, write_result
from edge_sdk.planning.cost import peak_mb, step_s
from edge_sdk.planning.fitting import estimate
from edge_sdk.protocol.measure import Fit
from edge_sdk.protocol.model import LoraShape, ModelShape
from edge_sdk.protocol.spec import Levers, Setting

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent


def drawn(config: dict[str, Any], layers: int, count: int, draw: random.Random) -> list[dict[str, Any]]:
    """Settings over all that the cost model tells apart; none twice."""
    found: list[dict[str, Any]] = []
    while len(found) < count:
        depth = draw.randint(1, layers)
        recompute = draw.choice(["none", "outputs", "outputs", "inner", "layer"])
        quantized = draw.choice([0, depth, draw.randint(0, depth)])
        batch, length = draw.choice(
            [(config["batch"], config["length"]), (8, 128), (16, 64), (4, 256), (8, 256)]
        )
        one = {
            "depth": depth, "quantized": quantized, "bits": draw.choice([8, 8, 4, 2]), "recompute": recompute,
            "rounding": "nearest", "batch": batch, "length": length,
            "factors": draw.choice(["AB", "AB", "AB", "B"]),
            "optimizer": draw.choice(["adamw", "adamw", "sgd", "adamw8bit"]),
        }  # fmt: skip
        if one not in found:
            found.append(one)
    return found


def setting_of(row: dict[str, Any]) -> Setting:
    levers = Levers(
        activation_bits=row["bits"], activation_rounding=row["rounding"], recompute=row["recompute"]
    )
    return Setting(
        depth=row["depth"], quantized_layers=row["quantized"], levers=levers, micro_batch=row["batch"],
        max_length=row["length"], factors=row["factors"], optimizer=row["optimizer"],
    )  # fmt: skip


def measured(name: str, config: dict[str, Any], settings: list[dict[str, Any]], repeats: int) -> list[Any]:
    what = {
        "model": name, "shape": config["models"][name], "batch": config["batch"], "length": config["length"],
        "rank": config["rank"], "threads": config["threads"], "probe": True, "repeats": repeats,
        "settings": settings,
    }  # fmt: skip
    return list(measure("benchmarks.prediction.measure", what, threads=config["threads"], allocator="glibc"))


def scored(name: str, rows: list[dict[str, Any]], lora: LoraShape) -> list[dict[str, Any]]:
    """One row a setting: measured, predicted from the fit, and estimated without it."""
    shape = msgspec.convert(next(r["shape"] for r in rows if r["kind"] == "shape"), ModelShape)
    fit = msgspec.convert(next(r["fit"] for r in rows if r["kind"] == "fit"), Fit)
    visits: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "visit":
            visits.setdefault(repr(row["setting"]), []).append(row)
    found = []
    for seen in visits.values():
        wanted = setting_of(seen[0]["setting"])
        guess = estimate(shape, lora, wanted)
        found.append(
            {
                "model": name,
                **seen[0]["setting"],
                "peak_mb": statistics.median(row["peak_mb"] for row in seen),
                "step_s": min(row["step_s"] for row in seen),
                "peaks_mb": [round(row["peak_mb"], 2) for row in seen],
                "steps_s": [round(row["step_s"], 4) for row in seen],
                "predicted_mb": peak_mb(fit, shape, lora, wanted),
                "predicted_s": step_s(fit, shape, lora, wanted),
                "estimated_mb": peak_mb(guess, shape, lora, wanted),
                "probes": len(fit.probes),
            }
        )
    return found


def share(errors: list[float], part: float) -> float:
    """The value that so large a part of the errors does not exceed."""
    ordered = sorted(errors)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def claims_of(rows: list[dict[str, Any]]) -> list[Claim]:
    memory = [row["predicted_mb"] / row["peak_mb"] - 1 for row in rows]
    seconds = [row["predicted_s"] / row["step_s"] - 1 for row in rows]
    guesses = [row["estimated_mb"] / row["peak_mb"] - 1 for row in rows]
    return [
        at_least("settings", "settings scored besides the probes", len(rows), 60),
        at_most("probes", "probes a model, at most", max(row["probes"] for row in rows), 5),
        at_most(
            "memory", "error of peak memory, 95th percentile", share([abs(e) for e in memory], 0.95), 0.08
        ),
        at_most("memory-under", "peak memory under-predicted by, at most", max(0.0, -min(memory)), 0.05),
        at_most("time", "error of step time, 90th percentile", share([abs(e) for e in seconds], 0.9), 0.15),
        at_most("estimate", "un-probed estimate of peak memory, error at most", max(map(abs, guesses)), 0.25),
    ]


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    config = tomllib.loads((FOLDER / "config.toml").read_text(encoding="utf-8"))
    draw = random.Random(config["seed"])
    lora = LoraShape(rank=config["rank"])
    count, repeats = ("quick_settings", "quick_repeats") if quick else ("settings", "repeats")
    rows: list[dict[str, Any]] = []
    for name, shape in config["models"].items():
        settings = drawn(config, shape["num_hidden_layers"], config[count], draw)
        rows += scored(name, measured(name, config, settings, config[repeats]), lora)
    for row in rows:
        print(
            f"  {row['model']:8} d{row['depth']} a{row['quantized']} {row['bits']} {row['recompute']:8}"
            f"{row['batch']:>3} x {row['length']:<4} {row['peak_mb']:7.1f} MB, predicted "
            f"{row['predicted_mb'] / row['peak_mb'] - 1:+.1%}, estimated "
            f"{row['estimated_mb'] / row['peak_mb'] - 1:+.1%}; {row['step_s']:.3f} s, predicted "
            f"{row['predicted_s'] / row['step_s'] - 1:+.1%}"
        )
    claims = claims_of(rows)
    if quick:
        for claim in claims:
            print(f"{'holds' if claim.holds else 'FAILS'}  {claim.text}: {claim.value} ({claim.bound})")
        return
    write_result(FOLDER, config, rows, claims)
    plot(rows, FOLDER / "prediction.svg")


if __name__ == "__main__":
    main()

"""Word order, three devices under memory limits: depths that are chosen against one depth that fits all."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.activation_accuracy.run import difference, minilm
from benchmarks.kept import Kept, digest, measure_missing
from benchmarks.results import Claim, write_result
from examples.docstring_tasks import split_evenly, word_order_task, write_jsonl

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
WORK = Path("runs/bench-federated-depth").resolve()
ARMS = ("chosen", "one depth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds of few steps: nothing is written")
    parser.add_argument("--fresh", action="store_true", help="forget the runs that are done")
    given = parser.parse_args()
    config = tomllib.loads((FOLDER / "config.toml").read_text(encoding="utf-8"))
    quick = config.pop("quick")
    if given.quick:
        config.update(quick)
    core = {k: v for k, v in config.items() if k not in ("seeds", "resamples", "processes")}
    kept = Kept(WORK / f"rows-{digest(core)}.jsonl", lambda row: (row["arm"], row["seed"]), fresh=given.fresh)
    wanted = [{"arm": arm, "seed": seed} for seed in config["seeds"]
              for arm in (ARMS if seed % 2 else ARMS[::-1])]  # fmt: skip
    missing = [one for one in wanted if not kept.has(one)]
    print(f"{len(wanted)} runs, {len(missing)} to do now", flush=True)
    _run_all(missing, config, kept)
    claims = claims_of(kept.rows, config["resamples"])
    for row in kept.rows:
        chose = ", ".join(f"{n} {d['depth']}/{d['quantized']}" for n, d in row["devices"].items())
        print(
            f"  {row['arm']:10} seed {row['seed']}: {row['accuracy']:.3f}, loss {row['loss']:.3f} ({chose})"
        )
    if given.quick:
        for claim in claims:
            print(f"{'holds' if claim.holds else 'FAILS'}  {claim.text}: {claim.value} ({claim.bound})")
        return
    write_result(FOLDER, config, kept.rows, claims)


def _run_all(missing: list[dict[str, Any]], config: dict[str, Any], kept: Kept) -> None:
    """Writes the rows of each device, and does the runs."""
    if not missing:
        return
    task = word_order_task(WORK)
    parts = split_evenly(task.train, len(config["devices"]))
    data = {
        "labels": list(task.labels),
        "held_out": str(write_jsonl(WORK / "held-out.jsonl", task.held_out)),
        "devices": [str(write_jsonl(WORK / f"device-{n}.jsonl", part)) for n, part in enumerate(parts)],
    }
    measure_missing(
        missing, kept, "benchmarks.federated_depth.training",
        lambda part: {"runs": part, "config": config, "data": data, "base": str(minilm())},
        processes=config["processes"],
        told=lambda row: f"{row['arm']}, seed {row['seed']}: {row['accuracy']:.4f} ({row['seconds']:.0f} s)",
    )  # fmt: skip


def claims_of(rows: list[dict[str, Any]], resamples: int) -> list[Claim]:
    outcomes, losses = {}, {}
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        outcomes[arm] = {
            row["seed"]: np.array([int(digit) for digit in row["right"]], dtype=np.float64) for row in mine
        }
        losses[arm] = float(np.mean([row["loss"] for row in mine]))
    mean, low, high = difference(outcomes["chosen"], outcomes["one depth"], resamples)
    over = [
        f"{row['arm']} seed {row['seed']} {name}"
        for row in rows
        for name, device in row["devices"].items()
        if device["peak_mb"] > device["budget_mb"]
    ]
    text = (
        "points gained by chosen depths and quantized layers over the one depth that fits all, low end "
        f"of the 95 % interval (mean {100 * mean:+.2f}, {100 * low:+.2f} to {100 * high:+.2f}; held-out loss "
        f"{losses['chosen']:.4f} against {losses['one depth']:.4f})"
    )
    return [
        Claim("gain", text, 100 * low, "> 0", low > 0),
        Claim("limits", f"devices that held more than their limit {over or ''}".strip(), len(over), "== 0",
              not over),
    ]  # fmt: skip


if __name__ == "__main__":
    main()

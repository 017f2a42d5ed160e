"""Compares the allocators that the trainer can be started under: time, peaks, and how hard a limit is."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Claim, at_least, at_most, write_result
from edge_sdk.device.allocators import ALLOCATORS, Allocator, find_allocator
from edge_sdk.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
DEFAULT = "glibc-default"
Row = dict[str, Any]


def arms() -> dict[str, Allocator]:
    """What is compared, by name: glibc as it comes, glibc as the trainer sets it, and what is installed."""
    found = {DEFAULT: Allocator("glibc")}
    for name in ALLOCATORS:
        try:
            if name != "auto":
                found[name] = find_allocator(name)
        except ConfigError:
            print(f"{name} is not installed here: left out")
    return found


def measure(name: str, allocator: Allocator, config: Mapping[str, Any], **more: Any) -> Row:
    told = {**config, "settle": name != DEFAULT, "limited": False, **more}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.allocator.subject", json.dumps(told)],
        env={**os.environ, **allocator.environment()}, cwd=FOLDER.parents[1], check=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    return {"arm": name, "limited": told["limited"], **json.loads(done.stdout.splitlines()[-1])}


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Of one arm: step time, deepest peak, its spread, how far peaks bend, what 8 bits save."""
    deepest = max(rows[0]["plain_mb"], key=int)
    tops = [row["plain_mb"][deepest] for row in rows]
    plain = {int(d): statistics.median(row["plain_mb"][d] for row in rows) for d in rows[0]["plain_mb"]}
    quantized = {
        int(d): statistics.median(row["quantized_mb"][d] for row in rows) for d in rows[0]["plain_mb"]
    }
    bends = []
    for peaks in (plain, quantized):
        slope, start = statistics.linear_regression(list(peaks), list(peaks.values()))
        bends.append(max(abs(start + slope * d - peak) for d, peak in peaks.items()) / max(peaks.values()))
    return {
        "step_s": min(row["step_s"] for row in rows),
        "peak_mb": statistics.median(tops),
        "spread": (max(tops) - min(tops)) / statistics.median(tops),
        "bend": max(bends),
        "saved": 1 - quantized[int(deepest)] / plain[int(deepest)],
    }


def claims_of(rows: Sequence[Row], chosen: Sequence[str]) -> list[Claim]:
    """Of what the trainer takes here, and of what the extra ``train`` brings."""
    free = [row for row in rows if not row["limited"]]
    names = dict.fromkeys(row["arm"] for row in free)
    arms = {name: summary([row for row in free if row["arm"] == name]) for name in names}
    default = arms[DEFAULT]
    claims = []
    for name in chosen:
        ours, limited = arms[name], [row for row in rows if row["limited"] and row["arm"] == name]
        time, peak = ours["step_s"] / default["step_s"], ours["peak_mb"] / default["peak_mb"]
        claims += [
            at_most(f"{name}-time", f"{name}: step time over glibc's default", time, 1.10),
            at_most(f"{name}-peak", f"{name}: peak over glibc's default", peak, 0.95),
            at_most(f"{name}-spread", f"{name}: spread of the peak over processes", ours["spread"], 0.05),
            at_most(f"{name}-bend", f"{name}: furthest peak from a line in depth", ours["bend"], 0.08),
            at_least(f"{name}-saved", f"{name}: share of the peak that 8 bits save", ours["saved"], 0.25),
            at_least(f"{name}-passes", f"{name}: a limit just above the peak lets training pass, share of "
                     "processes", _share(limited, "passes_above"), 1.0),
            at_least(f"{name}-stops", f"{name}: a limit below the peak stops it, share of processes",
                     _share(limited, "stopped_below"), 1.0),
        ]  # fmt: skip
    price = arms["glibc"]["step_s"] / default["step_s"]
    claims.append(at_most("price", "glibc as the trainer sets it: time over its default", price, 1.6))
    return claims


def _share(rows: Sequence[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def main() -> None:
    config = tomllib.loads((FOLDER / "config.toml").read_text(encoding="utf-8"))
    there = arms()
    chosen = [n for n in dict.fromkeys((find_allocator().name, "mimalloc")) if n in there]
    rows: list[Row] = []
    for _ in range(config["repeats"]):
        rows += [measure(name, allocator, config) for name, allocator in there.items()]
    for name, allocator in there.items():
        if name != DEFAULT:
            held = summary([row for row in rows if row["arm"] == name])["peak_mb"]
            rows.append(measure(name, allocator, config, limited=True, held_mb=held))
    for arm in there:
        figures = summary([row for row in rows if row["arm"] == arm and not row["limited"]])
        print(f"{arm:14}", *(f"{key} {value:.3f}" for key, value in figures.items()))
    write_result(FOLDER, {**config, "chosen": chosen}, rows, claims_of(rows, chosen))


if __name__ == "__main__":
    main()

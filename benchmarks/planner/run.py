"""Whether the planner's sweep is exact, how long it takes, and what its simpler variant gives away."""

from __future__ import annotations

import os
import random
import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.planner.frontiers import Frontiers
from aggregator.planner.sweep import Objective, default_coverage, reference_round, sweep
from benchmarks.planner.brute import Case, best_value, random_case
from benchmarks.planner.fleets import random_fleet
from benchmarks.planner.rivals import as_lists, as_tables, naive_value, plain_value
from benchmarks.results import Claim, at_least, at_most, write_result

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
Row = dict[str, Any]


def objective(frontiers: Frontiers, samples: Any, layers: int, **terms: Any) -> Objective:
    given = {"coverage": default_coverage(frontiers.devices), "omega": 0.1, "server_s": 2.0}
    return Objective.of(frontiers, samples, layers, **{**given, **terms})


def of_case(case: Case) -> Objective:
    flat = [pair for pairs in case.frontiers for pair in pairs]
    frontiers = Frontiers(
        offsets=np.cumsum([0, *map(len, case.frontiers)]),
        depth=np.array([depth for depth, _, _ in flat]),
        seconds=np.array([seconds for _, seconds, _ in flat]),
        gain=np.array([gain for _, _, gain in flat]),
    )
    return objective(
        frontiers, case.samples, case.layers, coverage=case.coverage, omega=case.omega, server_s=case.server_s
    )


def exact(config: Row, seed: int) -> list[Row]:
    """One row a kind of fleet: how many equal what trying everything gives, and cover."""
    random_, rows = random.Random(seed), {}
    for _ in range(config["cases"]):
        case = random_case(random_, config["devices"], config["layers"])
        row = rows.setdefault(
            case.kind,
            {"what": "exact", "kind": case.kind, "cases": 0, "equal": 0, "covered": 0, "largest_gap": 0.0},
        )
        j = of_case(case)
        swept = sweep(j)
        gap = abs(best_value(case) - swept.value)
        row["cases"] += 1
        row["equal"] += gap <= 1e-9
        row["covered"] += j.covers(swept.chosen)
        row["largest_gap"] = max(row["largest_gap"], gap)
    return [rows[kind] for kind in sorted(rows)]


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return taken


def scale(config: Row, seed: int) -> list[Row]:
    random_, layers = np.random.default_rng(seed), config["layers"]
    rows: list[Row] = []

    def fleet(devices: int, paces: str = "alike") -> tuple[Frontiers, Any]:
        """Of alike paces nearly every pair is beyond the first length swept, and has to be sorted."""
        frontiers = random_fleet(random_, devices, layers, config["spread"][paces], full=True)
        return frontiers, random_.integers(20, 500, devices)

    frontiers, samples = fleet(config["devices"])
    unequal = fleet(config["devices"], "unequal")
    best = sweep(objective(frontiers, samples, layers))
    before = np.clip(frontiers.depth[best.chosen] - 1, 1, layers)
    arms: dict[str, Callable[[], object]] = {
        "sweep": lambda: sweep(objective(frontiers, samples, layers)),
        "sweep with hysteresis": lambda: sweep(
            objective(frontiers, samples, layers), hysteresis=0.02, previous=before
        ),
        "sweep of unequal paces": lambda: sweep(objective(*unequal, layers)),
        "reference time": lambda: reference_round(objective(frontiers, samples, layers)),
    }
    for name, work in arms.items():
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        rows.append(
            {
                "what": "scale", "arm": name, "devices": config["devices"], "layers": layers,
                "pairs": len(frontiers.seconds), "seconds": seconds(work, config["repeats"]),
                "peak_mb": round(peak),
            }
        )  # fmt: skip
    rows.append(rival("plain Python", *fleet(config["plain_devices"]), layers, config))
    rows.append(rival("every length", *fleet(config["naive_devices"]), layers, config))
    return rows


def rival(name: str, frontiers: Frontiers, samples: Any, layers: int, config: Row) -> Row:
    """On a smaller fleet: whether it comes to the same, and what it would take for the large one."""
    j = objective(frontiers, samples, layers)
    factor = config["devices"] / frontiers.devices
    if name == "plain Python":
        work = partial(plain_value, j, as_lists(j))
    else:
        work = partial(naive_value, j, *as_tables(j, layers))
        factor **= 2
    taken = seconds(work, config["repeats"])
    return {
        "what": "scale", "arm": name, "devices": frontiers.devices, "layers": layers, "seconds": taken,
        "scaled_s": min(taken) * factor, "same": abs(work() - sweep(j).value) < 1e-9,
    }  # fmt: skip


def reference(config: Row, seed: int) -> list[Row]:
    random_, rows = np.random.default_rng(seed), []
    for number in range(config["fleets"]):
        devices, layers = int(random_.choice([1, 3, 10, 50, 300])), int(random_.choice([6, 12, 24]))
        spread = float(random_.choice([0.3, 0.6, 1.0]))
        fleet = random_fleet(random_, devices, layers, spread)
        j = objective(fleet, random_.integers(20, 500, devices), layers)
        best, referred = sweep(j), reference_round(j)
        rows.append(
            {
                "what": "reference", "seed": number, "devices": devices, "layers": layers, "spread": spread,
                "sweep": best.value, "reference": referred.value,
                "below": (best.value - referred.value) / abs(best.value),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    config = tomllib.loads((FOLDER / "config.toml").read_text(encoding="utf-8"))
    seed = config["seed"]
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, whatever libraries would like
    told = [exact(config["exact"], seed), scale(config["scale"], seed), reference(config["reference"], seed)]
    exacts, scales, references = told
    arms = {row["arm"]: row for row in scales}
    swept = max(min(arms[name]["seconds"]) for name in ("sweep", "sweep of unequal paces"))
    cases = sum(row["cases"] for row in exacts)
    below = [row["below"] for row in references]
    devices, layers = config["scale"]["devices"], config["scale"]["layers"]
    claims = [
        at_least("exact-cases", "random fleets on which every combination was tried", cases, 1000),
        Claim(
            "exact",
            "of them, those on which the sweep's J is not the best one, or a layer is not covered",
            cases - sum(min(row["equal"], row["covered"]) for row in exacts),
            "== 0",
            all(row["equal"] == row["covered"] == row["cases"] for row in exacts),
        ),
        at_most("seconds", f"seconds for {devices} devices with {layers} layers on one core", swept, 3.0),
        at_most(
            "seconds-hysteresis", "the same, with the round before to keep",
            min(arms["sweep with hysteresis"]["seconds"]), 3.0,
        ),
        at_least(
            "plain-python", "times as long as that: the same sweep over Python objects (scaled)",
            arms["plain Python"]["scaled_s"] / swept, 2.0,
        ),
        at_least(
            "every-length", "times as long as that: every length from scratch (scaled)",
            arms["every length"]["scaled_s"] / swept, 100.0,
        ),
        at_most(
            "reference-mean", "mean share of J that reference times give away", float(np.mean(below)), 0.02
        ),
        at_most("reference-p95", "the same, 95th percentile", float(np.quantile(below, 0.95)), 0.05),
        Claim(
            "rivals", "rivals that come to another J",
            sum(not row.get("same", True) for row in scales), "== 0",
            all(row.get("same", True) for row in scales),
        ),
    ]  # fmt: skip
    write_result(FOLDER, config, [row for rows in told for row in rows], claims)


if __name__ == "__main__":
    main()

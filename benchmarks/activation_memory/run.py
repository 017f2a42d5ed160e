"""Activation memory: what each way to train costs in memory and time, and what it does to gradients."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.activation_memory.claims import claims_of, summary
from benchmarks.activation_memory.plot import draw
from benchmarks.processes import measure
from benchmarks.results import write_result

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent


def rows_of(config: dict[str, Any], shape: str, arms: list[str], device: str) -> list[dict[str, Any]]:
    """Everything of one shape, from a process of its own."""
    settings = {**config["shapes"][shape], **config.get("override", {})}
    what = {
        "shape": shape, "model": settings["model"], "task": settings["task"], "batch": settings["batch"],
        "length": settings["length"], "arms": arms, "device": device,
        **{name: config[name] for name in ("repeats", "threads", "draws", "draws_batch", "seed")},
    }  # fmt: skip
    return list(measure("benchmarks.activation_memory.measure", what, threads=config["threads"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a look: few repeats, nothing is written")
    parser.add_argument("--shapes", nargs="*", help="of config.toml; all of them by default")
    parser.add_argument("--arms", nargs="*", default=[], help="parts of names of arms; nothing is written")
    parser.add_argument("--threads", type=int, help="of torch, instead of config.toml's")
    parser.add_argument("--device", default="cpu", help="cpu or cuda: the latter writes result-cuda.json")
    given = parser.parse_args()
    config = tomllib.loads((FOLDER / "config.toml").read_text(encoding="utf-8"))
    quick = config.pop("quick")
    if given.quick:
        config["override"] = {"batch": quick.pop("batch")}
        config.update(quick)
    if given.threads is not None:
        config["threads"] = given.threads
    shapes = given.shapes or list(config["shapes"])
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        found = rows_of(config, shape, given.arms, given.device)
        if summary(found, shape)["noise"] > config["noise"] and not given.quick:
            print(f"{shape}: the plain side was too noisy; once more", file=sys.stderr)
            found = rows_of(config, shape, given.arms, given.device)
        rows += found
    for shape in shapes:
        told = summary(rows, shape)
        print(
            f"\n{shape}: plain {told['plain_mb']:.0f} MB, {told['plain_s']:.3f} s; noise {told['noise']:.1%}"
        )
        for arm in told["arms"]:
            print(
                f"  {arm['arm']:36} peak {arm['peak']:.3f}  time {arm['time']:.3f}  "
                f"saved {arm['saved']:.3f}  error {arm['error']:.2%}"
                f"{'' if arm['same_loss'] else '  ANOTHER LOSS'}"
            )
    claims = [claim for shape in shapes for claim in claims_of(rows, shape)]
    if given.quick or given.arms or given.shapes:
        for claim in claims:
            print(f"{'holds' if claim.holds else 'FAILS'}  {claim.text}: {claim.value} ({claim.bound})")
        return
    suffix = "" if given.device == "cpu" else "-cuda"
    write_result(FOLDER, config, rows, claims, f"result{suffix}.json")
    draw([summary(rows, shape) for shape in shapes], FOLDER / f"pareto{suffix}.png")


if __name__ == "__main__":
    main()

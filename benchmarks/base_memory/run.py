"""Base memory: what a whole process takes to train a 1B language model, from plain to all levers."""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.base_memory.arms import BEST, LADDER, PLAIN, Arm
from benchmarks.models import write_large_base
from benchmarks.processes import measure
from benchmarks.results import Claim, at_least, write_result

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
BOUNDS = {1024: 8.0, 4096: 14.0}


class Measuring:
    """Measures arms of one base, and remembers what it measured."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder, self.config = folder, config
        self.rows: list[dict[str, Any]] = []

    def peak(self, arm: Arm, length: int) -> float:
        """MB above the process after its imports."""
        known = [r for r in self.rows if r["arm"] == arm.name and r["length"] == length and not r["computed"]]
        if not known:
            names = ("batch", "steps", "warm_length", "rank", "threads", "seed")
            what = {
                "arm": asdict(arm), "length": length, "folder": str(self.folder),
                **{name: self.config[name] for name in names},
            }  # fmt: skip
            known = list(measure("benchmarks.base_memory.measure", what, threads=self.config["threads"]))
            self.rows += known
        return float(known[0]["peak_mb"])

    def plain_peak(self, length: int) -> float:
        """Plain's; by a line through shorter lengths where it would take more than the room there is.

        Weights, gradients and optimizer do not grow with the length; activations and logits grow in
        proportion, the fused attention's too.
        """
        short, long = self.config["fit_lengths"]
        if length in (short, long):
            return self.peak(PLAIN, length)
        low, high = self.peak(PLAIN, short), self.peak(PLAIN, long)
        told = low + (high - low) * (length - short) / (long - short)
        if told <= self.config["room_mb"]:
            return self.peak(PLAIN, length)
        self.rows.append({
            "what": "peak", "arm": PLAIN.name, "length": length, "peak_mb": round(told, 1), "computed": True,
            "from": [{"length": short, "peak_mb": low}, {"length": long, "peak_mb": high}],
        })  # fmt: skip
        return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model: nothing is written")
    parser.add_argument("--arms", nargs="*", help="parts of names; nothing is written")
    parser.add_argument("--lengths", nargs="*", type=int, help="instead of config.toml's; nothing is written")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    config = tomllib.loads((FOLDER / "config.toml").read_text(encoding="utf-8"))
    quick = config.pop("quick")
    if given.quick:
        config["model"].update(quick.pop("model"))
        config.update(quick)
    if given.threads is not None:
        config["threads"] = given.threads
    lengths = given.lengths or config["lengths"]
    with tempfile.TemporaryDirectory(prefix="edge-base-") as name:
        print("writing the base", file=sys.stderr)
        measuring = Measuring(write_large_base(Path(name), config["model"], seed=config["seed"]), config)
        claims = []
        for length in lengths:
            peaks = ladder(measuring, length, given.arms or config["arms"].get(str(length)))
            claims += claims_of(measuring.rows, peaks, length)
    if given.quick or given.arms or given.lengths:
        for claim in claims:
            print(f"{'holds' if claim.holds else 'FAILS'}  {claim.text}: {claim.value} ({claim.bound})")
        return
    write_result(FOLDER, config, measuring.rows, claims)


def ladder(measuring: Measuring, length: int, only: list[str] | None) -> dict[str, float]:
    """Peaks by arm, told as they come: how many times less than plain, and what the last lever gave."""
    peaks: dict[str, float] = {}
    before = 0.0
    for arm in LADDER:
        if only and arm is not PLAIN and not any(part in arm.name for part in only):
            continue
        peak = measuring.plain_peak(length) if arm is PLAIN else measuring.peak(arm, length)
        peaks[arm.name] = peak
        gave = f"{before / peak:.2f} times less than before" if before else "  the start"
        print(
            f"{length:5}  {arm.name:18} {peak:8.0f} MB  {peaks[PLAIN.name] / peak:5.1f}  {gave}", flush=True
        )
        before = peak
    return peaks


def claims_of(rows: list[dict[str, Any]], peaks: dict[str, float], length: int) -> list[Claim]:
    if BEST not in peaks:
        return []
    computed = any(r["computed"] and r["length"] == length for r in rows)
    text = f"times less memory than plain fp32 LoRA at length {length}" + (
        ", plain computed" if computed else ""
    )
    return [at_least(f"length-{length}", text, peaks[PLAIN.name] / peaks[BEST], BOUNDS.get(length, 1.0))]


if __name__ == "__main__":
    main()

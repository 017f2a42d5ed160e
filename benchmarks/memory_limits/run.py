"""No run is lost to memory: random models under random hard limits, from the probe to the update."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kept import Kept, digest
from benchmarks.memory_limits.cases import draw, play
from benchmarks.results import Claim, at_most, write_result
from edge_sdk.agent.process_trainer import ProcessTrainer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
WORK = Path("runs/bench-memory-limits").resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="six cases: nothing is written")
    parser.add_argument("--only", nargs="*", type=int, help="numbers of cases: nothing is written")
    parser.add_argument("--minutes", type=float, help="stop after so long; another call goes on")
    parser.add_argument("--fresh", action="store_true", help="forget the cases that are done")
    given = parser.parse_args()
    config = tomllib.loads((FOLDER / "config.toml").read_text(encoding="utf-8"))
    core = {name: value for name, value in config.items() if name != "cases"}
    kept = Kept(WORK / f"rows-{digest(core)}.jsonl", lambda row: row["case"], fresh=given.fresh)
    wanted = [draw(number, config) for number in range(config["cases"])]
    if given.quick or given.only is not None:
        some = range(6) if given.only is None else given.only
        rows = list(_play([wanted[number] for number in some], config, None, None))
        _tell(rows)
        print("nothing is written: a look")
        return
    until = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    list(_play([case for case in wanted if not kept.has(case)], config, kept, until))
    rows = [row for row in kept.rows if row["case"] < config["cases"]]
    _tell(rows)
    if len(rows) < len(wanted):
        print(f"{len(rows)} of {len(wanted)} cases are done: nothing is written; call again to go on")
        return
    write_result(FOLDER, config, rows, claims_of(rows))


def _play(
    cases: Sequence[dict[str, Any]], config: dict[str, Any], kept: Kept | None, until: float | None
) -> Any:
    trainer = ProcessTrainer(WORK, allocator="glibc")  # as an agent with a limit starts it
    served = 0
    try:
        for case in cases:
            if until is not None and time.monotonic() > until:
                return
            if served >= config["cases_per_process"]:
                trainer.unload()
                served = 0
            served += 1
            row = play(case, config, trainer, WORK / "case")
            if kept is not None:
                kept.add(row)
            print(_line(row), flush=True)
            yield row
    finally:
        trainer.close()


def claims_of(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    ended = Counter(row["how"] for row in rows)
    downs = sum(row["downs"] > 0 for row in rows)
    untold = sum(row["told"] != list(range(len(row["told"]))) for row in rows)
    untold += sum(row["how"] == "trained" and len(row["told"]) != row["downs"] + 1 for row in rows)
    text = (
        f"runs lost to memory, of {len(rows)} ({ended['trained']} trained, {downs} of all after a step down, "
        f"{ended['declined']} declined, {ended['cannot join']} told that nothing fits)"
    )
    return [
        at_most("lost", text, ended["lost"], 0),
        at_most("untold", "steps down that the aggregator was not told of", untold, 0),
    ]


def _line(row: dict[str, Any]) -> str:
    what = f"{row['family']:8} {row['layers']} x {row['hidden']:3}, {row['batch']:2} x {row['length']:3}"
    chosen = f"depth {row['depth']}, {row['quantized']} quantized, " if "depth" in row else ""
    peak = f"{row['peak_mb']:.0f} of {row['predicted_mb']:.0f} MB predicted, " if "peak_mb" in row else ""
    room = f"{row['limit_mb'] - row['rest_mb']:.0f} MB above rest"
    why = f": {row['why'][:90]}" if row["why"] else ""
    return (
        f"{row['case']:3} {what}, {room}: {row['how']}, {chosen}{peak}{row['downs']} steps down, "
        f"{row['seconds']} s{why}"
    )


def _tell(rows: Sequence[dict[str, Any]]) -> None:
    for how, count in Counter(row["how"] for row in rows).most_common():
        print(f"{count:4} {how}")
    for claim in claims_of(rows):
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.text}: {claim.value} ({claim.bound})")


if __name__ == "__main__":
    main()

"""Frozen-prefix reuse: the time of a round of several local epochs, with it and without."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.processes import measure
from benchmarks.results import Claim, write_result

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
FASTER = 1.7


def seconds_of(rows: list[dict[str, Any]], arm: str) -> list[float]:
    return [row["seconds"] for row in rows if row["arm"] == arm]


def noise_of(rows: list[dict[str, Any]]) -> float:
    """Spread of the plain side: the median above the least."""
    seconds = sorted(seconds_of(rows, "none"))
    return seconds[len(seconds) // 2] / seconds[0] - 1.0


def measured(config: dict[str, Any]) -> list[dict[str, Any]]:
    return list(measure("benchmarks.prefix_reuse.measure", config, threads=config["threads"]))


def main() -> None:
    config = tomllib.loads((FOLDER / "config.toml").read_text(encoding="utf-8"))
    rows = measured(config)
    if noise_of(rows) > config["noise"]:
        print("the plain side was too noisy; once more", file=sys.stderr)
        rows = measured(config)
    plain = min(seconds_of(rows, "none"))
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        print(
            f"  {arm:14} {plain / min(seconds_of(rows, arm)):.2f} times faster, "
            f"peak {mine[0]['peak_mb']:.0f} MB, kept {mine[0]['kept_mb']:.2f} MB, "
            f"update off by {mine[0]['update_error']:.2%}"
        )
    print(f"  noise of the plain side {noise_of(rows):.1%}")
    ours = [row for row in rows if row["arm"] == "exact, memory"]
    times = plain / min(row["seconds"] for row in ours)
    exact = all(row["same_losses"] and not row["update_error"] for row in ours)
    text = f"depth {config['depth']} of 12, {config['epochs']} local epochs: times faster with reuse"
    claims = [
        Claim("faster", text, round(times, 3), f">= {FASTER}", times >= FASTER),
        Claim("exact", "losses and update with exact reuse are equal to the bit", exact, "== true", exact),
    ]
    write_result(FOLDER, {**config, "noise_found": round(noise_of(rows), 4)}, rows, claims)


if __name__ == "__main__":
    main()

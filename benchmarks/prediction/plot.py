"""Predicted against measured, memory and time side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot"]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, sides = plt.subplots(1, 2, figsize=(9, 4.2))
    for axes, measured, predicted, unit, band in (
        (sides[0], "peak_mb", "predicted_mb", "peak above rest, MB", 0.08),
        (sides[1], "step_s", "predicted_s", "step, s", 0.15),
    ):
        for name in dict.fromkeys(row["model"] for row in rows):
            mine = [row for row in rows if row["model"] == name]
            axes.scatter([r[measured] for r in mine], [r[predicted] for r in mine], s=14, label=name)
        ends = [min(r[measured] for r in rows), max(r[measured] for r in rows)]
        axes.plot(ends, ends, color="grey", linewidth=0.8)
        low, high = ([end * (1 + sign * band) for end in ends] for sign in (-1, 1))
        axes.fill_between(ends, low, high, color="grey", alpha=0.15, label=f"{band:.0%}")
        axes.set(xscale="log", yscale="log", xlabel=f"measured {unit}", ylabel="predicted")
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)

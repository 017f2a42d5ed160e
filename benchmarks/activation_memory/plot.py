"""Memory against time: what lies to the lower left is better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw"]

_LOOKS = {
    "plain": ("plain", "black", "*"),
    "checkpoint": ("gradient checkpointing every k layers", "tab:red", "s"),
    "lora-fa": ("LoRA-FA", "tab:brown", "v"),
    "exact": ("rebuilt, exact", "tab:gray", "o"),
    "int8": ("int8", "tab:blue", "o"),
    "int4": ("int4", "tab:green", "o"),
    "int2": ("int2", "tab:olive", "o"),
    "layer": ("layer rebuilt from its packed input", "tab:orange", "D"),
    "mixture": ("combinations", "tab:purple", "P"),
}


def draw(summaries: list[dict[str, Any]], path: Path) -> None:
    """One panel a shape, every arm a point, and the line of those that nothing beats."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(summaries), figsize=(7.5 * len(summaries), 6), squeeze=False)
    for panel, told in zip(panels[0], summaries, strict=True):
        for kind, (label, colour, marker) in _LOOKS.items():
            arms = [arm for arm in told["arms"] if arm["kind"] == kind]
            if arms:
                panel.scatter(
                    [a["peak"] for a in arms], [a["time"] for a in arms],
                    label=label, color=colour, marker=marker, s=60, zorder=3,
                )  # fmt: skip
            for arm in arms:
                panel.annotate(
                    arm["arm"].removeprefix("checkpoint "), (arm["peak"], arm["time"]),
                    textcoords="offset points", xytext=(5, 3), fontsize=6,
                )  # fmt: skip
        front = _front(told["arms"])
        panel.step([a["peak"] for a in front], [a["time"] for a in front], where="post", color="lightgray")
        panel.set_xlabel(f"peak above the resting model, share of plain ({told['plain_mb']:.0f} MB)")
        panel.set_ylabel(f"step time, share of plain ({told['plain_s']:.2f} s)")
        panel.set_title(told["shape"])
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _front(arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The arms that none beats in both, by rising peak."""
    front: list[dict[str, Any]] = []
    for arm in sorted(arms, key=lambda a: (a["peak"], a["time"])):
        if not front or arm["time"] < front[-1]["time"]:
            front.append(arm)
    return front

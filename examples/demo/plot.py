"""The picture of a run, from its summary alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["plot_summary"]

_COLORS = ("#1b6ca8", "#d1495b", "#66a182", "#edae49", "#6d597a")


def plot_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Accuracy over time against the head alone; what each device chose, held in memory and sent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), constrained_layout=True)
    devices = summary["devices"]
    names = [f"{d['device_class']}\n(emulated)" if d["emulated"] else d["id"] for d in devices]
    colors = [_COLORS[i % len(_COLORS)] for i in range(len(devices))]
    _accuracy(axes[0][0], summary)
    _choices(axes[0][1], devices, names, colors)
    _memory(axes[1][0], devices, names, colors)
    _bytes(axes[1][1], devices, names, colors)
    figure.suptitle(
        f"{summary['rounds']} rounds of {summary['method']} over {summary['broker']}", fontsize=12
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _accuracy(axis: Any, summary: Mapping[str, Any]) -> None:
    points = summary["accuracy"]
    axis.plot([p["wall_s"] for p in points], [p["accuracy"] for p in points], "o-", color=_COLORS[0])
    axis.annotate(
        f"{summary['accuracy_end']:.3f}", (points[-1]["wall_s"], points[-1]["accuracy"]),
        textcoords="offset points", xytext=(0, 7), ha="right",
    )  # fmt: skip
    head_only = summary["accuracy_head_only"]
    if head_only is not None:
        axis.axhline(head_only, linestyle="--", color="#888888")
        axis.annotate(
            f"head alone {head_only:.3f}", (points[0]["wall_s"], head_only),
            textcoords="offset points", xytext=(2, 4), color="#666666",
        )  # fmt: skip
    axis.set_ylim(0, 1)
    axis.set_xlabel("seconds")
    axis.set_title("held-out accuracy of the shared model")
    axis.grid(alpha=0.25)


def _choices(axis: Any, devices: list[Any], names: list[str], colors: list[str]) -> None:
    total = devices[0]["layers"]
    for x, device in enumerate(devices):
        depth, quantized = device["depth"], device["quantized_layers"]
        axis.bar(x, total, color="#eeeeee", width=0.6)
        axis.bar(x, depth, bottom=total - depth, color=colors[x], width=0.6)
        axis.bar(
            x,
            quantized,
            bottom=total - depth,
            color="none",
            edgecolor="white",
            hatch="//",
            width=0.6,
            linewidth=0,
        )
        axis.text(
            x, total + 0.1, f"({depth}, {quantized})  {device['binding_budget']}", ha="center", fontsize=9
        )
    axis.set_xticks(range(len(devices)), names, fontsize=8)
    axis.set_ylim(0, total + 0.8)
    axis.set_ylabel("layer (output on top)")
    axis.set_title("chosen: tuned layers, of them quantized (hatched), and what binds", fontsize=10)


def _memory(axis: Any, devices: list[Any], names: list[str], colors: list[str]) -> None:
    for x, device in enumerate(devices):
        for shift, key, alpha in ((-0.2, "predicted_peak_mb", 0.45), (0.2, "measured_peak_mb", 1.0)):
            bar = axis.bar(x + shift, device[key], width=0.38, color=colors[x], alpha=alpha)
            axis.bar_label(bar, fmt="%.0f", fontsize=8)
        limit = device["limits"].get("memory_mb")
        if limit is not None:
            room = limit - device["rest_mb"]
            axis.hlines(room, x - 0.42, x + 0.42, color="black", linestyle=":")
            axis.text(x, room, "limit", fontsize=8, ha="center", va="bottom")
    axis.set_xticks(range(len(devices)), names, fontsize=8)
    axis.set_ylabel("MB")
    axis.set_title("peak above rest: predicted (pale) and measured", fontsize=10)


def _bytes(axis: Any, devices: list[Any], names: list[str], colors: list[str]) -> None:
    for x, device in enumerate(devices):
        for shift, key, color in ((-0.2, "fp32_bytes_up", "#cccccc"), (0.2, "bytes_up", colors[x])):
            bar = axis.bar(x + shift, device[key] / 1e6, width=0.38, color=color)
            axis.bar_label(bar, fmt="%.2f", fontsize=8)
    axis.set_xticks(range(len(devices)), names, fontsize=8)
    axis.set_ylabel("MB, all rounds")
    axis.set_title("sent: as plain fp32 adapters (grey) and as it was", fontsize=10)

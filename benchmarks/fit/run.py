"""The share of a fleet that can train a model at all, and how deep, activations quantized or not."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from msgspec.structs import replace

from benchmarks.results import Claim, at_least, write_result
from edge_sdk.device.capacity import capacity
from edge_sdk.device.classes import device_class
from edge_sdk.device.fleets import fleet, members
from edge_sdk.planning.fitting import estimate
from edge_sdk.planning.frontier import Round, frontier
from edge_sdk.planning.shapes import held_base_bytes, shape_of
from edge_sdk.planning.work import prices
from edge_sdk.protocol.model import LoraShape, ModelShape
from edge_sdk.protocol.spec import Levers, Setting

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
Row = dict[str, Any]
_PLAIN, _EXACT, _QUANTIZED = "plain", "outputs exact", "outputs, 8 bits"


def depth(
    shape: ModelShape, lora: LoraShape, way: Row, setting: Setting, memory_mb: float
) -> tuple[int, int]:
    """The deepest that fits in all of ``memory_mb``, and its quantized layers; (0, 0): not one layer does."""
    rest_mb = held_base_bytes(shape, setting.base_precision) / 1e6 + prices().process_mb
    levers = Levers(recompute=way.get("recompute", "none"), activation_bits=way.get("activation_bits", 8))
    wanted = replace(setting, levers=levers)
    points = frontier(
        estimate(shape, lora, replace(wanted, depth=1)), shape, lora, wanted,
        budget_mb=max(0.0, memory_mb - rest_mb), work=Round(1, "int8"), quantize=way["quantize"],
    )  # fmt: skip
    return (points[-1].depth, points[-1].quantized_layers) if points else (0, 0)


def rows_of(config: Row) -> list[Row]:
    rows = []
    lora = LoraShape(rank=config["rank"], alpha=2.0 * config["rank"])
    for name in config["fleets"]:
        boards = Counter(
            one.device_class for one in members(fleet(name), seed=config["seed"], round=config["round"])
        )
        memory = {board: capacity(device_class(board)).memory_mb for board in boards}
        for model, about in config["shapes"].items():
            shape = shape_of(about["config"], task=about["task"], labels=2, lora=lora)
            for precision in config["precisions"]:
                setting = Setting(
                    depth=1, micro_batch=about["batch"], max_length=about["length"], base_precision=precision
                )
                for way, told in config["ways"].items():
                    find = partial(depth, shape, lora, told, setting)
                    found = {board: find(mb) for board, mb in memory.items() if mb is not None}
                    rows.append(
                        _row(boards, found, shape, fleet=name, model=model, precision=precision, way=way)
                    )
    return rows


def _row(boards: Counter[str], found: dict[str, tuple[int, int]], shape: ModelShape, **names: str) -> Row:
    depths = [found[board][0] for board, count in boards.items() if board in found for _ in range(count)]
    able = [one for one in depths if one]
    return {
        **names,
        "devices": len(depths),
        "no_memory_stated": sum(count for board, count in boards.items() if board not in found),
        "layers": shape.layers,
        "able": len(able) / len(depths) if depths else 0.0,
        "mean_depth": mean(depths) if depths else 0.0,
        "mean_depth_of_able": mean(able) if able else 0.0,
        "by_class": {
            board: {"devices": boards[board], "depth": d, "quantized": a} for board, (d, a) in found.items()
        },
    }


def claims_of(config: Row, rows: list[Row]) -> list[Claim]:
    """Of the headline's fleet, at the precision in which quantization has the most to do: fp32."""
    found = {
        (row["model"], row["way"]): row
        for row in rows
        if row["fleet"] == config["headline"] and row["precision"] == "fp32"
    }
    claims = []
    for model in config["shapes"]:
        plain, exact, quantized = (found[model, way] for way in (_PLAIN, _EXACT, _QUANTIZED))
        for name, other in (("plain", plain), ("exact", exact)):
            claims.append(
                at_least(
                    f"depth-{model}-{name}", f"{model}: mean depth with 8 bits over {other['way']}'s",
                    quantized["mean_depth"] / other["mean_depth"] if other["mean_depth"] else 0.0, 1.5,
                )
            )  # fmt: skip
        claims.append(
            at_least(
                f"able-{model}", f"{model}: share of devices that can train with 8 bits, less plain's share",
                quantized["able"] - plain["able"], 0.0,
            )
        )  # fmt: skip
    return claims


def table(config: Row, rows: list[Row]) -> str:
    """Of the headline's fleet: share that can train, and mean depth of all devices, as 'share / depth'."""
    ways = list(config["ways"])
    lines = ["| model, base in | " + " | ".join(ways) + " |", "| --- |" + " --- |" * len(ways)]
    for model in config["shapes"]:
        for precision in config["precisions"]:
            cells = [
                f"{row['able']:.0%} / {row['mean_depth']:.1f}"
                for row in rows
                if (row["fleet"], row["model"], row["precision"]) == (config["headline"], model, precision)
            ]
            layers = next(row["layers"] for row in rows if row["model"] == model)
            lines.append(f"| {model} ({layers} layers), {precision} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(config: Row, rows: list[Row], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ways, models = list(config["ways"]), list(config["shapes"])
    figure, panels = plt.subplots(1, len(models), figsize=(12, 3.6), sharey=True)
    for panel, model in zip(panels, models, strict=True):
        for i, precision in enumerate(config["precisions"]):
            shares = [
                row["mean_depth"] / row["layers"]
                for row in rows
                if (row["fleet"], row["model"], row["precision"]) == (config["headline"], model, precision)
            ]
            panel.bar([x + 0.26 * (i - 1) for x in range(len(ways))], shares, 0.25, label=precision)
        panel.set_title(model)
        panel.set_xticks(range(len(ways)), ways, rotation=30, ha="right", fontsize=8)
    panels[0].set_ylabel("mean depth, share of layers")
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{config['headline']}: estimates, nothing measured", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.fit.run", description=__doc__).parse_args()
    config = tomllib.loads((FOLDER / "config.toml").read_text(encoding="utf-8"))
    rows = rows_of(config)
    write_result(FOLDER, config, rows, claims_of(config, rows))
    print(table(config, rows))
    plot(config, rows, FOLDER / "fit.png")


if __name__ == "__main__":
    main()

"""The merge of many stored updates: what it holds in memory, and how long it takes beside reading them.

Files of int8 updates of one shape, written once; more devices than files share them. The plain
side reads each file at once and dequantizes every tensor, nothing else. Memory and time are of a process of
its own: resting is after a first small merge, the peak is the kernel's, cleared before; times that are
compared are the processor's, of user and system, as both sides have one thread and the files lie in memory.

    python -m benchmarks.aggregator.run --only merge
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from aggregator.adapters import Adapters
from aggregator.methods.merging import find_optimizer, find_rule
from aggregator.state.base import ParticipationRow, VersionRow
from benchmarks.results import Claim, at_most
from edge_sdk.protocol.model import DensePart, Fingerprint, LoraModule, LoraShape, ModelShape
from edge_sdk.protocol.spec import TrainSpec
from edge_sdk.protocol.wire import Run
from edge_sdk.transport.objects import ObjectStore
from edge_sdk.updates.container import read_container
from edge_sdk.updates.delta import write_update
from edge_sdk.updates.keys import all_keys
from edge_sdk.updates.layout import parse_layout, read_index
from edge_sdk.updates.versions import VersionChain

MB = 1e6
Row = dict[str, Any]


def run_record(config: Mapping[str, Any]) -> Run:
    width = config["width"]
    modules = tuple(LoraModule(name=name, inputs=width, outputs=width) for name in ("query", "value"))
    shape = ModelShape(
        family="bert", layers=config["layers"], hidden=width, intermediate=4 * width, heads=16,
        vocabulary=1000, layer_path="bert.encoder.layer", modules=modules,
        dense=(DensePart(name="classifier.weight", shape=(4, width)),), parameters=1, base_bytes=1,
    )  # fmt: skip
    digest = "0" * 64
    return Run(
        run="merge", nonce="n", base="base", labels=("a", "b"), max_length=8, micro_batch=1,
        lora=LoraShape(rank=config["rank"]), spec=TrainSpec(), shape=shape,
        fingerprint=Fingerprint(
            base=digest, tokenizer=digest, labels=digest, head="h", max_length=8, template=digest,
            targets=("all-linear",), rank=config["rank"], alpha=16.0,
        ),
    )  # fmt: skip


def write_files(folder: Path, record: Run, count: int) -> None:
    """Version 0, and ``count`` updates that differ."""
    store = ObjectStore(folder / "objects")
    made = adapters(folder, record).initial()
    (folder / "version").write_text(json.dumps([made.object, made.bytes]))
    chain = VersionChain([store.path(made.object)])
    start = {key: chain.tensor(key) for key in chain.sizes}
    noise = np.random.default_rng(0)
    updates = []
    end = {key: np.empty_like(rows) for key, rows in start.items()}
    for _ in range(count):
        for key, rows in start.items():
            noise.standard_normal(dtype=np.float32, out=end[key])
            end[key] *= 0.01
            end[key] += rows
        path = folder / "update"
        write_update(
            path, run=record.run, round=1,
            fingerprint=record.fingerprint.digest, builds_on=0, start=start, end=end,
            keys=all_keys(record.shape), codec="int8", residual=None,
        )  # fmt: skip
        updates.append(store.adopt(path)[0])
    (folder / "updates").write_text(json.dumps(updates))


def adapters(folder: Path, record: Run, rule: str = "layer-mean", optimizer: str = "none") -> Adapters:
    (folder / "work").mkdir(exist_ok=True)
    return Adapters(
        record, find_rule(rule), ObjectStore(folder / "objects"), folder / "work", 0,
        server_optimizer=None if optimizer == "none" else find_optimizer(optimizer),
    )  # fmt: skip


def participations(folder: Path, devices: int) -> list[ParticipationRow]:
    names = json.loads((folder / "updates").read_text())
    return [
        ParticipationRow(
            "merge", 1, f"d{number:05}", "received", "", 0.0,
            object=names[number % len(names)], samples=100,
        )
        for number in range(devices)
    ]  # fmt: skip


def plain(folder: Path, rows: list[ParticipationRow]) -> float:
    """Reads every file whole, one after the other, and dequantizes every tensor. Seconds of the processor."""
    first = folder / "objects" / str(rows[0].object)
    layout, keys = parse_layout(first, *read_index(first)), list(read_container(first).parts)
    began = time.process_time()
    for row in rows:
        data = (folder / "objects" / str(row.object)).read_bytes()
        for key in keys:
            at, scale = layout.tensors[key], layout.tensors[f"{key}.scale"]
            codes = np.frombuffer(data, np.int8, at.end - at.begin, at.begin).reshape(at.shape)
            scales = np.frombuffer(data, np.float32, scale.shape[0], scale.begin)
            codes.astype(np.float32) * scales[:, None]
    return time.process_time() - began


def merge(folder: Path, maker: Adapters, rows: list[ParticipationRow]) -> tuple[float, float]:
    """What the server does at the end of a round: from stored updates to a stored version.

    Seconds of the processor, and by the wall.
    """
    name, size = json.loads((folder / "version").read_text())
    began, began_wall = time.process_time(), time.perf_counter()
    maker.merged(1, 1, [VersionRow("merge", 0, 0, name, size, None, "global", 0.0)], rows)
    return time.process_time() - began, time.perf_counter() - began_wall


def child(folder: Path, config: Mapping[str, Any]) -> Iterator[Row]:
    """In a process of its own: rows of one number of devices, rule and server optimizer."""
    maker = adapters(folder, run_record(config), config["rule"], config["server_optimizer"])
    rows = participations(folder, config["devices"])
    process = psutil.Process()
    merge(folder, maker, rows[:4])
    plain(folder, rows[:4])
    for repeat in range(config["repeats"]):
        rest = process.memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")
        seconds, wall_s = merge(folder, maker, rows)
        peak = _highest()
        yield {
            "devices": config["devices"], "rule": config["rule"], "optimizer": config["server_optimizer"],
            "repeat": repeat, "merge_s": seconds, "wall_s": wall_s,
            "plain_s": plain(folder, rows) if config["beside"] else None,
            "rest_mb": rest / MB, "peak_above_rest_mb": (peak - rest) / MB,
            "update_bytes": (folder / "objects" / str(rows[0].object)).stat().st_size,
        }  # fmt: skip


def _highest() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measured(folder: Path, config: Mapping[str, Any], **what: Any) -> list[Row]:
    given = json.dumps({**config, "rule": "layer-mean", "server_optimizer": "none", "beside": False, **what})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.aggregator.merge", str(folder), given],
        stdout=subprocess.PIPE, check=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        print(json.dumps(row), file=sys.stderr)
    return rows


def run(config: Mapping[str, Any]) -> tuple[list[Row], list[Claim]]:
    folder = Path(tempfile.mkdtemp(prefix="merge-"))
    devices = config["devices"]
    try:
        write_files(folder, run_record(config), config["files"])
        rows = measured(folder, config, beside=True)
        for more in config["more_devices"]:
            rows += measured(folder, config, devices=more, repeats=1)
        for optimizer in config["server_optimizers"]:
            rows += measured(folder, config, server_optimizer=optimizer, repeats=1)
        for rule in config["rules"]:
            rows += measured(folder, config, devices=config["rule_devices"], rule=rule, repeats=1)
    finally:
        shutil.rmtree(folder)
    return rows, claims_of(rows, devices)


def claims_of(rows: list[Row], devices: int) -> list[Claim]:
    means = [row for row in rows if row["rule"] == "layer-mean" and row["optimizer"] == "none"]
    beside = [row for row in means if row["plain_s"] is not None]
    plainly = [row["plain_s"] for row in beside]
    least: dict[int, float] = {}
    for row in means:
        least[row["devices"]] = min(row["merge_s"], least.get(row["devices"], row["merge_s"]))
    most = max(least)
    size = f"{beside[0]['update_bytes'] / MB:.2f} MB"
    claims = [
        at_most(
            "merge-memory",
            f"peak memory above rest of a merge of {devices} updates of {size}, in MB",
            max(row["peak_above_rest_mb"] for row in beside), 64.0,
        ),
        at_most(
            "merge-time",
            f"its processor time over that of reading and dequantizing the same files "
            f"(the plain side's noise: {max(plainly) / min(plainly) - 1:.0%})",
            least[devices] / min(plainly), 4.0,
        ),
    ]  # fmt: skip
    if most > devices:
        growth = least[most] / most / (least[devices] / devices)
        peak = max(row["peak_above_rest_mb"] for row in means if row["devices"] == most)
        claims += [
            at_most("merge-linear", f"time per device with {most} devices over {devices}", growth, 1.25),
            at_most("merge-memory-devices", f"peak memory above rest with {most} devices, in MB", peak, 64.0),
        ]
    return claims


if __name__ == "__main__":
    for line in child(Path(sys.argv[1]), json.loads(sys.argv[2])):
        print(json.dumps(line), flush=True)

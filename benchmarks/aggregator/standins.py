"""A server and a thousand stand-ins that speak the real protocol, in one process, on the in-memory broker.

A tenth of them is drawn for each round. Memory is that of the process after each round, the stand-ins
included; they forget what they heard, so that what grows is the server's.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil

from benchmarks.results import Claim, at_most
from edge_sdk.config.run import StorageSection
from tests.support.fake_device import World


def run(config: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Claim]]:
    rows = measure(config["devices"], config["rounds"], config["share"])
    later = rows[len(rows) // 4 :]
    growth = _slope([row["round"] for row in later], [row["rss_mb"] for row in later])
    seconds = statistics.median(row["seconds"] for row in later)
    rows.append({"what": "summary", "median_round_s": seconds, "mb_per_round": growth})
    claims = [
        at_most("standins-memory", "MB that the process grows by in a round, after the first quarter",
                growth, config["most_mb_per_round"]),
    ]  # fmt: skip
    return rows, claims


def measure(devices: int, rounds: int, share: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as name:
        world = World(
            Path(name), total=rounds, min_devices=devices, selection="uniform", devices_per_round=share,
            deadline_s=600.0, linger_s=0.0,
        )  # fmt: skip
        world.config = msgspec.structs.replace(
            world.config, evaluation=None, storage=StorageSection(keep_free_mb=0)
        )
        server = world.open()
        began = time.perf_counter()

        def noted(event: Any) -> None:
            nonlocal began
            if event.name != "round.done":
                return
            for device in world.devices:
                device.records.clear()
            world.events.clear()
            gc.collect()
            now = time.perf_counter()
            rows.append({
                "round": event.fields["round"], "seconds": round(now - began, 3),
                "rss_mb": round(process.memory_info().rss / 1e6, 2), "outcome": event.fields["outcome"],
            })  # fmt: skip
            began = time.perf_counter()

        server.events.subscribe(noted)
        for number in range(devices):
            world.device(f"device-{number:04}")
        while not server.done:
            world.pump()
            world.clock.advance(1.0)
        server.close()
    return rows


def _slope(xs: list[float], ys: list[float]) -> float:
    """Of the line of least squares."""
    return statistics.linear_regression(xs, ys).slope

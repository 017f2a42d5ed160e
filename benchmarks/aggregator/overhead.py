"""What a round costs in which nobody trains: two devices, Mosquitto on loopback, adapters of 5 and 100 MB.

Server and agents are processes of their own; the trainer is the stub, whose time to write an update that
changes nothing is told and taken off.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from aggregator.broker.embedded import start_embedded
from benchmarks.aggregator.parties import Party, agent, server, write_files
from benchmarks.aggregator.stub_trainer import IDLE
from benchmarks.results import Claim, at_most

DEVICES = ("one", "two")
LAYERS, MODULES, RANK = 24, 4, 16


def run(config: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Claim]]:
    rows: list[dict[str, Any]] = []
    for adapter_mb in config["adapters_mb"]:
        for method in config["methods"]:
            row = measure(adapter_mb, method, config["rounds"], config["longest_s"])
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows, claims_of(rows, config)


def claims_of(rows: list[dict[str, Any]], config: Mapping[str, Any]) -> list[Claim]:
    claims = []
    for row in rows:
        mb, method = row["payload_mb"], row["method"]
        name = f"{method}-{mb:g}"
        what = f"a round of two idle devices, adapter of {mb:g} MB in 16 bits, {method}"
        bound = config["bounds_s"][config["adapters_mb"].index(mb)]
        most = max(row["above_rest_mb"].values())
        claims += [
            at_most(f"round-{name}", f"median seconds of {what}", row["overhead_s"], bound),
            at_most(f"memory-{name}", f"MB above rest of server or agent in {what}", most, 32.0),
        ]
    return claims


def measure(adapter_mb: float, method: str, rounds: int, longest_s: float) -> dict[str, Any]:
    """A run of ``rounds`` rounds; the first, in which the base version is fetched whole, does not count."""
    width = round(adapter_mb * 1e6 / 2 / (2 * RANK * LAYERS * MODULES))
    environment = {"STUB_SHAPE": f"{LAYERS}x{MODULES}x{width}", IDLE: "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name, start_embedded(Path(name) / "broker") as broker:
        folder = Path(name) / "run"
        write_files(
            folder, broker.url, rounds=rounds, devices=DEVICES, chunk_kib=256, window=8, rank=RANK,
            evaluate=False, method=method,
        )  # fmt: skip
        parties = [server(folder, "", environment), *(agent(folder, d, "", environment) for d in DEVICES)]
        watched = _watch(parties, longest_s)
        said = _events(folder / "server.log")
        kind = broker.kind
    rounds_done = [one for one in said if one["event"] == "round.done"]
    short = [one["round"] for one in rounds_done if one["outcome"] != "merged"]
    if short or len(rounds_done) != rounds:
        declined = [one["message"] for one in said if one["event"] == "round.decline"]
        raise RuntimeError(
            f"{len(rounds_done)} of {rounds} rounds, {short} without an update: {declined[:3]}"
        )
    opened = [one["wall"] for one in said if one["event"] == "round.opened"]
    ends = [*opened, *(one["wall"] for one in said if one["event"] == "run.finished")]
    seconds = [after - before for before, after in pairwise(ends)][1:]
    idle = [one["slowest_train_s"] for one in rounds_done[1:]]
    return {
        "method": method,
        "broker": kind,
        "payload_mb": adapter_mb,
        "rounds_s": [round(one, 3) for one in seconds],
        "round_s": statistics.median(seconds),
        "stub_s": statistics.median(idle),
        "overhead_s": statistics.median(one - stub for one, stub in zip(seconds, idle, strict=True)),
        "update_mb": statistics.median(
            one["bytes"] / 1e6 for one in said if one["event"] == "update.received"
        ),
        **watched,
    }


def _watch(parties: list[Party], longest_s: float) -> dict[str, Any]:
    """Until all have ended: the highest memory of each process above what it held when round 1 began.

    The highest of its whole life, so that the making of version 0 counts. ``cpu_s``: processor time since
    round 1 began, of each process without its trainer.
    """
    rest: dict[str, float] = {}
    began: dict[str, float] = {}
    highest: dict[str, float] = {}
    spent: dict[str, float] = {}
    ends = time.monotonic() + longest_s
    left = list(parties)
    while left:
        if time.monotonic() > ends:
            for party in left:
                os.kill(party.pid, signal.SIGKILL)
            raise TimeoutError(f"not over after {longest_s:g} s: {left[0].log.read_text()[-2000:]}")
        if not rest and any(one["event"] == "round.opened" for one in _events(parties[0].log)):
            rest = {party.name: psutil.Process(party.pid).memory_info().rss / 1e6 for party in parties}
            began = {party.name: _cpu_s(party.pid) for party in parties}
        for party in list(left):
            if os.waitpid(party.pid, os.WNOHANG)[0]:
                left.remove(party)
                continue
            highest[party.name] = max(highest.get(party.name, 0.0), _high_water_mb(party.pid))
            spent[party.name] = max(spent.get(party.name, 0.0), _cpu_s(party.pid))
        time.sleep(0.02)
    return {
        "rest_mb": {name: round(mb, 1) for name, mb in rest.items()},
        "above_rest_mb": {name: round(mb - rest[name], 1) for name, mb in highest.items()},
        "cpu_s": {name: round(spent[name] - s, 2) for name, s in began.items()},
    }


def _cpu_s(pid: int) -> float:
    """0: it has ended."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _high_water_mb(pid: int) -> float:
    """0: it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), 0.0)


def _events(log: Path) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    lines = log.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

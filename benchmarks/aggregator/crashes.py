"""The crash matrix: one run for each place, in which one process kills itself there and is started again.

Real processes, a real broker, a stub in the place of the trainer. Every run must end, with the same bytes as
the undisturbed one, and with every update that was acknowledged in it.

    python -m benchmarks.aggregator.crashes                # all places
    python -m benchmarks.aggregator.crashes --at server:update.durable --at one:receipt.come:2
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aggregator.broker.embedded import start_embedded
from aggregator.state.folder import StateFolder, open_store
from benchmarks.aggregator.parties import Party, agent, server, write_files
from benchmarks.aggregator.stub_trainer import ONCE, TRAINER_PLACES
from benchmarks.results import Claim, at_least
from edge_sdk.faults import AGENT_PLACES, AGGREGATOR_PLACES, VARIABLE

ROUNDS = 2
DEVICES = ("one", "two")
VICTIM = "one"
LONGEST_S = 120.0
NEVER = ("decline.noted",)
"""Nobody declines in these runs."""
AGAIN = (
    "server:version.durable", "server:round.open", "server:round.offered", "server:choice.noted",
    "server:update.awaited", "server:chunk.durable", "server:update.complete", "server:update.durable",
    "server:update.counted", "server:update.receipted", "server:round.closed", "server:merge.begun",
    "server:version.stored", "server:round.done", "one:trainer.known", "one:offer.kept", "one:choice.kept",
    "one:fetch.chunk", "one:training.done", "one:update.packed", "one:update.queued", "one:chunk.sent",
    "one:receipt.come",
)  # fmt: skip
"""Places that are tried at their second time too: another device's turn, the next chunk, or round 2."""


def all_places() -> list[str]:
    """``PROCESS:PLACE[:TIMES]``; a trainer's place goes with the process that started it."""
    once = [f"server:{place}" for place in AGGREGATOR_PLACES if place not in NEVER]
    once += [f"{VICTIM}:{place}" for place in AGENT_PLACES]
    once += [f"{VICTIM}:{place}" for place in TRAINER_PLACES if place != "trainer.evaluating"]
    once += ["server:trainer.describing", "server:trainer.evaluating"]
    return [*once, *(f"{place}:2" for place in AGAIN)]


def one_run(folder: Path, broker: str, at: str = "") -> dict[str, Any]:
    """One run to its end, with a kill at the place ``at``; what became of it."""
    process, _, place = at.partition(":")
    write_files(folder, broker, namespace=folder.name, rounds=ROUNDS, devices=DEVICES)
    began = time.monotonic()
    in_trainer = place in TRAINER_PLACES
    parties = [_start(folder, name, place if name == process else "") for name in ("server", *DEVICES)]
    killed = False
    statuses: dict[str, int] = {}
    while parties and time.monotonic() - began < LONGEST_S:
        for party in list(parties):
            pid, status = os.waitpid(party.pid, os.WNOHANG)
            if not pid:
                continue
            parties.remove(party)
            code = os.waitstatus_to_exitcode(status)
            if party.place and code == -signal.SIGKILL and not killed:
                killed = True
                parties.append(_start(folder, party.name, ""))
            else:
                statuses[party.name] = code
        time.sleep(0.01)
    for party in parties:
        os.kill(party.pid, signal.SIGKILL)
        os.waitpid(party.pid, 0)
    if in_trainer:
        killed = (folder / "once" / place).exists()
    finished = all(statuses.get(name) == 0 for name in ("server", *DEVICES))
    row = {"at": at, "killed": killed, "finished": finished, "seconds": round(time.monotonic() - began, 2)}
    row |= _what_is_left(folder)
    if not finished:
        row["statuses"] = statuses
    return row


def _start(folder: Path, name: str, place: str) -> Party:
    environment = {}
    if place in TRAINER_PLACES:
        (folder / "once").mkdir(exist_ok=True)
        environment = {VARIABLE: place, ONCE: str(folder / "once")}
    if name == "server":
        return server(folder, place, environment)
    return agent(folder, name, place, environment)


def _what_is_left(folder: Path) -> dict[str, Any]:
    """The versions, and the acknowledged updates that count in no round."""
    state = StateFolder(folder / "server")
    store = open_store(state, read_only=True)
    counted = {(row.device, row.round) for row in store.participations("crashes") if row.state == "received"}
    versions = [version.object for version in store.versions("crashes")]
    store.close()
    acknowledged = set()
    for name in DEVICES:
        lines = (folder / f"{name}.log").read_text(encoding="utf-8").splitlines()
        said = [json.loads(line) for line in lines if line.startswith("{")]
        acknowledged |= {(name, one["round"]) for one in said if one["event"] == "update.receipt"}
    return {
        "versions": versions,
        "updates_counted": len(counted),
        "acknowledged": len(acknowledged),
        "acknowledged_lost": len(acknowledged - counted),
    }


def run(config: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Claim]]:
    rows = matrix(config["places"] or all_places())
    return rows, claims_of(rows)


def matrix(places: Sequence[str], keep: Path | None = None) -> list[dict[str, Any]]:
    """The undisturbed run, then one for each place. ``keep``: where folders of runs that failed go."""
    rows = []
    with tempfile.TemporaryDirectory() as name, start_embedded(Path(name) / "broker") as broker:
        for i, at in enumerate(["", *places]):
            folder = Path(name) / f"run{i}"
            row = one_run(folder, broker.url, at)
            row["same_bytes"] = row["versions"] == (rows[0] if rows else row)["versions"]
            rows.append(row)
            good = is_good(row)
            print(f"{'ok  ' if good else 'FAIL'} {row['seconds']:5.1f} s  {at or 'undisturbed'}", flush=True)
            if not good and keep is not None:
                shutil.copytree(folder, keep / folder.name, dirs_exist_ok=True)
            shutil.rmtree(folder)
    return rows


def is_good(row: dict[str, Any]) -> bool:
    """It ended, with the same bytes, and was killed where it was to be."""
    return row["finished"] and row["same_bytes"] and (row["killed"] or not row["at"])


def claims_of(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    crashes = [row for row in rows if row["killed"]]
    everything = ROUNDS * len(DEVICES)
    lost = sum(row["acknowledged_lost"] for row in rows)
    shares = (
        ("finish", "share of these runs that finish", [row["finished"] for row in crashes]),
        ("bytes", "share whose versions are bit-identical to those of the undisturbed run",
         [row["same_bytes"] for row in crashes]),
        ("counted", "share in which every update of every round counts",
         [row["updates_counted"] == everything for row in crashes]),
    )  # fmt: skip
    return [
        at_least("crash-places", "places at which a process was killed", len(crashes), 60),
        *(at_least(f"crash-{name}", text, sum(good) / max(1, len(good)), 1.0) for name, text, good in shares),
        Claim("crash-lost", "acknowledged updates that were lost", lost, "== 0", lost == 0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aggregator.crashes")
    parser.add_argument("--at", action="append", help="PROCESS:PLACE[:TIMES]; default: all")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--keep", type=Path, help="where folders of runs that failed go")
    options = parser.parse_args()
    rows = matrix(options.at or all_places(), options.keep)
    if options.json is not None:
        options.json.write_text(json.dumps(rows))
    sys.exit(0 if all(is_good(row) and not row["acknowledged_lost"] for row in rows) else 1)


if __name__ == "__main__":
    main()

"""A cut of the crash matrix: eight places, each in a run of real processes. All: benchmarks/aggregator."""

from __future__ import annotations

import subprocess
import sys

PLACES = (
    "server:round.open", "server:update.durable", "server:update.counted", "server:version.durable",
    "one:choice.kept", "one:residual.adopted", "one:receipt.come", "one:trainer.residual",
)  # fmt: skip


def test_killed_anywhere_a_run_ends_with_the_same_bytes() -> None:
    """And with every acknowledged update; the same command is all that it takes."""
    places = [word for place in PLACES for word in ("--at", place)]
    command = [sys.executable, "-m", "benchmarks.aggregator.crashes", *places]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 1 + len(PLACES)

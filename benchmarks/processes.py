"""Measuring processes: started as the agent starts its trainer, rows come back as they are made."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edge_sdk.agent.process_trainer import trainer_environment
from edge_sdk.training.allocator import settle_allocator

__all__ = ["emit", "measure", "say"]


def measure(
    module: str, what: Mapping[str, Any], *, threads: int = 0, allocator: str = "auto"
) -> Iterator[dict[str, Any]]:
    """Calls ``run(what)`` of ``module`` in a process of its own and yields the rows that it emits.

    The process starts as a trainer does: same environment, same allocator, set before torch is loaded.
    ``threads``: of torch; 0 leaves it to torch. ``allocator``: as ``trainer.allocator``.

    Raises:
        RuntimeError: the process did not end well; what it said went to this process's standard error.
    """
    environment = trainer_environment(offline=True, allocator=allocator)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.processes", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        cwd=Path(__file__).parents[1],
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with child.stdin as given:
            given.write(json.dumps(what))
        for line in child.stdout:
            yield json.loads(line)
        if child.wait():
            raise RuntimeError(f"{module} ended with status {child.returncode}")
    finally:
        child.kill()
        child.wait()


def emit(**row: Any) -> None:
    """In the measuring process: a row for the one that started it."""
    print(json.dumps(row), flush=True)


def say(text: str) -> None:
    """In the measuring process: something for who waits."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    settle_allocator()
    importlib.import_module(sys.argv[1]).run(json.load(sys.stdin))


if __name__ == "__main__":
    main()

"""Measurements that are done, a line each: an interrupted benchmark goes on where it was."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import measure

__all__ = ["Kept", "digest", "measure_missing"]


class Kept:
    """Args:
    key: what tells one measurement from another, of a row or of what is wanted.
    fresh: forget what is there.
    """

    def __init__(self, path: Path, key: Callable[[Mapping[str, Any]], Any], *, fresh: bool = False) -> None:
        self._path, self._key = path, key
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def has(self, one: Mapping[str, Any]) -> bool:
        return any(self._key(row) == self._key(one) for row in self.rows)

    def add(self, row: dict[str, Any]) -> int:
        """How many there are now."""
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            self.rows.append(row)
            self.rows.sort(key=self._key)
            return len(self.rows)


def digest(config: Mapping[str, Any]) -> str:
    """Names a config: measurements of another one are other measurements."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def measure_missing(
    missing: Sequence[dict[str, Any]],
    kept: Kept,
    module: str,
    what: Callable[[Sequence[dict[str, Any]]], Mapping[str, Any]],
    *,
    processes: int,
    told: Callable[[Mapping[str, Any]], str],
) -> None:
    """Shares the measurements out among processes of one thread; each row is kept, and told, as it comes.

    Args:
        what: what ``measure`` gives to a process that is to make these.

    Raises the first error of any process, when all have ended.
    """
    failures: list[BaseException] = []

    def work(part: Sequence[dict[str, Any]]) -> None:
        try:
            for row in measure(module, what(part), threads=1):
                print(f"{kept.add(row):3}  {told(row)}", flush=True)
        except BaseException as error:
            failures.append(error)

    count = min(processes, len(missing))
    threads = [threading.Thread(target=work, args=(missing[i::count],)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]

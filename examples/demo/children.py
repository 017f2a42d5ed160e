"""Commands of the product as child processes, and the events that they write on standard output.

Every child leads a process group of its own: Ctrl-C at the terminal reaches only the demo, which then ends
the groups in order. A child whose parent vanished is told so by the kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["AGENT", "AGGREGATOR", "Child", "ChildError", "Children", "Said"]

AGENT = str(Path(sysconfig.get_path("scripts")) / "edge-agent")
AGGREGATOR = str(Path(sysconfig.get_path("scripts")) / "edge-aggregator")

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class ChildError(Exception):
    """A child ended before it should have."""


@dataclass(frozen=True)
class Said:
    """One event of one child."""

    who: str
    event: str
    fields: Mapping[str, Any]
    wall: float
    at: float = field(default_factory=time.monotonic)


class Child:
    """One command: its events go to ``inbox``, everything to files in ``logs``."""

    def __init__(
        self, name: str, command: Sequence[str], logs: Path, inbox: queue.Queue[Said], cwd: Path | None = None
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.errors = logs / f"{name}.log"
        self._events = logs / f"{name}.jsonl"
        self._inbox = inbox
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                preexec_fn=_end_with_parent,
                cwd=cwd,
            )
        self._reader = threading.Thread(target=self._read, name=f"events of {name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self._events.open("ab") as log, self.process.stdout as lines:
            for line in lines:
                log.write(line)
                log.flush()
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    said = json.loads(line)
                    fields = {k: v for k, v in said.items() if k not in ("event", "wall")}
                    self._inbox.put(Said(self.name, said["event"], fields, said.get("wall", time.time())))

    @property
    def exit_code(self) -> int | None:
        return self.process.poll()

    def signal(self, number: int) -> None:
        """To the whole group; no error when it is gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def kill_alone(self) -> None:
        """SIGKILL to this one process: what it started must notice by itself."""
        self.process.kill()
        self.process.wait()

    def last_words(self, lines: int = 3) -> str:
        said = self.errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " | ".join(said[-lines:]) or "it said nothing"

    def drained(self, timeout: float = 5.0) -> None:
        """Waits until all that an ended child wrote has been read."""
        self._reader.join(timeout)


class Children:
    """All children of one run; leaving the ``with`` block ends every one that still runs."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.inbox: queue.Queue[Said] = queue.Queue()
        self._children: dict[str, Child] = {}

    def start(self, name: str, command: Sequence[str], cwd: Path | None = None) -> Child:
        """Starts ``command``; a name used before is taken over (a child that was killed and comes again)."""
        child = Child(name, command, self.logs, self.inbox, cwd)
        self._children[name] = child
        return child

    def __getitem__(self, name: str) -> Child:
        return self._children[name]

    def events(self, *, finite: Sequence[str] = (), timeout_s: float) -> Iterator[Said]:
        """Events as they come, until every child has ended well.

        Raises ChildError when one ends with an error, one outside ``finite`` ends while those still run,
        or ``timeout_s`` passes.
        """
        ends = time.monotonic() + timeout_s
        while True:
            try:
                yield self.inbox.get(timeout=0.2)
                continue
            except queue.Empty:
                pass
            running = [c for c in self._children.values() if c.exit_code is None]
            for child in self._children.values():
                if child.exit_code not in (None, 0):
                    raise ChildError(
                        f"{child.name} ended with exit code {child.exit_code}: {child.last_words()}"
                    )
            if not running or (finite and not any(self._children[n].exit_code is None for n in finite)):
                for child in self._children.values():
                    if child.exit_code is not None:
                        child.drained()
                while not self.inbox.empty():
                    yield self.inbox.get()
                return
            if time.monotonic() > ends:
                names = ", ".join(child.name for child in running)
                raise ChildError(f"after {timeout_s:.0f} s still running: {names}")

    def end(self, patience_s: float = 10.0) -> None:
        """SIGTERM to every group, SIGKILL to those that still live after ``patience_s``."""
        for child in self._children.values():
            child.signal(signal.SIGTERM)
        ends = time.monotonic() + patience_s
        for child in self._children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, ends - time.monotonic()))
        for child in self._children.values():
            child.signal(signal.SIGKILL)
            child.process.wait()
            child.drained()

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def _end_with_parent() -> None:
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

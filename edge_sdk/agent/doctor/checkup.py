"""The training side's own checkup, run in a process of its own and read line by line.

A step that kills it is told as such, and the rest is run by another process.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from edge_sdk.agent.process_trainer import trainer_environment
from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.checkup import Begun, CheckupLine, StepFailed, decode_line

__all__ = ["run_checkup"]

_COMMAND = ("-m", "edge_sdk.training.checkup")
_TIMEOUT_S = 300.0
_MOST_DEATHS = 5


def run_checkup(
    allocator: str = "auto", *, command: Sequence[str] | None = None, timeout_s: float = _TIMEOUT_S
) -> list[CheckupLine]:
    """What every step said, in their order; a step that ended its process: ``StepFailed``.

    Args:
        allocator: ``trainer.allocator``. Raises ConfigError where it is not there.
        command: what to start instead, for tests; ``--skip STEP`` is appended.
    """
    environment = trainer_environment(offline=True, allocator=allocator)
    found: list[CheckupLine] = []
    for _ in range(_MOST_DEATHS):
        begun = [line.step for line in found if isinstance(line, Begun)]
        skip = [word for step in begun for word in ("--skip", step)]
        lines, end = _run([*(command or (sys.executable, *_COMMAND)), *skip], environment, timeout_s)
        found += lines
        if not end:
            break
        last = lines[-1] if lines else None
        step = last.step if isinstance(last, Begun) else "start" if last is None else "end"
        found.append(StepFailed(step=step, error=end))
        if step in ("start", "versions", "end"):
            break  # the next process would end there too
    return [line for line in found if not isinstance(line, Begun)]


def _run(
    command: Sequence[str], environment: dict[str, str], timeout_s: float
) -> tuple[list[CheckupLine], str]:
    """Its lines, and how it ended; empty: in order."""
    # Elsewhere than here: a file called torch.py beside the config is not to be imported.
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
                timeout=timeout_s, check=False,
            )  # fmt: skip
            out, said, end = done.stdout, done.stderr, _how(done.returncode)
        except subprocess.TimeoutExpired as error:
            out, said, end = error.stdout or b"", error.stderr or b"", f"did not end in {timeout_s:.0f} s"
        except OSError as error:
            return [], f"cannot be started: {error.strerror}"
    lines = []
    for line in out.splitlines():
        try:
            lines.append(decode_line(line))
        except ProtocolError as error:
            return lines, error.message
    last = said.decode(errors="replace").strip().splitlines()
    return lines, f"{end}: {last[-1][:300]}" if end and last else end


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}" if status else ""
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"

"""What both command lines share: how a command ends, and how ``init`` writes a file."""

from __future__ import annotations

import errno
import json
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import typer

from edge_sdk.errors import ConfigError, EdgeError

__all__ = ["counted", "finite", "one_line", "run_commands", "show_version", "write_config"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_NOT_WRITTEN = 74
"""As in sysexits.h."""


def run_commands(app: Callable[[], None]) -> None:
    """Runs a command line. An EdgeError is one line and a hint, and its class's exit code."""
    try:
        app()
    except OSError as error:
        # what a command opens it answers for itself; this is its output, on a disk that is full or gone
        if error.errno not in _NO_ROOM or error.filename is not None:
            raise
        sys.stderr.write(f"error: cannot write: {error.strerror}\n")
        _let_go_of_stdout()
        sys.exit(_NOT_WRITTEN)
    except EdgeError as error:
        typer.echo(f"error: {one_line(error.message)}", err=True)
        if error.hint:
            typer.echo(f"hint: {one_line(error.hint)}", err=True)
        sys.exit(error.exit_code)


def _let_go_of_stdout() -> None:
    """What is left in its buffer would fail again at the interpreter's end, and be told as a traceback."""
    with suppress(OSError):
        sys.stdout.close()


def show_version(wanted: bool) -> None:
    """Callback of ``--version``."""
    if wanted:
        from edge_sdk import __version__

        typer.echo(__version__)
        raise typer.Exit


def finite(value: float | None) -> float | None:
    """Callback of options for figures: to click's ranges nan is within any bounds."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


def write_config(path: Path, text: str, *, name: str, command: str, force: bool, as_json: bool) -> None:
    """Writes ``text`` to ``path``, or as ``name`` into a folder, and says how to go on with ``command``.

    Raises ConfigError where there is a file already, or it cannot be written.
    """
    if path.is_dir():
        path = path / name
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists already", "use --force to overwrite it, or name another") from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}", "name a folder that exists"
        ) from None
    told = (
        json.dumps({"written": str(path)}) if as_json else f"wrote {path}; edit it, then: {command} -c {path}"
    )
    typer.echo(told)


def counted(count: int, what: str) -> str:
    """``1 device``, ``2 devices``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def one_line(text: str) -> str:
    """What stands on lines of its own, separated by semicolons."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines).replace(":; ", ": ")

"""Machines as trees of files: see ``trees/README.md``."""

from __future__ import annotations

from pathlib import Path

__all__ = ["MACHINES", "plant"]

_FOLDER = Path(__file__).parent / "trees"
MACHINES = tuple(sorted(file.stem for file in _FOLDER.glob("*.txt")))


def plant(machine: str, root: Path) -> Path:
    """Lays the machine's files below ``root``, which it returns."""
    lines: list[str] = []
    file: Path | None = None
    for line in (_FOLDER / f"{machine}.txt").read_text().splitlines():
        if line.startswith("/"):
            _write(file, lines)
            file, lines = root / line[1:], []
        else:
            lines.append(line.removeprefix("    ").replace(r"\0", "\0"))
    _write(file, lines)
    return root


def _write(file: Path | None, lines: list[str]) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n")

"""Two tasks made of the docstrings of the running Python's own standard library: real text, nothing to fetch.

**area**: which part of the library is this docstring from? Twelve classes; for label skew.
**word order**: were six of these words shuffled? Two classes; for questions about LoRA depth.

Files are read and parsed, never imported. Counts differ slightly between Python versions.
"""

from __future__ import annotations

import ast
import json
import platform
import random
import sys
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = [
    "AREAS",
    "ORDERS",
    "Row",
    "Task",
    "area_task",
    "split_dirichlet",
    "split_evenly",
    "word_order_task",
    "write_jsonl",
]

_AREA_MODULES = {
    "network": (
        "socket http urllib ftplib smtplib imaplib poplib socketserver ssl xmlrpc wsgiref "
        "ipaddress selectors webbrowser netrc"
    ),
    "mail": "email mailbox mimetypes base64 quopri",
    "markup": "html xml plistlib json csv configparser",
    "concurrency": "asyncio concurrent multiprocessing threading queue sched subprocess signal",
    "files": (
        "os pathlib shutil tempfile glob posixpath ntpath fileinput _pyio stat filecmp fnmatch "
        "genericpath zipfile tarfile gzip bz2 lzma zipapp linecache dbm shelve"
    ),
    "numbers": (
        "_pydecimal decimal fractions statistics random numbers colorsys heapq bisect datetime "
        "_pydatetime calendar _strptime zoneinfo uuid hashlib hmac secrets"
    ),
    "text": ("string re textwrap difflib locale gettext codecs encodings _pylong stringprep reprlib pprint"),
    "testing": "unittest doctest timeit cProfile profile pstats trace tracemalloc",
    "debugging": "pdb bdb traceback code codeop cmd logging warnings pydoc inspect",
    "language": (
        "ast dis tokenize symtable compileall py_compile importlib pkgutil modulefinder typing "
        "types abc _py_abc runpy zipimport pickle pickletools copyreg copy"
    ),
    "containers": (
        "collections _collections_abc dataclasses enum functools contextlib contextvars weakref "
        "_weakrefset operator graphlib struct array ctypes sqlite3"
    ),
    "programs": (
        "argparse optparse getopt site sysconfig venv ensurepip getpass pty tty platform curses "
        "cgitb rlcompleter"
    ),
}
AREAS: tuple[str, ...] = tuple(_AREA_MODULES)
ORDERS: tuple[str, ...] = ("kept", "shuffled")

_AREA_OF = {module: area for area, modules in _AREA_MODULES.items() for module in modules.split()}
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "_vendor", "_bundled"}
_LONGEST, _FEWEST_WORDS = 400, 5
_ORDER_WORDS, _ORDER_FEWEST, _ORDER_WINDOW = 24, 12, 6


@dataclass(frozen=True)
class Row:
    text: str
    label: str


@dataclass(frozen=True)
class Task:
    """Rows of one task. ``held_out`` never reaches a device."""

    name: str
    labels: tuple[str, ...]
    train: tuple[Row, ...]
    held_out: tuple[Row, ...]

    def describe(self) -> str:
        counts = Counter(row.label for row in self.train + self.held_out)
        by_label = ", ".join(f"{label} {counts[label]}" for label in self.labels)
        total = len(self.train) + len(self.held_out)
        return f"{self.name}: {total} rows, {len(self.held_out)} of them held out ({by_label})"


def area_task(cache: Path | None = None, held_out: int = 1500) -> Task:
    """The area task. ``cache``: a folder that keeps the rows for the next time."""
    rows = _cached_rows(cache)
    return Task("area", AREAS, tuple(rows[held_out:]), tuple(rows[:held_out]))


def word_order_task(cache: Path | None = None, held_out: int = 1000, seed: int = 0) -> Task:
    """The word-order task, from the same rows in the same order."""
    rng = random.Random(seed)
    rows = []
    for row in _cached_rows(cache):
        words = row.text.split()[:_ORDER_WORDS]
        if len(words) < _ORDER_FEWEST:
            continue
        label = rng.choice(ORDERS)
        if label == "shuffled" and not _shuffle_window(words, rng):
            continue  # every window holds one word six times over
        rows.append(Row(" ".join(words), label))
    return Task("word order", ORDERS, tuple(rows[held_out:]), tuple(rows[:held_out]))


def split_dirichlet(
    rows: Sequence[Row], labels: Sequence[str], devices: int, *, alpha: float = 0.5, seed: int = 0
) -> list[list[Row]]:
    """Rows per device, non-IID: of every label, device k gets a share drawn from Dirichlet(alpha)."""
    rng = np.random.default_rng(seed)
    parts: list[list[Row]] = [[] for _ in range(devices)]
    for label in labels:
        mine = [row for row in rows if row.label == label]
        shares = rng.dirichlet([alpha] * devices)
        cuts = np.floor(np.cumsum(shares)[:-1] * len(mine)).astype(int)
        for part, chosen in zip(parts, np.split(np.arange(len(mine)), cuts), strict=True):
            part.extend(mine[i] for i in chosen)
    for part in parts:
        random.Random(seed).shuffle(part)
    return parts


def split_evenly(rows: Sequence[Row], devices: int) -> list[list[Row]]:
    """Rows per device, IID: dealt out like cards."""
    return [list(rows[k::devices]) for k in range(devices)]


def write_jsonl(path: Path, rows: Sequence[Row]) -> Path:
    """One ``{"text": ..., "label": ...}`` a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": row.text, "label": row.label}, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _shuffle_window(words: list[str], rng: random.Random) -> bool:
    """Shuffles six neighbours in place so that they differ; False where no shuffle can differ."""
    starts = [s for s in range(len(words) - _ORDER_WINDOW + 1) if len(set(words[s : s + _ORDER_WINDOW])) > 1]
    if not starts:
        return False
    start = rng.choice(starts)
    window = words[start : start + _ORDER_WINDOW]
    while window == words[start : start + _ORDER_WINDOW]:
        rng.shuffle(window)
    words[start : start + _ORDER_WINDOW] = window
    return True


def _cached_rows(cache: Path | None) -> list[Row]:
    if cache is None:
        return _rows()
    path = cache / f"docstrings-{sys.implementation.name}-{platform.python_version()}.jsonl"
    if not path.exists():
        partial = write_jsonl(path.with_suffix(".part"), _rows())
        partial.replace(path)
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _rows() -> list[Row]:
    rows: dict[str, Row] = {}
    for area, text in _docstrings(Path(sysconfig.get_path("stdlib"))):
        short = " ".join(text.split())[:_LONGEST].strip()
        if len(short.split()) >= _FEWEST_WORDS:
            rows.setdefault(short, Row(short, area))
    shuffled = list(rows.values())
    random.Random(0).shuffle(shuffled)
    return shuffled


def _docstrings(library: Path) -> Iterator[tuple[str, str]]:
    """Area and docstring of every module, class and function, in the order of sorted files."""
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        area = _AREA_OF.get(inside.parts[0].removesuffix(".py"))
        if area is None or _NOT_LIBRARY.intersection(inside.parts):
            continue
        try:
            with tokenize.open(path) as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in files that are not ours
                tree = ast.parse(file.read())
        except (SyntaxError, UnicodeDecodeError):
            continue  # sample files that are wrong on purpose
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield area, text


if __name__ == "__main__":
    folder = Path("runs/data")
    for task in (area_task(folder), word_order_task(folder)):
        print(task.describe())

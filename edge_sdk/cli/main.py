"""``edge-agent``: the device's commands. What computes goes through a trainer; nothing here does."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from edge_sdk.config.bounds import LARGEST, MAX_BATCH, MAX_LABELS, MAX_LENGTH, MAX_RANK, MAX_STEPS
from edge_sdk.console import finite, run_commands, show_version, write_config

__all__ = ["app", "main"]

app = typer.Typer(
    name="edge-agent",
    help="A device's part in a run: trains where the data lies, sends what it learnt.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The agent's config file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs: JSON on standard output.")]


class Precision(str, Enum):
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    nf4 = "nf4"
    int2 = "int2"


class HeldIn(str, Enum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    nf4 = "nf4"
    int2 = "int2"


class Salience(str, Enum):
    loss = "loss"
    influence = "influence"


class Task(str, Enum):
    classification = "classification"
    causal_lm = "causal-lm"


@app.command()
def run(
    config: ConfigOption = Path("agent.toml"),
    once: Annotated[
        bool,
        typer.Option(
            "--once", help="End when the run has finished; give up (69) after 30 s without a broker."
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Join a run and take part in its rounds, until stopped. A broker that is away is tried for ever."""
    from edge_sdk.cli.running import run_agent

    run_agent(config, once=once, as_json=json)


@app.command()
def status(config: ConfigOption = Path("agent.toml"), json: JsonOption = False) -> None:
    """What the agent is doing, from its state folder; works while it runs and when it does not."""
    from edge_sdk.cli.status import show_status

    show_status(config, as_json=json)


@app.command()
def profile(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The agent's config file; else agent.toml, if any.")
    ] = None,
    link: Annotated[
        bool, typer.Option("--link/--no-link", help="Measure the link (a few MB at most).")
    ] = True,
    compute: Annotated[
        bool, typer.Option("--compute/--no-compute", help="Measure arithmetic and memory (extra 'train').")
    ] = True,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds",
            min=2,
            max=600,
            callback=finite,
            help="For all of it, 18 if not told; a slow disk wants more.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """What this device is and does: memory, power, heat, arithmetic, link. Needs neither model nor config."""
    from edge_sdk.cli.profiling import show_profile

    show_profile(config, as_json=json, link=link, compute=compute, seconds=seconds)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("agent.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a commented agent.toml."""
    from edge_sdk.config.templates import agent_toml

    write_config(path, agent_toml(), name="agent.toml", command="edge-agent run", force=force, as_json=json)


@app.command("quantize-base")
def quantize_base(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The agent's config file; else agent.toml.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Instead of a config: the base's folder, or a hub id.")
    ] = None,
    budget_mb: Annotated[
        float | None,
        typer.Option(
            "--budget-mb",
            min=0.001,
            max=LARGEST,
            callback=finite,
            help="What the whole base may take, in 10^6 bytes.",
        ),
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(
            "--precision",
            help="Instead of a budget: the same for every block.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="Rows to measure with; else the config's, or random tokens."),
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="The column of their text.")] = None,
    method: Annotated[
        Salience,
        typer.Option(
            "--method",
            help="Salience of a block: what the loss rises by when it alone is lowered to 2 bits (a forward "
            "pass for each), or how far it turns its input (one in all).",
        ),
    ] = Salience.loss,
    rows: Annotated[int, typer.Option("--rows", min=1, max=4096, help="How many of them.")] = 32,
    length: Annotated[int, typer.Option("--length", min=2, max=MAX_LENGTH, help="Tokens of a row.")] = 128,
    task: Annotated[
        Task | None,
        typer.Option(
            "--task",
            help="What to load it as; else by its config.json.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the plan here, for trainer.base_plan.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Plan bits for each block of the base under a budget of bytes, and show what they save."""
    from edge_sdk.cli import quantizing

    quantizing.quantize_base(
        config=config, base=base, budget_mb=budget_mb,
        precision=None if precision is None else precision.value,
        calibration=calibration, text=text, method=method.value, rows=rows, length=length,
        task=None if task is None else task.value, out=out, as_json=json,
    )  # fmt: skip


@app.command()
def plan(
    model: Annotated[
        Path | None, typer.Option("--model", help="The model's config.json, or its folder.")
    ] = None,
    device_class: Annotated[
        str | None, typer.Option("--device-class", help="One of edge-agent device-classes.")
    ] = None,
    power_mode: Annotated[
        str | None, typer.Option("--power-mode", help="One of that class, by its vendor's name.")
    ] = None,
    memory_mb: Annotated[
        float | None,
        typer.Option(
            "--memory-mb",
            min=1,
            max=LARGEST,
            callback=finite,
            help="What the trainer may hold in all, in 10^6 bytes.",
        ),
    ] = None,
    gflops: Annotated[
        float | None,
        typer.Option(
            "--gflops",
            min=0.001,
            max=LARGEST,
            callback=finite,
            help="What edge-agent profile tells as fp32_gflops of what trains: cpu.fp32_gflops, say, or "
            "cuda:0.fp32_gflops.",
        ),
    ] = None,
    task: Annotated[Task | None, typer.Option("--task", help="Else by the config.")] = None,
    labels: Annotated[int, typer.Option("--labels", min=2, max=MAX_LABELS, help="Of a classifier.")] = 2,
    batch: Annotated[int, typer.Option("--batch", min=1, max=MAX_BATCH, help="Rows of a step.")] = 16,
    length: Annotated[int, typer.Option("--length", min=2, max=MAX_LENGTH, help="Tokens of a row.")] = 128,
    rank: Annotated[int, typer.Option("--rank", min=1, max=MAX_RANK, help="Of LoRA, in all linears.")] = 8,
    steps: Annotated[int, typer.Option("--steps", min=1, max=MAX_STEPS, help="Of a round.")] = 25,
    base_precision: Annotated[
        HeldIn, typer.Option("--base-precision", help="What the frozen weights are held in.")
    ] = HeldIn.fp32,
    up_mbps: Annotated[
        float | None,
        typer.Option("--up-mbps", min=0.001, max=LARGEST, callback=finite, help="The link's rate up."),
    ] = None,
    down_mbps: Annotated[
        float | None, typer.Option("--down-mbps", min=0.001, max=LARGEST, callback=finite, help="And down.")
    ] = None,
    prices: Annotated[
        bool, typer.Option("--show-prices", help="What estimates reckon with and where that is from.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """What of a model would fit on a device class: an estimate, before anything is downloaded or probed."""
    from edge_sdk.cli.planning import Asked, show_plan, show_prices

    if prices:
        show_prices(as_json=json)
        return
    if model is None:
        raise typer.BadParameter("name a model's config.json, or its folder", param_hint="--model")
    asked = Asked(
        model=model, device_class=device_class, memory_mb=memory_mb, gflops=gflops,
        task=None if task is None else task.value, labels=labels, batch=batch, length=length, rank=rank,
        steps=steps, base_precision=base_precision.value, up_mbps=up_mbps, down_mbps=down_mbps,
        power_mode=power_mode,
    )  # fmt: skip
    show_plan(asked, as_json=json)


@app.command("device-classes")
def device_classes(
    links: Annotated[bool, typer.Option("--links", help="The link classes instead.")] = False,
    fleets: Annotated[bool, typer.Option("--fleets", help="The fleets instead.")] = False,
    json: JsonOption = False,
) -> None:
    """The device classes that agent.device_class may name, with figures and their sources."""
    from edge_sdk.cli.starting import list_classes

    list_classes(links=links, all_fleets=fleets, as_json=json)


@app.command()
def doctor(config: ConfigOption = Path("agent.toml"), json: JsonOption = False) -> None:
    """What of this device works, what does not and how to mend it. 0: no error; else the first one's code."""
    from edge_sdk.cli.doctor import show_findings

    show_findings(config, as_json=json)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of all commands."""


def main() -> None:
    """The console script."""
    run_commands(app)

"""``edge-agent``: the device's commands. What computes goes through a trainer; nothing here does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_sdk.console import run_commands, show_version, write_config

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
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("agent.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a commented agent.toml."""
    from edge_sdk.config.templates import agent_toml

    write_config(path, agent_toml(), name="agent.toml", command="edge-agent run", force=force, as_json=json)


@app.command("device-classes")
def device_classes(json: JsonOption = False) -> None:
    """The device classes that agent.device_class may name, with their vendors' figures."""
    from edge_sdk.cli.starting import list_classes

    list_classes(as_json=json)


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

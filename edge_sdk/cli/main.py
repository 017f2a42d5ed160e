"""``edge-agent``: the device's commands. What computes goes through a trainer; nothing here does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edge_sdk.errors import EdgeError

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
    from edge_sdk.cli.starting import write_config

    write_config(path, force=force, as_json=json)


@app.command("device-classes")
def device_classes(json: JsonOption = False) -> None:
    """The device classes that agent.device_class may name, with their vendors' figures."""
    from edge_sdk.cli.starting import list_classes

    list_classes(as_json=json)


def _version(wanted: bool) -> None:
    if wanted:
        from edge_sdk import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of all commands."""


def main() -> None:
    """Runs the command line. An EdgeError is one line and a hint, and its class's exit code."""
    try:
        app()
    except EdgeError as error:
        typer.echo(f"error: {_one_line(error.message)}", err=True)
        if error.hint:
            typer.echo(f"hint: {_one_line(error.hint)}", err=True)
        sys.exit(error.exit_code)


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines).replace(":; ", ": ")

"""``edge-aggregator``: the operator's commands."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from edge_sdk.console import run_commands, show_version, write_config

__all__ = ["app", "main"]

app = typer.Typer(
    name="edge-aggregator",
    help="A run's server: offers work, takes in updates, merges them, and exports the adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class LogFormat(str, Enum):
    """How ``run`` tells what happens."""

    text = "text"
    json = "json"


ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The run's config file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs: JSON on standard output.")]


@app.command()
def run(
    config: ConfigOption = Path("run.toml"),
    json: JsonOption = False,
    log_format: Annotated[
        LogFormat,
        typer.Option("--log-format", help="text: lines for people; json: logs, on standard error."),
    ] = LogFormat.text,
) -> None:
    """Run the rounds to the end. Stopped or killed, the same command goes on where it stood."""
    from aggregator.cli.running import run_server

    run_server(config, as_json=json, json_logs=log_format is LogFormat.json)


@app.command()
def status(config: ConfigOption = Path("run.toml"), json: JsonOption = False) -> None:
    """Where the run stands; works while it runs and when it does not."""
    from aggregator.cli.looking import show_status

    show_status(config, as_json=json)


@app.command()
def devices(config: ConfigOption = Path("run.toml"), json: JsonOption = False) -> None:
    """Every device, as it last was, and what travelled between it and the server."""
    from aggregator.cli.looking import show_devices

    show_devices(config, as_json=json)


@app.command()
def rounds(config: ConfigOption = Path("run.toml"), json: JsonOption = False) -> None:
    """Every round: who took part, how, and how long it took."""
    from aggregator.cli.looking import show_rounds

    show_rounds(config, as_json=json)


@app.command()
def versions(
    config: ConfigOption = Path("run.toml"),
    pruned: Annotated[
        bool, typer.Option("--all", help="Those too that were pruned: their rows, without their files.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """The versions of the global adapter that are kept, and how well they do."""
    from aggregator.cli.looking import show_versions

    show_versions(config, pruned=pruned, as_json=json)


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; replaced if it exists.")],
    config: ConfigOption = Path("run.toml"),
    version: Annotated[
        str | None,
        typer.Option(
            "--version",
            metavar="[newest|best|N]",
            help="Default: best, by held-out accuracy; newest where none was evaluated.",
        ),
    ] = None,
    merged: Annotated[
        bool,
        typer.Option("--merged", help="Base and adapter as one transformers model (needs the extra train)."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Write a version as a PEFT adapter, or folded into its base."""
    from aggregator.cli.making import export_version

    export_version(config, out, version, merged=merged, as_json=json)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("run.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a commented run.toml."""
    from edge_sdk.config.templates import run_toml

    write_config(path, run_toml(), name="run.toml", command="edge-aggregator run", force=force, as_json=json)


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

"""``edge-aggregator init`` and ``edge-aggregator export``: files for others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import typer

from aggregator.cli.looking import looking
from aggregator.state.base import VersionRow
from edge_sdk.config.templates import run_toml
from edge_sdk.errors import ConfigError, ContainerError, StateError
from edge_sdk.protocol.wire import Run
from edge_sdk.transport.objects import ObjectStore, file_digest

__all__ = ["export_version", "pick_version", "write_config"]


def write_config(path: Path, *, force: bool, as_json: bool) -> None:
    """Raises ConfigError where there is a file already, or it cannot be written."""
    if path.is_dir():
        path = path / "run.toml"
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(run_toml())
    except FileExistsError:
        raise ConfigError(f"{path} exists already", "use --force to overwrite it, or name another") from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}", "name a folder that exists"
        ) from None
    typer.echo(
        json.dumps({"written": str(path)})
        if as_json
        else f"wrote {path}; edit it, then: edge-aggregator run -c {path}"
    )


def export_version(config: Path, out: Path, number: int | None, *, as_json: bool) -> None:
    """Raises StateError where there is no such version."""
    with looking(config) as look:
        versions = look.store.versions(look.run.run)
        chosen = pick_version(versions, number)
        by_number = {version.number: version for version in versions}
        chain: list[VersionRow] = []
        at: int | None = chosen.number
        while at is not None:
            chain.insert(0, by_number[at])
            at = by_number[at].parent
        devices = sorted(
            {row.device for row in look.store.participations(look.run.run) if row.state == "received"}
        )
        from aggregator.export import export_peft

        objects = ObjectStore(look.folder.objects)
        paths = [_whole(objects, version) for version in chain]
        try:
            folder = export_peft(
                out,
                paths,
                msgspec.json.decode(look.run.record, type=Run),
                base=look.run.base_folder,
                number=chosen.number,
                rounds=chosen.round,
                accuracy=chosen.accuracy,
                devices=devices,
            )
        except OSError as error:
            raise StateError(
                f"{out} cannot be written: {error.strerror}", "name a folder that can be made"
            ) from error
    facts = {"folder": str(folder), "version": chosen.number, "accuracy": chosen.accuracy}
    typer.echo(json.dumps(facts) if as_json else f"wrote version {chosen.number} to {folder}")


def _whole(objects: ObjectStore, version: VersionRow) -> Path:
    """The version's file. Raises ContainerError where it is not the one that was written."""
    path = objects.path(version.object)
    try:
        whole = file_digest(path)[0] == version.object
    except OSError:
        whole = False
    if not whole:
        raise ContainerError(
            f"the file of version {version.number} is not what was written: {path}",
            "export another one with --version, or put the state folder back from a copy",
        )
    return path


def pick_version(versions: Sequence[VersionRow], number: int | None) -> VersionRow:
    """The one asked for; else the most accurate, the newest of equals; else the newest."""
    if not versions:
        raise StateError("the run has no version yet", "wait until the server has read the base model")
    if number is not None:
        for version in versions:
            if version.number == number:
                return version
        raise StateError(f"there is no version {number}", f"versions are 0 to {versions[-1].number}")
    rated = [version for version in versions if version.accuracy is not None]
    return max(rated or versions, key=lambda version: (version.accuracy or 0.0, version.number))

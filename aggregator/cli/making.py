"""``edge-aggregator init`` and ``edge-aggregator export``: files for others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import typer

from aggregator.cli.looking import Look, looking
from aggregator.state.base import VersionRow, best_version, chain_of
from edge_sdk.errors import ContainerError, StateError
from edge_sdk.protocol.wire import Announce, Run
from edge_sdk.transport.objects import ObjectStore, file_digest

if TYPE_CHECKING:
    from aggregator.export import Origin

__all__ = ["export_version", "pick_version"]


def export_version(
    config: Path, out: Path, wanted: str | None, *, merged: bool = False, as_json: bool
) -> None:
    """Raises StateError where there is no such version."""
    with looking(config) as look:
        versions = look.store.versions(look.run.run)
        chosen, why = pick_version(versions, wanted)
        chain = chain_of(versions, chosen.number)
        from aggregator.export import export_merged, export_peft

        run = msgspec.json.decode(look.run.record, type=Run)
        origin = _origin(look, run, versions, chosen)
        objects = ObjectStore(look.folder.objects)
        paths = [_whole(objects, version) for version in chain]
        base = look.run.base_folder
        try:
            if merged:
                folder = export_merged(out, paths, run, base=base, origin=origin, config=look.config)
            else:
                folder = export_peft(out, paths, run, base=base, origin=origin)
        except OSError as error:
            raise StateError(
                f"{out} cannot be written: {error.strerror}", "name a folder that can be made"
            ) from error
    facts = {
        "folder": str(folder),
        "version": chosen.number,
        "merged": merged,
        "accuracy": chosen.accuracy,
        "perplexity": chosen.perplexity,
        "why": why,
    }
    what = "the model with version" if merged else "version"
    typer.echo(json.dumps(facts) if as_json else f"wrote {what} {chosen.number} to {folder} ({why})")


def _origin(look: Look, run: Run, versions: Sequence[VersionRow], chosen: VersionRow) -> Origin:
    """What is in the version: the updates of all rounds up to the one that made it."""
    from aggregator.export import Origin

    received = [
        row
        for row in look.store.participations(look.run.run)
        if row.state == "received" and row.round <= chosen.round
    ]
    depths = [
        msgspec.json.decode(row.announce, type=Announce).candidate.depth
        for row in received
        if row.announce is not None
    ]
    best = best_version(versions)
    return Origin(
        number=chosen.number,
        rounds=chosen.round,
        method=look.run.method,
        accuracy=chosen.accuracy,
        perplexity=chosen.perplexity,
        loss=chosen.loss,
        best=None if best is None else best.number,
        versions=versions[-1].number,
        devices=sorted({row.device for row in received}),
        updates=len(received),
        mean_depth=sum(depths) / len(depths) if depths else None,
        layers=run.shape.layers,
    )


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


def pick_version(versions: Sequence[VersionRow], wanted: str | None) -> tuple[VersionRow, str]:
    """The version, and why it is this one.

    Args:
        wanted: a number, ``newest``, or ``best``, the newest of equals. None: the best where any was
            evaluated, else the newest.

    Raises StateError where there is no such version.
    """
    if not versions:
        raise StateError("the run has no version yet", "wait until the server has read the base model")
    newest = versions[-1]
    best = best_version(versions)
    if wanted == "newest" or (wanted is None and best is None):
        return newest, "the newest" if best else "the newest; none was evaluated"
    if wanted in (None, "best"):
        if best is None:
            raise StateError("no version was evaluated, so none is the best", "take --version newest")
        why = f"the best on the held-out rows, {best.score}"
        return best, why if best is newest else f"{why}; the newest is version {newest.number}"
    for version in versions:
        if str(version.number) == wanted:
            return version, "as asked for"
    raise StateError(
        f"there is no version {wanted}", f"versions are 0 to {newest.number}, or newest, or best"
    )

"""Findings about what lies on this disk: the state folder, its room, the base model, the rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from edge_sdk.agent.doctor.finding import Finding, of_error
from edge_sdk.agent.lock import AGENT, check_owner, holder
from edge_sdk.agent.record import AgentRecord, disk_error
from edge_sdk.config.agent import AgentConfig
from edge_sdk.config.problems import nearest
from edge_sdk.data.base_files import find_base, tokenizer_digest, weight_files
from edge_sdk.data.rows import Row, TextRow, check_rows
from edge_sdk.data.tensor_files import read_header
from edge_sdk.device.machine import read_profile
from edge_sdk.errors import BaseModelError, ConfigError, EdgeError, StateError

__all__ = ["file_findings"]

_LOW_MB, _LEAST_MB = 1000.0, 100.0


def file_findings(config: AgentConfig) -> Iterator[Finding]:
    folder = Path(config.agent.state_dir)
    yield _state(folder)
    yield _disk(folder, config)
    yield _base(config)
    yield _rows(config)


def _state(folder: Path) -> Finding:
    """Nothing is left in it, and it is not made: that is the agent's to do, as the user it runs as."""
    above = folder
    while not above.exists() and above != above.parent:
        above = above.parent
    try:
        check_owner(folder, AGENT)
        if above == folder:
            _try_to_write(folder)
            record = folder / "agent.db"
            if record.is_file():
                AgentRecord(record, read_only=True).close()
        elif not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(13, f"{above} lets this user make no folder")
    except OSError as error:
        return of_error("state", disk_error(folder, error))
    except (StateError, ConfigError) as error:
        return of_error("state", error)
    pid = holder(folder)
    if pid is not None:
        return Finding(id="state", level="ok", text=f"{folder} is in use by the agent, process {pid}")
    made = "can be written" if above == folder else "is not there yet and can be made"
    return Finding(id="state", level="ok", text=f"{folder} {made}")


def _try_to_write(folder: Path) -> None:
    probe = folder / f".doctor-{os.getpid()}"
    try:
        with probe.open("xb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def _disk(folder: Path, config: AgentConfig) -> Finding:
    profile = read_profile(disk=folder)
    free = profile.disk_free_mb
    if free is None:
        return Finding(id="disk", level="warning", text=profile.reasons["disk_mb"])
    cache = config.limits.prefix_cache_mb if config.limits.prefix_cache == "disk" else 0.0
    told = f"{free:.0f} MB are free for {folder}"
    if free < _LEAST_MB:
        return Finding(
            id="disk", level="error", text=f"{told}: versions and updates will not find room",
            fix="free disk space, or set agent.state_dir to another disk", exit_code=StateError.exit_code,
        )  # fmt: skip
    if free < _LOW_MB + cache:
        kept = f", and limits.prefix_cache_mb takes {cache:g}" if cache else ""
        return Finding(
            id="disk", level="warning", text=f"{told}{kept}: large versions may not find room",
            fix="free disk space, or set agent.state_dir to another disk",
        )  # fmt: skip
    return Finding(id="disk", level="ok", text=told)


def _base(config: AgentConfig) -> Finding:
    wanted = config.base.path
    try:
        folder = find_base(wanted)
    except BaseModelError as error:
        if not Path(wanted).is_absolute():
            return Finding(
                id="base", level="warning",
                text=f'base.path "{wanted}" is no folder and not in the cache: it is taken for a hub id, and '
                "fetched when a run begins",
                fix=error.hint,
            )  # fmt: skip
        return of_error("base", error)
    try:
        files = weight_files(folder)
        tokenizer_digest(folder)
        for file in files:
            read_header(file)
        size = sum(file.stat().st_size for file in files) / 1e6
    except BaseModelError as error:
        return of_error("base", error)
    except OSError as error:
        what = f"base model {error.filename or folder}: cannot be read: {error.strerror}"
        return of_error("base", BaseModelError(what, "let the user who runs the agent read it"))
    return Finding(id="base", level="ok", text=f"{folder}: weights of {size:.0f} MB and a tokenizer")


def _rows(config: AgentConfig) -> Finding:
    """An agent may not know its run's task yet: rows that serve one of the two are told of the other."""
    source = config.data.source()
    try:
        checked = check_rows(source)
    except EdgeError as error:
        return of_error("data", error)
    size = Path(config.data.path).stat().st_size
    told = f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"
    parquet = Path(config.data.path).suffix.lower() == ".parquet"
    what = "is there; its rows are read by the trainer" if parquet else "can be read, every row of it"
    what = f"{config.data.path} ({told}) {what}"
    if checked is None or checked.kind is Row:
        return Finding(id="data", level="ok", text=what)
    what += f", for a causal LM alone: there is no column {source.label!r} for classification"
    more = [name for name in checked.columns if name != source.text]
    if checked.kind is not TextRow or not more:
        return Finding(id="data", level="ok", text=what)
    meant = nearest(source.label, more)
    return Finding(
        id="data", level="warning", text=f"{what}; columns: {', '.join(checked.columns[:20])}",
        fix=(f"did you mean {meant!r}? " if meant else "")
        + "data.label names the column of labels; nothing is to be done where the run is a causal LM's",
    )  # fmt: skip

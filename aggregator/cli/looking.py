"""The reading commands. They open the state folder without holding it, beside a server or without one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import typer

from aggregator.brokerage import read_note
from aggregator.cli.extra import need_server_extra
from aggregator.cli.planned import last_parts, planned_facts
from aggregator.cli.progress import device_label
from aggregator.state.base import AWAITED, LedgerRow, ParticipationRow, RunRow, Store, best_version
from aggregator.state.folder import StateFolder, open_store
from aggregator.storage import Storage, read_pause
from edge_sdk.clock import SystemClock
from edge_sdk.config.loading import load_run_config
from edge_sdk.config.run import RunConfig
from edge_sdk.console import counted
from edge_sdk.errors import StateError
from edge_sdk.protocol.wire import Announce, Choice, Decline, Refusal, Status

__all__ = ["Look", "looking", "show_devices", "show_rounds", "show_status", "show_versions"]


@dataclass(frozen=True)
class Look:
    """A run's state, open for reading."""

    config: RunConfig
    folder: StateFolder
    store: Store
    run: RunRow


@contextmanager
def looking(path: Path) -> Iterator[Look]:
    """Raises ConfigError, or StateError where the run was never started."""
    need_server_extra()
    config = load_run_config(path, files=False)
    folder = StateFolder(Path(config.run.state_dir))
    store = open_store(folder, read_only=True)
    try:
        run = store.run(config.run.name)
        if run is None:
            others = ", ".join(row.run for row in store.runs()) or "none"
            raise StateError(
                f"run {config.run.name!r} has not begun in {folder.path}; runs there: {others}",
                f"start it with `edge-aggregator run --config {path}`",
            )
        yield Look(config, folder, store, run)
    finally:
        store.close()


def show_status(path: Path, *, as_json: bool) -> None:
    with looking(path) as look:
        note, pid = read_note(look.folder), look.folder.holder()
        last, versions = look.store.last_round(look.run.run), look.store.versions(look.run.run)
        best = best_version(versions)
        devices = look.store.devices(look.run.run)
        pause = read_pause(look.folder.path)
        paused = pid is not None and pause.paused
        state = "finished" if look.run.finished else None if last is None else last.state
        storage = Storage(look.folder.path, look.config.storage.keep_free_mb, SystemClock())
        facts: dict[str, Any] = {
            "run": look.run.run,
            "method": look.run.method,
            "running": pid is not None,
            "pid": pid,
            "broker": None if note is None else msgspec.to_builtins(note),
            "round": None if last is None else last.number,
            "rounds": look.run.rounds,
            "state": "paused" if paused else state,
            "paused": pause.reason if paused else "",
            "free_mb": round(storage.free() / 1e6, 1),
            "held": None if last is None else last.held,
            "keep_free_mb": look.config.storage.keep_free_mb,
            "version": versions[-1].number if versions else None,
            "accuracy": versions[-1].accuracy if versions else None,
            "perplexity": versions[-1].perplexity if versions else None,
            "best_version": None if best is None else best.number,
            "best_accuracy": None if best is None else best.accuracy,
            "best_perplexity": None if best is None else best.perplexity,
            "devices": len(devices),
            "online": sum(device.online for device in devices) if pid is not None else 0,
            "insecure_devices": [row.device for row in devices if _status(row.status, "insecure")],
            "fingerprint": look.run.fingerprint,
        }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    where = f"round {facts['round']} of {facts['rounds']}, {facts['state']}"
    lines = [
        ("run", f"{facts['run']} ({facts['method']}), {where}"),
        ("server", f"running, process {pid}" if pid is not None else "not running"),
        ("broker", "not known yet" if note is None else f"{note.url} ({note.kind})"),
        ("version", f"{_text(facts['version'])}, {_score(facts)}"),
        ("best", f"version {_text(facts['best_version'])}, {_score(facts, 'best_')}"),
        ("devices", f"{facts['devices']} known, {facts['online']} online"),
    ]
    if facts["paused"]:
        lines.append(("PAUSED", f"{facts['paused']}; goes on by itself when there is room"))
    if facts["held"]:
        lines.append(("HELD", f"{facts['held']}; nothing is lost, it is tried again until that is cured"))
    if note is not None and note.insecure:
        lines.append(("INSECURE", "the broker is spoken to without TLS: everything travels readable"))
    if facts["insecure_devices"]:
        lines.append(("INSECURE", f"devices without TLS: {', '.join(facts['insecure_devices'])}"))
    for name, text in lines:
        typer.echo(f"{name:<9} {text}")


def show_devices(path: Path, *, as_json: bool) -> None:
    with looking(path) as look:
        running = look.folder.holder() is not None
        ledger = {row.device: row for row in look.store.ledger(look.run.run)}
        parts = last_parts(look.store, look.run.run)
        rows = []
        for row in look.store.devices(look.run.run):
            status = None if row.status is None else msgspec.json.decode(row.status, type=Status)
            refusal = None if row.refusal is None else msgspec.json.decode(row.refusal, type=Refusal)
            counts = asdict(ledger.get(row.device) or LedgerRow(look.run.run, row.device))
            rows.append(
                {
                    "device": row.device,
                    "online": row.online and running,
                    "state": _state(status, row.online and running),
                    "device_class": None if status is None else status.device_class,
                    "emulated": status is not None and status.emulated,
                    "permission": None if status is None else status.permission,
                    "reason": "" if status is None else status.reason,
                    "samples": None if status is None else status.samples,
                    "limits": {} if status is None else status.limits,
                    "rest_mb": None if status is None else status.memory.rest_mb,
                    "budget_mb": None if status is None else status.memory.budget_mb,
                    "up_bps": row.up_bps,
                    "down_bps": row.down_bps,
                    "holds": [] if status is None else list(status.holds),
                    "insecure": status is not None and status.insecure,
                    "refused": None if refusal is None else refusal.message,
                    "seen": row.seen_at,
                    **planned_facts(row, parts.get(row.device)),
                    **{name: count for name, count in counts.items() if name not in ("run", "device")},
                }
            )
    if as_json:
        typer.echo(json.dumps(rows))
        return
    _table(
        (
            *("device", "online", "state", "samples", "recommended", "chosen", "bound by"),
            *("up kB", "down kB", "twice kB", "refused"),
        ),
        [
            (
                device_label(row["device"], row["device_class"], row["emulated"]),
                "yes" if row["online"] else "no",
                row["state"],
                row["samples"],
                *((row["plan"] or {}).get(name) for name in ("recommended", "chosen", "binding")),
                row["bytes_up"] // 1000,
                row["bytes_down"] // 1000,
                row["duplicate_bytes"] // 1000,
                row["refused"],
            )
            for row in rows
        ],
    )


def show_rounds(path: Path, *, as_json: bool) -> None:
    with looking(path) as look:
        rows = []
        for row in look.store.rounds(look.run.run):
            taking_part = look.store.participations(look.run.run, row.number)
            facts = {name: value for name, value in asdict(row).items() if name != "run"}
            facts |= {"overhead_s": row.overhead_s, "devices": [_taking_part(one) for one in taking_part]}
            counted = look.store.counted(look.run.run, row.number)
            facts |= {
                "selected": len(taking_part),
                "merged": len(counted),
                "merged_late": sum(one.late for one in counted),
                "awaited": sum(one.state in AWAITED for one in taking_part),
            }
            rows.append(facts)
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for facts in rows:
        if facts["number"] == 0:
            continue
        overhead = f", overhead {facts['overhead_s']:.1f} s" if facts["overhead_s"] is not None else ""
        how = facts["outcome"] or facts["state"]
        typer.echo(
            f"round {facts['number']}: {how}, version {_text(facts['version'])}, "
            f"open {facts['open_s']:.1f} s{overhead}{_time_words(facts)}"
        )
        if facts["held"]:
            typer.echo(f"  HELD: {facts['held']}")
        _table(
            ("  device", "state", "depth", "quantized", "bound by", "train s", "kB", "late", "why"),
            [
                (
                    "  " + one["device"],
                    one["state"],
                    one["depth"],
                    one["quantized_layers"],
                    one["binding"],
                    one["train_s"],
                    None if one["bytes"] is None else one["bytes"] // 1000,
                    _late(one),
                    one["reason"],
                )
                for one in facts["devices"]
            ],
        )


def show_versions(path: Path, *, pruned: bool, as_json: bool) -> None:
    """``pruned``: those too of which nothing but their row is left."""
    with looking(path) as look:
        known = look.store.versions(look.run.run)
    versions = [row for row in known if pruned or row.kept]
    rows = [{name: value for name, value in asdict(row).items() if name != "run"} for row in versions]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    spoken = any(row["perplexity"] is not None for row in rows)
    _table(
        (
            "version",
            "round",
            "accuracy",
            "loss",
            *(("perplexity",) if spoken else ()),
            "kB",
            "object",
            "delta to",
            *(("kept",) if pruned else ()),
            "not evaluated",
        ),
        [
            (
                row["number"],
                row["round"],
                row["accuracy"],
                row["loss"],
                *((row["perplexity"],) if spoken else ()),
                row["bytes"] // 1000,
                row["object"][:12],
                row["parent"],
                *(("no" if row["pruned_at"] else "yes",) if pruned else ()),
                row["evaluation_error"],
            )
            for row in rows
        ],
    )
    if len(known) > len(versions):
        typer.echo(f"{len(known) - len(versions)} more were pruned: --all shows how well they did")


def _state(status: Status | None, online: bool) -> str | None:
    """What it may do, and why not; of one that is away, what it said last."""
    if status is None:
        return None
    said = f"{status.permission}: {status.reason}" if status.reason else status.permission
    return said if online else f"was {said}"


def _taking_part(row: ParticipationRow) -> dict[str, Any]:
    """One device's part in a round: what it chose, predicted, measured and sent."""
    choice = None if row.choice is None else msgspec.json.decode(row.choice, type=Choice)
    announce = None if row.announce is None else msgspec.json.decode(row.announce, type=Announce)
    decline = None if row.decline is None else msgspec.json.decode(row.decline, type=Decline)
    refusal = None if row.refusal is None else msgspec.json.decode(row.refusal, type=Refusal)
    told = decline or refusal
    candidate = announce.candidate if announce else choice.candidate if choice else None
    measured = announce.measured if announce else None
    return {
        "device": row.device,
        "state": row.state,
        "depth": candidate.depth if candidate else None,
        "quantized_layers": candidate.quantized_layers if candidate else None,
        "binding": choice.binding if choice else None,
        "attempt": choice.attempt if choice else None,
        "reason": row.set_aside
        or (f"{told.reason}: {told.message}" if told else choice.reason if choice else ""),
        "set_aside": row.set_aside,
        "predicted_peak_mb": candidate.peak_mb if candidate else None,
        "measured_peak_mb": measured.peak_mb if measured else None,
        "rest_mb": measured.rest_mb if measured else None,
        "predicted_s": candidate.seconds if candidate else None,
        "train_s": row.train_s,
        "upload_s": row.upload_s,
        "shaped_s": row.shaped_s,
        "bytes": row.bytes,
        "duplicate_bytes": row.duplicate_bytes,
        "samples": row.samples,
        "object": row.object,
        "builds_on": row.builds_on,
        "counts_in": row.counts_in,
        "late": row.late,
        "staleness": row.staleness,
        "weight": row.weight,
    }


def _time_words(facts: dict[str, Any]) -> str:
    """Who was asked and what the round waited for; empty before it opened."""
    if facts["wanted"] is None:
        return ""
    parts = f"{counted(facts['selected'], 'device')}, {facts['selection']}"
    if facts["schedule"] == "buffered":
        parts += f", buffer of {facts['quorum']}"
    elif facts["quorum"] != facts["selected"]:
        parts += f", quorum {facts['quorum']} of {facts['wanted']}"
    if facts["closed_by"] is not None:
        parts += f", closed by {facts['closed_by']}"
    if facts["merged_late"]:
        parts += f", {facts['merged_late']} of {counted(facts['merged'], 'update')} late"
    return f" ({parts})"


def _late(one: dict[str, Any]) -> str | None:
    """Where a late update counted, and how many versions after its own."""
    if not one["late"]:
        return None
    return f"in round {one['counts_in']}, {counted(one['staleness'], 'version')}, weight {one['weight']:.2f}"


def _status(text: str | None, name: str) -> Any:
    return None if text is None else getattr(msgspec.json.decode(text, type=Status), name)


def _score(facts: dict[str, Any], which: str = "") -> str:
    name = "accuracy" if facts[f"{which}perplexity"] is None else "perplexity"
    return f"{name} {_text(facts[which + name])}"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    cells = [list(head), *([_text(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        line = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())

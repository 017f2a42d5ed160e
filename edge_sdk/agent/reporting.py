"""What the agent tells of itself: to the aggregator, and to its owner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from edge_sdk.agent.budgets import link_now
from edge_sdk.agent.context import Context
from edge_sdk.agent.joining import Joining
from edge_sdk.agent.link import kept_link
from edge_sdk.agent.lock import AGENT, check_owner, holder
from edge_sdk.agent.record import AgentRecord, RoundRow, disk_error
from edge_sdk.agent.rounds import Rounds
from edge_sdk.agent.traffic import Traffic
from edge_sdk.clock import Clock, SystemClock
from edge_sdk.config.agent import AgentConfig
from edge_sdk.config.broker import parse_broker_url
from edge_sdk.errors import ConfigError, EdgeError
from edge_sdk.protocol.wire import AggregatorState, Choice, RoundPosition, Status

__all__ = ["folder_status", "live_state", "speaks_readably", "status_record"]


def speaks_readably(config: AgentConfig) -> bool:
    """Whether everything travels without TLS over a network, by the owner's leave."""
    try:
        address = parse_broker_url(config.broker.url)
    except ConfigError:
        return False
    return not address.tls and not address.loopback


def status_record(context: Context, joining: Joining, position: RoundPosition | None) -> Status | None:
    """The status as of now; None before the agent is ready to join, or knows that it cannot."""
    run, fingerprint, described = joining.run, joining.fingerprint, joining.described
    if not joining.tells or run is None or fingerprint is None or described is None:
        return None
    config = context.config
    limits = {
        "memory_mb": config.limits.memory_mb,
        "uplink_kbps": config.limits.uplink_kbps,
        "traffic_mb_per_day": config.gates.traffic_mb_per_day,
    }
    held = context.record.versions()
    return Status(
        device=context.device,
        run=run.run,
        session=context.session,
        device_class=config.agent.device_class,
        emulated=config.agent.emulated,
        permission=context.permission,
        reason=context.gate or joining.trouble[:1024],
        fingerprint=fingerprint,
        mechanisms=described.mechanisms,
        samples=described.samples,
        profile=context.machine.read_profile(disk=context.folder),
        fit=joining.fit,
        memory=joining.memory(),
        link=link_now(context),
        holds=tuple(number for number, ref in held.items() if context.store.has(ref.object)),
        position=position,
        insecure=speaks_readably(config),
        limits={key: value for key, value in limits.items() if value is not None},
    )


def live_state(
    context: Context,
    joining: Joining,
    rounds: Rounds,
    aggregator: AggregatorState | None,
    error: EdgeError | None,
) -> dict[str, Any]:
    """What only a running agent knows."""
    return {
        "session": context.session,
        "broker": context.transport.description,
        "connected": context.transport.connected,
        "aggregator": "unknown" if aggregator is None else _whether_ready(aggregator),
        "finished": aggregator is not None and aggregator.finished,
        "permission": context.permission,
        "reason": context.gate or "",
        "joined": joining.ready,
        "trouble": joining.trouble,
        "corrections": () if joining.fit is None else msgspec.to_builtins(joining.fit.corrections),
        "state": rounds.state,
        "trainer": context.desk.task or ("loaded" if context.desk.trainer.loaded else "unloaded"),
        "error": None if error is None else error.message,
    }


def _whether_ready(aggregator: AggregatorState) -> str:
    return "ready" if aggregator.ready else "paused" if aggregator.reason else "away"


def folder_status(config: AgentConfig, clock: Clock | None = None) -> dict[str, Any]:
    """The agent as its state folder tells it, whether it runs or not.

    Raises StateError for a damaged one, and ConfigError for an aggregator's.
    """
    folder = Path(config.agent.state_dir)
    check_owner(folder, AGENT)
    pid = holder(folder)
    status: dict[str, Any] = {
        "device": config.agent.id,
        "device_class": config.agent.device_class,
        "emulated": config.agent.emulated,
        "state_dir": str(folder),
        "running": pid is not None,
        "pid": pid,
        "broker": config.broker.url,
        "insecure": speaks_readably(config),
        "limits": msgspec.to_builtins(config.limits),
        "gates": msgspec.to_builtins(config.gates),
        "run": None,
    }
    path = folder / "agent.db"
    try:
        if not path.is_file():
            return status
    except OSError as error:
        raise disk_error(folder, error) from None
    record = AgentRecord(path, read_only=True)
    try:
        run = record.run
        live = msgspec.json.decode(record.get("live") or "{}")
        status.update(reason="", trouble="", corrections=[])
        if pid is None:
            live.update(connected=False, trainer="unloaded", aggregator="unknown", reason="")
        status.update(live)
        status.update(
            run=None if run is None else run.run,
            nonce=None if run is None else run.nonce,
            versions=sorted(record.versions()),
            outbox=[
                {"round": item.announce.round, "state": item.state, "bytes": item.announce.bytes,
                 "bytes_sent": item.bytes_sent}
                for item in record.outbox.items()
            ],
            owed=[owed.round for owed in record.owed()],
            ledger={} if run is None else record.ledger(run.nonce),
            link=_link(record),
            traffic_today=Traffic(record, clock or SystemClock(), None).used,
            rounds=[_round(row) for row in record.rounds()],
        )  # fmt: skip
    finally:
        record.close()
    return status


def _link(record: AgentRecord) -> dict[str, Any]:
    """What is known of it, and since when."""
    link, at = kept_link(record)
    return {**msgspec.to_builtins(link), "at": at or None}


def _round(row: RoundRow) -> dict[str, Any]:
    """One round for people and programs: the choice, why, and what was measured."""
    told: dict[str, Any] = {"round": row.round, "state": row.state or row.outcome or "queued"}
    if isinstance(row.answer, Choice):
        one = row.answer.candidate
        told.update(
            candidate=one.id,
            depth=one.depth,
            quantized_layers=one.quantized_layers,
            binding_budget=row.answer.binding,
            attempt=row.answer.attempt,
            predicted_peak_mb=one.peak_mb,
            predicted_seconds=one.seconds,
        )
    elif row.answer is not None:
        told.update(declined=row.answer.reason, message=row.answer.message)
    if row.packed is not None:
        measured = row.packed.measured
        told.update(
            samples=row.packed.samples, rest_mb=measured.rest_mb, measured_peak_mb=measured.peak_mb,
            train_s=measured.train_s, bytes_resent=row.resent,
        )  # fmt: skip
    return told

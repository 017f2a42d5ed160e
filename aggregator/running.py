"""The rooms of a run, put together once its record exists, and what the rounds need of the server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from aggregator.adapters import Adapters
from aggregator.echo import LINK_BYTES, Echo
from aggregator.evaluation import Evaluator, setup_of
from aggregator.fleet import Fleet
from aggregator.intake import Intake
from aggregator.methods.base import Method
from aggregator.norms import FleetNorms, Norms
from aggregator.participations import deepest_of
from aggregator.planner.plan import RoundPlan, plan_round
from aggregator.planner.utility import moved, read_utilities, write_utilities
from aggregator.reception import Reception
from aggregator.retention import prune
from aggregator.round_port import Made
from aggregator.rounds import Rounds
from aggregator.scheduling.terms import terms_of
from aggregator.state.base import ParticipationRow, Store, VersionRow
from aggregator.state.folder import StateFolder
from aggregator.transfers import Downloads, Ledger, Uploads
from aggregator.validation import refuse
from edge_sdk.clock import Clock
from edge_sdk.config.run import RunConfig
from edge_sdk.protocol.base import Record
from edge_sdk.protocol.topics import Topics
from edge_sdk.protocol.wire import AggregatorState, Announce, Offer, Refusal, Run, Status, encode
from edge_sdk.transport.base import Inbound
from edge_sdk.transport.objects import ObjectStore

__all__ = ["Running", "ServerPort"]


class ServerPort(Protocol):
    """What a run needs of the server that it runs in."""

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool: ...

    def emit(self, name: str, **fields: Any) -> None: ...

    @property
    def traffic(self) -> Counter[str]:
        """What travelled since the server's start, by the names of the ledger's columns."""
        ...


class Running:
    """A run that goes on: the fleet, the rounds, transfers both ways. Also the ``RoundsPort``.

    Raises StateError where the store is not whole.
    """

    def __init__(
        self,
        config: RunConfig,
        run: Run,
        base: Path,
        method: Method,
        *,
        epoch: str,
        store: Store,
        folder: StateFolder,
        objects: ObjectStore,
        evaluator: Evaluator,
        clock: Clock,
        server: ServerPort,
    ) -> None:
        self.run = run
        self._config = config
        self.base = base
        self._method = method
        self._epoch = epoch
        self._store = store
        self._objects = objects
        self._evaluator = evaluator
        self._clock = clock
        self._server = server
        self._topics = Topics(config.broker.namespace)
        self._linger_until: float | None = None
        namespace = config.broker.namespace
        self._norms = FleetNorms(store, run.run)
        self.ledger = Ledger(store, run.run, server.traffic)
        self.fleet = Fleet(store, run, config.rounds.max_samples)
        self.adapters = Adapters(
            run,
            method.merge,
            objects,
            folder.work,
            config.run.seed,
            server_optimizer=method.server_optimizer,
            full_every=config.merge.full_every,
        )
        self.rounds = Rounds(store, run, terms_of(config, method), self.fleet, self, clock)
        self.uploads = Uploads(namespace, folder.partials, objects, self.ledger, self._say)
        self.downloads = Downloads(namespace, objects, self.ledger, self._version_of, self._send_frame)
        self.intake = Intake(
            run,
            store,
            objects,
            self.uploads,
            self.ledger,
            self.rounds,
            self.fleet,
            limit_bytes=int(config.transfer.max_update_mb * 1e6),
            max_samples=config.rounds.max_samples,
            window=config.transfer.window,
            renews="" if method.merge.keeps_slots else method.merge.name,
            check=self._check,
            send=self._say,
            emit=self.emit,
        )
        self._reception = Reception(
            self._topics,
            self.fleet,
            self.rounds,
            self.intake,
            self.uploads,
            self.downloads,
            Echo(namespace, clock, self._say, self._send_frame, self.emit),
            self.ledger,
            clock,
            self._say,
            self.emit,
        )
        self.intake.recover()
        self.emit(
            "run.ready",
            run=run.run,
            method=config.run.method,
            method_name=method.name,
            round=self.rounds.row.number,
            rounds=config.rounds.total,
            state=self.rounds.row.state,
            fingerprint=run.fingerprint.digest,
        )

    def on_message(self, message: Inbound) -> None:
        """Raises EdgeError only for what is wrong with the server itself."""
        self._reception.on_message(message)

    def greet(self) -> None:
        """The connection is there, or the run: everybody learns of both."""
        if not self._server.publish(self._topics.run, encode(self.run), retain=True):
            return
        self.position_changed()
        for row in self.rounds.participations.awaited():  # after an outage, the time that is left is news
            self.rounds.offer_again(row.device)

    def lost(self) -> None:
        """The connection is gone: nobody is known to be there, and nothing is under way."""
        self.downloads.mark_lost()
        self.fleet.lose_all()

    def drive(self, now: float) -> list[float]:
        """Does what is due. Returns after how many seconds to look again, by whatever asks for it."""
        waits = []
        self.intake.settle(now)
        wait = self.rounds.advance()
        if wait is not None:
            waits.append(wait)
        self.downloads.pump(now)
        due = self.downloads.due(now)
        if due is not None:
            waits.append(due - now)
        return waits

    def linger(self, now: float) -> float | None:
        """After the last round: seconds to go on for those who lack the final version; None: it is over."""
        if self._linger_until is None:
            self._linger_until = now + self._config.rounds.linger_s
        final = self.rounds.row.version
        took_part = {row.device for row in self._store.participations(self.run.run)}
        # As it was last heard: who fetched it before a restart need not come again to say so.
        lacking = [device for device in sorted(took_part) if not _holds(self.fleet.reported(device), final)]
        if lacking and now < self._linger_until:
            return self._linger_until - now
        self.emit("run.over", run=self.run.run, version=final, lacking=lacking)
        return None

    def state(self, ready: bool) -> AggregatorState:
        newest = self.rounds.newest()
        return AggregatorState(
            ready=ready,
            epoch=self._epoch,
            run=self.run.run,
            round=self.rounds.row.number,
            rounds=self._config.rounds.total,
            version=None if newest is None else newest.ref,
            chain=() if newest is None else tuple(one.ref for one in self.rounds.chain(newest.number)[:-1]),
            finished=self.rounds.finished,
            link_bytes=LINK_BYTES,
        )

    def save(self) -> None:
        self.ledger.save()
        self.rounds.save()

    def close(self) -> None:
        """Lets go of files. What is not saved is lost, and nothing of it was promised to anybody."""
        self.uploads.close()

    # What the rounds need

    def plan(self, round: int, devices: Sequence[Status], previous: Mapping[str, int]) -> RoundPlan:
        newest = self.rounds.newest()
        return plan_round(
            self.run,
            self._method,
            devices,
            config=self._config,
            utilities=None if newest is None else read_utilities(newest.utilities),
            round=round,
            previous=previous,
            lessons={status.device: self.fleet[status.device].lessons for status in devices},
        )

    def initial_version(self) -> Made:
        return self.adapters.initial()

    def merged_version(
        self, number: int, round: int, chain: Sequence[VersionRow], updates: Sequence[ParticipationRow]
    ) -> Made:
        return self.adapters.merged(number, round, chain, updates)

    def faults(
        self, number: int, chain: Sequence[VersionRow], updates: Sequence[ParticipationRow]
    ) -> Mapping[ParticipationRow, str]:
        return self.adapters.faults(number, chain, updates)

    def utilities(self, before: VersionRow, made: Made, updates: Sequence[ParticipationRow]) -> str | None:
        layers = self.run.shape.layers
        untouched = layers - deepest_of(updates)
        norms = [None if layer < untouched else norm for layer, norm in enumerate(made.layer_changes)]
        return write_utilities(moved(read_utilities(before.utilities) or [1.0 / layers] * layers, norms))

    def evaluate(self, chain: Sequence[VersionRow]) -> None:
        setup = setup_of(self._config, self.run.spec, str(self.base))
        paths = [self._objects.path(version.object) for version in chain]
        self._evaluator.evaluate(setup, paths, self.rounds.on_evaluated)

    def send_offer(self, device: str, offer: Offer) -> None:
        self._say(device, offer)
        self.emit("round.offer", device=device, round=offer.round, candidates=len(offer.candidates))

    def position_changed(self) -> None:
        self._server.publish(self._topics.aggregator, encode(self.state(ready=True)), retain=True)

    def given_up(self, devices: Sequence[str]) -> None:
        self.intake.on_missed(list(devices))

    def round_over(self) -> None:
        self.uploads.keep_only({row.device for row in self.rounds.participations.awaited()})
        if not self._config.storage.keep_versions:
            gone = prune(self._store, self.run.run, self._clock.wall(), self.downloads.objects)
            if gone:
                self.emit("versions.pruned", versions=gone)
        self._objects.sweep(self._store.objects())
        self.save()

    def emit(self, name: str, **fields: Any) -> None:
        self._server.emit(name, **fields)

    # How

    def _check(self, path: Path, announce: Announce) -> Refusal | Norms:
        judged = self.adapters.check(path, announce, self.rounds.chain(announce.builds_on))
        if isinstance(judged, Refusal):
            return judged
        too_large = self._norms.too_large(judged, announce.round)
        if too_large is None:
            return judged
        hint = "see that the device's data and base model are whole, and lower the learning rates"
        return refuse(announce, "norm", too_large, hint)

    def _version_of(self, digest: str) -> VersionRow | None:
        versions = self._store.versions(self.run.run)
        return next((version for version in versions if version.kept and version.object == digest), None)

    def _say(self, device: str, record: Record) -> bool:
        return self._server.publish(self._topics.reply(device), encode(record))

    def _send_frame(self, device: str, frame: bytes) -> bool:
        return self._server.publish(self._topics.reply(device), frame)


def _holds(status: Status | None, version: int | None) -> bool:
    return status is not None and version in status.holds

"""What the server must not lose, as rows, and the interface of the store that keeps them.

Rows are plain values; records of the wire lie in them as JSON text, exactly as they were sent or received.
Adapters and updates lie beside the store as objects, and a row names them by digest: an object is durable
before the row that names it is written, and the row before anybody is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from edge_sdk.errors import StateError
from edge_sdk.protocol.wire import VersionRef

__all__ = [
    "AWAITED",
    "ClosedBy",
    "DeviceRow",
    "LedgerRow",
    "Outcome",
    "ParticipationRow",
    "ParticipationState",
    "RoundRow",
    "RoundState",
    "RunRow",
    "Store",
    "VersionRow",
    "best_version",
    "chain_of",
]

RoundState = Literal["waiting", "open", "merging", "evaluating", "closed"]
Outcome = Literal["merged", "empty"]
ClosedBy = Literal["all", "quorum", "buffer", "deadline"]
"""Why a round closed: nothing more can come, enough came, the buffer is full, or its time was over."""
ParticipationState = Literal[
    "offered", "chosen", "sending", "received", "declined", "refused", "missed", "set-aside"
]
"""``set-aside``: an update was received, and could not be merged; ``set_aside`` says why."""
AWAITED: frozenset[ParticipationState] = frozenset({"offered", "chosen", "sending"})
"""States from which an update may still come and count, in this round or a later one."""


@dataclass(frozen=True)
class RunRow:
    """A run. ``mathematics`` is JSON of the config's keys that change results; ``record`` the Run as sent."""

    run: str
    method: str
    mathematics: str
    record: str
    base_folder: str
    fingerprint: str
    rounds: int
    finished: bool
    created_at: float


@dataclass(frozen=True)
class VersionRow:
    """A version of the global adapter, and how well it does on the server's held-out data."""

    run: str
    number: int
    round: int
    """The round that made it; 0: the initial adapter."""
    object: str
    bytes: int
    parent: int | None
    branch: str
    created_at: float
    accuracy: float | None = None
    """Of rows; of a causal LM, of tokens."""
    loss: float | None = None
    examples: int | None = None
    f1: float | None = None
    """Of classification alone, as ``perplexity`` and ``tokens`` are of a causal LM."""
    perplexity: float | None = None
    tokens: int | None = None
    evaluation_error: str | None = None
    utilities: str | None = None
    """What each layer is worth after this version's merge, as JSON, from the input up; None: alike."""
    optimizer: str | None = None
    """Of the server optimizer: the objects of its state after this version, by name, as JSON."""
    pruned_at: float | None = None
    """Wall time at which its file was given up, as nobody needed it any more; None: it is kept."""

    @property
    def kept(self) -> bool:
        return self.pruned_at is None

    @property
    def score(self) -> str:
        """How well it does, in words: accuracy, or a causal LM's perplexity; empty where not evaluated."""
        if self.perplexity is not None:
            return f"perplexity {self.perplexity:.4f}"
        return "" if self.accuracy is None else f"accuracy {self.accuracy:.4f}"

    @property
    def ref(self) -> VersionRef:
        """As devices learn of it."""
        return VersionRef(
            number=self.number, object=self.object, bytes=self.bytes, parent=self.parent, branch=self.branch
        )


def best_version(versions: Sequence[VersionRow]) -> VersionRow | None:
    """The most accurate one, of a causal LM the one with the lowest loss; the newest of equals.

    None: none was evaluated.
    """

    def merit(version: VersionRow) -> tuple[float, int]:
        if version.perplexity is not None and version.loss is not None:
            return -version.loss, version.number
        return version.accuracy or 0.0, version.number

    return max((version for version in versions if version.accuracy is not None), key=merit, default=None)


def chain_of(versions: Sequence[VersionRow], number: int) -> list[VersionRow]:
    """The versions to read, a full one first, to get version ``number``.

    Raises StateError for one that there is not, or not any more.
    """
    known = {version.number: version for version in versions}
    chain: list[VersionRow] = []
    at: int | None = number
    while at is not None:
        if at not in known or len(chain) > len(known):
            raise StateError(f"version {number} refers to version {at}, which there is not")
        if not known[at].kept:
            kept = ", ".join(str(version.number) for version in versions if version.kept)
            raise StateError(
                f"version {at} was pruned: nobody needed it any more, and its file is gone",
                f"kept are {kept}; storage.keep_versions in run.toml keeps all that are made from then on",
            )
        chain.insert(0, known[at])
        at = known[at].parent
    return chain


@dataclass(frozen=True)
class RoundRow:
    """A round. Durations are seconds of the server's up-time; ``*_at`` are wall times, for people.

    Round 0 makes and evaluates version 0. ``open_s`` is what counts against ``deadline_s``: while the
    server is down it stands still.
    """

    run: str
    number: int
    state: RoundState
    builds_on: int | None = None
    version: int | None = None
    """What the round led to: a new version, or, where nobody delivered, the one it built on."""
    outcome: Outcome | None = None
    deadline_s: float | None = None
    wait_s: float = 0.0
    open_s: float = 0.0
    merge_s: float = 0.0
    evaluating_s: float = 0.0
    """Until the evaluation was there; ``evaluation_s`` of it by the trainer's own clock."""
    evaluation_s: float = 0.0
    slowest_train_s: float | None = None
    """The longest training of the round, as measured by its device."""
    shaped_upload_s: float | None = None
    """``shaped_s`` of the device that ``critical_s`` is of."""
    critical_s: float | None = None
    """Largest sum of one device's training and shaped upload: what the round could not do without."""
    selection: str | None = None
    """How its devices were selected; None, as the three after it: of a round before there was a choice."""
    schedule: str | None = None
    wanted: int | None = None
    """Devices that were to take part; those that were offered work may be more."""
    quorum: int | None = None
    """Updates that close it before its deadline; of the buffered schedule, those of the buffer."""
    closed_by: ClosedBy | None = None
    held: str | None = None
    """Why its merge, with all that it would merge, waits to be cured; None: it does not."""
    opened_at: float | None = None
    closed_at: float | None = None
    merged_at: float | None = None
    evaluated_at: float | None = None

    @property
    def overhead_s(self) -> float | None:
        """What the round cost beyond training, shaped upload and evaluation; None before its merge."""
        if self.critical_s is None:
            return None
        took = self.open_s + self.merge_s + self.evaluating_s
        return max(0.0, took - self.evaluation_s - self.critical_s)


@dataclass(frozen=True)
class ParticipationRow:
    """One device in one round: there is one at most, and it counts once at most."""

    run: str
    round: int
    device: str
    state: ParticipationState
    offer: str
    offered_at: float
    choice: str | None = None
    decline: str | None = None
    announce: str | None = None
    object: str | None = None
    bytes: int | None = None
    samples: int | None = None
    train_s: float | None = None
    upload_s: float | None = None
    """From the announce that began the upload to the update being durable, outages of the server left out."""
    shaped_s: float | None = None
    """Seconds of the upload that the device's limit on its link accounts for; 0: it is not limited."""
    duplicate_bytes: int = 0
    refusal: str | None = None
    receipt: str | None = None
    received_at: float | None = None
    builds_on: int | None = None
    """The version that its update is a change of."""
    counts_in: int | None = None
    """The round whose merge its update is part of: decided once, when that round closes. A later round than
    its own: the update was late."""
    staleness: int | None = None
    """Versions made between the one that it builds on and the one that it is merged into."""
    weight: float | None = None
    """What that multiplies its samples by."""
    norms: str | None = None
    """Of a received update: how large its change of each layer is, by layer, as JSON."""
    set_aside: str | None = None
    """Why the merge of the round ``counts_in`` went on without it."""

    @property
    def late(self) -> bool:
        return self.counts_in is not None and self.counts_in != self.round


@dataclass(frozen=True)
class DeviceRow:
    """A device as it last was. ``status`` is its last Status as JSON; link figures are moving averages."""

    run: str
    device: str
    session: int = 0
    online: bool = False
    status: str | None = None
    refusal: str | None = None
    up_bps: float | None = None
    down_bps: float | None = None
    seen_at: float = 0.0
    learned: str | None = None
    """What the planner learned of the device from its rounds, as JSON; None: nothing yet."""


@dataclass(frozen=True)
class LedgerRow:
    """What travelled between the server and one device, in payload bytes of chunks. Sums over the run."""

    run: str
    device: str
    bytes_up: int = 0
    chunks_up: int = 0
    duplicate_bytes: int = 0
    bytes_down: int = 0
    chunks_down: int = 0
    foreign: int = 0
    """Messages that were no use: garbage, chunks of no transfer, records out of place."""


class Store(Protocol):
    """One writer. Every method is a transaction of its own, or part of the ``transaction`` around it.

    What a method wrote is durable when the outermost transaction ends. Raises StateError where the store
    cannot be read or written.
    """

    def transaction(self) -> AbstractContextManager[None]: ...

    def run(self, run: str) -> RunRow | None: ...

    def runs(self) -> Sequence[RunRow]: ...

    def add_run(self, row: RunRow) -> None: ...

    def set_run(self, run: str, **values: Any) -> None: ...

    def add_version(self, row: VersionRow) -> None: ...

    def set_version(self, run: str, number: int, **values: Any) -> None: ...

    def version(self, run: str, number: int) -> VersionRow | None: ...

    def versions(self, run: str) -> Sequence[VersionRow]:
        """In the order of their numbers."""
        ...

    def add_round(self, row: RoundRow) -> None: ...

    def set_round(self, run: str, number: int, **values: Any) -> None: ...

    def last_round(self, run: str) -> RoundRow | None: ...

    def rounds(self, run: str) -> Sequence[RoundRow]: ...

    def add_participation(self, row: ParticipationRow) -> None:
        """Raises StateError where the device takes part in the round already."""
        ...

    def set_participation(self, run: str, round: int, device: str, **values: Any) -> None: ...

    def participation(self, run: str, round: int, device: str) -> ParticipationRow | None: ...

    def participations(self, run: str, round: int | None = None) -> Sequence[ParticipationRow]:
        """Ordered by round and device."""
        ...

    def states(self, run: str, round: int) -> Mapping[str, ParticipationState]:
        """How far each device of the round is: ``participations`` without what they said."""
        ...

    def awaited(self, run: str, device: str | None = None) -> Sequence[ParticipationRow]:
        """Those of any round, of one device or all, whose update may still come. By round and device."""
        ...

    def uncounted(self, run: str) -> Sequence[ParticipationRow]:
        """Those whose update was received and is part of no merge yet. Ordered by round and device."""
        ...

    def counted(self, run: str, round: int) -> Sequence[ParticipationRow]:
        """Those whose updates this round merges, of whatever round they are. Ordered by device and round."""
        ...

    def newest_received(self, run: str) -> Mapping[str, ParticipationRow]:
        """Of each device that ever delivered, its last participation with an update."""
        ...

    def put_device(self, row: DeviceRow) -> None:
        """Adds or replaces."""
        ...

    def devices(self, run: str) -> Sequence[DeviceRow]: ...

    def count(self, run: str, device: str, counts: Mapping[str, int]) -> None:
        """Adds to the device's ledger."""
        ...

    def ledger(self, run: str) -> Sequence[LedgerRow]: ...

    def objects(self) -> set[str]:
        """Digests of what must be kept: versions that are not pruned, the updates that no closed round has
        merged, and the server optimizer's state after each run's newest version."""
        ...

    def close(self) -> None: ...

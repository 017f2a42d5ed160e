"""The global adapter as files: the first version, the merge of a round, and the check of what comes in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import msgspec
import numpy as np

from aggregator.merging.base import Contribution, MergeRule, Sizes
from aggregator.merging.blame import faults
from aggregator.merging.streaming import Merge
from aggregator.norms import Norms, NormsOf
from aggregator.planner.utility import ProductChanges
from aggregator.round_port import Made
from aggregator.server_optimizers.base import ServerOptimizer
from aggregator.server_optimizers.keeping import Stepping
from aggregator.state.base import ParticipationRow, VersionRow
from aggregator.validation import refuse
from edge_sdk.errors import EdgeError
from edge_sdk.protocol.container import ContainerHeader
from edge_sdk.protocol.wire import Announce, Refusal, Run
from edge_sdk.transport.objects import ObjectStore
from edge_sdk.updates.codecs import Floats
from edge_sdk.updates.container import Container, Forms, read_container, rows_of
from edge_sdk.updates.initial import initial_part, initial_slots
from edge_sdk.updates.keys import check_shape, part_sizes
from edge_sdk.updates.versions import VersionChain, VersionWriter, version_header
from edge_sdk.updates.writer import file_bytes

__all__ = ["Adapters"]

MAX_CHANGE = 1e4
"""Largest value of an update: far above any that trains."""
MAX_VALUE = 6e4
"""Largest value that an update may lead to. A version's 16 bits end at 65504; what no update of a round goes
beyond, their mean does not either, whatever is lost in rounding."""


class Adapters:
    """Makes versions. The same inputs give the same bytes, so that a merge may be done again after a crash.

    Args:
        folder: where files lie while they are written; whoever starts the server empties it.
        seed: of the run, for the first version and for slots that begin anew.
        full_every: a chain of versions has so many at most, a full one and deltas.
    """

    def __init__(
        self,
        run: Run,
        merge: MergeRule,
        objects: ObjectStore,
        folder: Path,
        seed: int,
        *,
        server_optimizer: ServerOptimizer | None = None,
        full_every: int = 8,
    ) -> None:
        self._run = run
        self._rule = merge
        self._objects = objects
        self._folder = folder
        self._seed = seed
        self._optimizer = server_optimizer
        self._full_every = full_every
        self._forms = Forms()
        self._reach = _Reach()

    def initial(self) -> Made:
        """Version 0: durable."""
        shape, lora = self._run.shape, self._run.lora
        sizes = part_sizes(shape, lora)
        path = self._folder / "version-0.safetensors"
        reach = {}
        with VersionWriter(path, self._header(sizes, 0, 0)) as writer:
            for key in sizes:
                rows = writer.write(key, None, initial_part(shape, lora, self._seed, key))
                reach[key] = _largest(rows)
        made = Made(*self._objects.adopt(path))
        self._reach.put(made.object, reach)
        return made

    def merged(
        self, number: int, round: int, chain: Sequence[VersionRow], updates: Sequence[ParticipationRow]
    ) -> Made:
        """Version ``number``: what the round's updates make of the version that ``chain`` leads to.

        The server reads the version back from its file: every holder of it has the same bits. Parts are read,
        merged and written a few at a time. Raises ContainerError for updates that cannot be merged.
        """
        before = self._read(chain)
        merge = Merge(self._rule, before, self._contributions(updates), self._fresh(number))
        whole = {**before.sizes, **merge.sizes}
        header = self._header(whole, round, number)
        if whole == dict(before.sizes) and len(chain) < self._full_every:
            delta = self._header(merge.sizes, round, number, before.number)
            header = min(header, delta, key=file_bytes)
        parent = header.builds_on
        path = self._folder / f"version-{number}.safetensors"
        changes, reach = ProductChanges(self._run.shape.layers), {}
        stepping = self._stepping(whole, chain[-1], round, number)
        with (
            stepping or nullcontext(),
            VersionWriter(path, header) as writer,
        ):
            for key, was, becomes in merge.parts():
                # Weights are relative within a mean: where all of it is late, it is so as a whole.
                if was is not None and (freshest := merge.freshest(key)) < 1:
                    becomes = was + freshest * (becomes - was)
                if stepping is not None and was is not None:
                    becomes = stepping.step(key, was, becomes)
                rows = writer.write(key, was, becomes.astype(np.float32))
                changes.add(key, was, rows)
                reach[key] = _largest(rows)
            if parent is None:
                for key in sorted(before.sizes.keys() - merge.sizes.keys()):
                    was = before.tensor(key)
                    reach[key] = _largest(writer.write(key, was, was))
        states = {}
        if stepping is not None:
            states = {name: self._objects.adopt(file)[0] for name, file in stepping.files.items()}
        digest, size = self._objects.adopt(path)
        self._reach.put(digest, reach if parent is None else {**self._reach.of(chain[-1].object), **reach})
        return Made(
            digest, size, parent, msgspec.json.encode(states).decode() if states else None, changes.result()
        )

    def faults(
        self, number: int, chain: Sequence[VersionRow], updates: Sequence[ParticipationRow]
    ) -> dict[ParticipationRow, str]:
        """Why version ``number`` cannot be made: which updates are to blame, and for what.

        Raises what else is wrong.
        """
        found = faults(self._rule, self._read(chain), self._contributions(updates), self._fresh(number))
        return {updates[place]: why for place, why in found.items()}

    def check(self, path: Path, announce: Announce, chain: Sequence[VersionRow]) -> Refusal | Norms:
        """Whether a complete container is what its announce said, fits the run and its merge rule, and leads
        to values that a version can hold: how large its changes are. ``chain`` leads to the version that it
        builds on. A part of each is in memory at a time.
        """
        run = self._run
        try:
            with read_container(path, "update", self._forms) as container:
                header = container.header
                said = (
                    ("run", header.run, announce.run),
                    ("round", header.round, announce.round),
                    ("version it builds on", header.builds_on, announce.builds_on),
                    ("fingerprint", header.fingerprint, run.fingerprint.digest),
                    ("codec", header.codec, announce.candidate.codec),
                )
                for what, inside, outside in said:
                    if inside != outside:
                        return refuse(
                            announce,
                            "shape",
                            f"the container's {what} is {inside!r}, the announce says {outside!r}",
                        )
                check_shape(header, run.shape, run.lora, announce.candidate.depth, run.spec.factors)
                self._rule.check(container.parts)
                return self._check_values(container, announce, chain)
        except EdgeError as error:
            return refuse(announce, "shape", error.message, error.hint)

    def _check_values(
        self, container: Container, announce: Announce, chain: Sequence[VersionRow]
    ) -> Refusal | Norms:
        norms, current, reach = NormsOf(), self._read(chain), self._reach.of(chain[-1].object)
        for key, part in sorted(container.parts.items()):
            try:
                change = container.tensor(key)
            except EdgeError as error:
                return refuse(announce, "nonfinite", error.message, error.hint)
            changes_by = _largest(change)
            if key not in reach:
                reach[key] = _largest(current.tensor(key))
            leads_to = reach[key] + changes_by
            if leads_to > MAX_VALUE:  # the two may be of different values
                leads_to = _largest(current.tensor(key)[rows_of(part)] + change)
            for largest, what, most in (
                (changes_by, "changes a value by", MAX_CHANGE),
                (leads_to, "leads to a value of", MAX_VALUE),
            ):
                if largest > most:
                    return refuse(
                        announce,
                        "nonfinite",
                        f"part {key!r} {what} {largest:.3g}; at most {most:g} can be taken",
                        "training has diverged: lower the learning rates",
                    )
            norms.add(key, change)
        return norms.result()

    def _contributions(self, updates: Sequence[ParticipationRow]) -> list[Contribution]:
        return [
            Contribution(
                path=self._objects.path(row.object),
                device=row.device,
                samples=row.samples,
                weight=1.0 if row.weight is None else row.weight,
                digest=row.object,
            )
            for row in updates
            if row.object is not None and row.samples is not None
        ]

    def _read(self, chain: Sequence[VersionRow]) -> VersionChain:
        return VersionChain([self._objects.path(version.object) for version in chain], forms=self._forms)

    def _fresh(self, number: int) -> Callable[[str, tuple[int, int]], Floats]:
        return lambda key, size: initial_slots(key, size, self._seed, number)

    def _stepping(self, sizes: Sizes, last: VersionRow, round: int, number: int) -> Stepping | None:
        if self._optimizer is None:
            return None
        held: Mapping[str, str] = msgspec.json.decode(last.optimizer) if last.optimizer else {}
        return Stepping(
            self._optimizer,
            sizes,
            {name: self._objects.path(digest) for name, digest in held.items()},
            self._folder,
            run=self._run.run,
            round=round,
            number=number,
            fingerprint=self._run.fingerprint.digest,
        )

    def _header(self, sizes: Sizes, round: int, number: int, parent: int | None = None) -> ContainerHeader:
        return version_header(
            sizes,
            run=self._run.run,
            round=round,
            number=number,
            fingerprint=self._run.fingerprint.digest,
            parent=parent,
        )


class _Reach:
    """The largest value of each part of the versions last made or built on: what was read once need not be
    read for every update."""

    def __init__(self, most: int = 8) -> None:
        self._most = most
        self._versions: OrderedDict[str, dict[str, float]] = OrderedDict()

    def of(self, version: str) -> dict[str, float]:
        """By part, of the version with this object; what is not there may be added."""
        reach = self._versions.pop(version, {})
        self.put(version, reach)
        return reach

    def put(self, version: str, reach: dict[str, float]) -> None:
        self._versions[version] = reach
        if len(self._versions) > self._most:
            self._versions.popitem(last=False)


def _largest(rows: Floats) -> float:
    """Largest absolute value, without a copy of the rows."""
    return max(float(rows.max(initial=0.0)), -float(rows.min(initial=0.0)))

"""The global adapter as files: the first version, the merge of a round, and the check of what comes in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from math import sqrt
from pathlib import Path

import msgspec
import numpy as np

from aggregator.merging.base import Contribution, MergeRule, Sizes
from aggregator.merging.blame import faults
from aggregator.merging.streaming import Merge
from aggregator.norms import Norms, NormsOf
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
from edge_sdk.updates.initial import initial_adapter, initial_slots
from edge_sdk.updates.keys import check_shape, layer_of
from edge_sdk.updates.versions import VersionChain, VersionWriter, version_header
from edge_sdk.updates.writer import file_bytes

__all__ = ["Adapters", "layer_changes"]

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

    def initial(self) -> Made:
        """Version 0: durable."""
        adapter = initial_adapter(self._run.shape, self._run.lora, self._seed)
        sizes = {key: (rows.shape[0], rows.shape[1]) for key, rows in adapter.items()}
        path = self._folder / "version-0.safetensors"
        with VersionWriter(path, self._header(sizes, 0, 0)) as writer:
            for key, rows in adapter.items():
                writer.write(key, None, rows)
        return Made(*self._objects.adopt(path))

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
        norms = _LayerNorms(self._run.shape.layers)
        stepping = self._stepping(whole, chain[-1], round, number)
        with (
            stepping or nullcontext(),
            VersionWriter(path, header) as writer,
        ):
            for key, was, becomes in merge.parts():
                if stepping is not None and was is not None:
                    becomes = stepping.step(key, was, becomes)
                norms.add(key, was, writer.write(key, was, becomes.astype(np.float32)))
            if parent is None:
                for key in sorted(before.sizes.keys() - merge.sizes.keys()):
                    was = before.tensor(key)
                    norms.add(key, was, writer.write(key, was, was))
        states = {}
        if stepping is not None:
            states = {name: self._objects.adopt(file)[0] for name, file in stepping.files.items()}
        digest, size = self._objects.adopt(path)
        return Made(
            digest, size, parent, msgspec.json.encode(states).decode() if states else None, norms.result()
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
                return self._check_values(container, announce, self._read(chain))
        except EdgeError as error:
            return refuse(announce, "shape", error.message, error.hint)

    def _check_values(
        self, container: Container, announce: Announce, current: VersionChain
    ) -> Refusal | Norms:
        norms = NormsOf()
        for key, part in sorted(container.parts.items()):
            try:
                change = container.tensor(key)
            except EdgeError as error:
                return refuse(announce, "nonfinite", error.message, error.hint)
            for rows, what, most in (
                (change, "changes a value by", MAX_CHANGE),
                (current.tensor(key)[rows_of(part)] + change, "leads to a value of", MAX_VALUE),
            ):
                largest = float(np.abs(rows).max(initial=0.0))
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


class _LayerNorms:
    """How far the slots of each layer moved: the Euclidean norm over all of them."""

    def __init__(self, layers: int) -> None:
        self._squares = [0.0] * layers

    def add(self, key: str, before: Floats | None, after: Floats) -> None:
        layer = layer_of(key)
        if layer is not None and not key.startswith("fold."):
            change = after.astype(np.float64) if before is None else after.astype(np.float64) - before
            self._squares[layer] += float(np.square(change).sum())

    def result(self) -> tuple[float, ...]:
        return tuple(sqrt(square) for square in self._squares)


def layer_changes(before: VersionChain, after: VersionChain) -> tuple[float, ...]:
    """How far the slots of each layer moved from one version to another, a part in memory at a time."""
    layers = [layer for key in after.sizes if (layer := layer_of(key)) is not None]
    norms = _LayerNorms(max(layers, default=-1) + 1)
    for key in sorted(after.sizes):
        norms.add(key, before.tensor(key) if key in before.sizes else None, after.tensor(key))
    return norms.result()

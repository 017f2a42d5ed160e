"""The global adapter as files: the first version, the merge of a round, and the check of what comes in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aggregator.merging.base import Contribution, MergeRule
from aggregator.state.base import ParticipationRow, VersionRow
from aggregator.validation import refuse
from edge_sdk.errors import EdgeError
from edge_sdk.protocol.wire import Announce, Refusal, Run
from edge_sdk.transport.objects import ObjectStore
from edge_sdk.updates.container import read_container
from edge_sdk.updates.initial import initial_adapter
from edge_sdk.updates.keys import Adapter, check_shape
from edge_sdk.updates.versions import read_adapter, write_version

__all__ = ["Adapters"]

MAX_CHANGE = 1e4
"""Largest value of an update: far above any that trains, and below what a version of 16 bits can hold."""


class Adapters:
    """Makes versions. The same inputs give the same bytes, so that a merge may be done again after a crash.

    Args:
        folder: where files lie while they are written; whoever starts the server empties it.
        seed: of the run, for the first version.
    """

    def __init__(self, run: Run, merge: MergeRule, objects: ObjectStore, folder: Path, seed: int) -> None:
        self._run = run
        self._merge = merge
        self._objects = objects
        self._folder = folder
        self._seed = seed

    def initial(self) -> tuple[str, int]:
        """Version 0: digest and bytes of its object, durable."""
        return self._write(0, 0, initial_adapter(self._run.shape, self._run.lora, self._seed))

    def merged(
        self, number: int, round: int, chain: Sequence[VersionRow], updates: Sequence[ParticipationRow]
    ) -> tuple[str, int]:
        """Version ``number``: what the round's updates make of the version that ``chain`` leads to.

        The server reads the version back from its file: every holder of it has the same bits.
        """
        current = read_adapter([self._objects.path(version.object) for version in chain])
        contributions = [
            Contribution(path=self._objects.path(row.object), device=row.device, samples=row.samples)
            for row in sorted(updates, key=lambda row: row.device)
            if row.object is not None and row.samples is not None
        ]
        return self._write(number, round, self._merge.merge(current, contributions))

    def check(self, path: Path, announce: Announce) -> Refusal | None:
        """Whether a complete container is what its announce said, fits the run, and is finite.

        One part at a time is in memory.
        """
        run = self._run
        try:
            with read_container(path, "update") as container:
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
                check_shape(header, run.shape, run.lora, announce.candidate.depth)
                keys = sorted(container.parts)
                for key in keys:
                    try:
                        largest = float(np.abs(container.tensor(key)).max(initial=0.0))
                    except EdgeError as error:
                        return refuse(announce, "nonfinite", error.message, error.hint)
                    if largest > MAX_CHANGE:
                        return refuse(
                            announce,
                            "nonfinite",
                            f"part {key!r} holds {largest:.3g}; an update holds at most {MAX_CHANGE:g}",
                            "training has diverged: lower the learning rates",
                        )
        except EdgeError as error:
            return refuse(announce, "shape", error.message, error.hint)
        return None

    def _write(self, number: int, round: int, adapter: Adapter) -> tuple[str, int]:
        path = self._folder / f"version-{number}.safetensors"
        write_version(
            path,
            run=self._run.run,
            round=round,
            number=number,
            fingerprint=self._run.fingerprint.digest,
            adapter=adapter,
        )
        return self._objects.adopt(path)

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
from edge_sdk.updates.container import read_container, rows_of
from edge_sdk.updates.initial import initial_adapter
from edge_sdk.updates.keys import Adapter, check_shape
from edge_sdk.updates.versions import read_adapter, write_version

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
        current = self._read(chain)
        contributions = [
            Contribution(path=self._objects.path(row.object), device=row.device, samples=row.samples)
            for row in sorted(updates, key=lambda row: row.device)
            if row.object is not None and row.samples is not None
        ]
        return self._write(number, round, self._merge.merge(current, contributions))

    def check(self, path: Path, announce: Announce, chain: Sequence[VersionRow]) -> Refusal | None:
        """Whether a complete container is what its announce said, fits the run, and leads to values that a
        version can hold. ``chain`` leads to the version that it builds on.
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
                check_shape(header, run.shape, run.lora, announce.candidate.depth, run.spec.factors)
                current = self._read(chain)
                for key, part in sorted(container.parts.items()):
                    try:
                        change = container.tensor(key)
                    except EdgeError as error:
                        return refuse(announce, "nonfinite", error.message, error.hint)
                    for rows, what, most in (
                        (change, "changes a value by", MAX_CHANGE),
                        (current[key][rows_of(part)] + change, "leads to a value of", MAX_VALUE),
                    ):
                        largest = float(np.abs(rows).max(initial=0.0))
                        if largest > most:
                            return refuse(
                                announce,
                                "nonfinite",
                                f"part {key!r} {what} {largest:.3g}; at most {most:g} can be taken",
                                "training has diverged: lower the learning rates",
                            )
        except EdgeError as error:
            return refuse(announce, "shape", error.message, error.hint)
        return None

    def _read(self, chain: Sequence[VersionRow]) -> Adapter:
        return read_adapter([self._objects.path(version.object) for version in chain])

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

"""A round's updates as the merge reads them: in one order, a few files open at a time, any number of them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from aggregator.merging.base import Contribution, MergeRule, Sizes
from edge_sdk.errors import ContainerError
from edge_sdk.protocol.container import ContainerHeader
from edge_sdk.updates.container import Container, Forms, fits, read_container

__all__ = ["Updates"]

_BATCH, _BATCH_BYTES = 8, 6 << 20


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an update stands in the order, and what it weighs."""

    device: str
    round: int
    path: Path
    weight: float
    digest: str | None


class Updates:
    """The contributions in the one order that every rule uses: by device, then by round.

    Raises ContainerError for one that does not fit ``sizes``, the rule or the others, or comes twice.
    """

    def __init__(self, contributions: Sequence[Contribution], sizes: Sizes, rule: MergeRule) -> None:
        self._forms = Forms()
        places: dict[tuple[str, int], _Place] = {}
        fingerprints: set[str] = set()
        self.trained: Counter[str] = Counter()
        """Rows that were trained of each part, summed over the updates."""
        self.freshest: dict[str, float] = {}
        """Of each part the greatest ``weight``, samples aside, of an update that holds it."""
        checked: deque[ContainerHeader] = deque(maxlen=32)
        for one in contributions:
            container = read_container(one.path, "update", self._forms)
            header = container.header
            place = (one.device, header.round)
            if place in places:
                raise ContainerError(f"two updates of {one.device} for round {header.round} would both count")
            if not any(header is other for other in checked):
                checked.append(header)
                _check(one, container, sizes)
                rule.check(container.parts)
                fingerprints.add(header.fingerprint)
            self.trained.update({key: part.rows for key, part in container.parts.items()})
            for key in container.parts:
                self.freshest[key] = max(one.weight, self.freshest.get(key, 0.0))
            weight = one.samples * one.weight
            places[place] = _Place(one.device, header.round, one.path, weight, one.digest)
        if len(fingerprints) > 1:
            raise ContainerError(f"updates of {len(fingerprints)} different fingerprints cannot be merged")
        self._places = [places[place] for place in sorted(places)]
        self._unverified = {place.path for place in self._places if place.digest is not None}

    def __len__(self) -> int:
        return len(self._places)

    def batches(self) -> Iterator[list[tuple[Container, float]]]:
        """The updates in their order, a few at a time, open while they are looked at; and what each weighs.

        A few, so that what they are added to is fetched from memory once for all of them. The first time
        each file's digest is taken, of the bytes that are then added: what was altered since it was accepted
        is a ContainerError, also where it could be read.
        """
        with ExitStack() as opened:
            batch: list[tuple[Container, float]] = []
            for place in self._places:
                container = read_container(place.path, "update", self._forms).load()
                if place.path in self._unverified:
                    _verify(place, container)
                    self._unverified.discard(place.path)
                batch.append((opened.enter_context(container), place.weight))
                if len(batch) >= _BATCH or sum(one.loaded_bytes for one, _ in batch) >= _BATCH_BYTES:
                    yield batch
                    opened.close()
                    batch = []
            if batch:
                yield batch


def _verify(place: _Place, container: Container) -> None:
    if container.digest() != place.digest:
        raise ContainerError(f"the stored update of {place.device} was altered since it was accepted")


def _check(one: Contribution, container: Container, sizes: Sizes) -> None:
    for key, part in container.parts.items():
        size = sizes.get(key)
        if part.role == "fold" or size is None or not fits(part, size):
            raise ContainerError(f"the update of {one.device} has a part {key!r} that the adapter has not")

"""A server optimizer at work in one merge: its state read from the last version's objects, written anew."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from aggregator.merging.base import Doubles, Sizes
from aggregator.server_optimizers.base import ServerOptimizer, State, rows_at_rest
from edge_sdk.errors import ContainerError
from edge_sdk.updates.codecs import Floats
from edge_sdk.updates.container import header_of, read_container
from edge_sdk.updates.writer import ContainerWriter

__all__ = ["Stepping"]


class Stepping:
    """Turns merged changes into steps, a part at a time, within a block.

    Args:
        sizes: of all parts of the adapter; each has its state.
        before: the files of the last version's state, by name; empty: it begins.
        folder: where the new ones are written, a file a state.
    """

    def __init__(
        self,
        optimizer: ServerOptimizer,
        sizes: Sizes,
        before: Mapping[str, Path],
        folder: Path,
        *,
        run: str,
        round: int,
        number: int,
        fingerprint: str,
    ) -> None:
        self._optimizer = optimizer
        self._sizes = sizes
        self._before = {name: read_container(path, "server-state") for name, path in before.items()}
        if before and self._before.keys() != set(optimizer.states):
            raise ContainerError(
                f"the last version has the state {', '.join(sorted(before))}, "
                f"{optimizer.name} needs {', '.join(optimizer.states)}"
            )
        header = header_of(
            "server-state", sizes, "fp32",
            run=run, round=round, fingerprint=fingerprint, version=number,
        )  # fmt: skip
        self.files = {name: folder / f"{name}-{number}.safetensors" for name in optimizer.states}
        self._header = header
        self._writers: dict[str, ContainerWriter] = {}
        self._stack = ExitStack()
        self._left = dict(sizes)

    def __enter__(self) -> Stepping:
        for name, path in self.files.items():
            self._writers[name] = self._stack.enter_context(ContainerWriter(path, self._header))
        return self

    def __exit__(self, *what: object) -> None:
        try:
            if what[0] is None:
                for key in list(self._left):
                    self._keep(key, self._state(key))
        finally:
            self._stack.__exit__(*what)  # type: ignore[arg-type]

    def step(self, key: str, before: Floats, after: Doubles) -> Doubles:
        """Where the part goes, instead of ``after``."""
        change = after - before
        rest = rows_at_rest(change)
        old = self._state(key)
        new = {name: rows.copy() for name, rows in old.items()}
        step = self._optimizer.step(change, new)
        for name, rows in new.items():
            rows[rest] = old[name][rest]
        self._keep(key, new)
        moved: Doubles = before.astype(np.float64)
        moved[~rest] += step[~rest]
        return moved

    def _state(self, key: str) -> State:
        if self._before:
            return {name: held.tensor(key).astype(np.float64) for name, held in self._before.items()}
        return {name: np.full(self._sizes[key], self._optimizer.begin(name)) for name in self.files}

    def _keep(self, key: str, state: State) -> None:
        del self._left[key]
        for name, rows in state.items():
            self._writers[name].write(key, rows.astype(np.float32))

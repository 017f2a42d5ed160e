"""The end of a run: the final version is fetched, and the owner is told."""

from __future__ import annotations

from collections.abc import Callable

from edge_sdk.agent.context import Context
from edge_sdk.agent.downloads import Downloads
from edge_sdk.agent.joining import Joining
from edge_sdk.agent.rounds import Rounds
from edge_sdk.errors import BrokerError, EdgeError
from edge_sdk.faults import reached
from edge_sdk.protocol.wire import AggregatorState

__all__ = ["Ending"]

_AWAY_S = 30.0


class Ending:
    """Emits ``run.finished`` once the final version is held, or, its aggregator being gone, without one.

    Args:
        give_up_s: fail with BrokerError after so long without the aggregator; None: go on living.
    """

    def __init__(
        self,
        context: Context,
        joining: Joining,
        rounds: Rounds,
        downloads: Downloads,
        fail: Callable[[EdgeError], None],
        give_up_s: float | None,
    ) -> None:
        self._context = context
        self._joining = joining
        self._rounds = rounds
        self._downloads = downloads
        self._fail = fail
        self._give_up_s = give_up_s
        self.clear()

    def clear(self) -> None:
        """The run is another one, or goes on."""
        self._told = self._told_without = False
        self._away_since: float | None = None

    def follow(self, state: AggregatorState | None, report: Callable[[], None], now: float) -> float | None:
        """Does what is next once the run has finished. Returns when to look again."""
        run = self._joining.run
        if state is None or run is None or state.run != run.run:
            return None
        if not state.finished:
            self.clear()
            return None
        if self._told or not self._joining.ready or self._context.nonce != run.nonce:
            return None
        self._rounds.end_run()
        final = state.version
        if final is not None:
            chain = [*state.chain, final]
            held = all(self._context.store.has(ref.object) for ref in chain)
            if not state.ready and not held:
                return self._without(run.run, final.number, now)
            self._away_since = None
            if not self._downloads.want(chain, *self._transfer_terms()):
                return None
        self._told = True
        reached("final.held")
        report()
        self._context.emit("run.finished", run=run.run, version=None if final is None else final.number)
        return None

    def _without(self, run: str, final: int, now: float) -> float | None:
        """Nobody is there to send the final version; whoever comes back within a while still may."""
        if self._told_without:
            return None
        if self._away_since is None:
            self._away_since = now
        until = self._away_since + (_AWAY_S if self._give_up_s is None else self._give_up_s)
        if now < until:
            return until
        self._told_without = True
        if self._give_up_s is None:
            self._context.emit("run.finished", run=run, version=None)
        else:
            self._fail(
                BrokerError(
                    f"run {run} has finished, and its aggregator left before this device had version {final}",
                    "start the aggregator again, or take the adapter that it exported",
                )
            )
        return None

    def _transfer_terms(self) -> tuple[int, int]:
        """Chunk size and window, as the last offer had them."""
        rows = self._context.record.rounds()
        return (rows[-1].offer.chunk_bytes, rows[-1].offer.window) if rows else (256 * 1024, 4)

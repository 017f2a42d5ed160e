"""Which versions live: those that somebody may still ask for. The files of all others go after each round.

What is kept of the others is their row, with how well they did. The row says so before the file goes: what a
crash leaves between the two is swept at the next start.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from aggregator.state.base import ParticipationRow, Store, VersionRow, best_version, chain_of
from edge_sdk.faults import reached

__all__ = ["needed", "prune"]


def needed(
    versions: Sequence[VersionRow], waiting: Sequence[ParticipationRow], fetched: Collection[str] = ()
) -> set[int]:
    """Numbers of the versions that must be kept.

    The newest and the best, what the work that is under way builds on, and what is being fetched: each with
    the chain that leads to it.

    Args:
        versions: that are there, in order.
        waiting: whose update may still come, or counts in no round yet.
        fetched: objects that devices are in the middle of fetching.
    """

    def asked_for() -> Iterator[int]:
        best = best_version(versions)
        yield from (one.number for one in (*versions[-1:], *([best] if best else [])))
        yield from (row.builds_on for row in waiting if row.builds_on is not None)
        yield from (one.number for one in versions if one.object in fetched)

    return {one.number for number in set(asked_for()) for one in chain_of(versions, number)}


def prune(store: Store, run: str, wall: float, fetched: Collection[str]) -> list[int]:
    """Gives up the versions that nobody needs, and tells which; their files are the caller's to remove."""
    versions = [version for version in store.versions(run) if version.kept]
    kept = needed(versions, [*store.awaited(run), *store.uncounted(run)], fetched)
    gone = [version.number for version in versions if version.number not in kept]
    with store.transaction():
        for number in gone:
            store.set_version(run, number, pruned_at=wall)
    reached("versions.pruned")
    return gone

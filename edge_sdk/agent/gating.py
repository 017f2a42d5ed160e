"""Looks at the gates every so often: the owner's of ``agent.toml``, and those that an app put in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime

from edge_sdk.agent.context import Context
from edge_sdk.device.gates import Closed, Gates
from edge_sdk.protocol.measure import Profile

__all__ = ["Check", "Gating"]

Check = Callable[[], object]
"""Whether the agent may work now, as its truth value."""


class Gating:
    """``look`` tells why the agent may not work.

    Args:
        own: an app's gates, by name; may change at any time.
    """

    def __init__(self, context: Context, own: Mapping[str, Check]) -> None:
        self._context = context
        self._gates = Gates(context.config.gates)
        self._own = own
        self._told: set[str] = set()
        self._next = float("-inf")
        self._before: tuple[set[str], str | None] = (set(), None)

    def due(self, now: float) -> float | None:
        """When to look, at the earliest ``now``; None: there is nothing to look at."""
        watched = self._gates.any or self._own or self._before[1] is not None
        return max(now, self._next) if watched else None

    def hurry(self) -> None:
        """Something may have changed: look now."""
        self._next = float("-inf")

    def look(self, now: float) -> str | None:
        """All that is closed, in one line; None where everything passes.

        While the same gates are closed the line stays as it was, with the figures that closed them: a
        degree more is no news.
        """
        self._next = now + self._context.config.gates.check_s
        profile = Profile()
        if self._gates.reads_machine:
            profile = self._context.machine.read_profile(
                disk=self._context.folder, gpus=self._gates.reads_heat
            )
            for line in self._gates.blind(profile):
                self._tell_once(line, "the work goes on without; take the key out of [gates]")
        local = datetime.fromtimestamp(self._context.clock.wall()).time()
        closed = [*self._gates.closed(profile, local), *self._closed_by_app()]
        names = {one.gate for one in closed}
        if names != self._before[0]:
            self._before = (names, "; ".join(map(str, closed))[:1024] or None)
        return self._before[1]

    def _closed_by_app(self) -> list[Closed]:
        """A check that raises counts as closed: what it guards may be in use."""
        closed = []
        for name, check in list(self._own.items()):
            try:
                passes = bool(check())
            except Exception as error:
                what = f"its check failed: {type(error).__name__}: {error}"
                closed.append(Closed(name, what))
                self._tell_once(f"gate {name}: {what}", "it is closed until its check works")
                continue
            if not passes:
                closed.append(Closed(name, "closed by the app"))
        return closed

    def _tell_once(self, message: str, hint: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self._context.emit("problem", message=message, hint=hint)

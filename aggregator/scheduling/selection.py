"""Who of those who are free is offered work: all, some by lot, or some by what they are worth.

A selection sees what devices reported and draws lots of the run's seed: the same round, the same devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log, sqrt
from typing import Protocol

from aggregator.scheduling.lot import Lot

__all__ = ["SELECTIONS", "All", "Applicant", "Selection", "Uniform", "Utility", "how_many"]


@dataclass(frozen=True)
class Applicant:
    """A device that is free, and what its last update told; all None: it never delivered one."""

    device: str
    samples: int | None = None
    loss: float | None = None
    """Root mean square of the losses that it reported."""
    seconds: float | None = None
    """From the offer to the end of its upload, as far as known."""
    last_round: int | None = None


class Selection(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def asks_history(self) -> bool:
        """Whether it looks at more than the devices' names."""
        ...

    def select(self, applicants: Sequence[Applicant], count: int, lot: Lot) -> list[str]:
        """At most ``count`` devices, in the order of their names."""
        ...


def how_many(wanted: float | None, ready: int) -> int:
    """Devices to a round: a count as it is, a share of those who are ready; None: all of them."""
    if wanted is None:
        return ready
    return min(ready, wanted if isinstance(wanted, int) else max(1, ceil(wanted * ready - 1e-9)))


class All:
    name = "all"
    asks_history = False

    def select(self, applicants: Sequence[Applicant], count: int, lot: Lot) -> list[str]:  # noqa: ARG002
        return sorted(one.device for one in applicants)


class Uniform:
    name = "uniform"
    asks_history = False

    def select(self, applicants: Sequence[Applicant], count: int, lot: Lot) -> list[str]:
        return sorted(_by_lot([one.device for one in applicants], count, lot))


class Utility:
    """Devices whose data still teaches much and who are fast enough, beside some that were never asked.

    After Oort: Efficient Federated Learning via Guided Participant Selection, Lai et al., 2021. Its parts,
    with the values of its code: the statistical utility is samples · root mean square of the loss, clipped
    at its 0.98 quantile and brought to 0..1; a bonus of sqrt(0.1 ln(round) / last round) for who was not
    asked for long; (preferred / seconds)^2 for who is slower than preferred; who explores is 0.9 of the
    devices at first, 0.95 times that with every round, never under 0.2; who is exploited is drawn, by
    utility, from those above 0.7 of the cut-off.

    Reconstructed here: devices report the loss of their first and last step, not of every row, so the mean
    square is that of the two. The preferred time is the 30th percentile of the known ones, 5 points more
    every 20 rounds; Oort moves it by whether the utility gained falls. Who was never asked is drawn evenly.
    """

    name = "utility"
    asks_history = True

    def select(self, applicants: Sequence[Applicant], count: int, lot: Lot) -> list[str]:
        scores = _scores(applicants, lot.round)
        new = [one.device for one in applicants if one.device not in scores]
        share = max(_LEAST_EXPLORED, _EXPLORED * _DECAY ** max(0, lot.round - 1))
        places = int(share * count)
        if not places and lot.draw("", "explore") <= share * count:
            places = 1  # of few places less than one: by chance, or newcomers would never be asked
        exploring = min(len(new), max(places, count - len(scores)))
        drawn = _by_lot(new, exploring, lot)
        return sorted([*drawn, *_by_score(scores, count - len(drawn), lot)])


_EXPLORED, _DECAY, _LEAST_EXPLORED = 0.9, 0.95, 0.2
_CLIP, _CUT_OFF = 0.98, 0.7
_PERCENTILE, _STEP, _ROUNDS = 30, 5, 20


def _scores(applicants: Sequence[Applicant], round: int) -> dict[str, float]:
    """The utility of everybody whose worth is known, above 0."""
    known = {
        one.device: (one, one.samples * abs(one.loss))
        for one in applicants
        if one.samples is not None and one.loss is not None
    }
    if not known:
        return {}
    worths = sorted(worth for _, worth in known.values())
    most = worths[min(len(worths) - 1, int(_CLIP * len(worths)))]
    least = 0.999 * worths[0]
    span = max(most - least, 1e-9)
    times = sorted(one.seconds for one, _ in known.values() if one.seconds)
    percent = min(100, _PERCENTILE + _STEP * (round // _ROUNDS))
    preferred = times[min(len(times) - 1, len(times) * percent // 100)] if times else None
    scores = {}
    for device, (one, worth) in known.items():
        score = (min(worth, most) - least) / span
        score += sqrt(0.1 * log(max(round, 1)) / max(one.last_round or 1, 1))
        if preferred is not None and one.seconds and one.seconds > preferred:
            score *= (preferred / one.seconds) ** 2
        scores[device] = max(score, 1e-9)
    return scores


def _by_score(scores: Mapping[str, float], count: int, lot: Lot) -> list[str]:
    """Drawn without replacement, each with a chance in step with its score, from those near the best."""
    if count <= 0 or not scores:
        return []
    ranked = sorted(scores, key=lambda device: (-scores[device], device))
    cut_off = _CUT_OFF * scores[ranked[min(count, len(ranked)) - 1]]
    able = [device for device in ranked if scores[device] >= cut_off]
    # The largest of u ** (1 / score) are such a draw (Efraimidis and Spirakis, 2006); taken as logarithms.
    keys = {device: log(lot.draw(device, "exploit")) / scores[device] for device in able}
    return sorted(able, key=lambda device: (-keys[device], device))[:count]


def _by_lot(devices: Sequence[str], count: int, lot: Lot) -> list[str]:
    return sorted(devices, key=lambda device: (lot.draw(device, "select"), device))[: max(0, count)]


SELECTIONS: dict[str, type[Selection]] = {"all": All, "uniform": Uniform, "utility": Utility}

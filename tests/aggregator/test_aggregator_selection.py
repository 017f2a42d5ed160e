"""Who is selected: by lot, and by what devices reported."""

from __future__ import annotations

import pytest

from aggregator.methods.fedquad import METHOD
from aggregator.scheduling.lot import Lot
from aggregator.scheduling.schedule import Buffered, Standing, Synchronous, staleness_weight
from aggregator.scheduling.selection import All, Applicant, Uniform, Utility, how_many
from aggregator.scheduling.terms import terms_of
from edge_sdk.config.run import RoundsSection, RunBaseSection, RunConfig, RunSection
from edge_sdk.errors import ConfigError


def named(count: int) -> list[Applicant]:
    return [Applicant(f"d{number:02}") for number in range(count)]


def known(device: str, loss: float, seconds: float = 10.0, last_round: int = 90) -> Applicant:
    return Applicant(device, samples=100, loss=loss, seconds=seconds, last_round=last_round)


def times_selected(applicants: list[Applicant], count: int, rounds: range) -> dict[str, int]:
    drawn = [device for round in rounds for device in Utility().select(applicants, count, Lot(1, round))]
    return {one.device: drawn.count(one.device) for one in applicants}


@pytest.mark.parametrize(
    ("wanted", "ready", "many"), [(None, 7, 7), (3, 7, 3), (9, 7, 7), (0.5, 7, 4), (0.1, 10, 1), (0.01, 5, 1)]
)
def test_a_count_or_a_share(wanted: float | None, ready: int, many: int) -> None:
    assert how_many(wanted, ready) == many


def test_all_is_all() -> None:
    assert All().select(named(3), 3, Lot(0, 1)) == ["d00", "d01", "d02"]


def test_lots_are_fair_and_depend_on_nothing_but_seed_round_and_device() -> None:
    people = named(10)
    drawn = [Uniform().select(people, 3, Lot(5, round)) for round in range(300)]
    assert all(len(set(one)) == 3 for one in drawn)
    assert drawn[0] == Uniform().select(people[::-1], 3, Lot(5, 0))
    counts = [sum(one.device in devices for devices in drawn) for one in people]
    assert min(counts) > 60 and max(counts) < 120, "90 each, by chance a few more or less"


def test_a_high_loss_is_worth_more_and_a_slow_device_less() -> None:
    people = [known(f"d{number:02}", loss=0.5 + 0.1 * number) for number in range(20)]
    people.append(known("slow", loss=2.4, seconds=80.0))
    counts = times_selected(people, 5, range(100, 160))
    assert counts["d19"] > 20 and counts["d00"] == 0
    assert counts["slow"] == 0, "as much loss as the best, and (1/8)^2 of it counts"


def test_who_was_not_asked_for_long_is_worth_a_little_more() -> None:
    people = [known(f"d{number:02}", loss=1.0, last_round=98) for number in range(9)]
    people.append(known("long", loss=1.0, last_round=1))
    counts = times_selected(people, 2, range(100, 400))
    assert counts["long"] > 1.2 * max(count for device, count in counts.items() if device != "long")


def test_the_unknown_are_explored_often_at_first_and_seldom_later() -> None:
    people = [known(f"d{number:02}", loss=1.0, last_round=1) for number in range(20)] + [
        Applicant(f"new{number:02}") for number in range(20)
    ]
    for round, explored in ((1, 9), (11, 5), (500, 2)):
        selected = Utility().select(people, 10, Lot(3, round))
        assert len(selected) == 10
        assert sum(device.startswith("new") for device in selected) == explored


def test_newcomers_are_explored_also_where_there_are_few_places() -> None:
    people = [known(f"d{number:02}", loss=1.0, last_round=1) for number in range(5)] + [Applicant("new")]
    for count, share in ((1, 0.2), (4, 0.8)):
        asked = sum("new" in Utility().select(people, count, Lot(3, round)) for round in range(500, 800))
        assert asked / 300 == pytest.approx(share, abs=0.1)


def test_whoever_there_is_fills_the_places() -> None:
    assert len(Utility().select(named(4), 4, Lot(0, 50))) == 4
    people = [known("a", 1.0), known("b", 2.0)]
    assert Utility().select(people, 2, Lot(0, 50)) == ["a", "b"]
    assert Utility().select([*people, Applicant("new")], 3, Lot(0, 50)) == ["a", "b", "new"]


def standing(**values: float) -> Standing:
    fields = {
        "open_s": 0,
        "deadline_s": 9,
        "quorum": 3,
        "received": 0,
        "waited_for": 5,
        "uncounted": 0,
        "at_work": 5,
    }
    return Standing(**{**fields, **values})  # type: ignore[arg-type]


def test_when_a_round_closes() -> None:
    synchronous, buffered = Synchronous(), Buffered(3)
    assert (
        synchronous.quorum(1.0, 3) == 3 and synchronous.quorum(0.5, 3) == 2 and buffered.quorum(0.5, 9) == 3
    )
    assert synchronous.closes(standing()) is None and buffered.closes(standing()) is None
    assert synchronous.closes(standing(received=3)) == "quorum"
    assert synchronous.closes(standing(waited_for=0)) == "all"
    assert synchronous.closes(standing(open_s=9)) == buffered.closes(standing(open_s=9)) == "deadline"
    assert buffered.closes(standing(uncounted=3)) == "buffer"
    assert buffered.closes(standing(uncounted=1, at_work=0)) == "all"


def test_staleness() -> None:
    assert [staleness_weight(number) for number in (0, 3, 8)] == pytest.approx([1, 1 / 2, 1 / 3])


def test_a_method_names_its_own_and_the_operator_may_name_others() -> None:
    from dataclasses import replace

    def terms(method: object, **rounds: object) -> object:
        config = RunConfig(
            run=RunSection(name="demo", labels=("a", "b")),
            base=RunBaseSection(path="base"),
            rounds=RoundsSection(**rounds),  # type: ignore[arg-type]
        )
        found = terms_of(config, method)  # type: ignore[arg-type]
        return found.schedule.name, found.selection.name

    assert terms(METHOD) == ("synchronous", "all")
    assert terms(METHOD, devices_per_round=2) == ("synchronous", "uniform")
    own = replace(METHOD, selection="utility", schedule="buffered")
    assert terms(own, devices_per_round=0.5) == ("buffered", "utility")
    assert terms(own, devices_per_round=0.5, schedule="synchronous", selection="uniform") == (
        "synchronous",
        "uniform",
    )
    with pytest.raises(ConfigError, match="devices_per_round"):
        terms(own)
    with pytest.raises(ConfigError, match="late"):
        terms(own, devices_per_round=2, late="refuse")
    with pytest.raises(ConfigError, match="all, uniform, utility"):
        terms(replace(METHOD, selection="best"))
    with pytest.raises(ConfigError, match="synchronous, buffered"):
        terms(replace(METHOD, schedule="never"))

"""Gates, judged from readings: what closes them, what opens them again, and what they say."""

from datetime import time

import pytest

from edge_sdk.config.agent import GatesSection
from edge_sdk.device.gates import Gates
from edge_sdk.protocol.measure import Profile

NOON = time(12, 0)


def closed(gates: Gates, local: time = NOON, **readings: float | bool) -> list[str]:
    return [str(one) for one in gates.closed(Profile(**readings), local)]  # type: ignore[arg-type]


def test_no_gate_is_closed_where_none_is_set() -> None:
    gates = Gates(GatesSection())
    assert not gates.any and not gates.reads_machine
    assert closed(gates, battery_percent=1, on_ac=False, temperature_c=120) == []


def test_a_low_battery_closes_and_a_supply_opens() -> None:
    gates = Gates(GatesSection(min_battery_percent=30))
    assert closed(gates, battery_percent=30, on_ac=False) == []
    assert closed(gates, battery_percent=29, on_ac=False) == ["battery: 29 %, and 30 % are needed on battery"]
    assert closed(gates, battery_percent=29, on_ac=True) == []


def test_a_gauge_that_wavers_does_not_open_the_battery_again() -> None:
    gates = Gates(GatesSection(min_battery_percent=30))
    said = [bool(closed(gates, battery_percent=charge, on_ac=False)) for charge in (31, 29, 30, 31, 32, 31)]
    assert said == [False, True, True, True, False, False]


@pytest.mark.parametrize("least", [98.5, 99, 100])
def test_a_full_battery_opens_again_whatever_is_asked_of_it(least: float) -> None:
    gates = Gates(GatesSection(min_battery_percent=least))
    said = [bool(closed(gates, battery_percent=charge, on_ac=False)) for charge in (97, 99.9, 100)]
    assert said == [True, True, False]


def test_battery_without_a_word_on_supply_counts_as_battery() -> None:
    assert closed(Gates(GatesSection(min_battery_percent=30)), battery_percent=20)
    assert closed(Gates(GatesSection(ac_only=True)), battery_percent=90) == [
        "supply: cannot be told from battery"
    ]


def test_supply_only() -> None:
    gates = Gates(GatesSection(ac_only=True))
    assert closed(gates, battery_percent=100, on_ac=False) == ["supply: on battery"]
    assert closed(gates, battery_percent=5, on_ac=True) == []
    assert closed(gates) == []  # a board on the mains reports neither


def test_heat_closes_above_and_opens_below_the_margin() -> None:
    gates = Gates(GatesSection(max_temperature_c=80, temperature_margin_c=5))
    said = [bool(closed(gates, temperature_c=degrees)) for degrees in (80, 81, 80, 76, 75, 74, 80, 81)]
    assert said == [False, True, True, True, True, False, False, True]
    assert closed(gates, temperature_c=83) == ["temperature: 83 °C, closed above 80, open again below 75"]


@pytest.mark.parametrize(
    ("clock", "quiet"),
    [((21, 59), False), ((22, 0), True), ((23, 59), True), ((0, 0), True), ((6, 59), True), ((7, 0), False),
     ((12, 29), False), ((12, 30), True), ((13, 0), False)],
)  # fmt: skip
def test_quiet_hours_several_and_across_midnight(clock: tuple[int, int], quiet: bool) -> None:
    gates = Gates(GatesSection(quiet_hours=("22:00-07:00", "12:30-13:00")))
    assert gates.any and not gates.reads_machine
    assert bool(closed(gates, time(*clock))) == quiet


def test_all_that_are_closed_are_named() -> None:
    gates = Gates(GatesSection(ac_only=True, max_temperature_c=60, quiet_hours=("11:00-13:00",)))
    assert closed(gates, on_ac=False, temperature_c=70) == [
        "supply: on battery",
        "temperature: 70 °C, closed above 60, open again below 55",
        "quiet hours: 11:00-13:00, and it is 12:00",
    ]


def test_what_cannot_be_read_is_told_and_passes() -> None:
    gates = Gates(GatesSection(min_battery_percent=30, max_temperature_c=80))
    blind = Profile(
        reasons={"temperature_c": "no sensor can be read", "battery_percent": "there is no battery"}
    )
    assert gates.closed(blind, NOON) == ()
    assert gates.blind(blind) == (
        "gates.max_temperature_c has no effect: no sensor can be read",
        "the gates for battery and supply have no effect: there is no battery",
    )
    assert gates.blind(Profile(temperature_c=50, on_ac=True)) == ()

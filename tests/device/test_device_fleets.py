"""Link classes and fleets: the files that ship, what a fleet is in a round, and how a wrong file is told."""

from collections import Counter

import pytest

from edge_sdk.device.classes import device_classes
from edge_sdk.device.fleets import fleet, fleets, members, parse_fleet
from edge_sdk.device.links import link_class, link_classes, parse_link_class
from edge_sdk.errors import ConfigError


def modes(name, seed, round):
    return [one.power_mode for one in members(fleet(name), seed=seed, round=round)]


def rates(name, seed, round):
    return [(one.up_mbps, one.down_mbps) for one in members(fleet(name), seed=seed, round=round)]


def test_links_that_ship():
    links = link_classes()
    assert {"wifi-near", "wifi-far", "lte", "5g", "ethernet-1g"} <= links.keys()
    for found in links.values():
        assert found.up_mbps and found.down_mbps
        for figure in filter(None, (found.up_mbps, found.down_mbps, found.rtt_ms, found.loss)):
            assert found.sources[figure.source].date
    assert link_class("wifi-far").down_mbps.value < link_class("wifi-near").down_mbps.value
    with pytest.raises(ConfigError, match="there is no link class"):
        link_class("lte2")


def test_fleets_that_ship():
    for name, found in fleets().items():
        now = members(found, seed=1, round=1)
        assert len(now) == found.size == len({one.device for one in now})
        assert found.name == name
        for one in now:
            known = device_classes()[one.device_class].power_modes
            assert one.power_mode in known if known else one.power_mode is None
            assert one.up_mbps > 0 and one.down_mbps > 0
        figures = [group.count for group in found.groups]
        figures += filter(None, (found.modes_every, found.rates_every, found.up_mbps, found.down_mbps))
        assert all(found.sources[figure.source].date for figure in figures)


def test_the_fleet_of_80_boards():
    found = fleet("jetson-80")
    now = members(found, seed=0, round=1)
    assert len(now) == 80
    assert Counter(one.device_class for one in now) == {
        "jetson-tx2": 30,
        "jetson-xavier-nx": 40,
        "jetson-agx-xavier": 10,
    }
    assert all(1 <= rate <= 30 for pair in rates("jetson-80", 0, 1) for rate in pair)
    assert found.modes_every.value == 20
    assert found.groups[0].count.evidence == "reported"
    assert found.modes_every.evidence == "recalled"


def test_modes_are_drawn_again_every_20_rounds():
    first = modes("jetson-80", 7, 1)
    assert all(modes("jetson-80", 7, round) == first for round in range(2, 21))
    second = modes("jetson-80", 7, 21)
    assert second != first
    assert modes("jetson-80", 7, 40) == second != modes("jetson-80", 7, 41)


def test_rates_are_drawn_again_every_round():
    assert rates("jetson-80", 7, 1) != rates("jetson-80", 7, 2)


def test_the_same_seed_draws_the_same_whatever_is_asked_first():
    late = members(fleet("jetson-80"), seed=3, round=50)
    members(fleet("jetson-80"), seed=3, round=1)
    assert members(fleet("jetson-80"), seed=3, round=50) == late
    assert members(fleet("jetson-80"), seed=4, round=50) != late
    assert late[0].up_mbps == pytest.approx(LATE_UP)  # on any machine


LATE_UP = 16.577843253817328


def test_every_mode_is_drawn_about_equally():
    drawn = Counter(
        one.power_mode
        for seed in range(50)
        for one in members(fleet("jetson-80"), seed=seed, round=1)
        if one.device_class == "jetson-tx2"
    )
    assert len(drawn) == 4
    assert all(300 < count < 450 for count in drawn.values())  # 375 each of 1,500


def test_a_device_keeps_its_link():
    first = [one.link for one in members(fleet("boards-20"), seed=1, round=1)]
    assert [one.link for one in members(fleet("boards-20"), seed=1, round=99)] == first
    assert len(set(first)) > 2


def test_rounds_are_counted_from_1():
    with pytest.raises(ValueError, match="from 1"):
        members(fleet("jetson-80"), seed=0, round=0)


FLEET = """name = "x"
title = "X"
modes_every = { value = 20, evidence = "assumed", source = "s" }
[[groups]]
device_class = "jetson-tx2"
count = { value = 3, evidence = "assumed", source = "s" }
power_modes = ["MAXN"]
links = ["lte"]
[sources.s]
title = "T"
date = "2026"
"""


def test_a_fleet_may_name_its_modes():
    found = parse_fleet("x.toml", FLEET)
    assert {one.power_mode for one in members(found, seed=0, round=1)} == {"MAXN"}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("jetson-tx2", "jetson-tx3", 'groups[0].device_class: there is no device class "jetson-tx3"'),
        ("MAXN", "MAXX", 'groups[0].power_modes: "MAXX" is no power mode of jetson-tx2 (it has MAXN, MAXQ'),
        ('"lte"', '"lt"', 'groups[0].links: there is no link class "lt" (did you mean "lte"?'),
        ('links = ["lte"]', "", "groups[0].links: is missing"),
        ("value = 3", "value = 0", "groups[0].count.value: received 0; allowed: an integer at least 1"),
        ("assumed", "guessed", 'groups[0].count.evidence: received "guessed"; allowed: one of'),
        ('"2026"', "2026", "sources.s.date: received 2026"),
        ('[[groups]]\n', '[[groups]]\nmodel = "x"\n', "groups[0].model: is no key"),
        ('source = "s" }\npower', 'source = "t" }\npower', 'groups[0].count.source: "t" is not in [sources]'),
        ("modes_every", "up_mbps = { low = 3, high = 1, evidence = 'assumed', source = 's' }\nmodes_every",
         "up_mbps: received low 3 above high 1"),
    ],
)  # fmt: skip
def test_wrong_fleets(old, new, told):
    with pytest.raises(ConfigError) as caught:
        parse_fleet("x.toml", FLEET.replace(old, new))
    assert told in str(caught.value)


def test_everything_wrong_with_a_fleet_is_told_at_once():
    text = FLEET.replace("jetson-tx2", "tx2").replace('"lte"', '"lt"').replace('"x"', '"y"')
    with pytest.raises(ConfigError) as caught:
        parse_fleet("x.toml", text)
    for told in ("3 errors", "name: received", "groups[0].device_class", "groups[0].links"):
        assert told in str(caught.value)


def test_a_wrong_link():
    text = 'name = "x"\ntitle = "X"\nloss = { value = 2, source = "s" }\n'
    text += '[sources.s]\ntitle = "T"\ndate = "2026"\n'
    with pytest.raises(ConfigError, match="loss: received 2; allowed: a share, at most 1"):
        parse_link_class("x.toml", text)

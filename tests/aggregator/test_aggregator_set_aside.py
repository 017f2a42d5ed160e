"""Updates that were accepted and cannot be merged: the bad ones are set aside by name, the rest is merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fake_device import World

from aggregator.cli.looking import show_rounds, show_status
from aggregator.merging.layer_mean import Means
from aggregator.metrics import Metrics
from aggregator.participations import Participations
from aggregator.state.base import ParticipationRow, Store
from edge_sdk.faults import arm
from edge_sdk.protocol.wire import Announce
from edge_sdk.updates.container import Container

NAMES = ("a", "b", "c")


class Killed(BaseException):
    """As ``kill -9`` ends a process."""


def a_world(folder: Path, decline: str = "") -> World:
    """Three devices that differ; up to the merge of the first of two rounds, as far as it goes."""
    world = World(folder, min_devices=3, deadline_s=100.0)
    world.open()
    world.pump()
    for number, name in enumerate(NAMES):
        world.device(
            name, change=0.01 * (number + 1), samples=50 + 10 * number,
            decline="no" if name == decline else None,
        )  # fmt: skip
    return world


def store_of(world: World) -> Store:
    assert world.server is not None
    return world.server._store


def first_version(world: World) -> str:
    """Digest of what the first round made."""
    return store_of(world).versions("demo")[1].object


@pytest.fixture(scope="module")
def without_b(tmp_path_factory: pytest.TempPathFactory) -> str:
    world = a_world(tmp_path_factory.mktemp("without"), decline="b")
    world.pump()
    return first_version(world)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    world = a_world(tmp_path_factory.mktemp("undisturbed"))
    world.pump()
    return first_version(world)


def stored(world: World, device: str) -> Path:
    row = store_of(world).participation("demo", 1, device)
    assert row is not None and row.object is not None and world.server is not None
    return world.server._objects.path(row.object)


def flip(path: Path) -> None:
    """One bit of the values: a file that every reader still takes."""
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage(world: World, how: Callable[[Path], None], *devices: str) -> None:
    """The files of these are damaged when the merge of the first round begins."""
    with arm("merge.begun", lambda: [how(stored(world, name)) for name in devices] and None):
        world.pump()


def b_is_set_aside(world: World, cause: str) -> None:
    row = store_of(world).participation("demo", 1, "b")
    assert row is not None and (row.state, row.counts_in) == ("set-aside", 1)
    assert row.set_aside is not None and cause in row.set_aside
    assert [row.device for row in store_of(world).counted("demo", 1)] == ["a", "c"]
    told = world.last("update.set_aside")
    assert (told["device"], told["round"]) == ("b", 1) and cause in told["message"]
    assert "round.held" not in world.names()


@pytest.mark.parametrize("how", [flip, cut], ids=["a bit", "the end"])
def test_of_a_damaged_file_the_rest_of_the_round_is_merged(
    tmp_path: Path, how: Callable[[Path], None], without_b: str, capsys: pytest.CaptureFixture[str]
) -> None:
    world = a_world(tmp_path)
    metrics = Metrics(world.config, {}, lambda: 0.0)
    assert world.server is not None
    world.server.events.subscribe(metrics)
    damage(world, how, "b")
    b_is_set_aside(world, "altered on the disk")
    assert first_version(world) == without_b
    assert metrics.registry.get_sample_value("edge_updates_set_aside_total") == 1
    assert [receipt.round for receipt in world.devices[1].receipts] == [1, 2], "the next one counts"

    world.server.close()
    write_toml(tmp_path)
    show_rounds(tmp_path / "run.toml", as_json=False)
    line = next(line for line in capsys.readouterr().out.splitlines() if "set-aside" in line)
    assert line.split()[0] == "b" and "altered on the disk" in line
    show_rounds(tmp_path / "run.toml", as_json=True)
    first = json.loads(capsys.readouterr().out)[1]
    assert first["merged"] == 2 and "altered" in first["devices"][1]["set_aside"]


def write_toml(folder: Path) -> None:
    (folder / "run.toml").write_text(
        '[run]\nname = "demo"\nlabels = ["no", "yes"]\nstate_dir = "state"\n[base]\npath = "base"\n'
    )


def test_an_update_that_cannot_be_decoded_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_b: str
) -> None:
    world = a_world(tmp_path)
    original = Container.tensor

    def breaks() -> None:
        bad = stored(world, "b")

        def tensor(self: Container, key: str) -> Any:
            if self.path == bad:
                raise ArithmeticError("a code that nothing decodes")
            return original(self, key)

        monkeypatch.setattr(Container, "tensor", tensor)

    with arm("merge.begun", breaks):
        world.pump()
    b_is_set_aside(world, "ArithmeticError: a code that nothing decodes")
    assert first_version(world) == without_b


def test_killed_after_setting_aside_the_same_rest_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_b: str
) -> None:
    world = a_world(tmp_path)
    original = Participations.set_aside

    def dies(self: Participations, bad: dict[ParticipationRow, str]) -> None:
        original(self, bad)
        raise Killed

    whole: list[bytes] = []

    def harm(path: Path) -> None:
        whole.append(path.read_bytes())
        flip(path)

    with monkeypatch.context() as patch:
        patch.setattr(Participations, "set_aside", dies)
        with pytest.raises(Killed):
            damage(world, harm, "b")
    path = stored(world, "b")
    world.kill()
    path.write_bytes(whole[0])  # it is whole again, and was decided upon
    world.open()
    world.pump()
    assert first_version(world) == without_b
    assert [row.device for row in store_of(world).counted("demo", 1)] == ["a", "c"]


def test_where_all_are_bad_the_round_is_held_until_that_is_cured(
    tmp_path: Path, undisturbed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    world = a_world(tmp_path)
    metrics = Metrics(world.config, {}, lambda: 0.0)
    assert world.server is not None
    world.server.events.subscribe(metrics)
    whole: dict[Path, bytes] = {}

    def harm(path: Path) -> None:
        whole[path] = path.read_bytes()
        cut(path)

    damage(world, harm, *NAMES)
    told = world.last("round.held")
    assert told["updates"] == 3 and all(f"{name}: its file" in told["message"] for name in NAMES)
    assert metrics.registry.get_sample_value("edge_paused", {"cause": "merge"}) == 1
    world.pass_time(200, step=5)
    assert world.names().count("round.held") == 1, "tried again, and told once"
    assert len(store_of(world).counted("demo", 1)) == 3 and len(store_of(world).versions("demo")) == 1
    world.kill()
    world.open()
    world.pump()
    assert world.names().count("round.held") == 2, "and once by a server that was started anew"

    write_toml(tmp_path)
    show_status(tmp_path / "run.toml", as_json=False)
    assert "HELD" in capsys.readouterr().out
    show_rounds(tmp_path / "run.toml", as_json=False)
    assert "HELD: no update of it can be merged" in capsys.readouterr().out

    for path, data in whole.items():
        path.write_bytes(data)
    world.pass_time(61)
    assert first_version(world) == undisturbed
    row = store_of(world).rounds("demo")[1]
    assert (row.outcome, row.held) == ("merged", None)


def test_a_fault_that_is_none_of_theirs_drops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: str
) -> None:
    """Each can be merged alone: what fails is all of them together."""

    def result(self: Means) -> Any:
        if next(iter(self._weights.values())).max() > 70:
            raise TypeError("a rule with a bug")
        return original(self)

    world = a_world(tmp_path)
    original = Means.result
    with monkeypatch.context() as patch:
        patch.setattr(Means, "result", result)
        world.pump()
        assert world.last("round.held")["message"] == "TypeError: a rule with a bug"
        assert len(store_of(world).counted("demo", 1)) == 3
    world.pass_time(6)
    assert first_version(world) == undisturbed


def test_a_file_that_is_gone_is_nobody_elses_loss(tmp_path: Path, undisturbed: str) -> None:
    world = a_world(tmp_path)
    away = tmp_path / "away"
    damage(world, lambda path: path.rename(away) and None, "b")
    assert "cannot be read" in world.last("round.held")["message"]
    away.rename(stored(world, "b"))
    world.pass_time(6)
    assert first_version(world) == undisturbed


def test_a_delivery_after_all_is_owed(tmp_path: Path) -> None:
    """A device that never heard of its receipt keeps an update that was set aside, and adds it later."""
    world = a_world(tmp_path)
    world.devices[2].updates_left = 1  # the second round stays open
    damage(world, flip, "b")
    b = world.devices[1]
    row = store_of(world).participation("demo", 1, "b")
    assert row is not None and row.announce is not None
    b.say(msgspec.json.decode(row.announce, type=Announce))
    world.pump()
    assert [refusal.reason for refusal in b.refusals] == ["round"]

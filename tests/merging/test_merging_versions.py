"""What a merge leaves behind: full versions and deltas, a server optimizer's state, the same bytes again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import test_merging_export
from updates_fakes import SHAPE as SMALL
from updates_fakes import moved

from aggregator.adapters import Adapters
from aggregator.merging.layer_mean import LayerMean
from aggregator.merging.product_svd import ProductSvd
from aggregator.merging.stacking import Stacking
from aggregator.methods.base import Method, find_method
from aggregator.methods.merging import method_of
from aggregator.server_optimizers.fedadam import FedAdam
from aggregator.server_optimizers.fedavgm import FedAvgM
from aggregator.state.base import ParticipationRow, VersionRow
from edge_sdk.config.agent import DataSection, TrainerSection
from edge_sdk.config.run import (
    EvaluationSection,
    MergeSection,
    RoundsSection,
    RunBaseSection,
    RunConfig,
    RunSection,
)
from edge_sdk.errors import ConfigError, ContainerError, MechanismError
from edge_sdk.transport.objects import ObjectStore
from edge_sdk.updates.container import read_container
from edge_sdk.updates.delta import write_update
from edge_sdk.updates.keys import all_keys, tuned_keys
from edge_sdk.updates.peft import write_peft
from edge_sdk.updates.versions import VersionChain, VersionWriter, read_adapter, version_header

WIDE = tuple(msgspec.structs.replace(module, inputs=32, outputs=512) for module in SMALL.modules)
SHAPE = msgspec.structs.replace(SMALL, modules=WIDE)
RUN = msgspec.structs.replace(test_merging_export.RUN, shape=SHAPE)


class Server:
    """Versions in a row, as the rounds make them."""

    def __init__(self, folder: Path, rule=None, **how) -> None:
        self.folder = folder
        (folder / "work").mkdir(parents=True)
        self.objects = ObjectStore(folder / "objects")
        self.adapters = Adapters(RUN, rule or LayerMean(), self.objects, folder / "work", 0, **how)
        self.rows: list[VersionRow] = []
        self.add(self.adapters.initial())

    def add(self, made) -> VersionRow:
        number = len(self.rows)
        row = VersionRow(
            "paint", number, number, made.object, made.bytes, made.parent, "global", 0.0,
            optimizer=made.optimizer,
        )  # fmt: skip
        self.rows.append(row)
        return row

    def chain(self, number=-1) -> list[VersionRow]:
        chain = [self.rows[number]]
        while chain[0].parent is not None:
            chain.insert(0, self.rows[chain[0].parent])
        return chain

    def paths(self, number=-1) -> list[Path]:
        return [self.objects.path(row.object) for row in self.chain(number)]

    def update(self, device, seed, depth=3) -> ParticipationRow:
        start, number = read_adapter(self.paths()), len(self.rows)
        path = self.folder / "work" / device
        write_update(
            path, run=RUN.run, round=number, fingerprint=RUN.fingerprint.digest, builds_on=number - 1,
            start=start, end=moved(start, tuned_keys(SHAPE, depth), seed), keys=tuned_keys(SHAPE, depth),
            codec="int8", residual=None,
        )  # fmt: skip
        digest, _ = self.objects.adopt(path)
        return ParticipationRow("paint", number, device, "received", "", 0.0, object=digest, samples=9)

    def round(self, **how):
        number = len(self.rows)
        made = self.adapters.merged(
            number,
            number,
            self.chain(),
            [self.update(name, number * 9 + at, **how) for at, name in enumerate("ab")],
        )
        self.add(made)
        return made


def test_a_full_version_is_followed_by_deltas_until_the_next_one(tmp_path):
    server = Server(tmp_path / "s", full_every=3)
    for _ in range(5):
        server.round()
    assert [row.parent for row in server.rows] == [None, 0, 1, None, 3, 4]
    full, delta = server.rows[0].bytes, server.rows[1].bytes
    with read_container(server.paths(1)[-1]) as container:
        assert container.header.codec == "int8" and delta < full


def test_where_all_that_trained_a_part_is_late_it_moves_by_the_least_late(tmp_path):
    server = Server(tmp_path / "s", full_every=1)
    before = read_adapter(server.paths())
    late, later = server.update("a", 1), server.update("b", 1, depth=1)
    rows = [replace(late, weight=0.5), replace(later, weight=0.25)]
    server.add(server.adapters.merged(1, 1, server.chain(), rows))
    after = read_adapter(server.paths())
    with (
        read_container(server.objects.path(late.object)) as one,
        read_container(server.objects.path(later.object)) as other,
    ):
        for key, was in before.items():
            mean = one.tensor(key)
            if key in other.parts:
                mean = (0.5 * mean + 0.25 * other.tensor(key)) / 0.75
            np.testing.assert_allclose(after[key] - was, 0.5 * mean, rtol=1e-3, atol=2e-4)


def test_every_holder_has_the_bits_that_the_server_went_on_from(tmp_path):
    server = Server(tmp_path / "s")
    for _ in range(3):
        server.round()
    whole = read_adapter(server.paths())
    chain = VersionChain(server.paths())
    for key in chain.sizes:
        assert chain.tensor(key).tobytes() == whole[key].tobytes()
    again = Server(tmp_path / "t")
    for _ in range(3):
        again.round()
    assert [row.object for row in again.rows] == [row.object for row in server.rows]


def test_a_delta_holds_the_parts_that_were_trained_and_no_others(tmp_path):
    server = Server(tmp_path / "s")
    made = server.round(depth=1)
    with read_container(server.paths()[-1]) as container:
        assert set(container.parts) == set(tuned_keys(SHAPE, 1))
    assert made.layer_changes[:2] == (0.0, 0.0) and made.layer_changes[2] > 0
    before, after = read_adapter(server.paths(0)), read_adapter(server.paths(1))
    dense = [
        after[f"2.{m.name}.B"].T @ after[f"2.{m.name}.A"]
        - before[f"2.{m.name}.B"].T @ before[f"2.{m.name}.A"]
        for m in SHAPE.modules
    ]
    assert made.layer_changes[2] == pytest.approx(np.sqrt(sum(np.sum(one**2) for one in dense)), rel=1e-5)


def test_a_delta_that_would_be_larger_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("test_merging_versions.SHAPE", SMALL)
    monkeypatch.setattr("test_merging_versions.RUN", test_merging_export.RUN)
    server = Server(tmp_path / "s")
    server.round()
    server.round(depth=1)
    assert [row.parent for row in server.rows] == [None, None, 1]


def test_of_one_version_a_chain_every_version_is_a_full_one(tmp_path):
    server = Server(tmp_path / "s", full_every=1)
    server.round()
    assert server.rows[1].parent is None and set(VersionChain(server.paths()).sizes) == set(all_keys(SHAPE))


@pytest.mark.parametrize(
    "optimizer", [FedAvgM(0.5, 0.9), FedAdam(0.01, 0.9, 0.99, 1e-3)], ids=lambda one: one.name
)
def test_a_server_optimizer_against_arithmetic_through_a_restart(tmp_path, optimizer):
    """The state lives in objects alone: each round is made by another server than the one before."""
    server = Server(tmp_path / "s", server_optimizer=optimizer, full_every=1)
    plain = Server(tmp_path / "p", full_every=1)
    key = "2.output.dense.A"
    state: dict[str, np.ndarray] = {}
    for number in (1, 2, 3):
        before = read_adapter(server.paths())[key].astype(np.float64)
        plain.rows, plain.objects = list(server.rows), server.objects
        plain.adapters = Adapters(RUN, LayerMean(), server.objects, tmp_path / "p/work", 0, full_every=1)
        plain.round()
        change = read_adapter(plain.paths())[key] - before
        if optimizer.name == "fedavgm":
            state["m"] = 0.9 * state.get("m", 0.0) + change
            step = 0.5 * state["m"]
        else:
            state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * change
            state["v"] = 0.99 * state.get("v", 1e-6) + 0.01 * change**2
            step = 0.01 * state["m"] / (np.sqrt(state["v"]) + 1e-3)
        server.adapters = Adapters(
            RUN, LayerMean(), server.objects, tmp_path / "s/work", 0, server_optimizer=optimizer, full_every=1
        )
        server.round()
        np.testing.assert_allclose(read_adapter(server.paths())[key], before + step, atol=3e-4)
        held = json.loads(server.rows[number].optimizer or "")
        assert set(held) == set(optimizer.states) and all(map(server.objects.has, held.values()))


def test_rows_that_nobody_changed_rest_and_their_momentum_waits(tmp_path):
    server = Server(tmp_path / "s", server_optimizer=FedAvgM(), full_every=1)
    server.round(depth=3)
    before = read_adapter(server.paths())
    server.round(depth=1)
    after = read_adapter(server.paths())
    assert after["0.output.dense.A"].tobytes() == before["0.output.dense.A"].tobytes()
    states = [
        read_container(server.objects.path(json.loads(row.optimizer or "")["momentum"])).tensor(
            "0.output.dense.A"
        )
        for row in server.rows[1:]
    ]
    assert states[0].any() and states[0].tobytes() == states[1].tobytes()


def test_a_version_with_a_fold_is_a_full_one_and_its_export_has_more_slots(tmp_path):
    server = Server(tmp_path / "s", Stacking())
    server.round()
    server.round(depth=1)
    adapter = read_adapter(server.paths())
    assert server.rows[2].parent is None and adapter["fold.0.output.dense.A"].shape == (8, 32)
    assert adapter["fold.2.output.dense.A"].shape == (16, 32)
    assert not any(rows.any() for key, rows in adapter.items() if key.endswith(".B") and key[0].isdigit())
    out = write_peft(tmp_path / "out", adapter, shape=SHAPE, lora=RUN.lora, base="b", labels=RUN.labels)
    config = json.loads((out / "adapter_config.json").read_text())
    name = f"{SHAPE.layer_path}.2.output.dense"
    rank = RUN.lora.rank + 16
    assert config["rank_pattern"][name] == rank
    assert config["alpha_pattern"][name] == pytest.approx(RUN.lora.scaling * rank)


# What is refused together


def config(method="fedavg", **merge):
    return RunConfig(
        run=RunSection(name="r", method=method), base=RunBaseSection(path="/b"), merge=MergeSection(**merge)
    )


def test_the_config_puts_its_merge_in_the_place_of_the_methods():
    method = method_of(config(rule="stacking"))
    assert isinstance(method.merge, Stacking)
    assert {"fold:low-rank", "reinit:each-round"} <= method.spec(config()).needs()
    method = method_of(config(server_optimizer="fedadam", momentum=0.5))
    assert method.server_optimizer == FedAdam(momentum=0.5)
    assert method_of(config()) == find_method("fedavg")


@pytest.mark.parametrize(
    ("method", "merge", "told"),
    [
        ("fedquad", {"rule": "product-svd"}, "error feedback with the merge rule product-svd"),
        ("fedquad", {"rule": "stacking"}, "error feedback with the merge rule stacking"),
        ("fedavg", {"rule": "product-svd", "server_optimizer": "fedavgm"}, "the server optimizer fedavgm"),
    ],
)
def test_what_makes_no_sense_together_is_refused_with_the_reason(method, merge, told):
    with pytest.raises(MechanismError, match=told) as error:
        method_of(config(method, **merge))
    assert "slots anew" in error.value.hint


def test_updates_of_older_versions_do_not_go_with_slots_made_anew():
    buffered = msgspec.structs.replace(config(rule="product-svd"), rounds=RoundsSection(schedule="buffered"))
    with pytest.raises(MechanismError, match="buffered schedule"):
        method_of(buffered)
    method_of(msgspec.structs.replace(buffered, merge=MergeSection()))


def test_a_delta_goes_no_further_than_a_full_version_can_follow(tmp_path):
    rows = np.full((1, 2), 6e4, np.float32)
    header = version_header({"dense.w": (1, 2)}, run="r", round=1, number=1, fingerprint="ab" * 32, parent=0)
    with (
        pytest.raises(ContainerError, match="holds 65504 at most"),
        VersionWriter(tmp_path / "v", header) as one,
    ):
        one.write("dense.w", rows, rows + 6e4)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_holds_its_base_quantized_cannot_evaluate_folds():
    quantized = msgspec.structs.replace(
        config(rule="stacking"), trainer=TrainerSection(base_precision="int8"),
        evaluation=EvaluationSection(data=DataSection(path="/rows")),
    )  # fmt: skip
    with pytest.raises(MechanismError, match=r"trainer\.base_precision is 'int8'"):
        method_of(quantized)
    method_of(msgspec.structs.replace(quantized, evaluation=None))


def test_a_fold_into_a_quantized_base_is_refused():
    fedavg = find_method("fedavg")
    with pytest.raises(MechanismError, match="with a base in nf4"):
        replace(fedavg, merge=Stacking(), reinit="each-round", fold="low-rank", base_precision="nf4")
    with pytest.raises(MechanismError, match="with the merge rule stacking"):
        replace(fedavg, merge=Stacking())
    with pytest.raises(MechanismError, match="joins reinit"):
        Method(name="x", allocation=fedavg.allocation, merge=ProductSvd(), reinit="each-round")


@pytest.mark.parametrize(
    ("merge", "told"),
    [
        ({"momentum": 0.5}, "no server optimizer is set"),
        ({"server_optimizer": "fedavgm", "adaptivity": 0.1}, "fedavgm has no such figure"),
        ({"server_optimizer": "fedadan"}, "there is no 'fedadan'"),
        ({"rule": "no_such_module:RULE"}, "No module named"),
        ({"rule": "aggregator.server_optimizers.fedadam:OPTIMIZER"}, "is a FedAdam, not a MergeRule"),
    ],
)
def test_figures_and_names_of_no_use_are_told(merge, told):
    with pytest.raises(ConfigError, match=told):
        method_of(config(**merge))


def test_the_record_of_the_newest_state_knows_what_it_builds_on():
    from edge_sdk.protocol.wire import AggregatorState, VersionRef, decode, encode

    refs = [VersionRef(number=n, object="0" * 64, bytes=5, parent=n - 1 if n else None) for n in range(3)]
    state = AggregatorState(ready=True, epoch="e", version=refs[2], chain=tuple(refs[:2]))
    assert decode(encode(state)) == state
    assert msgspec.json.decode(encode(state))["chain"][1]["parent"] == 0

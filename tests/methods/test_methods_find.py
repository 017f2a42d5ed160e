from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import aggregator.methods.base as base
from aggregator.merging.layer_mean import LayerMean
from aggregator.methods.base import Method, find_method, method_names
from aggregator.planner.allocation import FullDepth, GreedyDepth
from edge_sdk.config.run import RunBaseSection, RunConfig, RunSection, TrainingSection
from edge_sdk.errors import ConfigError, MechanismError

OWN = """
from dataclasses import dataclass
from aggregator.merging.layer_mean import LayerMean
from aggregator.methods.base import Method
from aggregator.planner.allocation import Allocated

@dataclass(frozen=True)
class TopOnly:
    name: str = "top-only"
    def allocate(self, fleet, situation):
        pairs = {c.device: c.pair(1, 0) for c in fleet if c.fits(1, 0)}
        return Allocated(max((p.seconds for p in pairs.values()), default=1.0), pairs)
    def options(self, costs, recommended):
        return ((1, 0),)

METHOD = Method(name="mine", allocation=TopOnly(), merge=LayerMean(), codec="fp16")
def make():
    return METHOD
nothing = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_method.py").write_text(OWN)
    (tmp_path / "broken_method.py").write_text("import a_module_that_is_nowhere")
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_method"
    for name in ("own_method", "broken_method"):
        sys.modules.pop(name, None)


def config(method: str = "fedquad") -> RunConfig:
    return RunConfig(
        run=RunSection(name="r", labels=("a", "b"), method=method, seed=5),
        base=RunBaseSection(path="base"),
        training=TrainingSection(
            optimizer="sgd",
            learning_rate=0.003,
            head_learning_rate=0.02,
            weight_decay=0.1,
            clip_norm=0.5,
            warmup_steps=7,
        ),
    )


def test_the_built_in_methods_name_their_mechanisms() -> None:
    fedavg, fedquad = find_method("fedavg"), find_method("fedquad")
    assert isinstance(fedavg.allocation, FullDepth)
    assert isinstance(fedquad.allocation, GreedyDepth)
    assert (fedavg.codec, fedavg.error_feedback) == ("fp32", False)
    assert (fedquad.codec, fedquad.error_feedback, fedquad.levers.activation_bits) == ("int8", True, 8)
    assert fedavg.merge.name == fedquad.merge.name == "layer-mean"
    assert method_names() == ("fedavg", "fedquad")


def test_the_spec_takes_mechanisms_from_the_method_and_figures_from_the_config() -> None:
    spec = find_method("fedquad").spec(config())
    assert (spec.seed, spec.optimizer, spec.warmup_steps) == (5, "sgd", 7)
    assert (spec.learning_rate, spec.head_learning_rate) == (0.003, 0.02)
    assert (spec.weight_decay, spec.clip_norm) == (0.1, 0.5)
    assert spec.error_feedback
    assert not find_method("fedavg").spec(config()).error_feedback
    assert "error-feedback:on" in spec.needs()


@pytest.mark.parametrize("attribute", ["METHOD", "make"])
def test_a_method_of_ones_own_by_its_path(own_module: str, attribute: str) -> None:
    found = find_method(f"{own_module}:{attribute}")
    assert (found.name, found.codec, found.allocation.name) == ("mine", "fp16", "top-only")


def test_a_method_of_ones_own_by_entry_point(own_module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name="mine", value=f"{own_module}:METHOD", group=base.GROUP)

    def points(*, group: str) -> list[EntryPoint]:
        return [point] if group == base.GROUP else []

    monkeypatch.setattr(base, "entry_points", points)
    assert find_method("mine").name == "mine"
    assert method_names() == ("fedavg", "fedquad", "mine")


def test_an_unknown_method_names_those_there_are_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no method 'fedquat'; there are fedavg, fedquad") as caught:
        find_method("fedquat")
    assert "did you mean 'fedquad'?" in caught.value.hint
    with pytest.raises(ConfigError) as caught:
        find_method("xyz")
    assert "did you mean" not in caught.value.hint
    assert "package.module:name" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module:METHOD", "No module named 'no_such_module'"),
        ("own_method:OTHER", "no attribute 'OTHER'"),
        ("broken_method:METHOD", "a_module_that_is_nowhere"),
        ("own_method:nothing", "is a int, not a method"),
    ],
)
def test_a_path_that_leads_nowhere_is_told(own_module: str, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.method") as caught:
        find_method(name)
    assert says in caught.value.message


def test_error_feedback_and_privacy_do_not_go_together() -> None:
    with pytest.raises(MechanismError, match="error feedback with privacy 'gaussian'"):
        Method(name="x", allocation=FullDepth(), merge=LayerMean(), error_feedback=True, privacy="gaussian")

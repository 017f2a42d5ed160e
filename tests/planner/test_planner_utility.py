"""Layer utilities against the dense product."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from updates_fakes import LORA, SHAPE
from updates_fakes import moved as trained_adapter

from aggregator.planner.utility import ProductChanges, moved, read_utilities, write_utilities
from edge_sdk.updates.initial import initial_adapter
from edge_sdk.updates.keys import Adapter, all_keys

LAYERS = SHAPE.layers


def dense_change(before: Adapter, after: Adapter, layer: int) -> float:
    """|B'A' - BA| of a layer's modules, made in full."""
    squares = 0.0
    for module in SHAPE.modules:
        a, b = f"{layer}.{module.name}.A", f"{layer}.{module.name}.B"
        change = after[b].astype(float).T @ after[a].astype(float) - before[b].astype(float).T @ before[
            a
        ].astype(float)
        squares += float(np.sum(change**2))
    return sqrt(squares)


def change_norms(before: Adapter, after: Adapter) -> tuple[float, ...]:
    changes = ProductChanges(LAYERS)
    for key in sorted(before):
        changes.add(key, before[key], after[key])
    return changes.result()


def test_norms_are_those_of_the_dense_product() -> None:
    start = initial_adapter(SHAPE, LORA, 0)
    first = trained_adapter(start, all_keys(SHAPE), seed=1)
    for before, after in ((start, first), (first, trained_adapter(first, all_keys(SHAPE), seed=2))):
        norms = change_norms(before, after)
        assert norms == pytest.approx([dense_change(before, after, layer) for layer in range(LAYERS)])


def test_what_the_model_does_not_see_is_no_change() -> None:
    start = initial_adapter(SHAPE, LORA, 0)
    a_alone = {key: 3 * rows if key.endswith(".A") else rows for key, rows in start.items()}
    assert change_norms(start, a_alone) == (0.0,) * LAYERS
    before = trained_adapter(start, all_keys(SHAPE), seed=1)
    traded = {
        key: rows * (2 if key.endswith(".A") else 0.5 if key.endswith(".B") else 1)
        for key, rows in before.items()
    }
    norms = change_norms(before, traded)
    least = min(dense_change(start, before, layer) for layer in range(LAYERS))
    assert all(norm < 1e-6 * least for norm in norms)


def test_the_average_moves_a_fifth_of_the_way_and_keeps_its_sum() -> None:
    assert moved([0.25] * 4, [0.0, 1.0, 1.0, 2.0]) == pytest.approx([0.2, 0.25, 0.25, 0.3])
    assert moved([0.25] * 4, [0.0] * 4) == (0.25,) * 4


def test_layers_that_nobody_trained_keep_what_they_had() -> None:
    after = moved([0.4, 0.2, 0.2, 0.2], [None, None, 3.0, 1.0])
    assert after == pytest.approx([0.4, 0.2, 0.8 * 0.2 + 0.2 * 0.3, 0.8 * 0.2 + 0.2 * 0.1])


@pytest.mark.parametrize("strip", [1, 3, 10**6])
def test_strips_of_any_width_give_the_same(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = trained_adapter(initial_adapter(SHAPE, LORA, 0), all_keys(SHAPE), seed=1)
    after = trained_adapter(before, all_keys(SHAPE), seed=2)
    whole = change_norms(before, after)
    monkeypatch.setattr("aggregator.planner.utility._STRIP", strip)
    assert change_norms(before, after) == pytest.approx(whole)


def test_an_adapter_that_was_not_there_moves_by_all_that_it_does() -> None:
    after = trained_adapter(initial_adapter(SHAPE, LORA, 0), all_keys(SHAPE), seed=1)
    changes = ProductChanges(LAYERS)
    for key in sorted(after):
        changes.add(key, None, after[key])
    nothing = {key: np.zeros_like(rows) for key, rows in after.items()}
    assert changes.result() == pytest.approx(change_norms(nothing, after))


def test_utilities_are_kept_as_text() -> None:
    assert read_utilities(write_utilities((0.25, 0.75))) == (0.25, 0.75) and read_utilities(None) is None

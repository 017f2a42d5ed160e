"""Layer utilities against the dense product."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from updates_fakes import FINGERPRINT, LORA, SHAPE
from updates_fakes import moved as trained_adapter

from aggregator.planner.utility import change_norms, layer_utilities, moved, read_utilities, write_utilities
from edge_sdk.updates.initial import initial_adapter
from edge_sdk.updates.keys import Adapter, all_keys, tuned_keys
from edge_sdk.updates.versions import write_version

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


def test_norms_are_those_of_the_dense_product() -> None:
    start = initial_adapter(SHAPE, LORA, 0)
    first = trained_adapter(start, all_keys(SHAPE), seed=1)
    for before, after in ((start, first), (first, trained_adapter(first, all_keys(SHAPE), seed=2))):
        norms = change_norms(SHAPE, before.__getitem__, after.__getitem__, LAYERS)
        assert norms == pytest.approx([dense_change(before, after, layer) for layer in range(LAYERS)])


def test_what_the_model_does_not_see_is_no_change() -> None:
    start = initial_adapter(SHAPE, LORA, 0)
    a_alone = {key: 3 * rows if key.endswith(".A") else rows for key, rows in start.items()}
    assert change_norms(SHAPE, start.__getitem__, a_alone.__getitem__, LAYERS) == (0.0,) * LAYERS
    before = trained_adapter(start, all_keys(SHAPE), seed=1)
    traded = {
        key: rows * (2 if key.endswith(".A") else 0.5 if key.endswith(".B") else 1)
        for key, rows in before.items()
    }
    norms = change_norms(SHAPE, before.__getitem__, traded.__getitem__, LAYERS)
    least = min(dense_change(start, before, layer) for layer in range(LAYERS))
    assert all(norm is not None and norm < 1e-6 * least for norm in norms)


def test_the_average_moves_a_fifth_of_the_way_and_keeps_its_sum() -> None:
    assert moved([0.25] * 4, [0.0, 1.0, 1.0, 2.0]) == pytest.approx([0.2, 0.25, 0.25, 0.3])
    assert moved([0.25] * 4, [0.0] * 4) == (0.25,) * 4


def test_layers_that_nobody_trained_keep_what_they_had() -> None:
    after = moved([0.4, 0.2, 0.2, 0.2], [None, None, 3.0, 1.0])
    assert after == pytest.approx([0.4, 0.2, 0.8 * 0.2 + 0.2 * 0.3, 0.8 * 0.2 + 0.2 * 0.1])


def test_utilities_come_from_version_files_and_a_delta_gives_what_the_whole_one_gives(tmp_path: Path) -> None:
    start = initial_adapter(SHAPE, LORA, 0)

    def write(
        number: int, adapter: Adapter, parent: tuple[int, Adapter] | None = None, codec: str = "fp16"
    ) -> Adapter:
        return write_version(
            tmp_path / f"{number}{codec}", run="r", round=number, number=number, fingerprint=FINGERPRINT,
            adapter=adapter, parent=parent, codec=codec,
        )  # fmt: skip

    base = write(0, start)
    delta = write(1, trained_adapter(base, tuned_keys(SHAPE, LAYERS - 1), seed=3), (0, base), "int8")
    write(1, delta, codec="fp32")
    chain = [tmp_path / "0fp16"]
    by_delta, whole = (
        layer_utilities(SHAPE, chain, after, LAYERS - 1, None)
        for after in ([*chain, tmp_path / "1int8"], [tmp_path / "1fp32"])
    )
    assert by_delta == pytest.approx(whole)
    assert sum(whole) == pytest.approx(1.0)
    assert whole[0] == pytest.approx(1 / LAYERS)
    assert read_utilities(write_utilities(whole)) == whole and read_utilities(None) is None

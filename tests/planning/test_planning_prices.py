"""The prices that are shipped say where they are from, and the benchmark that makes them makes that file."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import msgspec
import pytest

from benchmarks.prediction.prices import (
    OF_SMALL,
    as_toml,
    beyond_counted,
    of_small,
    small_settings,
    table,
)
from benchmarks.prediction.run import setting_of
from edge_sdk.cli.planning import show_prices
from edge_sdk.planning.cost import peak_mb
from edge_sdk.planning.fitting import estimate
from edge_sdk.planning.shapes import shape_of
from edge_sdk.planning.work import counts, prices, read_prices
from edge_sdk.protocol.model import LoraShape

SMALL = {
    "model_type": "bert", "vocab_size": 500, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 8, "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LORA = LoraShape(rank=8)
ABOUT = {"processor": "Some CPU", "versions": {"torch": "9"}}


def test_every_price_says_whether_it_was_measured_and_by_what(capsys: pytest.CaptureFixture[str]) -> None:
    known = prices()
    assert known.all().keys() == known.got.keys() and all(value >= 0 for value in known.all().values())
    for source in known.got.values():
        assert source.how in ("measured", "taken") and source.by and source.date.startswith("202")
        assert source.how == "taken" or source.on
    show_prices(as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["seconds.linear"] == {"value": known.seconds["linear"], **asdict(known.got["seconds.linear"])}
    show_prices(as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]][: len(told)] == list(told)
    with pytest.raises(KeyError):
        read_prices("gflops = { value = 1.0 }\n[sources]\n[seconds]\n[packing]\n")


def test_what_the_benchmark_measures_is_the_file_that_is_read() -> None:
    found = {place: 1.25 * value for place, value in prices().all().items()}
    again = read_prices(as_toml(found, ABOUT, threads=1, repeats=200))
    assert again.all() == pytest.approx(found, rel=1e-3)
    assert {source.how for source in again.got.values()} == {"measured"}
    assert "whole model" in again.got["seconds.call"].by and "Some CPU" in again.got["packing.fbgemm.8"].on
    lines = table(prices(), found)
    assert len(lines) == len(found) + 1
    assert sum(" 1.25 " in line for line in lines) == sum(value > 0 for value in found.values())


def test_calls_and_what_is_fixed_come_of_small_steps() -> None:
    """Visits made up with known calls, among slower ones: they are found again."""
    shape = shape_of(SMALL, lora=LORA)
    call, tuned, known = 5e-4, 2e-3, prices()
    without = replace(known, seconds={**known.seconds, "call": 0.0, "tuned": 0.0})
    rows: list[dict[str, Any]] = [{"kind": "shape", "shape": msgspec.to_builtins(shape)}]
    for slower in (1.3, 1.0, 2.0):
        for told in small_settings(shape.layers):
            setting = setting_of(told)
            forward, layer, _ = counts(shape, LORA, setting)
            step = without.of(forward) + setting.depth * without.of(layer)
            step += shape.layers * call + setting.depth * tuned
            counted = peak_mb(estimate(shape, LORA, setting), shape, LORA, setting) - known.fixed_mb
            rows.append({"kind": "visit", "setting": told, "step_s": slower * step, "peak_mb": counted + 1.5})
    found = of_small(rows, LORA, known)
    assert beyond_counted(rows, LORA, known) == pytest.approx([1.5] * 6)
    assert found.keys() == set(OF_SMALL)
    assert found["seconds.call"] == pytest.approx(1e9 * call)
    assert found["seconds.tuned"] == pytest.approx(1e9 * tuned)

"""``edge-agent plan`` and what it rests on: shapes from config.json, frontiers of a counted fit."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from msgspec.structs import replace
from typer.testing import CliRunner

from edge_sdk.cli.main import app
from edge_sdk.cli.planning import Asked, show_plan
from edge_sdk.console import finite
from edge_sdk.device.capacity import capacity
from edge_sdk.device.classes import device_class
from edge_sdk.errors import BaseModelError, ConfigError
from edge_sdk.planning.cost import peak_mb
from edge_sdk.planning.fitting import estimate
from edge_sdk.planning.frontier import Round, fewest, frontier
from edge_sdk.planning.memory import LONGER, counted
from edge_sdk.planning.shapes import held_base_bytes, shape_of, task_of
from edge_sdk.planning.work import prices
from edge_sdk.protocol.model import LoraShape
from edge_sdk.protocol.spec import Levers, Setting

ROBERTA = {
    "model_type": "roberta", "vocab_size": 50265, "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 514, "type_vocab_size": 1,
    "hidden_act": "gelu",
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip
LORA = LoraShape(rank=8)
ASKED = Asked(
    model=Path(), device_class=None, memory_mb=None, gflops=None, task=None, labels=2, batch=8, length=128,
    rank=8, steps=25, base_precision="fp32", up_mbps=10.0, down_mbps=None,
)  # fmt: skip


def test_known_models_have_their_known_size() -> None:
    assert shape_of(ROBERTA).parameters == pytest.approx(125e6, rel=0.01)
    llama = shape_of(LLAMA, task="causal-lm")
    assert llama.parameters == pytest.approx(1.236e9, rel=0.005)
    assert held_base_bytes(llama, "nf4") < 0.2 * held_base_bytes(llama, "fp32")
    assert shape_of(ROBERTA, lora=LoraShape(targets=("query", "value"))).modules[1].name.endswith("value")


def test_what_cannot_be_read_is_refused_with_what_can() -> None:
    with pytest.raises(BaseModelError, match=r"'t5' cannot be planned.*bert, .*roberta"):
        shape_of({"model_type": "t5"})
    with pytest.raises(BaseModelError, match="has no num_hidden_layers"):
        shape_of({k: v for k, v in ROBERTA.items() if k != "num_hidden_layers"})
    with pytest.raises(BaseModelError, match=r"lora\.targets may name"):
        shape_of(ROBERTA, lora=LoraShape(targets=("nowhere",)))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"num_attention_heads": 1000}, "1000 attention heads in a width of 768"),
        ({"num_attention_heads": 7}, "7 attention heads, which a width of 768 cannot be shared among"),
        ({"model_type": None}, "names no model_type"),
        ({"num_key_value_heads": 5}, "5 heads of keys and values, which 12"),
        ({"num_hidden_layers": 10**6}, "1000000 layers, and 1000"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000; allowed: a whole number up to"),
        ({"hidden_size": 768.5}, r"hidden_size is 768\.5; allowed: a whole number"),
        ({"hidden_size": "768"}, 'hidden_size is "768"; allowed'),
        ({"hidden_size": 0}, "has no hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers is true; allowed"),
        ({"type_vocab_size": [2]}, "type_vocab_size is a list of 1; allowed"),
    ],
)
def test_a_config_of_no_model_is_refused(said: dict[str, object], why: str) -> None:
    with pytest.raises(BaseModelError, match=why):
        shape_of({**ROBERTA, **said})


def test_whole_numbers_may_have_a_point_and_null_is_as_missing() -> None:
    assert shape_of({**ROBERTA, "hidden_size": 768.0, "num_hidden_layers": 12.0}) == shape_of(ROBERTA)
    assert shape_of({**ROBERTA, "head_dim": None, "num_key_value_heads": 0}) == shape_of(ROBERTA)
    assert shape_of({**ROBERTA, "num_attention_heads": 1000, "head_dim": 4}).query_width == 4000


def test_the_task_is_that_of_the_class_which_a_config_names() -> None:
    assert [task_of(one) for one in (ROBERTA, LLAMA)] == ["classification", "causal-lm"]
    assert task_of({"architectures": []}) == task_of({"architectures": None}) == "classification"
    for wrong in ({"a": 1}, 3, "BertModel", [None], [["x"]]):
        with pytest.raises(BaseModelError, match=r"architectures is .*, no list of names"):
            task_of({"architectures": wrong})


# Batch 8, length 128, every layer tuned, LoRA of rank 8 on all linears: measured under mimalloc on another
# machine and told in docs/training-memory.md, as shares of plain's 632 MB.
@pytest.mark.parametrize(
    ("recompute", "bits", "share"),
    [("none", 0, 1.0), ("outputs", 0, 0.57), ("inner", 0, 0.34), ("layer", 0, 0.15), ("outputs", 8, 0.22),
     ("outputs", 4, 0.15), ("inner", 4, 0.13)],
)  # fmt: skip
def test_estimates_are_within_a_quarter_of_what_was_measured(recompute: str, bits: int, share: float) -> None:
    shape = shape_of(ROBERTA, labels=4)
    reference = Setting(depth=1, micro_batch=8, max_length=128, optimizer="sgd")
    wanted = replace(
        reference, depth=12, quantized_layers=12 if bits else 0,
        levers=Levers(activation_bits=bits or 8, recompute=recompute),
    )  # fmt: skip
    assert peak_mb(estimate(shape, LORA, reference), shape, LORA, wanted) == pytest.approx(
        632 * share, rel=0.25
    )


def test_every_lever_takes_less_memory_and_fewer_bits_take_less_again() -> None:
    shape = shape_of(LLAMA, task="causal-lm")
    reference = Setting(depth=16, quantized_layers=16, micro_batch=2, max_length=512)

    def peak(recompute: str, bits: int, **more: object) -> float:
        wanted = replace(reference, levers=Levers(activation_bits=bits, recompute=recompute), **more)
        # a fit is of the precision that a device holds its base in
        fit = estimate(shape, LORA, replace(reference, base_precision=wanted.base_precision))
        return peak_mb(fit, shape, LORA, wanted)

    for order in (
        [peak(way, 8) for way in ("none", "outputs", "inner", "layer")],
        [peak("outputs", 8, quantized_layers=a) for a in (0, 4, 10, 16)],
        [peak("outputs", bits) for bits in (8, 4, 2)],
        [peak("outputs", 8, micro_batch=b) for b in (8, 4, 2, 1)],
        [peak("none", 8, factors=f) for f in ("AB", "B")],
        [peak("outputs", 8, optimizer=o) for o in ("adamw", "adamw8bit", "sgd")],
        [peak("outputs", 8, accumulation=n) for n in (2, 1)],
        [peak("outputs", 8, base_precision=p) for p in ("nf4", "fp32", "bf16")],
    ):
        assert all(more > less for more, less in pairwise(order)), order


def test_where_all_quantized_does_not_fit_a_mix_may() -> None:
    assert [fewest(4, fits.__contains__) for fits in ({0, 3, 4}, {2, 3, 4}, {2, 3}, {4}, set())] == [
        0, 2, 2, 4, None,
    ]  # fmt: skip


def test_weights_that_are_unpacked_one_at_a_time_make_longer_chunks() -> None:
    """Gate, up and down of this shape take 201 MB in fp32: more than are unpacked together."""
    big = shape_of(LLAMA, lora=LORA)
    wanted = Setting(depth=1, levers=Levers(recompute="outputs"), micro_batch=64, max_length=512)
    packed, whole = (counted(big, LORA, replace(wanted, base_precision=word)) for word in ("nf4", "fp32"))
    decoded = packed.frozen_room - whole.frozen_room
    chunk = (whole.plain_room - 2 * 4 * 64 * 512 * big.hidden) / 3
    assert packed.plain_room - whole.plain_room - decoded == pytest.approx(3 * (LONGER - 1) * chunk, rel=0.02)


def test_a_frontier_grows_with_memory_and_quantizes_only_where_it_must() -> None:
    shape = shape_of(ROBERTA)
    reference = Setting(depth=1, levers=Levers(recompute="outputs"), micro_batch=8, max_length=128)
    fit = estimate(shape, LORA, reference)
    deepest = []
    for budget in (20.0, 120.0, 200.0, 300.0, 1000.0):
        points = frontier(fit, shape, LORA, reference, budget_mb=budget, work=Round(10, "int8"))
        deepest.append(len(points))
        assert all(point.peak_mb <= 0.9 * budget for point in points)
        assert all(a.step_s < b.step_s and a.bytes_up < b.bytes_up for a, b in pairwise(points))
        for point in points:
            if point.quantized_layers:
                fewer = replace(reference, depth=point.depth, quantized_layers=point.quantized_layers - 1)
                assert peak_mb(fit, shape, LORA, fewer) > 0.9 * budget
    assert deepest == sorted(deepest) and deepest[0] == 0 and deepest[-1] == 12


def test_the_command_tells_an_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ROBERTA))
    asked = Asked(**{**vars(ASKED), "model": tmp_path, "device_class": "raspberry-pi-5", "gflops": 20.0})
    show_plan(asked, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["estimate"] is True and told["device_class"] == "raspberry-pi-5" and told["layers"] == 12
    assert told["rest_mb"] + told["budget_mb"] == pytest.approx(told["memory_mb"], abs=0.2)
    (first, *_, last) = told["ways"]["outputs, 8 bits"]
    assert last["depth"] == 12 and first["step_s"] < last["step_s"] and first["bytes_up"] > 0
    show_plan(asked, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ESTIMATE: roberta") and "Raspberry Pi 5" in lines[0]


def test_without_figures_there_are_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(ROBERTA))
    with pytest.raises(ConfigError, match="--device-class"):
        show_plan(Asked(**{**vars(ASKED), "model": file}), as_json=False)
    with pytest.raises(ConfigError, match="laptop-cpu states no memory"):
        show_plan(Asked(**{**vars(ASKED), "model": file, "device_class": "laptop-cpu"}), as_json=False)
    show_plan(Asked(**{**vars(ASKED), "model": file, "memory_mb": 1000.0}), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert "--gflops" in told["time_source"]
    assert all(point["step_s"] is None for points in told["ways"].values() for point in points)
    show_plan(Asked(**{**vars(ASKED), "model": file, "memory_mb": 860.0}), as_json=False)
    assert "nothing fits: the least takes" in capsys.readouterr().out
    with pytest.raises(BaseModelError, match="cannot be read"):
        show_plan(Asked(**{**vars(ASKED), "model": tmp_path / "no.json", "memory_mb": 1.0}), as_json=False)
    (tmp_path / "cut.json").write_text('{"model_type": "bert"')
    with pytest.raises(BaseModelError, match="is not JSON") as told_why:
        show_plan(Asked(**{**vars(ASKED), "model": tmp_path / "cut.json", "memory_mb": 1.0}), as_json=False)
    assert "config.json" in told_why.value.hint


def test_files_that_are_no_config_are_refused(tmp_path: Path) -> None:
    (tmp_path / "deep").write_text("[" * 100_000)
    for name, why in (
        ("deep", "is not JSON"), ("/dev/zero", "above 4 MiB"),
        ("n" * 5000, "cannot be read: File name too long"),
    ):  # fmt: skip
        with pytest.raises(BaseModelError, match=why):
            show_plan(Asked(**{**vars(ASKED), "model": tmp_path / name, "memory_mb": 1e3}), as_json=False)
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROBERTA).encode())
    show_plan(Asked(**{**vars(ASKED), "model": tmp_path, "memory_mb": 1e3, "length": 512}), as_json=True)
    with pytest.raises(BaseModelError, match="--length is 513, this model takes 512"):
        show_plan(Asked(**{**vars(ASKED), "model": tmp_path, "memory_mb": 1e3, "length": 513}), as_json=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        told = subprocess.run(
            [sys.executable, "-c", "from edge_sdk.cli.main import main; main()", "plan", "--show-prices"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=Path(__file__).parents[2],
        )  # fmt: skip
    assert (told.returncode, told.stderr) == (
        74, "error: cannot write: No space left on device\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    "words",
    ["--memory-mb nan", "--memory-mb inf", "--gflops nan", "--up-mbps 1e300", "--rank 1000000",
     "--batch 100000000000000"],
)  # fmt: skip
def test_figures_of_no_machine_are_refused(words: str) -> None:
    told = CliRunner().invoke(app, ["plan", "--model", "nowhere", *words.split()])
    assert told.exit_code == 2 and words.split()[0] in told.output


def test_a_figure_is_finite_whatever_typer_takes_for_one() -> None:
    assert (finite(None), finite(2.0)) == (None, 2.0)
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(typer.BadParameter, match="is no finite number"):
            finite(wrong)


def told_of(capsys: pytest.CaptureFixture[str], model: Path, **asked: object) -> dict[str, Any]:
    show_plan(Asked(**{**vars(ASKED), "model": model, **asked}), as_json=True)
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def test_a_class_counts_as_everywhere_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Memory and peak are those of ``device.capacity``; CUDA's part of a GPU's memory is taken off once."""
    (tmp_path / "config.json").write_text(json.dumps(ROBERTA))
    base_mb = held_base_bytes(shape_of(ROBERTA), "fp32") / 1e6
    for name, own in (("jetson-agx-orin-32gb", False), ("raspberry-pi-4", False), ("laptop-rtx-4060", True)):
        told, has = told_of(capsys, tmp_path, device_class=name), capacity(device_class(name))
        assert (told["memory_mb"], told["memory_source"]) == (has.memory_mb, has.memory_how)
        assert told["rest_mb"] == pytest.approx(base_mb + (0 if own else prices().process_mb), abs=0.1)
        assert (told["gflops"] is None) == (has.fp32_tflops is None)
    board = device_class("jetson-agx-orin-64gb")
    fast = told_of(capsys, tmp_path, device_class=board.name)
    slow = told_of(capsys, tmp_path, device_class=board.name, power_mode="MODE_15W")
    peak = capacity(board, "MODE_15W").fp32_tflops
    assert peak is not None and slow["gflops"] == pytest.approx(250 * peak)
    steps = [told["ways"]["outputs, 8 bits"][0]["step_s"] for told in (fast, slow)]
    assert steps[1] / steps[0] == pytest.approx(fast["gflops"] / slow["gflops"], rel=0.01)
    with pytest.raises(ConfigError, match="no power mode"):
        told_of(capsys, tmp_path, device_class=board.name, power_mode="60W")
    with pytest.raises(ConfigError, match="--device-class"):
        told_of(capsys, tmp_path, memory_mb=1000.0, power_mode="MODE_15W")

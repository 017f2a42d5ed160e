"""Throughput: every name has a figure or a reason, within its time, and without a model."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.train, pytest.mark.alone]

from edge_sdk.protocol.measure import Throughput  # noqa: E402
from edge_sdk.protocol.trainer import Measure, Progress, Timed, TrainerReply  # noqa: E402
from edge_sdk.training import throughput  # noqa: E402
from edge_sdk.training.engine import Engine  # noqa: E402
from edge_sdk.training.failures import InterruptError  # noqa: E402
from edge_sdk.training.inline import InlineTrainer  # noqa: E402
from edge_sdk.training.throughput import measure_throughput  # noqa: E402

NAMES = {"fp32", "bf16", "fp16", "int8", "copy", "triad"}


def go_on() -> None:
    """Nothing interrupts."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_SIDES", {"cpu": (32, 64, 128)})
    monkeypatch.setattr(throughput, "_VECTOR_MB", {"cpu": 1})
    monkeypatch.setattr(throughput, "_MOST_REPEATS", 5)


def test_a_request_is_answered_without_a_model() -> None:
    replies: list[TrainerReply] = []
    trainer = InlineTrainer(threaded=False)
    trainer.start(replies.append)
    trainer.request(Measure(id=4, seconds=30.0))
    assert not trainer.loaded
    *progress, timed = replies
    assert all(isinstance(one, Progress) and one.stage == "measuring" for one in progress)
    assert isinstance(timed, Timed) and timed.id == 4
    first = timed.throughput[0]
    assert (first.device, first.how, bool(first.name)) == ("cpu", "measured", True)
    assert first.gflops.keys() | first.gb_s.keys() | first.reasons.keys() == NAMES
    assert {"fp32", "copy", "triad"} <= first.gflops.keys() | first.gb_s.keys()
    assert first.spread.keys() == first.gflops.keys() | first.gb_s.keys()
    assert all(rate > 0 for rate in (*first.gflops.values(), *first.gb_s.values()))
    assert all(spread >= 0 for spread in first.spread.values())


def test_the_rate_is_work_over_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    repeats = [9.0, 0.001, 0.002, 0.004]
    times = iter(repeats * 2 + [9.0, 1.0] + repeats)
    monkeypatch.setattr(throughput, "_once", lambda kernel, device: next(times))
    monkeypatch.setattr(throughput, "_DTYPES", {"fp32": torch.float32})
    monkeypatch.setattr(throughput, "_MOST_REPEATS", 3)
    found = measure_throughput("cpu", 60.0, go_on)
    assert found.gflops == {"fp32": pytest.approx(2 * 32**3 / 0.002 / 1e9)}
    assert found.gb_s["copy"] == pytest.approx(2e6 / 0.002 / 1e9)
    assert found.gb_s["triad"] == pytest.approx(3e6 / 0.002 / 1e9)
    assert found.spread["fp32"] == pytest.approx(1.5)


def test_a_dtype_that_the_device_does_not_multiply_has_torchs_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError('"addmm_impl" not implemented for Char\nand more')

    monkeypatch.setattr(torch, "_int_mm", refuse)
    found = measure_throughput("cpu", 30.0, go_on)
    assert found.reasons == {"int8": 'torch: "addmm_impl" not implemented for Char'}
    assert "int8" not in found.gflops | found.spread


def test_memory_that_cannot_be_had_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_VECTOR_MB", {"cpu": 1e12})
    monkeypatch.setattr(throughput, "free_memory_mb", lambda: None)
    assert measure_throughput("cpu", 30.0, go_on).reasons == dict.fromkeys(
        ("copy", "triad"), "not enough memory"
    )


def test_without_time_nothing_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure_throughput("cpu", 0.0, go_on)
    assert found.reasons.keys() == NAMES
    assert not found.gflops and not found.gb_s


def test_it_ends_within_a_repeat_when_interrupted() -> None:
    calls = 0

    def end() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise InterruptError

    with pytest.raises(InterruptError):
        measure_throughput("cpu", 60.0, end)


def test_without_the_extra_it_says_so() -> None:
    code = """
import sys
class Missing:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Missing)
from edge_sdk.protocol.measure import Throughput  # noqa: E402
from edge_sdk.protocol.trainer import Measure
from edge_sdk.training.engine import Engine
Engine(lambda reply: print(type(reply).__name__, reply.cause, reply.hint), enforce=True).handle(Measure(id=1))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(" ", 2) == ["Failed", "extra", "pip install 'edge-sdk[train]'\n"]


def test_a_slow_kernel_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def slow(kernel: object, device: str) -> float:
        nonlocal now
        now += 100.0
        return 100.0

    monkeypatch.setattr(throughput, "_once", slow)
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now)
    assert throughput._times(lambda: None, "cpu", 1.0, go_on) == [100.0]


def test_no_more_time_is_taken_than_the_import_left(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def measured(device: str, seconds: float, check: Callable[[], None]) -> Throughput:
        given.append(seconds)
        return Throughput(device=device)

    monkeypatch.setattr(throughput, "measure_throughput", measured)
    monkeypatch.setattr(throughput, "compute_devices", lambda: ["cpu"])
    engine = Engine(lambda reply: None, enforce=False)
    for left in (100.0, 3.0, -5.0):
        engine.handle(Measure(id=1, seconds=5.0, until=time.monotonic() + left))
    assert given == pytest.approx([5.0, 3.0, 0.5], abs=0.2)

"""Real trainer processes that run out of memory: by RLIMIT_DATA, by a memory cgroup, by their own limit.

The device joins without a limit. Then something of the system's that nobody told it of holds its trainer
down, so that what it chooses does not fit after all.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("torch")


from benchmarks.memory_limits.cases import play, prepare
from benchmarks.memory_limits.device import Device, describe, run_of
from edge_sdk.agent.process_trainer import ProcessTrainer
from edge_sdk.protocol.spec import Candidate
from edge_sdk.protocol.wire import Choice, Status
from edge_sdk.updates.initial import initial_adapter
from edge_sdk.updates.versions import write_version

pytestmark = [pytest.mark.train, pytest.mark.alone]

WORKER = (sys.executable, "-m", "edge_sdk.training.worker")
CONFIG = {"vocabulary": 300, "lengths": [128], "steps": 3, "slack_mb": 2.0}
CASE = {"case": 1, "family": "bert", "layers": 6, "hidden": 128, "batch": 16, "length": 128}
ROOM_MB = 40.0
"""Above rest: enough for one layer, and not for six, which take about 15 MB each."""


class Shelf:
    """A device that joined once: its base, rows, run, and state folder to begin with."""

    def __init__(self, folder: Path) -> None:
        self.config, self.data = prepare(CASE, CONFIG, folder)
        trainer = ProcessTrainer(folder)
        known = describe(self.config, trainer, self.data)
        self.mapped_mb = _held(trainer)["VmData"]  # before a deep training leaves holes in the heap
        self.run = run_of(self.config, known.shape, folder)
        self.version = folder / "version"
        write_version(
            self.version, run=self.run.run, round=0, number=0, fingerprint=self.run.fingerprint.digest,
            adapter=initial_adapter(self.run.shape, self.run.lora, 0),
        )  # fmt: skip
        self.state = folder / "state"
        device = self.device(self.state, trainer)
        device.begin()
        assert device.until("agent.reported") is not None, device.events
        self.own_mb = _held(trainer)["RssAnon"]
        device.close()
        trainer.close()

    def device(self, state: Path, trainer: ProcessTrainer) -> Device:
        return Device(
            state, self.config, self.run, trainer, data=self.data, version=self.version, memory_mb=None
        )

    def again(self, state: Path, trainer: ProcessTrainer) -> tuple[Device, Status]:
        """The same device after a restart: it knows its fit, and nothing of a limit."""
        shutil.copytree(self.state, state)
        device = self.device(state, trainer)
        device.begin()
        assert device.until("agent.reported") is not None, device.events
        return device, device.heard(Status)[-1]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("limits"))


def _held(trainer: ProcessTrainer) -> dict[str, float]:
    """Figures of the process, in MB."""
    lines = Path(f"/proc/{trainer.pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e6 for line in lines if line.endswith(" kB")}


def candidates(depths: tuple[int, ...]) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(id=f"d{depth}", depth=depth, micro_batch=16, max_length=128, steps=3, gain=float(depth),
                  recompute="outputs")
        for depth in depths
    )  # fmt: skip


def steps_down_and_remembers(device: Device, status: Status) -> list[str]:
    """Six layers are taken and run out of memory; one is trained in the same round, and at once in the next.

    Returns what was said of the failures.
    """
    device.offer(1, status, candidates=candidates((6, 1)))
    assert device.until("update.queued", "round.decline") is not None, device.events
    said = [(one.round, one.candidate.depth, one.attempt) for one in device.heard(Choice)]
    assert said == [(1, 6, 0), (1, 1, 1)], device.events
    failed = [event.fields for event in device.events if event.name == "training.failed"]
    assert all(fields["memory"] for fields in failed)
    device.until("agent.reported", seconds=1)
    told = device.heard(Status)[-1]
    assert told.memory.budget_mb < status.memory.budget_mb / 5
    device.offer(2, told, candidates=candidates((6, 1)))
    assert device.until("training.done", "round.decline") is not None, device.events
    last: Choice = device.heard(Choice)[-1]
    assert (last.round, last.candidate.depth, last.attempt, last.binding) == (2, 1, 0, "memory")
    return [str(fields["message"]) for fields in failed]


def test_under_rlimit_data_a_smaller_candidate_is_trained_in_the_same_round(
    shelf: Shelf, tmp_path: Path
) -> None:
    kib = int((shelf.mapped_mb + ROOM_MB) * 1e6) // 1024
    limited = ("/bin/sh", "-c", 'ulimit -d "$0" && exec "$@"', str(kib), *WORKER)
    with closing(ProcessTrainer(tmp_path, command=limited)) as trainer:
        (message,) = steps_down_and_remembers(*shelf.again(tmp_path / "state", trainer))
    assert "memory" in message


class Group:
    """A memory group of the test's own, of version 2 or 1."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.v2 = (path / "memory.max").exists()

    def limit(self, megabytes: float) -> None:
        names = ("memory.max",) if self.v2 else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        for name in names:
            if (self.path / name).exists():
                (self.path / name).write_text(str(int(megabytes * 1e6)))
        if self.v2 and (self.path / "memory.swap.max").exists():
            (self.path / "memory.swap.max").write_text("0")


@pytest.fixture
def group() -> Iterator[Group]:
    path, why = None, "no memory controller is mounted"
    for parent in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        try:
            if (
                parent.name == "cgroup"
                and "memory" not in (parent / "cgroup.controllers").read_text().split()
            ):
                continue
            made = parent / f"edge-sdk-test-{os.getpid()}"
            made.mkdir()
            if (made / "memory.max").exists() or (made / "memory.limit_in_bytes").exists():
                path = made
                break
            made.rmdir()
        except OSError as error:
            why = f"{parent}: {error.strerror}"
    if path is None:
        pytest.skip(f"needs root and a memory cgroup that it may make: {why}")
    yield Group(path)
    deadline = time.monotonic() + 10
    while path.exists():
        try:
            path.rmdir()
        except OSError:  # its last process is only just ending
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def test_killed_in_a_memory_cgroup_a_smaller_candidate_is_trained_in_the_same_round(
    shelf: Shelf, tmp_path: Path, group: Group
) -> None:
    group.limit(shelf.own_mb + ROOM_MB)
    limited = ("/bin/sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group.path), *WORKER)
    with closing(ProcessTrainer(tmp_path, command=limited)) as trainer:
        (message,) = steps_down_and_remembers(*shelf.again(tmp_path / "state", trainer))
    assert "SIGKILL" in message


def test_a_cut_of_the_benchmark(tmp_path: Path) -> None:
    """All fits; some of it does; the base alone does not. One trainer process, as long as it may live."""
    small = {**CASE, "layers": 3, "hidden": 64, "batch": 8}
    with closing(ProcessTrainer(tmp_path, allocator="glibc")) as trainer:
        rows = [
            play({**small, "case": number, "share": share}, CONFIG, trainer, tmp_path / "case")
            for number, share in enumerate((1.5, 0.45, -0.2))
        ]
    assert [row["how"] for row in rows] == ["trained", "trained", "cannot join"], rows
    assert rows[1]["depth"] < 3 or rows[1]["quantized"], rows[1]

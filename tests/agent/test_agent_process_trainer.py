"""The trainer as a process: a small stub worker that lives and dies as told."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from agent_fakes import LORA, PRINT, SHAPE

from edge_sdk.agent.process_trainer import ProcessTrainer
from edge_sdk.device.allocators import find_allocator
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.trainer import Died, Export, Exported, Failed, Progress, TrainerReply

STUB = (sys.executable, str(Path(__file__).with_name("stub_worker.py")))


class Host:
    def __init__(self, folder: Path, **options: object) -> None:
        self.trainer = ProcessTrainer(folder, command=STUB, **options)  # type: ignore[arg-type]
        self.replies: queue.Queue[TrainerReply] = queue.Queue()
        self.trainer.start(self.replies.put)
        self.ids = iter(range(1, 100))

    def ask(self, what: str) -> int:
        number = next(self.ids)
        self.trainer.request(
            Export(id=number, base=what, labels=("a", "b"), lora=LORA, shape=SHAPE, fingerprint=PRINT,
                   versions=(), folder="/out")
        )  # fmt: skip
        return number

    def answer(self) -> TrainerReply:
        while True:
            reply = self.replies.get(timeout=20)
            if not isinstance(reply, Progress):
                return reply


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    one = Host(tmp_path)
    yield one
    one.trainer.close()


def test_one_process_answers_until_it_is_unloaded(host: Host) -> None:
    assert not host.trainer.loaded and host.trainer.pid is None
    pids = []
    for _ in range(2):
        number = host.ask("x")
        reply = host.answer()
        assert isinstance(reply, Exported) and reply.id == number
        pids.append(int(reply.folder))
    assert pids[0] == pids[1] == host.trainer.pid and host.trainer.loaded
    host.trainer.unload()
    assert not host.trainer.loaded and not psutil.pid_exists(pids[0])
    host.ask("x")
    reply = host.answer()
    assert isinstance(reply, Exported) and int(reply.folder) != pids[0]


@pytest.mark.parametrize(
    ("what", "status", "word"), [("die", -11, "SIGSEGV"), ("kill", -9, "SIGKILL"), ("exit", 3, "status 3")]
)
def test_death_is_an_event_and_the_next_request_starts_another(
    host: Host, what: str, status: int, word: str
) -> None:
    number = host.ask(what)
    reply = host.answer()
    assert isinstance(reply, Died) and (reply.id, reply.exit, reply.memory) == (number, status, False)
    assert word in reply.message
    if what == "exit":
        assert "no such thing" in reply.message
    assert not host.trainer.loaded
    host.ask("x")
    assert isinstance(host.answer(), Exported)


def test_after_it_ran_out_of_memory_another_begins(host: Host) -> None:
    host.ask("memory")
    reply = host.answer()
    assert isinstance(reply, Failed) and reply.cause == "memory"
    first = int(reply.message.split()[-1])
    host.ask("x")
    reply = host.answer()
    assert isinstance(reply, Exported) and int(reply.folder) != first and not psutil.pid_exists(first)


def test_it_starts_under_the_allocator_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    best = find_allocator().library
    for wanted, expected in (("auto", str(best) if best else "none"), ("glibc", "none")):
        host = Host(tmp_path, allocator=wanted)
        host.ask("allocator")
        reply = host.answer()
        assert isinstance(reply, Exported) and reply.folder == expected
        host.trainer.close()
    assert "LD_PRELOAD" not in os.environ
    with pytest.raises(ConfigError, match="not there"):
        ProcessTrainer(tmp_path, allocator="/no/such/lib.so")


def test_a_worker_that_talks_nonsense_is_ended(host: Host) -> None:
    host.ask("garbage")
    reply = host.answer()
    assert isinstance(reply, Died) and reply.exit == -signal.SIGTERM and not reply.memory
    assert "not understood" in reply.message


def test_interrupt_ends_a_request(host: Host) -> None:
    host.ask("wait")
    assert isinstance(host.replies.get(timeout=20), Progress)
    host.trainer.interrupt()
    reply = host.answer()
    assert isinstance(reply, Failed) and reply.cause == "interrupted" and host.trainer.loaded


def test_unload_in_the_middle_says_nothing_more(host: Host) -> None:
    host.ask("wait")
    assert isinstance(host.replies.get(timeout=20), Progress)
    host.trainer.unload()
    assert host.replies.empty() and not host.trainer.loaded


def test_the_log_is_bounded(host: Host, tmp_path: Path) -> None:
    host.ask("loud")
    assert isinstance(host.answer(), Exported)
    host.trainer.unload()
    sizes = [path.stat().st_size for path in tmp_path.glob("trainer.log*")]
    assert len(sizes) == 2 and sum(sizes) < 2.5e6


def test_no_descriptor_but_its_own_is_inherited(tmp_path: Path) -> None:
    extra = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(extra, True)
    host = Host(tmp_path)
    try:
        host.ask("fds")
        reply = host.answer()
        assert isinstance(reply, Exported)
        fds, offline, folder = reply.folder.split()
        # 0-2, its socket, and the one that lists the folder.
        assert len(fds.split(",")) == 5 and offline == "1" and folder == str(tmp_path)
    finally:
        os.close(extra)
        host.trainer.close()


def test_a_hub_id_may_use_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    host = Host(tmp_path, offline=False)
    host.ask("fds")
    reply = host.answer()
    assert isinstance(reply, Exported) and reply.folder.split()[1] == "None"
    host.trainer.close()


def test_a_command_that_does_not_exist_is_a_death(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.trainer._command = ["/no/such/program"]
    host.ask("x")
    reply = host.answer()
    assert isinstance(reply, Died) and reply.exit == 127


def test_a_killed_host_leaves_no_worker(tmp_path: Path) -> None:
    """A real process holds a real worker in the middle of work, and is killed with SIGKILL."""
    script = tmp_path / "host.py"
    script.write_text(
        "import sys, time\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
        "from pathlib import Path\n"
        "from test_agent_process_trainer import Host\n"
        f"host = Host(Path({str(tmp_path)!r}))\n"
        "host.ask('wait')\n"
        "host.replies.get(timeout=20)\n"
        "print(host.trainer.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        assert worker.is_running()
        parent.kill()
    deadline = time.monotonic() + 20
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_a_request_to_a_trainer_that_is_dying_is_answered_all_the_same(host: Host) -> None:
    for wait in range(12):
        host.ask("x")
        assert isinstance(host.answer(), Exported)
        assert host.trainer.pid is not None
        os.kill(host.trainer.pid, signal.SIGKILL)
        time.sleep(wait / 2000)
        number = host.ask("x")
        assert host.answer().id == number


def test_a_trainer_that_is_buried_takes_no_request(host: Host) -> None:
    host.ask("die")
    assert isinstance(host.answer(), Died)
    child = host.trainer._child
    assert child is not None and not child.take(7) and child.active is None

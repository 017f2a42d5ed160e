"""The trainer as a process of its own: torch's memory ends with it, and its death is only an event.

Host and worker speak framed JSON over a socket pair. The worker ends when the pair closes, so that an agent
that is killed leaves no trainer behind.
"""

from __future__ import annotations

import logging
import os
import signal
import site
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from edge_sdk.agent.trainer_log import TrainerLog
from edge_sdk.device.allocators import find_allocator
from edge_sdk.device.cgroups import memory_group, oom_kills
from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.pipe import Unframer, frame
from edge_sdk.protocol.trainer import (
    Died,
    Failed,
    Interrupt,
    Progress,
    TrainerReply,
    TrainerRequest,
    decode_reply,
)

__all__ = ["ProcessTrainer", "trainer_environment"]

_log = logging.getLogger(__name__)
_WORKER = ("-m", "edge_sdk.training.worker")
_GRACE_S = 5.0
_READ = 1 << 16
_ROOT = Path("/")


class ProcessTrainer:
    """A TrainerHost whose work is done by ``python -m edge_sdk.training.worker``.

    The process is started by the first request and ended by ``unload``; the next request starts another, as
    does the one after a request that ran out of memory.

    Args:
        folder: where it runs, and where its ``trainer.log`` is kept (at most 2 MiB).
        offline: forbid Hugging Face's libraries the network; needless downloads fail instead of hanging.
        allocator: what allocates its memory, as ``trainer.allocator`` in the config; preloaded for it alone.
            ConfigError where one is named that is not there.
        command: what to start instead of the worker, for tests; ``--fd N`` is appended.
    """

    def __init__(
        self,
        folder: Path,
        *,
        offline: bool = True,
        allocator: str = "auto",
        command: Sequence[str] | None = None,
    ) -> None:
        self._folder = folder
        self._environment = trainer_environment(offline=offline, allocator=allocator)
        self._command = [sys.executable, *_WORKER] if command is None else list(command)
        self._deliver: Callable[[TrainerReply], None] | None = None
        self._lock = threading.Lock()
        self._child: _Child | None = None

    @property
    def loaded(self) -> bool:
        return self._child is not None and self._child.alive

    @property
    def pid(self) -> int | None:
        return self._child.process.pid if self._child is not None and self._child.alive else None

    def start(self, deliver: Callable[[TrainerReply], None]) -> None:
        self._deliver = deliver

    def request(self, request: TrainerRequest) -> None:
        with self._lock:
            child = self._child
            if child is None or not child.take(_id(request)):
                if child is not None:
                    child.end()  # what it holds is free before another takes memory
                try:
                    child = self._child = self._spawn(_id(request))
                except OSError as error:
                    self._tell(
                        Died(id=_id(request), memory=False, exit=127, message=f"cannot be started: {error}")
                    )
                    return
        child.send(request)

    def interrupt(self) -> None:
        child = self._child
        if child is not None and child.active is not None:
            child.send(Interrupt())

    def unload(self) -> None:
        """Ends the process; what it was doing is not answered any more."""
        with self._lock:
            child, self._child = self._child, None
        if child is not None:
            child.end()

    def close(self) -> None:
        self._deliver = None
        self.unload()

    def _spawn(self, first: int) -> _Child:
        self._folder.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = subprocess.Popen(
                    [*self._command, "--fd", str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    cwd=self._folder,
                    env=self._environment,
                    # Its own session: Ctrl-C reaches the agent alone, which ends it in order.
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        return _Child(process, ours, TrainerLog(self._folder / "trainer.log"), self._tell, first)

    def _tell(self, reply: TrainerReply) -> None:
        deliver = self._deliver
        if deliver is not None:
            deliver(reply)


class _Child:
    """One worker process and the thread that reads what it says."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        pipe: socket.socket,
        log: TrainerLog,
        tell: Callable[[TrainerReply], None],
        first: int,
    ) -> None:
        self.process = process
        self.active: int | None = first
        self._burial = threading.Lock()
        self.alive = True
        self._spent = False
        self._pipe = pipe
        self._log = log
        self._tell = tell
        self._wanted = True
        self._group: Path | None = None
        self._kills_before = oom_kills(_ROOT, None)
        self._watch_group()
        self._logger = threading.Thread(target=self._read_log, name="trainer-log", daemon=True)
        self._reader = threading.Thread(target=self._read_replies, name="trainer-replies", daemon=True)
        self._logger.start()
        self._reader.start()

    def take(self, request: int) -> bool:
        """Makes this the request that is answered, by ``Died`` at the least. False: it is of no more use.

        Dead, or out of memory once: its heap is in pieces then, and what would fit might not.
        """
        with self._burial:
            fit = self.alive and not self._spent
            if fit:
                self.active = request
            return fit

    def send(self, request: TrainerRequest) -> None:
        try:
            self._pipe.sendall(frame(msgspec.json.encode(request)))
        except OSError:
            # It just died: the reader finds out, and tells how.
            _log.debug("the trainer was gone before a request reached it")

    def end(self) -> None:
        """Closes the pair, on which the worker exits; kills it where it does not."""
        self._wanted = False
        self._shut()
        try:
            self.process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if threading.current_thread() is not self._reader:  # a reply may be answered with a request at once
            self._reader.join(_GRACE_S)
        self._logger.join(_GRACE_S)

    def _shut(self) -> None:
        try:
            self._pipe.shutdown(socket.SHUT_RDWR)
        except OSError:
            _log.debug("the trainer's socket was closed already")

    def _read_replies(self) -> None:
        unframer = Unframer()
        try:
            while data := self._pipe.recv(_READ):
                self._watch_group()
                for message in unframer.feed(data):
                    self._pass_on(decode_reply(message))
        except OSError as error:
            _log.debug("the trainer's socket ended: %s", error)
        except ProtocolError as error:
            self._log.write(f"not understood by the agent: {error}\n".encode())
            self.process.terminate()  # not SIGKILL: that is what memory's death looks like
        self._bury()

    def _pass_on(self, reply: TrainerReply) -> None:
        if self._wanted and reply.id == self.active:
            if not isinstance(reply, Progress):
                self.active = None
            self._spent |= isinstance(reply, Failed) and reply.cause == "memory"
            self._tell(reply)

    def _watch_group(self) -> None:
        """Which memory group it is in; whoever limits it may put it into another one after its start."""
        group = memory_group(_ROOT, self.process.pid)
        if group is not None and group != self._group:
            self._group, self._kills_before = group, oom_kills(_ROOT, group)

    def _bury(self) -> None:
        """The pair is closed: the process is gone, or has nothing more to say."""
        self._shut()
        try:
            exit_status = self.process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            exit_status = self.process.wait()
        self._logger.join(_GRACE_S)
        with self._burial:
            self.alive = False
            active, self.active = self.active, None
        self._pipe.close()
        if self._wanted and active is not None:
            memory = exit_status == -signal.SIGKILL and oom_kills(_ROOT, self._group) > self._kills_before
            self._tell(Died(id=active, memory=memory, exit=exit_status, message=self._epitaph(exit_status)))

    def _epitaph(self, status: int) -> str:
        try:
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        except ValueError:
            how = f"ended with status {status}"
        last = self._log.last_line()
        return f"the trainer was {how}"[:200] + (f": {last[:500]}" if last else "")

    def _read_log(self) -> None:
        stream = self.process.stdout
        if stream is not None:
            with stream, self._log:
                while data := os.read(stream.fileno(), _READ):
                    self._log.write(data)


def _id(request: TrainerRequest) -> int:
    if isinstance(request, Interrupt):
        raise TypeError("an interrupt is sent by interrupt()")
    return request.id


def trainer_environment(*, offline: bool, allocator: str) -> dict[str, str]:
    """What the trainer's process is started with. ConfigError where the allocator named is not there."""
    env = dict(os.environ)
    env["TOKENIZERS_PARALLELISM"] = "false"
    # Threads that spin while they wait make each other three times slower where cores are shared.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if offline:
        env["HF_HUB_OFFLINE"] = "1"
    root = str(Path(__file__).resolve().parents[2])
    if root not in [*site.getsitepackages(), site.getusersitepackages()]:
        # Run from a source tree: the worker starts in another folder and must find the same package.
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    return {**env, **find_allocator(allocator).environment()}

"""A worker that does as it is told by the request's base: answer, die, hang, talk too much."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import msgspec

from edge_sdk.protocol.pipe import Unframer, frame
from edge_sdk.protocol.trainer import Export, Exported, Failed, Interrupt, Progress, decode_request


def main() -> None:
    pair = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
    interrupted = threading.Event()
    unframer = Unframer()

    def reply(record: object) -> None:
        pair.sendall(frame(msgspec.json.encode(record)))

    def work(request: Export) -> None:
        match request.base:
            case "die":
                sys.stderr.write("about to die\n")
                sys.stderr.flush()
                os.kill(os.getpid(), signal.SIGSEGV)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                sys.stderr.write("no such thing\n")
                sys.stderr.flush()
                os._exit(3)
            case "garbage":
                pair.sendall(b"\xff" * 64)
                time.sleep(60)
            case "wait":
                reply(Progress(id=request.id, stage="training", done=0, total=1))
                interrupted.wait(60)
                reply(Failed(id=request.id, cause="interrupted", message="interrupted"))
            case "loud":
                sys.stderr.write("x" * 100 + "\n")
                for _ in range(30):
                    sys.stderr.write("y" * 100_000 + "\n")
                sys.stderr.flush()
                reply(Exported(id=request.id, folder=request.folder))
            case "memory":
                reply(Failed(id=request.id, cause="memory", message=f"out of memory in {os.getpid()}"))
            case "allocator":
                reply(Exported(id=request.id, folder=os.environ.get("LD_PRELOAD", "none")))
            case "fds":
                told = ",".join(sorted(path.name for path in Path("/proc/self/fd").iterdir()))
                reply(
                    Exported(id=request.id, folder=f"{told} {os.environ.get('HF_HUB_OFFLINE')} {Path.cwd()}")
                )
            case _:
                reply(Progress(id=request.id, stage="training", done=1, total=1))
                reply(Exported(id=request.id, folder=str(os.getpid())))

    while data := pair.recv(1 << 16):
        for message in unframer.feed(data):
            request = decode_request(message)
            if isinstance(request, Interrupt):
                interrupted.set()
            else:
                threading.Thread(target=work, args=(request,), daemon=True).start()
    os._exit(0)


if __name__ == "__main__":
    main()

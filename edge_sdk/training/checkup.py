"""``python -m edge_sdk.training.checkup``: tries out what training needs, and says what it saw.

A process of its own, since what is tried may end it: native code for another processor, a GPU driver that
is not the one torch was built for. Each step is announced before it begins, so that whoever reads knows
which one was the last; ``--skip STEP`` leaves it out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import logging
import mmap
import os
import resource
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from edge_sdk.protocol.base import Record
from edge_sdk.protocol.checkup import Accounting, Begun, Decoding, Kernel, Packing, StepFailed, Versions
from edge_sdk.training.allocator import allocator_kind, allocator_word, settle_allocator

__all__ = ["main", "not_limited"]

_OTHERS = ("transformers", "peft", "safetensors", "tokenizers", "numpy")
_GROWTH = 64 << 20
_TOO_MUCH = 256 << 20


def accounting() -> Accounting:
    no_mark = ""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        no_mark = error.strerror or str(error)
    return Accounting(
        allocator=allocator_kind(), allocator_word=allocator_word(), no_mark=no_mark, no_limit=not_limited()
    )


def not_limited() -> str:
    """Why a limit on this process's memory has no effect; empty: what is above it is refused.

    Tried: more than the limit leaves is mapped, and given back untouched.
    """
    held = _data_bytes()
    before = resource.getrlimit(resource.RLIMIT_DATA)
    hard = before[1]
    limit = held + _GROWTH
    if hard != resource.RLIM_INFINITY and limit > hard:
        return ""  # a harder limit stands already
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        mmap.mmap(-1, _TOO_MUCH, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return ""
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    return f"{_TOO_MUCH >> 20} MiB were given beyond a limit of {_GROWTH >> 20} MiB (RLIMIT_DATA)"


def _data_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) << 10
    return 0


def versions() -> Versions:
    import torch

    from edge_sdk.training.lean import keep_lean

    keep_lean()  # as the trainer does
    for name in ("transformers", "safetensors.torch"):
        importlib.import_module(name)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Versions(
        torch=str(torch.__version__),
        others={name: version for name in _OTHERS if (version := _version(name))},
        cuda=torch.version.cuda,
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(found)),
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def kernel(device: str) -> Kernel:
    """Small whole numbers: every device must get exactly what the arithmetic of integers gives."""
    import torch

    rows = (torch.arange(64 * 96).reshape(64, 96) * 7) % 11 - 5
    columns = (torch.arange(96 * 32).reshape(96, 32) * 5) % 13 - 6
    left = rows.to(device, torch.float32).requires_grad_()
    right = columns.to(device, torch.float32).requires_grad_()
    product = left @ right
    product.sum().backward()
    wanted = (rows @ columns, columns.sum(1).expand(64, 96), rows.sum(0)[:, None].expand(96, 32))
    for what, got, right_one in zip(
        ("a product", "its gradient", "its gradient"), (product, left.grad, right.grad), wanted, strict=True
    ):
        if got is None or not torch.equal(got.detach().cpu(), right_one.float()):
            raise ArithmeticError(f"{what} came out wrong on {device}")
    kind = torch.device(device)
    return Kernel(device=device, name=torch.cuda.get_device_name(kind) if kind.type == "cuda" else "")


def packing(device: str) -> Packing:
    import torch

    from edge_sdk.training.activations import kernels, triton_kernels

    place = torch.device(device)
    rows = torch.linspace(-1.0, 3.0, 32 * 64, device=place).reshape(64, 32)
    for bits in (8, 4, 2):
        back = kernels.unpack_rows(kernels.pack_rows(rows, bits), bits, 32)
        span = rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True)
        if not bool(((back - rows).abs() <= 1.1 * span / (2**bits - 1)).all()):
            raise ArithmeticError(f"what was packed at {bits} bits came back wrong on {device}")
    if triton_kernels.available(place):
        return Packing(device=device, by="triton")
    return Packing(device=device, by="fbgemm" if kernels.has_kernel(place) else "torch")


def decoding(kind: str) -> Decoding:
    import torch

    from edge_sdk.training.precision.kernels import implementation, why_not

    place = torch.device(kind)
    reason = why_not("nf4", place)
    if reason is not None:
        return Decoding(kind=kind, why_not=reason)
    return Decoding(kind=kind, version=implementation("nf4", place).removeprefix("bitsandbytes "))


def _steps() -> Iterator[tuple[str, Callable[[], Record]]]:
    yield "accounting", accounting
    yield "versions", versions
    yield from _of_device("cpu")
    for i in range(_gpus()):
        yield from _of_device(f"cuda:{i}")
    if _gpus():
        yield "decoding cuda", lambda: decoding("cuda")


def _of_device(device: str) -> Iterator[tuple[str, Callable[[], Record]]]:
    yield f"kernel {device}", lambda: kernel(device)
    yield f"packing {device}", lambda: packing(device)
    if device == "cpu":
        yield "decoding cpu", lambda: decoding("cpu")


def _gpus() -> int:
    torch: Any = importlib.import_module("torch")
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m edge_sdk.training.checkup")
    parser.add_argument("--skip", action="append", default=[], metavar="STEP")
    skipped = set(parser.parse_args().skip)
    # Records alone go to standard output, whatever a library prints.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    logging.basicConfig(level=logging.ERROR)
    warnings.simplefilter("ignore")
    settle_allocator()

    def tell(record: Record) -> None:
        out.write(msgspec.json.encode(record) + b"\n")
        out.flush()

    for step, run in _steps():
        if step in skipped:
            continue
        tell(Begun(step=step))
        try:
            tell(run())
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            tell(StepFailed(step=step, error=f"{type(error).__name__}: {first}"[:1000]))
            if step == "versions":
                return  # nothing behind it can be tried


if __name__ == "__main__":
    main()

"""Findings about the training side: what its checkup said, and what to do about it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from edge_sdk.agent.doctor import prices
from edge_sdk.agent.doctor.checkup import run_checkup
from edge_sdk.agent.doctor.finding import Finding, of_error
from edge_sdk.config.agent import TrainerSection
from edge_sdk.device.accelerators import accelerators
from edge_sdk.device.machine import free_memory_mb
from edge_sdk.device.tegra import tegra_chip
from edge_sdk.errors import ConfigError, MissingExtraError, TrainerError
from edge_sdk.protocol.checkup import (
    Accounting,
    CheckupLine,
    Decoding,
    Kernel,
    Packing,
    StepFailed,
    Versions,
)

__all__ = ["training_findings"]

_NEEDED_MB = 400
"""What the checkup takes: 254 MB with a torch for the processor alone; more with CUDA."""
_EXTRA = "pip install 'edge-sdk[train]'"

Checkup = Callable[[str], Sequence[CheckupLine]]


def training_findings(
    root: Path,
    trainer: TrainerSection,
    allocator: str = "auto",
    *,
    limited: bool = False,
    checkup: Checkup = run_checkup,
    is_there: Callable[[str], object | None] = importlib.util.find_spec,
) -> Iterator[Finding]:
    missing = [name for name in ("torch", "transformers", "safetensors") if is_there(name) is None]
    if missing:
        yield Finding(
            id="torch", level="error",
            text=f"training cannot be checked, and does not run here: without {', '.join(missing)}",
            fix=_EXTRA, exit_code=MissingExtraError.exit_code,
        )  # fmt: skip
        names = ("kernel", "allocator", "memory-peak", "memory-limit", "packing", "bitsandbytes")
        for name in names:
            yield Finding(id=name, level="skipped", text="only the extra 'train' can tell", fix=_EXTRA)
        return
    free = free_memory_mb(root)
    if free is not None and free < _NEEDED_MB:
        yield Finding(
            id="torch", level="skipped",
            text=f"training was not checked: that takes {_NEEDED_MB} MB, and {free:.0f} are free",
            fix="stop the agent or other programs, and ask again",
        )  # fmt: skip
        return
    try:
        lines = checkup(allocator)
    except ConfigError as error:
        yield of_error("allocator", error)
        lines = checkup("auto")
    for line in lines:
        match line:
            case Accounting():
                yield from _accounting(line, limited=limited)
            case Versions():
                yield from _versions(line, root, trainer)
            case Kernel():
                named = f" ({line.name})" if line.name else ""
                yield Finding(id="kernel", level="ok", text=f"{line.device}{named} computes, and rightly")
            case Packing():
                yield _packing(line)
            case Decoding():
                yield _decoding(line, trainer)
            case StepFailed():
                yield _failed(line, trainer)


def _accounting(line: Accounting, *, limited: bool) -> Iterator[Finding]:
    if line.allocator == "glibc" and limited:
        yield Finding(
            id="allocator", level="ok", text=f"the trainer's memory is allocated by {line.allocator_word}, "
            f"which under a memory limit is the better one: {prices.LIMITED}",
        )  # fmt: skip
    elif line.allocator == "glibc":
        yield Finding(
            id="allocator", level="note", text=f"the trainer's memory is allocated by {line.allocator_word}: "
            f"{prices.ALLOCATOR}",
            fix=f"{_EXTRA} brings mimalloc; Debian's libtcmalloc-minimal4 brings tcmalloc; "
            'trainer.allocator = "auto"',
        )  # fmt: skip
    elif line.allocator == "other":
        yield Finding(
            id="allocator", level="warning", text=f"{line.allocator_word} allocates: memory peaks vary more",
            fix=f"{_EXTRA} brings mimalloc",
        )  # fmt: skip
    else:
        yield Finding(
            id="allocator", level="ok", text=f"the trainer's memory is allocated by {line.allocator_word}"
        )
    if line.no_mark:
        yield Finding(
            id="memory-peak", level="warning",
            text=f"the highest memory cannot be cleared ({line.no_mark}): measured peaks are those of the "
            "trainer's whole life, and the chosen depth may be lower than could be",
            fix="let the container write /proc/self/clear_refs",
        )  # fmt: skip
    else:
        yield Finding(id="memory-peak", level="ok", text="the highest memory is measured for each training")
    if line.no_limit:
        yield Finding(
            id="memory-limit", level="warning",
            text=f"this kernel does not hold a process to a limit: {line.no_limit}; limits.memory_mb is "
            "compared with what was used between layers only",
            fix="install tcmalloc (Debian: libtcmalloc-minimal4), which limits itself",
        )  # fmt: skip
    else:
        yield Finding(id="memory-limit", level="ok", text="the kernel holds the trainer to limits.memory_mb")


def _versions(line: Versions, root: Path, trainer: TrainerSection) -> Iterator[Finding]:
    built = f"for CUDA {line.cuda}" if line.cuda else "without CUDA"
    rest = ", ".join(f"{name} {version}" for name, version in line.others.items())
    yield Finding(id="torch", level="ok", text=f"torch {line.torch} {built}, {rest}")
    names, _ = accelerators(root)
    wanted = trainer.device.removeprefix("cuda")
    number = int(wanted.removeprefix(":") or 0) if wanted != trainer.device else None
    if number is not None and number >= len(line.gpus):
        yield Finding(
            id="gpu", level="error",
            text=f'trainer.device is "{trainer.device}", and torch sees {len(line.gpus)} GPUs',
            fix=_gpu_fix(line, root), exit_code=TrainerError.exit_code,
        )  # fmt: skip
    elif names and not line.gpus:
        yield Finding(
            id="gpu", level="warning",
            text=f"{', '.join(names)} is here, and torch ({built}) does not see it: the processor trains",
            fix=_gpu_fix(line, root),
        )  # fmt: skip
    elif not names and not line.gpus:
        yield Finding(id="gpu", level="skipped", text="there is no NVIDIA GPU; the processor trains")


def _gpu_fix(line: Versions, root: Path) -> str:
    if tegra_chip(root):
        return "install the torch that NVIDIA builds for this JetPack; the common one is for other GPUs"
    if line.cuda is None:
        return "install a torch that is built for CUDA, or set trainer.device"
    return f"is the driver loaded and new enough for CUDA {line.cuda} (nvidia-smi), and the user let at it?"


def _packing(line: Packing) -> Finding:
    if line.by != "torch":
        who = {"fbgemm": "torch's FBGEMM kernels", "triton": "Triton kernels"}[line.by]
        return Finding(id="packing", level="ok", text=f"{line.device}: activations are packed by {who}")
    if line.device == "cpu":
        fix = "a torch that is built with FBGEMM has the kernels"
        return Finding(id="packing", level="note", text=f"cpu: {prices.PACKING}", fix=fix)
    return Finding(
        id="packing", level="note",
        text=f"{line.device}: composed operations pack; how much quicker Triton's would be was not measured",
        fix="install triton (it comes with torch for CUDA on x86-64)",
    )  # fmt: skip


def _decoding(line: Decoding, trainer: TrainerSection) -> Finding:
    if line.version:
        text = f"bitsandbytes {line.version} decodes NF4 on {line.kind}"
        return Finding(id="bitsandbytes", level="ok", text=text)
    used = trainer.base_precision == "nf4" or trainer.base_plan is not None
    if line.why_not == "it is not installed":
        why, fix = "bitsandbytes is not installed", "pip install 'edge-sdk[bnb]'"
    else:
        why = f"bitsandbytes is installed and of no use here ({line.why_not})"
        fix = "install a release with native kernels for this processor and this CUDA, or take it out"
    effect = "" if used else "; nothing to this base, which is not held in NF4"
    return Finding(
        id="bitsandbytes", level="note", text=f"{line.kind}: {why}: {prices.DECODING}{effect}", fix=fix
    )


def _failed(line: StepFailed, trainer: TrainerSection) -> Finding:
    step, _, device = line.step.partition(" ")
    where = f" on {device}" if device else ""
    fixes = {
        "versions": f"{_EXTRA}, in an environment of its own where packages of others are in the way",
        "kernel": "install a torch that is built for this processor, GPU and driver, or set trainer.device",
        "decoding": "take bitsandbytes out; torch decodes as well",
        "start": "run `python -m edge_sdk.training.checkup` and look at what it says",
    }
    names = {"versions": "torch", "start": "torch", "end": "torch", "accounting": "memory-limit",
             "decoding": "bitsandbytes"}  # fmt: skip
    if "SIGKILL" in line.error:
        fix = "it was killed, most often for want of memory: stop other programs, and ask again"
    else:
        fix = fixes.get(step, "ask again; where it stays, report it with this text")
    whats = {
        "versions": "torch and transformers cannot be imported",
        "kernel": f"a kernel failed{where}",
        "start": "the check of training did not begin",
    }
    what = whats.get(step, f"{step} failed{where}")
    used = {"cpu", "cuda:0" if trainer.device in ("auto", "cuda") else trainer.device}
    crucial = step in ("versions", "start") or (step == "kernel" and device in used)
    return Finding(
        id=names.get(step, step), level="error" if crucial else "warning", text=f"{what}: {line.error}",
        fix=fix, exit_code=TrainerError.exit_code if crucial else 0,
    )  # fmt: skip

"""The one form of every benchmark's result: who made it, on what, the raw rows, and what they claim."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

__all__ = ["Claim", "at_least", "at_most", "write_result"]

_PACKAGES = ("torch", "transformers", "peft", "numpy", "paho-mqtt", "msgspec", "psutil", "amqtt")


@dataclass(frozen=True)
class Claim:
    """A sentence that the rows bear out, or do not: then it stays, with ``holds`` false."""

    id: str
    text: str
    value: float | int | bool
    bound: str
    holds: bool


def at_most(claim_id: str, text: str, value: float, bound: float) -> Claim:
    return Claim(claim_id, text, round(value, 4), f"<= {bound}", value <= bound)


def at_least(claim_id: str, text: str, value: float, bound: float) -> Claim:
    return Claim(claim_id, text, round(value, 4), f">= {bound}", value >= bound)


def machine() -> dict[str, Any]:
    """Processor, cores, memory and versions; nothing that names a person or a host."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_mb": round(psutil.virtual_memory().total / 1e6),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def write_result(
    folder: Path,
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    claims: Sequence[Claim],
    name: str = "result.json",
) -> Path:
    result = {
        "made": {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "commit": _commit()},
        "machine": machine(),
        "config": dict(config),
        "rows": [dict(row) for row in rows],
        "claims": [asdict(claim) for claim in claims],
    }
    path = folder / name
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.text}: {claim.value} ({claim.bound})")
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(names, platform.processor())


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return done.stdout.strip() or "unknown"

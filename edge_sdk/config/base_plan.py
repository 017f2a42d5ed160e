"""The file of a base plan: what ``edge-agent quantize-base --out`` writes and ``trainer.base_plan`` names."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from edge_sdk.errors import ConfigError
from edge_sdk.protocol.base_plan import BasePlan

__all__ = ["read_plan", "write_plan"]

_MAX_BYTES = 1 << 20


def read_plan(path: str | Path) -> BasePlan:
    """Raises ConfigError for anything but an intact plan."""
    path = Path(path)
    hint = "make it anew with `edge-agent quantize-base --out FILE`"
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: is above {_MAX_BYTES >> 20} MiB, so no base plan", hint)
        plan = msgspec.json.decode(path.read_bytes(), type=BasePlan)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", hint) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: is no base plan: {error}", hint) from None
    if [block.block for block in plan.blocks] != list(range(len(plan.blocks))):
        raise ConfigError(f"{path}: its blocks are not numbered from 0, each once", hint)
    return plan


def write_plan(path: Path, plan: BasePlan) -> None:
    """Whole or not at all. Raises ConfigError."""
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(plan), indent=1) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}", "name a file in a folder that exists"
        ) from None

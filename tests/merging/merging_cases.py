"""Devices' updates of one module, written as a device writes them, and dense arithmetic to compare with."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from updates_fakes import FINGERPRINT

from aggregator.merging.base import Contribution
from edge_sdk.updates.container import header_for, read_container, write_container

A, B = "0.m.A", "0.m.B"


def adapter(rank=3, inputs=7, outputs=5, seed=0, b=True):
    draw = np.random.default_rng(seed)
    size = draw.normal(size=(rank, outputs)) if b else np.zeros((rank, outputs))
    return {A: draw.normal(size=(rank, inputs)).astype(np.float32), B: size.astype(np.float32)}


def contribute(folder: Path, changes, device, samples=10, *, weight=1.0, slots=None, codec="fp32", round=1):
    header = header_for("update", changes, codec, run="r", round=round, fingerprint=FINGERPRINT, builds_on=0)
    if slots is not None:
        slots = slots if isinstance(slots, dict) else dict.fromkeys(changes, slots)
        parts = tuple(msgspec.structs.replace(part, slots=slots[part.key]) for part in header.parts)
        header = msgspec.structs.replace(header, parts=parts)
    path = folder / f"{device}-{round}"
    write_container(path, header, changes)
    return Contribution(path, device, samples, weight)


def fleet(folder: Path, current, devices=4, seed=1, **how):
    """Devices that changed both factors, and what each changed."""
    draw = np.random.default_rng(seed)
    made = []
    for number in range(devices):
        changes = {key: draw.normal(size=rows.shape).astype(np.float32) for key, rows in current.items()}
        made.append(contribute(folder, changes, f"d{number}", 5 + 7 * number, **how))
    return made


def product(adapter, prefix=""):
    return adapter[prefix + B].astype(np.float64).T @ adapter[prefix + A].astype(np.float64)


def mean_product(current, contributions):
    """The weighted mean of what each device's adapter does, dense."""
    total, weights = 0.0, 0.0
    for one in contributions:
        with read_container(one.path) as container:
            ends = {key: rows.astype(np.float64) for key, rows in current.items()}
            for key, part in container.parts.items():
                at = slice(None) if part.slots is None else list(part.slots)
                ends[key][at] += container.tensor(key)
        weight = one.samples * one.weight
        total = total + weight * (ends[B].T @ ends[A])
        weights += weight
    return total / weights

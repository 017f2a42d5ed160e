"""A trainer process without torch: says what a trainer says, and makes updates that only the request decides.

``python stub_trainer.py --fd N`` in the place of ``edge_sdk.training.worker``. It dies at the place that
``EDGE_SDK_KILL_AT`` names, once for each folder in ``STUB_ONCE``: whoever is started in its place lives.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import zlib
from pathlib import Path

import msgspec
import numpy as np

from edge_sdk.faults import VARIABLE
from edge_sdk.protocol.container import CODEC_FORMS
from edge_sdk.protocol.measure import Fit, Measured, ProbePoint
from edge_sdk.protocol.model import DensePart, LoraModule, ModelShape
from edge_sdk.protocol.pipe import Unframer, frame
from edge_sdk.protocol.spec import Candidate, TrainSpec
from edge_sdk.protocol.trainer import (
    Describe,
    Described,
    Evaluate,
    Evaluated,
    Interrupt,
    Probe,
    Probed,
    Train,
    Trained,
    decode_request,
)
from edge_sdk.updates.delta import write_update
from edge_sdk.updates.keys import part_sizes, tuned_keys
from edge_sdk.updates.residual import add_owed, read_residual, write_residual
from edge_sdk.updates.versions import read_adapter

TRAINER_PLACES = (
    "trainer.describing",
    "trainer.probing",
    "trainer.training",
    "trainer.update",
    "trainer.residual",
    "trainer.answered",
    "trainer.evaluating",
)
"""``trainer.update``: the update is written, the residual is not. ``trainer.residual``: both are, nothing was
answered."""

MECHANISMS = tuple(
    sorted(
        TrainSpec().needs()
        | Candidate(id="x", depth=1, quantized_layers=1).needs()
        | {f"codec:{name}" for name in CODEC_FORMS}
    )
)
ONCE = "STUB_ONCE"


IDLE = "STUB_IDLE"
"""Set: an update that changes nothing, made as cheaply as can be."""


def shape_of(size: str) -> ModelShape:
    """``LAYERSxMODULESxWIDTH``; an adapter of rank r has 2 r times the product of them, and a small head."""
    layers, modules, width = map(int, size.split("x"))
    return ModelShape(
        family="bert", layers=layers, hidden=width, intermediate=2 * width, heads=2, vocabulary=100,
        layer_path="bert.encoder.layer",
        modules=tuple(LoraModule(name=f"query{i}", inputs=width, outputs=width) for i in range(modules)),
        dense=(DensePart(name="classifier.weight", shape=(2, 16)),), parameters=10_000, base_bytes=40_000,
    )  # fmt: skip


SHAPE = shape_of(os.environ.get("STUB_SHAPE", "4x1x16"))


def reached(place: str) -> None:
    if os.environ.get(VARIABLE) == place:
        try:
            os.close(os.open(Path(os.environ[ONCE]) / place, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


def described(request: Describe) -> Described:
    reached("trainer.describing")
    return Described(
        id=request.id, base=request.setup.base, shape=SHAPE, rest_mb=100, samples=100, device="cpu",
        mechanisms=MECHANISMS, torch="0",
    )  # fmt: skip


def probed(request: Probe) -> Probed:
    reached("trainer.probing")
    points = (
        ProbePoint(depth=SHAPE.layers, quantized_layers=0, peak_mb=50, step_s=0.001),
        ProbePoint(depth=SHAPE.layers, quantized_layers=SHAPE.layers, peak_mb=30, step_s=0.001),
    )
    fit = Fit(
        micro_batch=request.setup.micro_batch, max_length=request.setup.max_length, levers=request.levers,
        rest_mb=100, head_mb=10, layer_mb=10, saved_mb=5, work_mb=0, forward_s=1e-4, layer_s=1e-4,
        quantize_s=0, probes=points,
    )  # fmt: skip
    return Probed(id=request.id, fit=fit)


def trained(request: Train) -> Trained:
    reached("trainer.training")
    began = time.perf_counter()
    random = np.random.default_rng(zlib.crc32(f"{request.device} {request.round}".encode()))
    idle = bool(os.environ.get(IDLE))
    if idle:
        start = {
            key: np.zeros(size, np.float32) for key, size in part_sizes(SHAPE, request.setup.lora).items()
        }
    else:
        start = read_adapter([Path(path) for path in request.versions])
    end = (
        start
        if idle
        else {
            key: rows + 0.01 * random.standard_normal(rows.shape, dtype=np.float32)
            for key, rows in start.items()
        }
    )
    residual = None
    if request.spec.error_feedback:
        residual = {} if request.residual is None else read_residual(Path(request.residual))
        residual = add_owed(residual, [Path(path) for path in request.owed])
    folder = Path(request.folder)
    facts = {"run": request.run, "round": request.round, "fingerprint": request.fingerprint}
    left = write_update(
        folder / "update.safetensors", **facts, builds_on=request.round - 1, start=start, end=end,
        keys=tuned_keys(SHAPE, request.candidate.depth), codec=request.candidate.codec, residual=residual,
    )  # fmt: skip
    reached("trainer.update")
    if left is not None:
        write_residual(folder / "residual.safetensors", left, **facts)
    reached("trainer.residual")
    measured = Measured(
        rest_mb=100, peak_mb=request.candidate.peak_mb,
        train_s=time.perf_counter() - began if idle else 0.001, step_s=0.001, steps=1,
        loss_first=2.0, loss_last=1.0,
    )  # fmt: skip
    return Trained(
        id=request.id, update=str(folder / "update.safetensors"),
        residual=None if left is None else str(folder / "residual.safetensors"), samples=40,
        measured=measured,
    )  # fmt: skip


def evaluated(request: Evaluate) -> Evaluated:
    reached("trainer.evaluating")
    adapter = read_adapter([Path(path) for path in request.versions])
    loss = float(np.mean([np.abs(rows).mean() for rows in adapter.values()]))
    return Evaluated(id=request.id, accuracy=0.5, loss=loss, examples=10, seconds=0.0)


def main() -> None:
    pair = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
    answers = {Describe: described, Probe: probed, Train: trained, Evaluate: evaluated}
    unframer = Unframer()
    while data := pair.recv(1 << 16):
        for message in unframer.feed(data):
            request = decode_request(message)
            if not isinstance(request, Interrupt):
                pair.sendall(frame(msgspec.json.encode(answers[type(request)](request))))
                reached("trainer.answered")


if __name__ == "__main__":
    main()

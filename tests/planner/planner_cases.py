"""Runs and statuses for the planner's tests."""

from __future__ import annotations

from aggregator.methods.fedquad import METHOD as FEDQUAD
from edge_sdk.config.run import (
    LoraSection,
    RoundsSection,
    RunBaseSection,
    RunConfig,
    RunSection,
    TrainingSection,
)
from edge_sdk.protocol.measure import Fit, Link, Memory, ProbePoint, Profile
from edge_sdk.protocol.model import DensePart, Fingerprint, LoraModule, LoraShape, ModelShape
from edge_sdk.protocol.spec import Levers, TrainSpec
from edge_sdk.protocol.wire import Run, Status

DIGEST = "0" * 64
FINGERPRINT = Fingerprint(
    base=DIGEST,
    tokenizer=DIGEST,
    labels=DIGEST,
    head="12x384",
    max_length=32,
    template=DIGEST,
    targets=("query",),
    rank=8,
    alpha=16.0,
)


def a_shape(layers: int = 6, hidden: int = 384) -> ModelShape:
    return ModelShape(
        family="bert",
        layers=layers,
        hidden=hidden,
        intermediate=4 * hidden,
        heads=12,
        vocabulary=30522,
        layer_path="bert.encoder.layer",
        modules=(LoraModule(name="query", inputs=hidden, outputs=hidden),),
        dense=(DensePart(name="classifier.weight", shape=(12, hidden)),),
        parameters=1,
        base_bytes=1,
    )


def a_run(layers: int = 6) -> Run:
    return Run(
        run="r",
        nonce="n",
        base="base",
        labels=("a", "b"),
        max_length=32,
        micro_batch=16,
        lora=LoraShape(rank=8),
        spec=TrainSpec(),
        shape=a_shape(layers),
        fingerprint=FINGERPRINT,
    )


def a_config(steps: int = 10, deadline_s: float | None = None, method: str = "fedquad") -> RunConfig:
    return RunConfig(
        run=RunSection(name="r", labels=("a", "b"), method=method, seed=5),
        base=RunBaseSection(path="base"),
        lora=LoraSection(),
        training=TrainingSection(steps=steps, batch=16, max_length=32, learning_rate=0.003),
        rounds=RoundsSection(deadline_s=deadline_s),
    )


def a_fit(
    pace: float = 1.0,
    *,
    head: float = 10.0,
    layer: float = 40.0,
    saved: float = 25.0,
    work: float = 6.0,
    quantize: float = 0.01,
    kinds: tuple[int, ...] = (0, 1),
    micro_batch: int = 16,
    levers: Levers = FEDQUAD.levers,
) -> Fit:
    """``kinds``: 0: plain layers were probed, 1: quantized ones."""
    return Fit(
        micro_batch=micro_batch,
        max_length=32,
        levers=levers,
        rest_mb=300.0,
        head_mb=head,
        layer_mb=layer,
        saved_mb=saved,
        work_mb=work,
        forward_s=0.1 * pace,
        layer_s=0.05 * pace,
        quantize_s=quantize * pace,
        probes=tuple(ProbePoint(depth=1, quantized_layers=kind, peak_mb=1.0, step_s=1.0) for kind in kinds),
    )


def a_status(
    device: str = "a",
    *,
    fit: Fit | None = None,
    budget_mb: float = 10_000.0,
    up_bps: float | None = None,
    samples: int = 100,
    mechanisms: tuple[str, ...] = ("activation:int8", "codec:int8"),
) -> Status:
    return Status(
        device=device,
        run="r",
        session=1,
        fingerprint=FINGERPRINT,
        mechanisms=mechanisms,
        samples=samples,
        profile=Profile(),
        fit=fit,
        memory=Memory(budget_mb=budget_mb, rest_mb=300.0),
        link=Link(up_bps=up_bps, source="configured" if up_bps else "unknown"),
    )

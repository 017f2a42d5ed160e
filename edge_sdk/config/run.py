"""Schema of ``run.toml``: everything that changes the mathematics, and where the server lives."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edge_sdk.config.agent import BaseSection, DataSection, TrainerSection
from edge_sdk.config.bounds import LARGEST, MAX_BATCH, MAX_LABELS, MAX_LENGTH, MAX_RANK, MAX_STEPS
from edge_sdk.config.broker import BrokerConfig
from edge_sdk.config.kinds import FolderPath
from edge_sdk.protocol.base import Name, NotNegative, Positive, Record, Text

__all__ = [
    "TEMPLATES",
    "EvaluationSection",
    "LoraSection",
    "MergeSection",
    "MetricsSection",
    "RoundsSection",
    "RunBaseSection",
    "RunConfig",
    "RunSection",
    "StorageSection",
    "TrainingSection",
    "TransferSection",
]

TEMPLATES = {"classification": "{text}", "causal-lm": "{prompt}\n{response}"}
Rate = Annotated[float, msgspec.Meta(gt=0, le=10)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=LARGEST)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class RunBaseSection(BaseSection, frozen=True, kw_only=True):
    layers: Text = ""
    """Path of the list of transformer layers in the model, where it cannot be found by structure."""


class RunSection(Record, frozen=True, kw_only=True):
    name: Name
    method: Text = "fedquad"
    """``fedquad``, ``fedavg``, an entry point of group ``edge_sdk.methods``, or ``package.module:name``."""
    task: Literal["classification", "causal-lm"] = "classification"
    labels: Annotated[tuple[Text, ...], msgspec.Meta(max_length=MAX_LABELS)] = ()
    """Of classification, two at least; a causal LM has none."""
    template: Text | None = None
    """How a row becomes the model's input. None: as ``TEMPLATES`` has it for the task.

    Classification: ``{text}`` is the text column. Causal LM: ``{prompt}`` and then ``{response}``, from which
    on the text is learnt; rows of text alone, and chats, have no use for it.
    """
    seed: int = 0
    state_dir: FolderPath = "server-state"

    @property
    def row_template(self) -> str:
        return TEMPLATES[self.task] if self.template is None else self.template


class LoraSection(Record, frozen=True, kw_only=True):
    rank: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)] = 8
    alpha: Annotated[float, msgspec.Meta(gt=0, le=LARGEST)] = 16.0
    targets: tuple[Text, ...] = ("all-linear",)


class TrainingSection(Record, frozen=True, kw_only=True):
    steps: Annotated[int, msgspec.Meta(ge=1, le=MAX_STEPS)] = 25
    batch: Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH)] = 16
    max_length: Annotated[int, msgspec.Meta(ge=1, le=MAX_LENGTH)] = 128
    accumulation: Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH)] = 1
    """Batches a step; memory is that of one."""
    optimizer: Literal["adamw", "adamw8bit", "paged-adamw8bit", "sgd"] = "adamw"
    factors: Literal["AB", "A", "B"] | None = None
    """Of each LoRA pair, what is trained; None: what the method says."""
    learning_rate: Rate = 2e-3
    head_learning_rate: Rate = 1e-2
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    clip_norm: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    warmup_steps: NotNegative = 0
    schedule: Literal["constant", "linear"] = "constant"
    prefix_form: Literal["exact", "fp16", "int8"] = "exact"


class RoundsSection(Record, frozen=True, kw_only=True):
    total: Positive = 10
    """One in which nobody delivered counts too: a run comes to its end whatever becomes of its devices."""
    min_devices: Positive = 1
    """A round waits until so many devices are there and ready."""
    deadline_s: Seconds | None = None
    """None: from the devices' predicted times."""
    linger_s: Annotated[float, msgspec.Meta(ge=0, le=LARGEST)] = 30.0
    """After the last round, how long to wait for devices to fetch the final version."""
    schedule: Literal["synchronous", "buffered"] | None = None
    """None: what the method says. ``buffered``: work for whoever is free, merges of ``buffer`` updates."""
    buffer: Positive = 10
    selection: Literal["all", "uniform", "utility"] | None = None
    """None: what the method says; all, or, where ``devices_per_round`` is set, uniform."""
    devices_per_round: Positive | Share | None = None
    """A count or a share of those who are ready. Of the buffered schedule: how many are at work at once."""
    over_select: Annotated[float, msgspec.Meta(ge=1, le=10)] = 1.0
    """So many times ``devices_per_round`` are offered work, as some will not deliver."""
    quorum: Share = 1.0
    """The share of ``devices_per_round``, or of all, whose updates close a round before its deadline."""
    late: Literal["merge", "refuse"] = "merge"
    """``merge``: an update that comes after its round counts in a later one, by its staleness."""
    max_staleness: NotNegative = 10
    """Versions that may have been made since; an older update is refused."""
    max_samples: Positive = 1_000_000
    """A device that says it has more rows is refused: it would outweigh all others by its word alone."""


class MergeSection(Record, frozen=True, kw_only=True):
    rule: Text | None = None
    """How updates become the next version; None: what the method says. See ``aggregator.merging``."""
    server_optimizer: Text | None = None
    """``none``, or how far the adapter goes along the merged change; None: what the method says."""
    server_learning_rate: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """This and the next three, of the server optimizer; None: its own."""
    momentum: Annotated[float, msgspec.Meta(ge=0, lt=1)] | None = None
    second_moment: Annotated[float, msgspec.Meta(ge=0, lt=1)] | None = None
    adaptivity: Annotated[float, msgspec.Meta(gt=0)] | None = None
    full_every: Annotated[int, msgspec.Meta(ge=1, le=256)] = 8
    """Every so many versions a full one, at 16 bits; the others are 8-bit deltas to the one before."""


class EvaluationSection(Record, frozen=True, kw_only=True):
    data: DataSection
    every: Positive = 1


class TransferSection(Record, frozen=True, kw_only=True):
    chunk_kib: Annotated[int, msgspec.Meta(ge=1, le=256)] = 256
    window: Annotated[int, msgspec.Meta(ge=1, le=256)] = 4
    max_update_mb: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 256.0


class StorageSection(Record, frozen=True, kw_only=True):
    keep_free_mb: Annotated[float, msgspec.Meta(ge=0, le=LARGEST)] = 100.0
    """Below so much room on the state folder's disk (10^6 bytes) the rounds pause until there is more."""
    keep_versions: bool = False
    """Keep the files of all versions; otherwise those that nobody needs any more go after each round."""


class MetricsSection(Record, frozen=True, kw_only=True):
    listen: (
        Annotated[
            str,
            msgspec.Meta(
                pattern=r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9_.-]+):\d{1,5}\Z",
                description='"host:port", "127.0.0.1:9464" say',
            ),
        ]
        | None
    ) = None
    """Where Prometheus reads metrics; None: nowhere."""


class RunConfig(Record, frozen=True, kw_only=True):
    """All of ``run.toml``. Paths are relative to the file and absolute after loading."""

    run: RunSection
    base: RunBaseSection
    broker: BrokerConfig = BrokerConfig()
    lora: LoraSection = LoraSection()
    training: TrainingSection = TrainingSection()
    rounds: RoundsSection = RoundsSection()
    merge: MergeSection = MergeSection()
    evaluation: EvaluationSection | None = None
    transfer: TransferSection = TransferSection()
    trainer: TrainerSection = TrainerSection()
    """Where the server's own evaluation runs."""
    storage: StorageSection = StorageSection()
    metrics: MetricsSection = MetricsSection()

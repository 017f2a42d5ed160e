"""Between the agent (or the server) and a trainer: requests, replies, and the TrainerHost interface.

Every request carries the whole ``Setup``: a trainer that lacks it loads it first, so that a restarted
process needs no other memory than the request. Tensors never travel here: files do, by path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Protocol

import msgspec

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.base import Digest, Name, NotNegative, Positive, Record, Text
from edge_sdk.protocol.base_plan import BasePlan, Bits, SalienceMethod
from edge_sdk.protocol.measure import Fit, Measured, Throughput
from edge_sdk.protocol.model import Fingerprint, LoraShape, ModelShape
from edge_sdk.protocol.spec import Candidate, Levers, TrainSpec

__all__ = [
    "BasePlanned",
    "DataSource",
    "Describe",
    "Described",
    "Died",
    "Evaluate",
    "Evaluated",
    "Export",
    "Exported",
    "Failed",
    "FailureCause",
    "Interrupt",
    "Measure",
    "PlanBase",
    "Probe",
    "Probed",
    "Progress",
    "Setup",
    "Timed",
    "Train",
    "Trained",
    "TrainerHost",
    "TrainerReply",
    "TrainerRequest",
]

Path = Text


class DataSource(Record, frozen=True, kw_only=True):
    """A file of rows, its format told by its suffix, and the names of the columns that a task may read.

    Classification reads ``text`` and ``label``. A causal LM reads ``messages``, or else ``prompt`` and
    ``response``, or else ``text``: the first of these that the file has.
    """

    path: Path
    text: Text = "text"
    label: Text = "label"
    prompt: Text = "prompt"
    response: Text = "response"
    messages: Text = "messages"


class Setup(Record, frozen=True, kw_only=True):
    """What a trainer holds: the base model with LoRA in every layer, and where it may run."""

    base: Path
    """Local folder, or a hub id where the config names one."""
    task: Text = "classification"
    labels: tuple[Text, ...]
    """Of classification; empty for other tasks."""
    template: Text = "{text}"
    max_length: Positive
    micro_batch: Positive
    lora: LoraShape
    layers: Text = ""
    """Path of the list of transformer layers in the model; "": it is found."""
    spec: TrainSpec
    device: Text = "auto"
    """``auto``, ``cpu`` or ``cuda:N``."""
    threads: NotNegative = 0
    """0: as many as torch likes."""
    memory_mb: float | None = None
    """Hard limit of what the trainer process may hold in all; None: no limit."""
    data: DataSource | None = None
    prefix_mb: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """What of the frozen layers' output may be kept over the epochs of a round; 0: it is computed anew."""
    prefix_place: Literal["memory", "disk"] = "memory"
    """``disk``: a file without a name in the training's folder."""
    base_precision: Text = "fp32"
    """What the frozen weights are held in; one of ``BASE_WORDS``."""
    base_plan: BasePlan | None = None
    """Bits of each block, where ``base_precision`` is ``plan``."""


class Describe(Record, frozen=True, kw_only=True, tag="describe"):
    """Find the base (fetch it, where a hub id is named), load it, and tell its shape."""

    id: NotNegative
    setup: Setup


class Probe(Record, frozen=True, kw_only=True, tag="probe"):
    """Measure a few settings and fit the cost model, staying within the memory limit."""

    id: NotNegative
    setup: Setup
    levers: Levers = Levers()


class Train(Record, frozen=True, kw_only=True, tag="train"):
    """Train one candidate from a version; write the update and the new residual into ``folder``."""

    id: NotNegative
    setup: Setup
    run: Name
    round: Positive
    device: Name
    fingerprint: Digest
    candidate: Candidate
    spec: TrainSpec
    versions: tuple[Path, ...]
    """Containers of the chain, a full version first."""
    residual: Path | None = None
    owed: tuple[Path, ...] = ()
    """Earlier updates that were never merged; added to the residual."""
    folder: Path


class Evaluate(Record, frozen=True, kw_only=True, tag="evaluate"):
    """How well a version does on the setup's data."""

    id: NotNegative
    setup: Setup
    versions: tuple[Path, ...]


class Export(Record, frozen=True, kw_only=True, tag="export"):
    """Write a version into ``folder``: a PEFT adapter, or folded into its base. Needs no model in memory."""

    id: NotNegative
    base: Path
    task: Text = "classification"
    labels: tuple[Text, ...]
    lora: LoraShape
    shape: ModelShape
    fingerprint: Fingerprint
    versions: tuple[Path, ...]
    folder: Path
    merged: bool = False
    """Base and adapter as one model."""
    card: Annotated[str, msgspec.Meta(max_length=1 << 20)] = ""
    """What to tell of the run, Markdown."""


class PlanBase(Record, frozen=True, kw_only=True, tag="plan-base"):
    """Measure the base's blocks and choose bits for each; the rows of ``setup.data`` are for calibration.

    One of ``budget_bytes`` (what the whole base may take) and ``bits`` (the same for every block) is given.
    """

    id: NotNegative
    setup: Setup
    budget_bytes: Positive | None = None
    bits: Bits | None = None
    method: SalienceMethod = "loss"
    rows: Positive = 32


class Measure(Record, frozen=True, kw_only=True, tag="measure"):
    """Time what every compute device of this machine computes and copies. Needs no model."""

    id: NotNegative
    threads: NotNegative = 0
    """0: as many as torch likes."""
    seconds: Annotated[float, msgspec.Meta(gt=0, le=600)] = 5.0
    """In all, not counting the import of torch."""
    until: float | None = None
    """On this boot's monotonic clock: less than ``seconds`` where the import left no more."""


class Interrupt(Record, frozen=True, kw_only=True, tag="interrupt"):
    """End the current request within a step; it fails with cause ``interrupted``. Has no reply of its own."""


TrainerRequest = Describe | Probe | Train | Evaluate | Export | PlanBase | Measure | Interrupt


class Described(Record, frozen=True, kw_only=True, tag="described"):
    id: NotNegative
    base: Path
    """The local folder that the base was found in."""
    shape: ModelShape
    rest_mb: float
    samples: NotNegative
    dropped: NotNegative = 0
    """Rows of a causal LM of which ``max_length`` left nothing to learn."""
    label_counts: tuple[int, ...] = ()
    device: Text
    """The device that the trainer computes on: ``cpu`` or ``cuda:N``."""
    gpu: Text = ""
    """Its UUID, as its driver knows it too; empty: it is no GPU, or torch does not tell."""
    mechanisms: tuple[Text, ...]
    base_held: Text = ""
    """What the base is held in, and what decodes it: ``nf4 by bitsandbytes 0.50.2``."""
    torch: Text
    allocator: Text = ""
    """What allocates the trainer's memory, with its version."""


class Probed(Record, frozen=True, kw_only=True, tag="probed"):
    id: NotNegative
    fit: Fit


class Progress(Record, frozen=True, kw_only=True, tag="progress"):
    id: NotNegative
    stage: Literal["loading", "probing", "training", "evaluating", "planning", "measuring"]
    done: NotNegative
    total: NotNegative
    loss: float | None = None
    tokens_per_s: float | None = None
    """Of the last step, padding not counted."""
    left_s: float | None = None
    """Until ``done`` is ``total``, at the pace of the last steps."""


class Trained(Record, frozen=True, kw_only=True, tag="trained"):
    id: NotNegative
    update: Path
    residual: Path | None
    samples: Positive
    measured: Measured


class Evaluated(Record, frozen=True, kw_only=True, tag="evaluated"):
    """Of classification per row, of a causal LM per predicted token. ``f1`` is told of the one,
    ``perplexity`` and ``tokens`` of the other."""

    id: NotNegative
    accuracy: float
    loss: float
    """Mean negative log likelihood, in nats."""
    f1: float | None = None
    """Mean over labels."""
    perplexity: float | None = None
    tokens: Positive | None = None
    examples: Positive
    seconds: float


class Exported(Record, frozen=True, kw_only=True, tag="exported"):
    id: NotNegative
    folder: Path


class BasePlanned(Record, frozen=True, kw_only=True, tag="base-planned"):
    id: NotNegative
    plan: BasePlan
    seconds: float


class Timed(Record, frozen=True, kw_only=True, tag="timed"):
    id: NotNegative
    throughput: tuple[Throughput, ...]
    """The processor first, then CUDA's devices in their order."""
    torch: Text
    seconds: float
    """What it took."""


FailureCause = Literal["memory", "data", "base", "mechanism", "extra", "container", "interrupted", "internal"]


class Failed(Record, frozen=True, kw_only=True, tag="failed"):
    """The request failed and the trainer lives on."""

    id: NotNegative
    cause: FailureCause
    message: Text
    hint: Text = ""


class Died(Record, frozen=True, kw_only=True, tag="died"):
    """The trainer process is gone; the host says so, since the trainer cannot."""

    id: NotNegative
    """The request that it died in."""
    memory: bool
    """Memory was the cause: it said so, or the cgroup's oom_kill count rose."""
    exit: int
    """Exit status; negative: the signal's number."""
    message: Text


TrainerReply = (
    Described | Probed | Progress | Trained | Evaluated | Exported | BasePlanned | Timed | Failed | Died
)


class TrainerHost(Protocol):
    """Something that trains: a process of its own, or one inside this process.

    One request at a time. Replies come through ``deliver``, from any thread, each bearing its request's
    id: any number of ``Progress``, then one of the others.
    """

    @property
    def loaded(self) -> bool:
        """Whether a trainer is running (and so holds memory)."""
        ...

    def start(self, deliver: Callable[[TrainerReply], None]) -> None: ...

    def request(self, request: TrainerRequest) -> None:
        """Begins a request; starts the trainer where needed."""
        ...

    def interrupt(self) -> None:
        """Ends the current request within a step: it fails with cause ``interrupted``."""
        ...

    def unload(self) -> None:
        """Ends the trainer and gives its memory back; the next request starts it again."""
        ...

    def close(self) -> None: ...


MAX_MESSAGE_BYTES = 4 << 20
_request_decoder = msgspec.json.Decoder(TrainerRequest)
_reply_decoder = msgspec.json.Decoder(TrainerReply)


def decode_request(data: bytes) -> Any:
    try:
        return _request_decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"not a trainer request: {error}") from error


def decode_reply(data: bytes) -> Any:
    try:
        return _reply_decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"not a trainer reply: {error}") from error

"""Schema of ``agent.toml``: who this device is, and where things lie on it. Nothing mathematical."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edge_sdk.config.base_plan import read_plan
from edge_sdk.config.bounds import LARGEST
from edge_sdk.config.broker import BrokerConfig
from edge_sdk.config.kinds import BasePath, FilePath, FolderPath
from edge_sdk.protocol.base import Name, NotNegative, Record, Text
from edge_sdk.protocol.base_plan import BasePlan
from edge_sdk.protocol.trainer import DataSource

__all__ = [
    "AgentConfig",
    "AgentSection",
    "BaseSection",
    "DataSection",
    "GatesSection",
    "LimitsSection",
    "TrainerSection",
]

_HOUR = r"([01]\d|2[0-3]):[0-5]\d"
Hours = Annotated[
    str, msgspec.Meta(pattern=rf"^{_HOUR}-{_HOUR}\Z", description='from and until, as in "22:00-07:00"')
]
Percent = Annotated[float, msgspec.Meta(ge=0, le=100)]
Celsius = Annotated[float, msgspec.Meta(ge=0, le=150)]


class AgentSection(Record, frozen=True, kw_only=True):
    id: Name
    device_class: Name | None = None
    """One of ``edge-agent device-classes``."""
    emulated: bool = False
    """This machine only plays that device class, by limits."""
    state_dir: FolderPath = "state"
    idle_unload_s: Annotated[float, msgspec.Meta(ge=0, le=LARGEST)] = 300.0
    """The trainer ends after so long without work; 0: at once."""


class BaseSection(Record, frozen=True, kw_only=True):
    path: BasePath
    """Local folder with config.json, model.safetensors and the tokenizer, or a hub id."""


class DataSection(Record, frozen=True, kw_only=True):
    path: FilePath
    """JSONL, CSV (both UTF-8) or Parquet, told by its suffix."""
    text: Text = "text"
    label: Text = "label"
    prompt: Text = "prompt"
    response: Text = "response"
    messages: Text = "messages"

    def source(self) -> DataSource:
        """As a trainer is told of it."""
        return DataSource(**msgspec.structs.asdict(self))


class TrainerSection(Record, frozen=True, kw_only=True):
    device: Annotated[
        str, msgspec.Meta(pattern=r"^(auto|cpu|cuda(:\d+)?)\Z", description='"auto", "cpu" or "cuda:N"')
    ] = "auto"
    threads: NotNegative = 0
    """0: as many as torch likes."""
    allocator: Annotated[
        str,
        msgspec.Meta(
            pattern=r"^(auto|glibc|mimalloc|tcmalloc|jemalloc|/.+)\Z",
            description='"auto", "glibc", "mimalloc", "tcmalloc", "jemalloc" or the path of a library',
        ),
    ] = "auto"
    """What allocates the trainer's memory; auto: glibc under ``limits.memory_mb``, as what it holds is what
    the tensors take; else the quickest that is installed."""
    base_precision: Literal["fp32", "bf16", "fp16", "int8", "nf4", "int2"] = "fp32"
    """What the frozen base is held in. Below 16 bits the embeddings are held in 8."""
    base_plan: FilePath | None = None
    """Bits for each block, as `edge-agent quantize-base` wrote them; instead of one precision for all."""

    def base_held(self) -> tuple[str, BasePlan | None]:
        """The word of the base's precision, and its plan. Raises ConfigError where the plan is none."""
        if self.base_plan is None:
            return self.base_precision, None
        return "plan", read_plan(self.base_plan)


class LimitsSection(Record, frozen=True, kw_only=True):
    memory_mb: Annotated[float, msgspec.Meta(gt=0, le=LARGEST)] | None = None
    """What the trainer process may hold in all; enforced."""
    uplink_kbps: Annotated[float, msgspec.Meta(gt=0, le=LARGEST)] | None = None
    """kilobit per second; what the agent sends is held to it by a token bucket."""
    link_probe_mb: Annotated[float, msgspec.Meta(ge=0, le=4)] = 1.0
    """What may go over the link to measure it, both ways together: at joining, and again when what is known
    is a day old; 0: it is not measured, and only transfers show it."""
    prefix_cache_mb: Annotated[float, msgspec.Meta(ge=0, le=LARGEST)] = 0.0
    """What may be kept of the frozen layers' output over the epochs of a round; 0: nothing."""
    prefix_cache: Literal["memory", "disk"] = "memory"
    """Where. In memory it is part of ``memory_mb``; on disk, a file without a name in the state folder."""


class GatesSection(Record, frozen=True, kw_only=True):
    """When the agent may work. A gate that is closed postpones work, or has a smaller candidate chosen."""

    min_battery_percent: Percent | None = None
    """On battery and below it: no work."""
    ac_only: bool = False
    battery_training_s: Annotated[float, msgspec.Meta(gt=0, le=LARGEST)] | None = None
    """On battery a round may train for so long, as predicted; what takes longer is not chosen."""
    max_temperature_c: Celsius | None = None
    """Of the hottest sensor; above it: no work until it is below by the margin."""
    temperature_margin_c: Celsius = 5.0
    quiet_hours: tuple[Hours, ...] = ()
    """Windows of local time in which nothing is computed; one may span midnight."""
    traffic_mb_per_day: Annotated[float, msgspec.Meta(gt=0, le=LARGEST)] | None = None
    """Both ways together, by the local day; updates wait for the next one."""
    check_s: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 10.0
    """How often the gates are looked at."""


class AgentConfig(Record, frozen=True, kw_only=True):
    """All of ``agent.toml``. Paths are relative to the file and absolute after loading."""

    agent: AgentSection
    broker: BrokerConfig
    base: BaseSection
    data: DataSection
    trainer: TrainerSection = TrainerSection()
    limits: LimitsSection = LimitsSection()
    gates: GatesSection = GatesSection()

    def allocator(self) -> str:
        """``trainer.allocator``, with ``auto`` settled where there is a limit on a processor's memory."""
        named, limited = self.trainer.allocator, self.limits.memory_mb is not None
        on_gpu = self.trainer.device.startswith("cuda")
        return "glibc" if named == "auto" and limited and not on_gpu else named

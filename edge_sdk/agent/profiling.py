"""What ``edge-agent profile`` tells: the machine as read, its throughput from a trainer, its link.

All of it has one end in time. The trainer imports torch for some seconds, and the link is measured meanwhile;
each takes what is left, up to its own share, and what could not be had by then is missing for that reason.
"""

from __future__ import annotations

import queue
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec.structs import replace

from edge_sdk.agent.link import Found, find_link
from edge_sdk.agent.process_trainer import ProcessTrainer
from edge_sdk.clock import next_within
from edge_sdk.config.agent import AgentConfig, TrainerSection
from edge_sdk.device.classes import DeviceClass, device_class
from edge_sdk.device.machine import read_profile
from edge_sdk.protocol.measure import Gpu, Profile, Reading, Throughput
from edge_sdk.protocol.trainer import Died, Failed, Measure, Timed, TrainerHost, TrainerReply

__all__ = ["PROFILE_S", "measure_machine", "readings"]

PROFILE_S = 18.0
"""All that the profile takes."""
_COMPUTE_S = 5.0
_LAST_S = 1.0
"""Before the end: the trainer answers and is closed."""
_POWER_S = 0.2
"""For meters that count energy."""
_LEFT_OUT = "left out as asked"


def measure_machine(
    config: AgentConfig | None,
    *,
    link: bool = True,
    compute: bool = True,
    seconds: float = PROFILE_S,
    tell: Callable[[str], object] = str,
    trainer: TrainerHost | None = None,
) -> tuple[Profile, Found]:
    """Reads and measures this machine.

    Args:
        config: None: the machine alone; there is no link without one.
        seconds: for all of it.
        tell: takes a line about what is being done.
        trainer: measures in place of a process of its own; it is closed here.
    """
    end = time.monotonic() + seconds
    tell("reading the machine")
    disk = None if config is None else Path(config.agent.state_dir)
    profile = read_profile(disk=disk, gpus=True, wake=True, interval_s=_POWER_S)
    with _asked(config, trainer, compute, end, tell) as answer:
        if not link:
            found = Found.nothing(_LEFT_OUT)
        elif config is None:
            found = Found.nothing("there is no config that names a broker")
        else:
            tell(f"measuring the link through {config.broker.url}")
            found = find_link(config, within_s=end - _LAST_S - time.monotonic())
        throughput, reason = answer()
    if not throughput and config is not None and config.agent.device_class and not config.agent.emulated:
        throughput = _stated(device_class(config.agent.device_class), reason)
    reasons = profile.reasons if throughput else {**profile.reasons, "throughput": reason}
    return replace(profile, throughput=throughput, reasons=reasons), found


@contextmanager
def _asked(
    config: AgentConfig | None,
    trainer: TrainerHost | None,
    wanted: bool,
    end: float,
    tell: Callable[[str], object],
) -> Iterator[Callable[[], tuple[tuple[Throughput, ...], str]]]:
    """Has the trainer begin; what is yielded waits for its answer: figures, or why there are none."""
    if not wanted:
        yield lambda: ((), _LEFT_OUT)
        return
    began, until = time.monotonic(), end - _LAST_S
    tell(f"measuring what it computes, which takes {until - began:.0f} seconds at most")
    section = TrainerSection() if config is None else config.trainer
    replies: queue.SimpleQueue[TrainerReply] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="edge-profile-") as folder:
        host = trainer or ProcessTrainer(
            Path(folder), allocator="auto" if config is None else config.allocator()
        )
        host.start(replies.put)
        try:
            host.request(Measure(id=1, threads=section.threads, seconds=_COMPUTE_S, until=until))
            yield lambda: _answer(replies, began, end)
        finally:
            host.close()


def _answer(
    replies: queue.SimpleQueue[TrainerReply], began: float, end: float
) -> tuple[tuple[Throughput, ...], str]:
    while (left := end - time.monotonic()) > 0:
        try:
            reply = next_within(replies, left)
        except queue.Empty:
            break
        if isinstance(reply, Timed):
            return reply.throughput, ""
        if isinstance(reply, Failed):
            return (), f"{reply.message}{f': {reply.hint}' if reply.hint else ''}"
        if isinstance(reply, Died):
            return (), reply.message
    given = max(0.0, end - began)
    return (), f"torch was not loaded within {given:.0f} s; edge-agent profile --seconds 60 waits longer"


def _stated(stated: DeviceClass, reason: str) -> tuple[Throughput, ...]:
    """The vendor's figures of the device's class, where nothing could be measured."""
    tflops = {"fp32": stated.fp32_tflops, "fp16": stated.fp16_tflops}
    gflops = {name: 1000 * figure.value for name, figure in tflops.items() if figure is not None}
    gb_s = {} if stated.memory_gb_s is None else {"copy": stated.memory_gb_s.value}
    if not gflops and not gb_s:
        return ()
    return (
        Throughput(
            device="cuda:0" if stated.accelerator is not None else "cpu",
            name=stated.title, how="datasheet", at=time.time(), gflops=gflops, gb_s=gb_s,
            reasons={"measured": reason},
        ),
    )  # fmt: skip


def readings(profile: Profile, found: Found) -> list[Reading]:
    """Every value by itself, with how and when it was got, or why it is missing."""
    told: list[Reading] = []
    for name in profile.__struct_fields__:
        value = getattr(profile, name)
        if name in ("at", "reasons"):
            continue
        if name == "gpus":
            told += _of_gpus(profile)
        elif name == "throughput":
            told += _of_throughput(profile)
        elif isinstance(value, dict):
            told += [_read(f"{name}.{part}", one, profile.at) for part, one in value.items()]
        else:
            told.append(_read(name, _plain(value), profile.at, profile.reasons.get(name, "")))
    for name in ("rtt_ms", "down_bps", "up_bps"):
        value = getattr(found.link, name)
        told.append(
            Reading(
                name=f"link.{name}", value=value, how=None if value is None else "measured",
                at=found.at, spread=found.spread.get(name), reason=found.reasons.get(name, ""),
            )
        )  # fmt: skip
    return told


def _of_gpus(profile: Profile) -> Iterator[Reading]:
    if not profile.gpus:
        yield _read("gpus", None, profile.at, profile.reasons.get("gpus", ""))
    for gpu in profile.gpus:
        for name in Gpu.__struct_fields__:
            if name not in ("index", "reasons"):
                value = _plain(getattr(gpu, name))
                yield _read(f"gpu{gpu.index}.{name}", value, profile.at, gpu.reasons.get(name, ""))


def _of_throughput(profile: Profile) -> Iterator[Reading]:
    if not profile.throughput:
        yield _read("throughput", None, profile.at, profile.reasons.get("throughput", ""))
    for one in profile.throughput:
        yield Reading(name=f"{one.device}.name", value=one.name, how="read", at=one.at)
        rates = [*((f"{name}_gflops", name, rate) for name, rate in one.gflops.items()),
                 *((f"{name}_gb_s", name, rate) for name, rate in one.gb_s.items())]  # fmt: skip
        for label, name, rate in rates:
            yield Reading(
                name=f"{one.device}.{label}", value=rate, how=one.how, at=one.at, spread=one.spread.get(name)
            )
        for name, reason in one.reasons.items():
            yield Reading(name=f"{one.device}.{name}", value=None, at=one.at, reason=reason)


def _plain(value: object) -> float | bool | str | None:
    """Lists in one line; an empty one of what was asked for is ``none``, an empty text nothing."""
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    if value is None or value == "":
        return None
    return value if isinstance(value, float | bool | str) else float(str(value))


def _read(name: str, value: float | bool | str | None, at: float, reason: str = "") -> Reading:
    return Reading(name=name, value=value, how=None if value is None else "read", at=at, reason=reason)

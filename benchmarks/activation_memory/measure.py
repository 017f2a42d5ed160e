"""The measuring process of one shape: all arms, interleaved; then gradients and their stochastic draws."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.activation_memory.arms import Arm, find_arms
from benchmarks.activation_memory.subject import Subject
from benchmarks.models import write_base
from benchmarks.processes import emit, say
from edge_sdk.training.allocator import allocator_word
from edge_sdk.training.memory import read_status


def run(wanted: dict[str, Any]) -> None:
    if wanted["threads"]:
        torch.set_num_threads(wanted["threads"])
    device = torch.device(wanted["device"])
    arms = find_arms(wanted["shape"], wanted["arms"])
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), wanted["model"], seed=wanted["seed"])
        subject = Subject(
            Path(folder), task=wanted["task"], batch=wanted["batch"], length=wanted["length"],
            device=device, seed=wanted["seed"],
        )  # fmt: skip
    say(f"{wanted['shape']}: {len(arms)} arms, {torch.get_num_threads()} threads, {device}")
    # first, for what is loaded, found and cached at the first use belongs to nobody's step
    _gradients(subject, arms, wanted["shape"])
    rest_mb = read_status()["VmRSS"]
    _visits(subject, arms, wanted["shape"], wanted["repeats"])
    subject.rows(wanted["draws_batch"])
    _draws(subject, arms, wanted["shape"], wanted["draws"])
    emit(
        what="process", shape=wanted["shape"], rest_mb=rest_mb, threads=torch.get_num_threads(),
        device=_name(device), allocator=allocator_word(),
    )  # fmt: skip


def _visits(subject: Subject, arms: list[Arm], shape: str, repeats: int) -> None:
    shuffled = random.Random(0)
    for repeat in range(repeats):
        for arm in shuffled.sample(arms, len(arms)):
            cost = subject.visit(arm)
            emit(
                what="cost", shape=shape, arm=arm.name, repeat=repeat, peak_mb=round(cost.peak_mb, 2),
                step_s=round(cost.step_s, 5), first_s=round(cost.first_s, 5), loss=cost.loss,
            )  # fmt: skip
            say(f"{shape} {repeat} {arm.name}: {cost.peak_mb:.0f} MB, {cost.step_s:.2f} s")


def _gradients(subject: Subject, arms: list[Arm], shape: str) -> None:
    exact = subject.gradients(arms[0])
    for arm in arms:
        error = _error(subject.gradients(arm), exact)
        saved = subject.saved_mb(arm)
        emit(what="gradient", shape=shape, arm=arm.name, error=error, saved_mb=round(saved, 2))
        say(f"{shape} {arm.name}: gradient error {error:.2%}, {saved:.1f} MB saved")


def _draws(subject: Subject, arms: list[Arm], shape: str, draws: int) -> None:
    """Errors of single stochastic gradients, and of their mean."""
    drawn = [arm for arm in arms if arm.stochastic]
    exact = subject.gradients(arms[0]) if drawn else {}
    for arm in drawn:
        total: dict[str, Any] = {}
        singles = []
        for seed in range(draws):
            one = subject.gradients(arm, seed)
            singles.append(_error(one, exact))
            total = {key: value + total[key] if total else value for key, value in one.items()}
        mean = _error({key: value / draws for key, value in total.items()}, exact)
        emit(
            what="draws", shape=shape, arm=arm.name, draws=draws, batch=len(subject.batch[0]),
            highest_single=max(singles), mean=mean,
        )  # fmt: skip
        say(f"{shape} {arm.name}: one draw {max(singles):.2%} at most, the mean of {draws} {mean:.2%}")


def _error(found: dict[str, Any], exact: dict[str, Any]) -> float:
    """Relative L2 error over all gradients that both have."""
    off = sum(float((found[key] - exact[key]).square().sum()) for key in found)
    size = sum(float(exact[key].square().sum()) for key in found)
    return (off / size) ** 0.5


def _name(device: Any) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

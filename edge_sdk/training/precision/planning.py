"""Answers ``PlanBase``: loads a base as it is, measures its blocks, and shares a budget out among them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch

from edge_sdk.data.base_files import base_digest
from edge_sdk.data.rows import ChatRow, PromptRow, Sample, read_samples
from edge_sdk.errors import DataError, MechanismError
from edge_sdk.planning.precision import BlockCosts, Option, allocate, held_bytes, objective
from edge_sdk.protocol.base_plan import WORD_OF_BITS, BasePlan, BlockPlan
from edge_sdk.protocol.trainer import DataSource, PlanBase, Setup
from edge_sdk.training.base import compute_device
from edge_sdk.training.checking import checked
from edge_sdk.training.model import TunableModel, load_model
from edge_sdk.training.model.checkpoint import Checkpoint
from edge_sdk.training.model.frozen import BasePrecision
from edge_sdk.training.precision.holding import compute_dtype
from edge_sdk.training.precision.salience import Batch, block_figures, frozen_of, loss_rises
from edge_sdk.training.precision.weights import Dense
from edge_sdk.training.tasks.tokens import check_ids, load_tokenizer

__all__ = ["plan_base"]

_BITS = (16, 8, 4, 2)
_DRAWN_FROM = 4096
"""Calibration rows are drawn from so many first ones: files are often sorted."""
_LEAST_SHARE = 0.01
"""Of the mean salience: a block that the calibration happens not to need is not worth nothing."""


def plan_base(
    request: PlanBase, folder: Path, check: Callable[[], None], report: Callable[[int, int], None]
) -> BasePlan:
    """The plan of the base in ``folder``. The base is held as its checkpoint has it while it is measured.

    Args:
        check: called between tensors and layers; raises to end the request.
        report: told of the blocks done, and of how many there are in all.

    Raises:
        BaseModelError: the base cannot be loaded. DataError: the calibration rows cannot be read.
        MechanismError: the budget is below what everything takes at 2 bits; it names the least one.
    """
    setup = request.setup
    device = compute_device(setup.device)
    digest = base_digest(folder)
    as_it_is = BasePrecision("plan", compute_dtype("plan", device), lambda _, tensor: Dense(tensor))
    model = load_model(
        folder, setup.labels, setup.lora, device,
        task=setup.task, precision=as_it_is, layers=setup.layers, check=check,
    )  # fmt: skip
    batches, told = _batches(setup, folder, model, request.rows)
    count = len(model.layers)
    passes = 2 if request.method == "loss" else 1

    def done(before: int) -> Callable[[int], None]:
        def one(number: int) -> None:
            check()
            report(before + number + 1, passes * count)

        return one

    words = [WORD_OF_BITS[bits] for bits in _BITS]
    with checked(model, check):
        figures = block_figures(model, batches[0], words, done(0))
        rises = loss_rises(model, batches, done(count)) if request.method == "loss" else ()
    if request.method == "loss":
        raw: Sequence[float] = rises
        # the rise belongs to the error at 2 bits: at other bits to a part of it
        units = [figure.errors["int2"] or 1.0 for figure in figures]
    else:
        raw = [figure.influence for figure in figures]
        units = [figure.added or 1.0 for figure in figures]
    salience = _floored(raw)
    blocks = [
        BlockCosts(
            salience[i],
            tuple(
                Option(bits, _block_bytes(model, i, bits), figures[i].errors[WORD_OF_BITS[bits]] / units[i])
                for bits in _BITS
            ),
        )
        for i in range(count)
    ]
    rest = _rest_bytes(model)
    if request.bits is not None:
        chosen = tuple(next(o for o in block.options if o.bits == request.bits) for block in blocks)
    elif request.budget_bytes is not None:
        chosen = _within(blocks, request.budget_bytes, rest)
    else:
        raise MechanismError("neither a budget nor a precision is given to plan for")
    return BasePlan(
        base=digest,
        blocks=tuple(
            BlockPlan(
                block=i, bits=option.bits, bytes=option.bytes,  # type: ignore[arg-type]
                bytes_before=sum(weight.nbytes for weight in frozen_of(model.layers[i]).values()),
                salience=salience[i], error=option.error,
            )
            for i, option in enumerate(chosen)
        ),
        method=request.method,
        calibration=told,
        objective=objective(blocks, chosen),
        bytes=rest + sum(option.bytes for option in chosen),
        bytes_before=sum(entry.tensor.size for entry in Checkpoint.open(folder).entries.values()),
    )  # fmt: skip


def _within(blocks: Sequence[BlockCosts], budget: int, rest: int) -> tuple[Option, ...]:
    least = rest + sum(min(option.bytes for option in block.options) for block in blocks)
    if budget < least:
        raise MechanismError(
            f"a budget of {budget / 1e6:.1f} MB is below the {least / 1e6:.1f} MB that the base takes with "
            f"every block at 2 bits, {rest / 1e6:.1f} MB of them for embeddings, norms and head",
            f"give at least {_up(least)} MB, or take a smaller base model",
        )
    return allocate(blocks, budget - rest)


def _up(size: int) -> float:
    """MB, rounded up to the next tenth."""
    return -(-size // 100_000) / 10


def _floored(raw: Sequence[float]) -> list[float]:
    mean = sum(max(0.0, value) for value in raw) / len(raw)
    return [max(value, _LEAST_SHARE * mean, 1e-9) for value in raw]


def _block_bytes(model: TunableModel, block: int, bits: int) -> int:
    weights = frozen_of(model.layers[block]).values()
    word = WORD_OF_BITS[bits]
    return sum(held_bytes(word, weight.out_features, weight.in_features) for weight in weights)


def _rest_bytes(model: TunableModel) -> int:
    """All but the blocks' linears: embeddings and output layer in 8 bits, the rest as it is computed with."""
    rest = model.shape.base_bytes
    for layer in model.layers:
        rest -= sum(weight.nbytes for weight in frozen_of(layer).values())
    tables = [model.net.get_input_embeddings().weight]
    output = model.net.get_output_embeddings()
    if output is not None and output.weight is not tables[0]:
        tables.append(output.weight)
    for table in tables:
        rest += held_bytes("int8", *table.shape) - int(table.numel() * table.element_size())
    return rest


def _batches(setup: Setup, folder: Path, model: TunableModel, rows: int) -> tuple[list[Batch], str]:
    """Batches of real text, and what they are; of random tokens where no file is named."""
    length = setup.max_length
    model.check_length(length)
    if setup.data is None:
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(model.shape.vocabulary, (rows, length), generator=draw)
        mask = torch.ones_like(ids)
        told = f"{rows} rows of random tokens"
    else:
        texts, tokenizer = _texts(setup.data, rows), load_tokenizer(folder)
        coded = tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
        ids, mask = coded["input_ids"].long(), coded["attention_mask"].long()
        if not mask.any():
            raise DataError(
                f"{setup.data.path}: the base's tokenizer makes no token of the calibration rows",
                "the tokenizer is another model's, or the rows hold no text of a kind that it knows",
            )
        check_ids(ids, tokenizer, model.shape.vocabulary)
        told = f"{len(texts)} rows of {Path(setup.data.path).name}"
    size = setup.micro_batch
    pairs = zip(ids.to(model.device).split(size), mask.to(model.device).split(size), strict=True)
    return list(pairs), told


def _texts(source: DataSource, count: int) -> list[str]:
    """``count`` of the first rows, drawn without bias, always the same ones."""
    draw = random.Random(0)  # noqa: S311 - a sample, no secret
    chosen: list[str] = []
    for seen, sample in enumerate(islice(read_samples(source), _DRAWN_FROM)):
        if seen < count:
            chosen.append(_text(sample))
        elif (place := draw.randrange(seen + 1)) < count:
            chosen[place] = _text(sample)
    return chosen


def _text(sample: Sample) -> str:
    if isinstance(sample, PromptRow):
        return f"{sample.prompt} {sample.response}"
    if isinstance(sample, ChatRow):
        return "\n".join(message.content for message in sample.messages)
    return sample.text

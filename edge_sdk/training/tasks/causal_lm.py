"""Causal language modelling: a learnt token is predicted from those before it. Nothing but LoRA is trained.

What is learnt: of a text all of it, of prompt and response the response, of a chat the assistant's turns;
and, where the row was not cut and no chat template says how a text ends, the token that ends a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from edge_sdk.data.rows import RowSource, read_samples
from edge_sdk.errors import BaseModelError, DataError, TrainerError
from edge_sdk.training.model import TunableModel
from edge_sdk.training.tasks.base import Batch
from edge_sdk.training.tasks.loss import Output, score_tokens, token_loss
from edge_sdk.training.tasks.metrics import Metrics, TokenScores
from edge_sdk.training.tasks.rendering import Rendered, Renderer
from edge_sdk.training.tasks.tokens import BLOCK, Rows, RowsBuilder

__all__ = ["CausalLM"]


class CausalLM:
    name = "causal-lm"
    has_head = False

    def rows(
        self,
        source: RowSource,
        labels: Sequence[str],  # noqa: ARG002
        *,
        tokenizer: Any,
        template: str,
        max_length: int,
        check: Callable[[], None],
    ) -> Rows:
        if not tokenizer.is_fast:
            raise BaseModelError(
                "the base model's tokenizer does not tell where in the text a token stands",
                "make its tokenizer.json: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
            )
        renderer = Renderer(tokenizer, template, source.path)
        builder = RowsBuilder()
        waiting: list[Rendered] = []
        seen = 0

        def flush() -> None:
            check()
            for ids, learnt in _coded(tokenizer, waiting, max_length):
                if any(learnt[1:]):  # nothing comes before the first
                    builder.add(ids, learnt)
            waiting.clear()

        for sample in read_samples(source):
            rendered = renderer.render(sample)
            if waiting and rendered.whole != waiting[0].whole:
                flush()
            waiting.append(rendered)
            seen += 1
            if len(waiting) == BLOCK:
                flush()
        flush()
        if not len(builder):
            raise DataError(
                f"{source.path}: of {seen} rows none has a token to learn within {max_length}",
                "raise training.max_length in run.toml, or shorten the prompts",
            )
        return builder.build(max_length=max_length, pad=tokenizer.pad_token_id, dropped=seen - len(builder))

    def batch(self, rows: Rows, chosen: Any, device: Any, *, trim: bool = False) -> Batch:
        return (*rows.inputs(chosen, device, trim=trim), rows.following(chosen, device, trim=trim))

    def random_targets(self, ids: Any, labels: int, draw: np.random.Generator) -> Any:  # noqa: ARG002
        return torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)

    def count(self, batch: Batch) -> int:
        return int((batch[2] >= 0).sum())

    def loss(self, model: TunableModel, batch: Batch, count: int | None = None) -> Any:
        ids, mask, targets = batch
        return token_loss(model.hidden(ids, mask), _output(model), targets, count)

    def evaluate(
        self,
        model: TunableModel,
        batches: Iterable[Batch],
        *,
        check: Callable[[], None],
        report: Callable[[int], None],
    ) -> Metrics:
        scores = TokenScores()
        with torch.inference_mode():
            for ids, mask, targets in batches:
                check()
                scores.add(len(ids), *score_tokens(model.hidden(ids, mask), _output(model), targets))
                report(scores.examples)
        return scores.result()


def _output(model: TunableModel) -> Output:
    if model.output_weight is None:
        raise TrainerError("the model was not loaded as a language model: it has no output layer")
    return Output(model.output_weight, model.output_bias, model.check)


def _coded(
    tokenizer: Any, texts: Sequence[Rendered], max_length: int
) -> Iterable[tuple[list[int], bytearray]]:
    """Ids of each text, and which are learnt: those that reach into a span, and the end of an uncut text."""
    if not texts:
        return
    whole = texts[0].whole
    coded = tokenizer(
        [one.text for one in texts],
        truncation=True,
        max_length=max_length,
        add_special_tokens=not whole,
        return_offsets_mapping=True,
    )
    end = tokenizer.eos_token_id
    for place, one in enumerate(texts):
        ids, offsets = list(coded["input_ids"][place]), coded["offset_mapping"][place]
        learnt = bytearray(any(b > start and a < stop for start, stop in one.spans) for a, b in offsets)
        cut = bool(coded.encodings[place].overflowing)
        if not (whole or cut or end is None):
            if ids and ids[-1] == end:
                learnt[-1] = True
            elif len(ids) < max_length:
                ids.append(end)
                learnt.append(True)
        yield ids, learnt

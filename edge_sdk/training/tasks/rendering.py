"""From a sample to one text and the parts of it that are to be learnt."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from edge_sdk.data.rows import ChatRow, Message, Sample, TextRow
from edge_sdk.errors import BaseModelError, DataError

__all__ = ["Rendered", "Renderer"]

_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
"""Templates that mark the assistant's turns themselves."""


class Rendered(NamedTuple):
    """``spans``: half-open ranges of characters. ``whole``: the template has put in every special token."""

    text: str
    spans: tuple[tuple[int, int], ...]
    whole: bool = False


class Renderer:
    """Args:
    template: ``{prompt}``, then ``{response}``; what stands behind the response is learnt with it.
    """

    def __init__(self, tokenizer: Any, template: str, path: str) -> None:
        self._tokenizer = tokenizer
        self._path = path
        self._head, _, rest = template.partition("{prompt}")
        self._middle, _, self._tail = rest.partition("{response}")

    def render(self, sample: Sample) -> Rendered:
        """Raises DataError, or BaseModelError for a chat without a chat template."""
        if isinstance(sample, TextRow):
            return Rendered(sample.text, ((0, len(sample.text)),))
        if isinstance(sample, ChatRow):
            return self._chat(sample)
        before = f"{self._head}{sample.prompt}{self._middle}"
        text = f"{before}{sample.response}{self._tail}"
        return Rendered(text, ((len(before), len(text)),))

    def _chat(self, sample: ChatRow) -> Rendered:
        template = self._tokenizer.chat_template
        if isinstance(template, dict):  # several, by name
            template = template.get("default")
        if not template:
            raise BaseModelError(
                "the rows are chats, and the base model's tokenizer has no chat template",
                "take the base's instruction-tuned variant, or put a chat_template.jinja beside its "
                "tokenizer; or give the rows as prompt and response",
            )
        whole = self._text(sample, sample.messages)
        if _GENERATION.search(template):
            spans = tuple(self._marked(sample, whole))
        else:
            spans = tuple(self._turns(sample, whole))
        if not spans:
            raise self._bad(sample, "the chat template leaves out every turn of the assistant")
        return Rendered(whole, spans, whole=True)

    def _turns(self, sample: ChatRow, whole: str) -> Iterator[tuple[int, int]]:
        """Each turn is what the text gains by it, after the words that call for an answer."""
        for place, message in enumerate(sample.messages):
            if message.role != "assistant":
                continue
            before = self._text(sample, sample.messages[:place], calls=True) if place else ""
            end = self._end(sample, place, whole, len(before)) if whole.startswith(before) else None
            if end is None:
                raise self._bad(
                    sample,
                    f"the chat template writes turn {place + 1} so that it cannot be told from the others",
                    "mark the assistant's turns in the template with {% generation %}, or split the chat "
                    "into rows that end with one answer each",
                )
            yield len(before), end

    def _end(self, sample: ChatRow, place: int, whole: str, start: int) -> int | None:
        """Where a turn ends in ``whole``. As the last of a chat it may be written with more, a reasoning say:
        then its words are looked for, with what stood behind them there."""
        after = self._text(sample, sample.messages[: place + 1])
        for last in (after, after.rstrip()):
            if whole.startswith(last):
                return len(last)
        said = sample.messages[place].content.strip()
        _, found, tail = after.rpartition(said)
        at = whole.find(said + tail, start) if found else -1
        return None if at < 0 else at + len(said + tail)

    def _marked(self, sample: ChatRow, whole: str) -> Iterator[tuple[int, int]]:
        """What the template itself marks."""
        try:
            coded = self._tokenizer.apply_chat_template(
                _plain(sample.messages), return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:  # a template may raise whatever it likes
            raise self._refused(sample, error) from error
        places = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        for (start, end), marked in zip(places["offset_mapping"], coded["assistant_masks"], strict=True):
            if marked:
                yield start, end

    def _text(self, sample: ChatRow, messages: Sequence[Message], *, calls: bool = False) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    _plain(messages), tokenize=False, add_generation_prompt=calls
                )
            )
        except Exception as error:  # a template may raise whatever it likes
            raise self._refused(sample, error) from error

    def _refused(self, sample: ChatRow, error: Exception) -> DataError:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        return self._bad(sample, f"the chat template refuses it: {said}")

    def _bad(self, sample: Sample, what: str, hint: str = "") -> DataError:
        return DataError(f"{self._path}: row {sample.number}: {what}", hint)


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [message._asdict() for message in messages]

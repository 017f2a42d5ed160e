"""From rows to tokens: what is learnt, what is cut, what is left out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from causal_base import CHAT, make_tokenizer

from edge_sdk.errors import BaseModelError, DataError, MechanismError
from edge_sdk.protocol.model import TASKS
from edge_sdk.protocol.trainer import DataSource
from edge_sdk.training.tasks.finding import task_of
from edge_sdk.training.tasks.tokens import Rows, load_tokenizer

pytestmark = pytest.mark.train
PAIR = {"prompt": "say red ?", "response": "the red ."}
CHAT_ROW = {
    "messages": [
        {"role": "user", "content": "say cat"},
        {"role": "assistant", "content": "a cat ."},
        {"role": "user", "content": "and dog"},
        {"role": "assistant", "content": "a dog ."},
    ]
}
TURN = "{{ '<|' + m.role + '|> ' }}"
MARKED = (
    "{% for m in messages %}" + TURN + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{{ ' <|end|> ' }}{% else %}{{ m.content + ' <|end|> ' }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}" + TURN + "{% if m.role == 'assistant' and loop.last %}{{ 'then then ' }}"
    "{% endif %}{{ m.content + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


class Bench:
    """A tokenizer, and rows made with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checks = 0
        self.load = load_tokenizer

    def rows(
        self, *rows: dict[str, Any], chat: str | None = None, template: str = "{prompt}\n{response}",
        length: int = 32, task: str = "causal-lm", labels: tuple[str, ...] = (),
    ) -> Rows:  # fmt: skip
        make_tokenizer(self.folder, chat)
        self.tokenizer = self.load(self.folder)
        path = self.folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return task_of(task).rows(
            DataSource(path=str(path)), labels, tokenizer=self.tokenizer, template=template,
            max_length=length, check=self.check,
        )  # fmt: skip

    def check(self) -> None:
        self.checks += 1

    def said(self, rows: Rows, row: int = 0) -> tuple[str, str]:
        """All tokens of a row, and those that are learnt."""
        ids, mask, following = task_of("causal-lm").batch(rows, torch.tensor([row]), "cpu")
        assert int(mask.sum()) == int(rows.lengths[row])
        assert ((following == -100) | (following == ids.roll(-1, 1)))[:, :-1].all()
        learnt = following[following >= 0]
        return self.tokenizer.decode(ids[mask > 0]), self.tokenizer.decode(learnt)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_of_prompt_and_response_the_response_is_learnt(bench: Bench) -> None:
    rows = bench.rows(PAIR)
    assert bench.said(rows) == ("<s> say red ? the red . </s>", "the red . </s>")
    assert (len(rows), rows.dropped, rows.counts, rows.labels) == (1, 0, (), None)


def test_what_stands_around_them_is_the_templates(bench: Bench) -> None:
    rows = bench.rows(PAIR, template="a {prompt} : {response} and")
    assert bench.said(rows) == ("<s> a say red ? : the red . and </s>", "the red . and </s>")
    odd = bench.rows({"prompt": "say {response}", "response": "{prompt} a"}, template="{prompt} : {response}")
    assert bench.said(odd)[1] == "<unk> a </s>"  # places inside the columns are text


def test_of_a_text_everything_is_learnt_but_the_first_token(bench: Bench) -> None:
    assert bench.said(bench.rows({"text": "a red cat"})) == ("<s> a red cat </s>", "a red cat </s>")
    assert bench.said(bench.rows({"text": "a red cat </s>"}))[1] == "a red cat </s>"


@pytest.mark.parametrize(
    ("chat", "learnt"),
    [
        (CHAT, "a cat . <|end|> a dog . <|end|>"),
        (MARKED, "a cat . a dog ."),
        (THINKING, "a cat . <|end|> then then a dog . <|end|>"),
    ],
)
def test_of_a_chat_the_assistants_turns_are_learnt(bench: Bench, chat: str, learnt: str) -> None:
    text, found = bench.said(bench.rows(CHAT_ROW, chat=chat))
    assert found == learnt
    assert text.startswith("<|user|> say cat <|end|> <|assistant|> a cat")
    assert "<s>" not in text and "</s>" not in text  # the template says what a text begins and ends with


def test_an_assistant_may_begin(bench: Bench) -> None:
    row = {"messages": [{"role": "assistant", "content": "a cat"}, {"role": "user", "content": "and"}]}
    assert bench.said(bench.rows(row, chat=CHAT))[1] == "a cat <|end|>"


def test_a_chat_without_template_is_refused_with_what_to_do(bench: Bench) -> None:
    with pytest.raises(BaseModelError, match=r"no chat template.*chat_template\.jinja"):
        bench.rows(CHAT_ROW)


@pytest.mark.parametrize(
    ("chat", "told"),
    [
        ("{{ raise_exception('roles must alternate') }}", "row 2: the chat template refuses it: roles must"),
        ("{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}", "row 2: the chat template refuses it"),
        (
            "{{ messages | length }} " + CHAT,
            "row 2: the chat template writes turn 2 so that it cannot be told from the others",
        ),
    ],
)
def test_what_a_template_does_not_take_is_told_with_the_row(bench: Bench, chat: str, told: str) -> None:
    good = "{% if messages[0].content == 'a' %}" + CHAT + "{% else %}" + chat + "{% endif %}"
    first = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "cat"}]}
    with pytest.raises(DataError) as caught:
        bench.rows(first, CHAT_ROW, chat=good)
    assert told in str(caught.value)


def test_a_cut_row_learns_what_is_left_and_does_not_end(bench: Bench) -> None:
    assert bench.said(bench.rows(PAIR, length=6)) == ("<s> say red ? the red", "the red")
    assert bench.said(bench.rows(PAIR, length=7))[1] == "the red ."  # whole, and no room to end
    assert bench.said(bench.rows({"text": "a red cat"}, length=3))[1] == "a red"


def test_a_tokenizer_that_ends_texts_itself_ends_no_cut_one(bench: Bench) -> None:
    from tokenizers.processors import TemplateProcessing

    def ending(folder: Path) -> Any:
        tokenizer = load_tokenizer(folder)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        return tokenizer

    bench.load = ending
    text = {"text": "a red cat"}
    assert bench.said(bench.rows(text)) == ("<s> a red cat </s>", "a red cat </s>")
    assert bench.said(bench.rows(text, length=4)) == ("<s> a red </s>", "a red")


def test_rows_with_nothing_left_to_learn_are_dropped_and_counted(bench: Bench) -> None:
    long = {"prompt": "say red and red and red ?", "response": "the red ."}
    rows = bench.rows(long, PAIR, long, length=6)
    assert (len(rows), rows.dropped) == (1, 2)
    assert bench.said(rows)[1] == "the red"
    with pytest.raises(DataError, match="of 2 rows none has a token to learn within 6"):
        bench.rows(long, long, length=6)


def test_batches_are_padded_with_what_is_masked(bench: Bench) -> None:
    rows = bench.rows({"text": "a"}, {"text": "a red cat and a dog"}, length=10)
    assert bench.tokenizer.pad_token_id == bench.tokenizer.eos_token_id == 2 == rows.pad
    task = task_of("causal-lm")
    ids, mask, following = task.batch(rows, torch.tensor([1, 0]), "cpu")
    assert ids.shape == mask.shape == following.shape == (2, 10) and ids.dtype == torch.int64
    assert mask.sum(1).tolist() == [8, 3]
    assert (ids[mask == 0] == 2).all() and (following[mask == 0] == -100).all()
    assert task.count((ids, mask, following)) == 7 + 2
    short = task.batch(rows, torch.tensor([0]), "cpu", trim=True)
    assert short[0].shape == (1, 3) and short[2].tolist() == [[6 + 3, 2, -100]]


def test_many_rows_come_in_blocks_and_may_be_interrupted(bench: Bench) -> None:
    rows = bench.rows(*({"text": "a " * (1 + i % 7)} for i in range(1200)))
    assert len(rows) == 1200 and bench.checks == 3
    assert rows.lengths.tolist() == [3 + i % 7 for i in range(1200)]
    assert len(rows.ids) == int(rows.lengths.sum())  # no padding is kept


def test_classification_is_as_the_tokenizer_pads(bench: Bench) -> None:
    texts = ["a red cat", "a", "the dog and the bird and the fish and the cat ."]
    data = [{"text": text, "label": label} for text, label in zip(texts, "xyx", strict=True)]
    rows = bench.rows(*data, task="classification", template="say {text}", labels=("x", "y"), length=8)
    padded = bench.tokenizer(
        [f"say {text}" for text in texts], truncation=True, max_length=8, padding="max_length"
    )
    ids, mask, labels = task_of("classification").batch(rows, torch.arange(3), "cpu")
    assert ids.tolist() == padded["input_ids"] and mask.tolist() == padded["attention_mask"]
    assert labels.tolist() == [0, 1, 0] and rows.counts == (2, 1)


def test_a_row_of_which_no_token_is_made_is_told(bench: Bench) -> None:
    from tokenizers.normalizers import Replace
    from tokenizers.processors import TemplateProcessing

    def load(folder: Path) -> Any:
        tokenizer = load_tokenizer(folder)
        tokenizer.backend_tokenizer.normalizer = Replace("dog", "")
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
        return tokenizer

    bench.load = load
    data = [{"text": text, "label": "x"} for text in ("a cat", "dog", "a dog")]
    with pytest.raises(DataError, match=r"row 2: .* makes no token of its text"):
        bench.rows(*data, task="classification", template="{text}", labels=("x",))


def test_tasks_by_name() -> None:
    assert [task_of(name).name for name in TASKS] == list(TASKS)
    with pytest.raises(MechanismError, match=r"'ranking'.*classification, causal-lm"):
        task_of("ranking")

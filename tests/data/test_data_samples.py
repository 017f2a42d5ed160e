"""Rows of a causal LM: which kind they are, and how a bad one is told."""

import json

import pytest

from edge_sdk.config.agent import DataSection
from edge_sdk.data.rows import ChatRow, Message, PromptRow, TextRow, check_rows, read_samples
from edge_sdk.errors import DataError
from edge_sdk.protocol.trainer import DataSource

ASK, ANSWER = {"role": "user", "content": "two?"}, {"role": "assistant", "content": "2"}
CHAT = [ASK, ANSWER]


@pytest.fixture
def samples(tmp_path):
    def read(content, name="rows.jsonl", kind=DataSource, **columns):
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_text(content)
        return list(read_samples(kind(path=str(tmp_path / name), **columns)))

    return read


def test_texts(samples):
    assert samples([{"text": "a", "n": 1}, {"text": "b"}]) == [TextRow("a", 1), TextRow("b", 2)]
    assert samples("n,body\n1,a\n", name="rows.csv", text="body", kind=DataSection) == [TextRow("a", 2)]


def test_prompts(samples):
    expected = [PromptRow("two?", "2", 1)]
    assert samples([{"prompt": "two?", "response": "2", "text": "two? 2"}]) == expected
    assert samples([{"q": "two?", "a": "2"}], prompt="q", response="a") == expected
    # one of the two alone is just another column
    assert samples([{"prompt": "x", "text": "a"}]) == [TextRow("a", 1)]


def test_chats(samples):
    expected = [ChatRow((Message("user", "two?"), Message("assistant", "2")), 1)]
    assert samples([{"messages": CHAT, "prompt": "x", "response": "y", "text": "z"}]) == expected
    assert samples([{"talk": [{**m, "more": 1} for m in CHAT]}], messages="talk") == expected
    assert samples([{"messages": json.dumps(CHAT)}]) == expected
    text = json.dumps(CHAT).replace('"', '""')
    assert samples(f'messages\n"{text}"\n', name="rows.csv") == [expected[0]._replace(number=2)]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"txt": "a"}], 'row 1: has no column "text" (did you mean "txt"? its columns: txt; data.prompt, '),
        ([{"prompt": "a", "resp": "b"}], 'row 1: has no column "response"'),
        ([{"response": "b"}], 'row 1: has no column "prompt"'),
        ([{"text": "a"}, {"body": "a"}], 'row 2: has no column "text"'),
        ([{"prompt": "a", "response": "b"}, {"prompt": "a"}], 'row 2: has no column "response"'),
        ([{"prompt": "a", "response": " "}], 'row 1: "response" is empty'),
        ([{"prompt": ["a"], "response": "b"}], 'row 1: "prompt" is a list'),
        ([{"messages": []}], '"messages" is empty'),
        ([{"messages": "two?"}], '"messages" is text that is not JSON'),
        ([{"messages": "7"}], '"messages" is a number, received 7'),
        ([{"messages": {"role": "user"}}], '"messages" is an object'),
        ([{"messages": ["two?"]}], '"messages" holds "two?" at place 1'),
        (
            [{"messages": [ASK, {"role": "assistant"}]}],
            '"messages" lacks role or content, as text, at place 2',
        ),
        ([{"messages": [ASK]}], '"messages" has no turn of role "assistant"'),
        ([{"messages": CHAT}, {"messages": None}], 'row 2: "messages" is null'),
        ([], "holds no rows"),
    ],
)
def test_bad_rows(samples, rows, told):
    with pytest.raises(DataError) as caught:
        samples(rows)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_are_checked_before_the_task_is_known(tmp_path):
    path = tmp_path / "rows.jsonl"
    for good in ({"text": "a", "label": "x"}, {"text": "a"}, {"prompt": "a", "response": "b"}):
        path.write_text(json.dumps(good) + "\n")
        check_rows(DataSource(path=str(path)))
    for first, second in (({"text": "a", "label": "x"}, {"text": "a"}), ({"text": "a"}, {"label": "x"})):
        path.write_text(json.dumps(first) + "\n\n" + json.dumps(second) + "\n")
        with pytest.raises(DataError, match="row 3: has no column"):
            check_rows(DataSource(path=str(path)))

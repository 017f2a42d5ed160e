"""docs/data.md: its rows are read, and learnt as it says; its keys are the config's."""

import json
import re
from pathlib import Path

import pytest

from edge_sdk.config.agent import DataSection
from edge_sdk.config.checking import tomllib
from edge_sdk.config.run import TEMPLATES, RunSection
from edge_sdk.data.formats import FORMATS
from edge_sdk.data.rows import read_rows, read_samples
from edge_sdk.protocol.trainer import DataSource

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"<!-- rows: (\S+), ([^\n]*) -->\n```jsonl\n(.*?)```", TEXT, re.S)


def source(tmp_path, rows):
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    return DataSource(path=str(tmp_path / "rows.jsonl"))


def test_every_kind_is_shown():
    assert [task for task, _, _ in EXAMPLES] == ["classification", *["causal-lm"] * 3]


def test_formats_and_columns_are_those_there_are():
    told = re.findall(r"`(\.\w+)`", TEXT.split("## Formats")[1].split("## ")[0])
    assert sorted(told) == sorted(FORMATS)
    blocks = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", TEXT, re.S)]
    run, data = blocks[0]["run"], blocks[1]["data"]
    assert run["template"] == TEMPLATES["causal-lm"] and set(run) <= set(RunSection.__struct_fields__)
    assert set(data) == set(DataSection.__struct_fields__)
    for key in data.keys() - {"path"}:
        assert f'default "{getattr(DataSection(path="x"), key)}"' in TEXT


def test_rows_of_classification(tmp_path):
    _, told, rows = EXAMPLES[0]
    labels = told.split(",")[0].removeprefix("labels: ").split()
    assert [row.label for row in read_rows(source(tmp_path, rows), labels)] == ["mail", "network"]


@pytest.mark.train
@pytest.mark.parametrize("example", EXAMPLES[1:], ids=["chats", "instructions", "texts"])
def test_rows_of_a_causal_lm(tmp_path, example):
    torch = pytest.importorskip("torch")
    from causal_base import CHAT, make_tokenizer

    from edge_sdk.training.tasks.finding import task_of
    from edge_sdk.training.tasks.tokens import load_tokenizer

    _, told, text = example
    data = source(tmp_path, text)
    assert len(list(read_samples(data))) == 1
    make_tokenizer(tmp_path, CHAT)
    tokenizer, task = load_tokenizer(tmp_path), task_of("causal-lm")
    rows = task.rows(
        data, (), tokenizer=tokenizer, template=TEMPLATES["causal-lm"], max_length=64, check=lambda: None
    )
    following = task.batch(rows, torch.tensor([0]), "cpu")[2]
    assert tokenizer.decode(following[following >= 0]) == json.loads(told.removeprefix("learnt: "))

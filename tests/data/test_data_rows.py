"""Rows: what is read, and how a bad one is told."""

import pytest

from edge_sdk.config.agent import DataSection
from edge_sdk.data.rows import Row, read_rows
from edge_sdk.errors import DataError
from edge_sdk.protocol.trainer import DataSource

LABELS = ("mail", "network")


@pytest.fixture
def rows(tmp_path):
    def read(content, name="rows.jsonl", labels=LABELS, kind=DataSource, **columns):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
        return list(read_rows(kind(path=str(tmp_path / name), **columns), labels))

    return read


def test_jsonl(rows):
    text = '{"text": "a", "label": "mail", "more": 1}\n\n  {"text": "ü\\n", "label": "network"}'
    expected = [Row("a", "mail", 1), Row("ü\n", "network", 3)]
    assert rows(text) == expected
    assert rows(b"\xef\xbb\xbf" + text.encode()) == expected
    assert rows(text.replace("\n\n", "\r\n\r\n"), name="rows.NDJSON", kind=DataSection) == expected


def test_csv(rows):
    text = 'label,text,n\nmail,"a, ""b""\nc",1\n\nnetwork,d,2\n'
    expected = [Row('a, "b"\nc', "mail", 2), Row("d", "network", 5)]
    assert rows(text, name="rows.csv") == expected
    assert rows(b"\xef\xbb\xbf" + text.encode(), name="rows.csv") == expected
    assert rows("text\tlabel\na, b\tmail\n", name="rows.tsv") == [Row("a, b", "mail", 2)]


def test_columns_and_numbered_labels(rows):
    assert rows('{"t": "a", "y": 1}', labels=("0", "1"), text="t", label="y") == [Row("a", "1", 1)]
    assert rows('{"text": "a", "label": "any"}', labels=None) == [Row("a", "any", 1)]


GOOD = '{"text": "a", "label": "mail"}\n'


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (GOOD + "{oops}\n", "row 2: is not JSON"),
        (GOOD + "\n[1, 2]\n", "row 3: received a list of 2"),
        (GOOD + '{"txt": "a", "label": "mail"}', 'row 2: has no column "text" (did you mean "txt"? its col'),
        (GOOD + '{"text": "a"}', 'row 2: has no column "label"'),
        ('{"text": " \\t", "label": "mail"}', 'row 1: "text" is empty'),
        ('{"text": null, "label": "mail"}', 'row 1: "text" is null'),
        ('{"text": 3, "label": "mail"}', 'row 1: "text" is a number, received 3'),
        ('{"text": "a", "label": true}', 'row 1: "label" is a truth value, received true'),
        ('{"text": "a", "label": 1.5}', 'row 1: "label" is a number, received 1.5'),
        ('{"text": "a", "label": "Mail"}', '(did you mean "mail"? labels: mail, network)'),
        ('{"text": "a", "label": 7}', 'the label "7" is outside'),
        (GOOD.encode() + b'{"text": "\xff", "label": "mail"}', "row 2: is not UTF-8 text: 0xff at byte 11"),
        ("[" * 100_000, "row 1: is not JSON"),
        ("", "holds no rows"),
        ("\n \n", "holds no rows"),
    ],
)  # fmt: skip
def test_bad_jsonl(rows, content, told):
    with pytest.raises(DataError) as caught:
        rows(content)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("text,label\na,b,mail\n", "row 2: has 3 fields, its header 2"),
        ("text,label\na\n", "row 2: has 1 fields, its header 2"),
        ('text,label\n"a\nb",mail\n,mail', 'row 4: "text" is empty'),
        ('text,label\na,mail\n"never closed,mail\n', "row 3: is not CSV"),
        ("text,text\na,mail\n", 'row 1: names the column "text" more than once'),
        ("txt;label\na;mail\n", 'has no column "text"'),
        ("text,label\n", "holds no rows"),
        ("text,label\n" + "a" * 200_000 + ",mail", "row 2: is not CSV: field larger"),
    ],
)
def test_bad_csv(rows, content, told):
    with pytest.raises(DataError) as caught:
        rows(content, name="rows.csv")
    assert told in str(caught.value)


def test_a_line_without_end_is_not_read_whole(rows):
    with pytest.raises(DataError, match="row 1: is longer than 4 MiB"):
        rows(b"x" * (5 << 20))


def test_files_that_are_none(rows, tmp_path):
    with pytest.raises(DataError, match=r'"\.txt" tells no format'):
        rows("", name="rows.txt")
    with pytest.raises(DataError, match="no such file"):
        list(read_rows(DataSection(path=str(tmp_path / "none.csv")), LABELS))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        list(read_rows(DataSection(path=str(tmp_path / "folder.csv")), LABELS))


def test_many_labels_are_not_all_listed(rows):
    with pytest.raises(DataError) as caught:
        rows('{"text": "a", "label": "x"}', labels=[f"label-{n}" for n in range(100)])
    assert "and 80 more" in str(caught.value)

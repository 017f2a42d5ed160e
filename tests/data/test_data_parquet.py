"""Parquet against JSONL: the same rows; and what is told where it cannot be read."""

import importlib.util
import json
import subprocess
import sys

import pytest

from edge_sdk.data.rows import check_rows, read_rows, read_samples
from edge_sdk.errors import DataError, MissingExtraError
from edge_sdk.protocol.trainer import DataSource

ROWS = [{"text": f"text {i}", "label": "xy"[i % 2], "more": [i]} for i in range(3000)]
CHAT = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "2"}]


@pytest.fixture
def write(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    def write(rows, name="rows.parquet", **columns):
        path = tmp_path / name
        table = pyarrow.Table.from_pylist(rows) if rows is not None else pyarrow.table(columns)
        parquet.write_table(table, path, row_group_size=700)
        return DataSource(path=str(path))

    return write


def test_the_same_rows_as_of_jsonl(write, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert list(read_rows(write(ROWS), "xy")) == list(
        read_rows(DataSource(path=str(tmp_path / "rows.jsonl")), "xy")
    )
    samples = [{"messages": CHAT}, {"messages": CHAT * 2}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    assert list(read_samples(write(samples))) == list(
        read_samples(DataSource(path=str(tmp_path / "rows.jsonl")))
    )


def test_labels_of_any_kind(write):
    import pyarrow

    for values in (pyarrow.array([1, 0]), pyarrow.array(["1", "0"]).dictionary_encode()):
        rows = list(read_rows(write(None, text=pyarrow.array(["a", "b"]), label=values), ("0", "1")))
        assert [row.label for row in rows] == ["1", "0"]


def test_nothing_but_the_columns_asked_for_is_read(write, monkeypatch):
    from pyarrow import parquet

    asked = []
    real = parquet.ParquetFile.iter_batches

    def watch(self, *, columns, **more):
        asked.append(columns)
        for batch in real(self, columns=columns, **more):
            assert batch.num_rows <= 1024
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", watch)
    assert len(list(read_rows(write(ROWS), "xy"))) == 3000
    list(read_samples(write([{"text": "a", "more": 1, "prompt": "b"}])))
    assert asked == [["text", "label"], ["text"]]


def test_bad_rows_have_their_number(write):
    with pytest.raises(DataError, match=r'row 1201: "text" is null'):
        list(read_rows(write([*ROWS[:1200], {"text": None, "label": "x"}]), "xy"))
    with pytest.raises(DataError, match=r'has no column "label".*its columns: text, tag; data\.text'):
        list(read_rows(write([{"text": "a", "tag": "x"}]), "xy"))
    with pytest.raises(DataError, match="holds no rows"):
        list(read_rows(write(None, text=[], label=[]), "xy"))


def test_damage_is_told(write, tmp_path):
    source = write(ROWS)
    whole = (tmp_path / "rows.parquet").read_bytes()
    for damaged in (b"", b"PAR1", whole[:-100], whole[100:]):
        (tmp_path / "rows.parquet").write_bytes(damaged)
        with pytest.raises(DataError, match="is not Parquet"):
            list(read_rows(source, "xy"))
    (tmp_path / "rows.parquet").write_bytes(whole[:1000] + bytes(2000) + whole[3000:])
    with pytest.raises(DataError, match="is not Parquet"):
        list(read_rows(source, "xy"))


def test_an_agent_looks_from_outside(write, tmp_path):
    source = write([{"text": None}])  # the trainer will tell
    script = "import sys; from edge_sdk.data.rows import check_rows; from edge_sdk.protocol.trainer import "
    script += "DataSource; check_rows(DataSource(path=sys.argv[1])); assert 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", script, source.path], check=True, timeout=60)
    (tmp_path / "rows.parquet").write_text("text,label\n")
    with pytest.raises(DataError, match="does not begin with PAR1"):
        check_rows(source)
    (tmp_path / "rows.parquet").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        check_rows(source)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    source = DataSource(path=str(tmp_path / "rows.parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for read in (
        lambda: list(read_rows(source)),
        lambda: list(read_samples(source)),
        lambda: check_rows(source),
    ):
        with pytest.raises(MissingExtraError, match=r"edge-sdk\[parquet\]"):
            read()


def test_a_value_that_python_cannot_hold_is_told_with_its_row(write):
    import pyarrow

    offsets = b"".join(place.to_bytes(4, "little") for place in (0, 4, 7))
    buffers = [None, *map(pyarrow.py_buffer, (offsets, b"fine\xff\xfea"))]
    not_utf8 = pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)
    for odd in (not_utf8, pyarrow.array([0, 10**15], pyarrow.timestamp("s"))):
        source = write(None, text=["one", "two"], label=odd)
        with pytest.raises(DataError, match=r"row 2: cannot be read: ") as told:
            list(read_rows(source))
        assert "\n" not in told.value.message and told.value.hint


def test_two_columns_of_one_name_are_refused(write, tmp_path):
    import pyarrow
    from pyarrow import parquet

    columns = [pyarrow.array([value]) for value in ("x", "y", "a")]
    table = pyarrow.Table.from_arrays(columns, names=["text", "text", "label"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match='names the column "text" more than once') as told:
        list(read_rows(DataSource(path=str(tmp_path / "rows.parquet"))))
    assert told.value.hint


def test_bytes_are_not_called_a_number(write):
    with pytest.raises(DataError, match="of type bytes"):
        list(read_rows(write(None, text=[b"abc"], label=["a"])))

"""The two docstring tasks: deterministic, as large as their definition says, splits that lose nothing."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("numpy")

from examples.docstring_tasks import (
    AREAS,
    area_task,
    split_dirichlet,
    split_evenly,
    word_order_task,
    write_jsonl,
)


def test_area_has_the_known_size_and_all_classes(cache: Path) -> None:
    task = area_task(cache)
    total = len(task.train) + len(task.held_out)
    assert 5000 <= total <= 5800, task.describe()
    assert len(task.held_out) == 1500
    assert {row.label for row in task.train} == set(AREAS) == {row.label for row in task.held_out}
    texts = [row.text for row in task.train + task.held_out]
    assert len(set(texts)) == len(texts)
    assert all(len(text.split()) >= 5 and len(text) <= 400 for text in texts)


def test_area_is_the_same_from_the_cache_and_afresh(cache: Path) -> None:
    assert area_task(cache) == area_task(None)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="counts are asserted on CPython 3.11")
def test_counts_on_python_3_11(cache: Path) -> None:
    area, order = area_task(cache), word_order_task(cache)
    assert 5256 <= len(area.train) + len(area.held_out) <= 5508
    assert abs(len(order.train) + len(order.held_out) - 3285) < 60


def test_word_order_shuffles_one_window_in_half_of_the_texts(cache: Path) -> None:
    area = area_task(cache)
    originals = {" ".join(row.text.split()[:24]) for row in area.train + area.held_out}
    same_words = {tuple(sorted(text.split())) for text in originals}
    rows = word_order_task(cache)
    everything = rows.train + rows.held_out
    for row in everything:
        assert 12 <= len(row.text.split()) <= 24
        assert tuple(sorted(row.text.split())) in same_words
        if row.label == "kept":
            assert row.text in originals
    assert not any(row.text in originals for row in everything if row.label == "shuffled")
    share = Counter(row.label for row in everything)["shuffled"] / len(everything)
    assert 0.47 < share < 0.53
    assert len(rows.held_out) == 1000


def test_dirichlet_split_is_seeded_skewed_and_complete(cache: Path) -> None:
    task = area_task(cache)
    parts = split_dirichlet(task.train, task.labels, 3, alpha=0.5, seed=0)
    assert parts == split_dirichlet(task.train, task.labels, 3, alpha=0.5, seed=0)
    assert parts != split_dirichlet(task.train, task.labels, 3, alpha=0.5, seed=1)
    assert sorted(row.text for part in parts for row in part) == sorted(row.text for row in task.train)
    shares = [Counter(row.label for row in part)["network"] / max(1, len(part)) for part in parts]
    assert max(shares) > 2 * min(shares)
    even = split_evenly(task.train, 3)
    assert sum(map(len, even)) == len(task.train)


def test_rows_go_to_jsonl_and_back(tmp_path: Path, cache: Path) -> None:
    rows = area_task(cache).train[:50]
    path = write_jsonl(tmp_path / "deep" / "rows.jsonl", rows)
    back = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert back == [{"text": row.text, "label": row.label} for row in rows]

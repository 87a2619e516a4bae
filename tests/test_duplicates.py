"""lib/duplicates.py: documents that repeat earlier ones are skipped, and counted."""
import sys

import pytest
from conftest import prose
from data_cases import PLAIN, load

import data
from lib.duplicates import distinct

COPIES = [data.Document("a", prose(1, 900)), data.Document("b", prose(2, 900)),
          data.Skipped("c", "unreadable"), data.Document("d", prose(1, 900)),
          data.Document("e", prose(3, 900)), data.Document("f", prose(2, 900) + " planted"),
          data.Document("g", ""), data.Document("h", "")]


def copies():
    yield from COPIES


def test_exact_duplicates_are_skipped_and_counted():
    found = list(distinct(COPIES))
    assert found == [data.Skipped("d", "duplicate") if d.path == "d" else d for d in COPIES]


def distinct_copies():
    return distinct(copies())


def test_the_cache_counts_duplicates():
    loader = load(distinct_copies, PLAIN)
    counts = loader.rows[0][0][0].cache.total["counts"]
    assert counts["skipped: duplicate"] == 1 and counts["documents"] == 4


def test_near_duplicates_are_found_and_others_kept():
    pytest.importorskip("datasketch", reason="near duplicates need datasketch")
    texts = [prose(seed, 1_500) for seed in range(30)]
    changed = [t[:700] + " something else " + t[700:] for t in texts[:10]]
    documents = [data.Document(str(i), t) for i, t in enumerate(texts + changed)]
    found = list(distinct(documents, near=0.8))
    assert found[:30] == documents[:30]
    assert found[30:] == [data.Skipped(str(i), "near-duplicate") for i in range(30, 40)]
    assert [d.kind for d in distinct(COPIES, near=0.8) if isinstance(d, data.Skipped)] == [
        "unreadable", "duplicate", "near-duplicate"]


def test_near_duplicates_without_the_library_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(data.InputError, match="pip install datasketch"):
        list(distinct(COPIES, near=0.8))

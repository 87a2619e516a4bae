"""lib/duplicates.py: documents that repeat earlier ones are skipped, and counted."""
import sys

import pytest
from conftest import prose
from data_cases import PLAIN, load, only_rows

import data
from lib.duplicates import distinct

COPIES = [
    data.Document("a", prose(1, 900)),
    data.Document("b", prose(2, 900)),
    data.Skipped("c", "unreadable"),
    data.Document("d", prose(1, 900)),
    data.Document("e", prose(3, 900)),
    data.Document("f", prose(2, 900) + " planted"),
    data.Document("g", ""),
    data.Document("h", ""),
]


def distinct_copies():
    """The documents of a source without exact duplicates."""
    return distinct(iter(COPIES))


def test_exact_duplicates_are_skipped():
    expected = list(COPIES)
    expected[3] = data.Skipped("d", "duplicate")
    assert list(distinct(COPIES)) == expected


def test_the_cache_counts_duplicates():
    loader = load(distinct_copies, PLAIN)
    counts = only_rows(loader).cache.total["counts"]
    assert counts["skipped: duplicate"] == 1
    assert counts["documents"] == 4


@pytest.fixture
def datasketch():
    """The library that finds near duplicates, or no test."""
    return pytest.importorskip("datasketch", reason="near duplicates need datasketch")


def test_near_duplicates_are_found_and_others_kept(datasketch):
    texts = [prose(seed, 1_500) for seed in range(30)]
    changed = [text[:700] + " something else " + text[700:] for text in texts[:10]]
    documents = [data.Document(str(i), text) for i, text in enumerate(texts + changed)]

    found = list(distinct(documents, near=0.8))

    assert found[:30] == documents[:30]
    assert found[30:] == [data.Skipped(str(i), "near-duplicate") for i in range(30, 40)]


def test_exact_duplicates_are_told_from_near_ones(datasketch):
    found = distinct(COPIES, near=0.8)
    kinds = [each.kind for each in found if isinstance(each, data.Skipped)]
    assert kinds == ["unreadable", "duplicate", "near-duplicate"]


def test_near_duplicates_without_the_library_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(data.InputError, match="pip install datasketch"):
        list(distinct(COPIES, near=0.8))

"""tests/first_loss.py: the five forms hold the same documents, and the clock stops at a loss."""
import os
import sys

import pytest
from first_loss import FORMS, seconds_to_loss, write_forms

from lib.any_text import any_text


def test_the_forms_hold_the_same_texts(tmp_path):
    write_forms(tmp_path, 12)
    found = {}
    for form in FORMS:
        documents = any_text(str(tmp_path / form), separator="" if form == "book.txt" else None)
        found[form] = sorted(document.text for document in documents)
    first, *others, book = found.values()
    assert len(first) == 12
    assert others == [first] * 3
    assert len("".join(book)) == len("".join(first)) + 2 * 11


def test_the_clock_stops_at_the_first_loss(tmp_path):
    lines = ["step 1: nothing", "  0.2% | step 1/340 | loss 8.107 | lr 2.00e-04"]
    program = f"for line in {lines!r}: print(line, flush=True)\nimport time; time.sleep(60)"
    seconds = seconds_to_loss([sys.executable, "-c", program], tmp_path, dict(os.environ))
    assert seconds < 30
    with pytest.raises(RuntimeError, match="no such"):
        seconds_to_loss([sys.executable, "-c", "print('no such file')"], tmp_path, dict(os.environ))

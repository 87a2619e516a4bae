"""configs/understanding: arithmetic, task_hinting, number_pieces: every text says what is true."""
import re

import numpy as np
import pytest

from configs.understanding import arithmetic, number_pieces, task_hinting
from lib.tokenizers import Numbers

pytestmark = pytest.mark.library


def test_formats_of_a_sum():
    assert arithmetic.written(29, 57, "plain") == ("29+57=", "86")
    assert arithmetic.written(29, 57, "reverse") == ("$29+57=", "68$")
    assert arithmetic.written(29, 57, "simplified") == ("29+57:", "9+7+0=6C1;2+5+1=8C0;86")
    assert arithmetic.written(9, 57, "scratchpad") == ("9+57:", "09+57,,C0;0+5,6,C1;+,66,C0;66")


def test_every_step_of_every_sum_is_true():
    for a, b in arithmetic.pairs(True).tolist():
        _, answer = arithmetic.written(a, b, "simplified")
        *steps, last = answer.split(";")
        assert int(last) == a + b
        for step in steps:
            x, y, carry, digit, out = map(int, re.findall(r"\d+", step))
            assert x + y + carry == 10 * out + digit
        _, answer = arithmetic.written(a, b, "scratchpad")
        for step in answer.split(";")[:-1]:  # what is left, what is done and the carry make the sum
            x, y, done, carry = re.fullmatch(r"(\d*)\+(\d*),(\d*),C(\d)", step).groups()
            left = int(x or 0) + int(y or 0) + int(carry)
            assert left * 10 ** len(done) + int(done or 0) == a + b


def test_what_is_asked_is_not_taught():
    taught, asked = (set(map(tuple, arithmetic.pairs(kind).tolist())) for kind in (True, False))
    assert len(taught) == 2_000 and len(asked) == 400 and not taught & asked
    assert {(a, b) for a in range(10) for b in range(10)} <= taught
    [first, second] = list(arithmetic.sums("plain", passes=2))
    assert first.text != second.text and sorted(first.text.split()) == sorted(second.text.split())


def test_lists_and_their_hints():
    rng = np.random.default_rng(0)
    for _ in range(200):
        ask, answer = task_hinting.item(rng, "sort", 7)
        assert sorted(ask[1:-1]) == answer and len(set(answer)) == 7
        ask, [answer] = task_hinting.item(rng, "successor", 7)
        assert answer == min(x for x in ask[1:-2] if x > ask[-2])
        ask, [answer] = task_hinting.item(rng, "largest", 7)
        assert answer == max(ask[1:-1])
    lengths = {len(document.text.split()) for document in task_hinting.lists("sort", count=300)}
    assert lengths == set(range(2, 11))


def test_no_list_is_cut():
    """Else a row would begin with an answer whose list stands in another one."""
    for task in task_hinting.tasks:
        documents = task_hinting.lists(task, count=300)
        sizes = np.array([len(f"{d.prefix} {d.text}".split()) + 1 for d in documents])
        for arm in task_hinting.study.arms.values():
            [phase] = arm.phases
            _, _, document, start, length, _ = phase.packing(sizes, phase.seq).T
            assert sorted(document) == list(range(300)) and not start.any()
            np.testing.assert_array_equal(length, sizes[document])


def test_lists_are_judged_whole_and_with_their_end():
    """By a model that sorts lists of up to 15 numbers and goes on after the 15 least."""
    def apply(params, ids):
        logits = np.zeros((*ids.shape, task_hinting.END + 3))
        for row, said in zip(ids, logits, strict=True):
            ask = int(np.argmax(row == task_hinting.END))
            rising = sorted(row[2:ask].tolist())[:15]
            for i, piece in enumerate([*rising, tokenizer.eos]):
                said[ask + i, piece] = 1
        return logits

    [arm, *_] = task_hinting.study.arms.values()
    tokenizer = Numbers(task_hinting.END + 1)
    found = task_hinting.sorts(None, apply, tokenizer, arm)
    assert found == {"own/sorted_10": 1, "own/sorted_15": 1, "own/sorted_20": 0}


def test_numbers_are_cut_from_either_side():
    assert number_pieces.cut(12345, "left") == [10 + 12, 10 + 34, 5]
    assert number_pieces.cut(12345, "right") == [1, 10 + 23, 10 + 45]
    assert number_pieces.cut(1205, "left") == number_pieces.cut(1205, "right") == [22, 15]
    assert number_pieces.cut(7, "left") == number_pieces.cut(7, "right") == [7]
    rng = np.random.default_rng(0)
    for a, b in number_pieces.pairs(rng, 300, 1, 5).tolist():
        for side in ("left", "right"):
            ask, answer = number_pieces.item(a, b, side)
            text = "".join(str(i) if i < 10 else f"{i - 10:02}" for i in answer)
            assert int(text) == a + b and text == str(a + b)
            assert max(ask) == number_pieces.EQUALS and max(answer) < number_pieces.PLUS
    size = np.char.str_len(number_pieces.pairs(rng, 5_000, 1, 5).astype(str))
    np.testing.assert_allclose([(size == n).mean() for n in range(1, 6)], 0.2, atol=0.02)

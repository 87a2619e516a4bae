"""lib/packing.py: plans that keep every position, rows filled by hand, a permutation without a table."""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lib.evaluate import windows
from lib.packing import (
    DOCUMENT,
    LENGTH,
    QUIET,
    ROW,
    SEGMENT,
    START,
    best_fit,
    concat_and_split,
    fill,
    first_fit,
    one_per_row,
    permute,
)

equal = np.testing.assert_array_equal
PACKINGS = [best_fit, first_fit, one_per_row]


# ----------------------------------------------------------------------------------------------- permutations


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 100, 255, 256, 257, 1_000, 4_096, 5_003])
def test_permute_is_a_permutation(n):
    out = permute(np.arange(n), n, 1, 2)
    equal(np.sort(out), np.arange(n))
    assert out.dtype == np.int64


def test_permute_of_nothing_is_nothing():
    assert permute(np.arange(0), 0, 1).shape == (0,)


def test_permute_follows_its_key():
    keys = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 1), (2**40, 0, 0))
    images = [permute(np.arange(1_000), 1_000, *key) for key in keys]
    for one, other in itertools.combinations(images, 2):
        assert np.mean(one == other) < 0.02
    for image in images:  # and it is no mere shift: neighbours part
        assert np.mean(np.abs(np.diff(image)) < 10) < 0.1
    equal(images[0], permute(np.arange(1_000), 1_000, *keys[0]))


@given(st.integers(1, 10**12), st.data())
def test_permute_of_one_is_as_within_many(n, drawn):
    index = drawn.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    many = permute(np.array(index), n, 3)
    assert [int(permute(i, n, 3)[0]) for i in index] == many.tolist()
    assert all(0 <= i < n for i in many.tolist())


# ----------------------------------------------------------------------------------- the plain plan, and rows

lengths = st.lists(st.integers(1, 40), max_size=25).map(lambda x: np.array(x, np.int64))


def covered(plan, sizes, quiet=True):
    """How often each position of each document is in a plan; without the quiet ones where told."""
    out = [np.zeros(n, int) for n in sizes]
    for _, _, document, start, length, silent in plan.tolist():
        assert length > 0 and 0 <= silent < length and start + length <= len(out[document])
        out[document][start + (0 if quiet else silent):start + length] += 1
    return out


def orderly(plan):
    """Rows are 0, 1, 2, ...; segments 1, 2, ... in each."""
    rows = plan[:, ROW].tolist()
    assert rows == sorted(rows) and set(rows) == set(range(len(set(rows))))
    for row in set(rows):
        assert plan[plan[:, ROW] == row][:, SEGMENT].tolist() == list(range(1, 1 + rows.count(row)))


@given(lengths, st.integers(1, 50))
@example(np.array([], np.int64), 4)
@example(np.array([4, 4]), 4)
@example(np.array([1, 1, 1]), 1)
def test_concat_and_split_covers_everything_once_in_order(sizes, seq):
    plan = concat_and_split(sizes, seq)
    assert plan.shape[1] == 6 and plan.dtype.kind == "i"
    assert all(np.all(c == 1) for c in covered(plan, sizes)) and not np.any(plan[:, QUIET])
    orderly(plan)
    order = plan[:, [DOCUMENT, START]].tolist()
    assert order == sorted(order)
    full = np.bincount(plan[:, ROW], plan[:, LENGTH]) if len(plan) else np.zeros(0)
    assert np.all(full[:-1] == seq) and full.sum() == sizes.sum() and np.all(full <= seq)


@given(lengths, st.integers(1, 50), st.data())
def test_windows_predict_everything_once(sizes, seq, drawn):
    overlap = drawn.draw(st.integers(0, seq - 1))
    plan = windows(sizes, seq, overlap)
    assert all(np.all(c == 1) for c in covered(plan, sizes, quiet=False))
    orderly(plan)
    assert np.all(np.bincount(plan[:, ROW], plan[:, LENGTH]) <= seq)
    for _, _, document, start, length, quiet in plan.tolist():
        assert quiet == (overlap if start else 0)
        assert sizes[document] > seq or (start, length) == (0, sizes[document])  # cut where it must be alone


def test_fill_by_hand():
    """Row 0: a whole document, the middle of another, padding. Row 1: its end, one position quiet, and two
    pieces that share a segment. Row 2 is not in the plan."""
    ids = [np.array(x, np.uint16) for x in ([10, 11], [20, 21, 22, 23, 24], [30])]
    plan = np.array([(0, 1, 0, 0, 3, 0), (0, 2, 1, 1, 3, 0),
                     (1, 1, 1, 3, 3, 1), (1, 2, 2, 0, 2, 0), (1, 2, 0, 0, 2, 0)])
    got = fill(plan, np.array([0, 1, 2]), 7, lambda d: ids[d], SimpleNamespace(bos=1, eos=2))
    expected = dict(
        tokens=[[1, 10, 11, 20, 21, 22, 2], [22, 23, 24, 1, 30, 1, 10], [2] * 7],
        targets=[[10, 11, 2, 21, 22, 23, 2], [23, 24, 2, 30, 2, 10, 11], [2] * 7],
        segments=[[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 2, 2, 2, 2], [0] * 7],
        positions=[[0, 1, 2, 0, 1, 2, 0], [0, 1, 2, 0, 1, 2, 3], [0] * 7],
        weights=[[1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1], [0] * 7],
        document=[[0, 0, 0, 1, 1, 1, -1], [1, 1, 1, 2, 2, 0, 0], [-1] * 7])
    assert set(got) == set(expected)
    for key, value in expected.items():
        equal(got[key], value, err_msg=key)
        assert got[key].dtype == (np.float32 if key == "weights" else np.int32)


@given(lengths.filter(len), st.integers(1, 50), st.data())
def test_fill_gives_each_position_its_next_token(sizes, seq, drawn):
    """For the plans of training and evaluation, with ids that tell where they are from."""
    overlap = drawn.draw(st.integers(0, seq - 1))
    special = SimpleNamespace(bos=-1, eos=-2)
    for plan in (concat_and_split(sizes, seq), windows(sizes, seq, overlap)):
        rows = np.arange(plan[-1, ROW] + 1)
        got = fill(plan, rows, seq, lambda d: 100 * d + np.arange(sizes[d] - 1), special)
        predicted = []
        for r in rows:
            for segment in range(1, got["segments"][r].max() + 1):
                where = got["segments"][r] == segment
                tokens, targets, weights = (
                    got[k][r, where].tolist() for k in ("tokens", "targets", "weights"))
                (document,) = set(got["document"][r, where].tolist())
                whole = [-1, *(100 * document + np.arange(sizes[document] - 1)).tolist(), -2]
                start = whole.index(tokens[0])
                assert whole[start:start + len(tokens) + 1] == [*tokens, targets[-1]]
                assert tokens[1:] == targets[:-1]
                equal(got["positions"][r, where], np.arange(len(tokens)))
                predicted += [(document, start + i) for i, weight in enumerate(weights) if weight]
        assert sorted(predicted) == [(d, i) for d, n in enumerate(sizes.tolist()) for i in range(n)]
        padding = got["segments"] == 0
        assert np.all(got["tokens"][padding] == -2) and not np.any(got["weights"][padding])


# ----------------------------------------------------------------------------------------------- bin-packings


@st.composite
def documents(draw) -> tuple[np.ndarray, int]:
    """(lengths, seq), lengths about the multiples, halves and thirds of seq more often than elsewhere."""
    seq = draw(st.integers(1, 40))
    near = st.builds(lambda part, off: max(1, seq * part // 6 + off), st.integers(0, 15), st.integers(-1, 1))
    lengths = draw(st.lists(st.one_of(near, st.integers(1, 4 * seq)), max_size=60))
    return np.array(lengths, np.int64), seq


def rows_of(plan: np.ndarray) -> list[list[int]]:
    """The lengths of the pieces in each row, in falling order, rows in order."""
    return [sorted((int(p[LENGTH]) for p in group), reverse=True)
            for _, group in itertools.groupby(plan, lambda p: p[ROW])]


def slow_best_fit(lengths: list[int], seq: int) -> list[list[int]]:
    """Best-fit decreasing by looking at every row; of rows with as much left, the last one to get a piece."""
    pieces = [min(seq, n - start) for n in lengths for start in range(0, n, seq)]
    rows, last = [], []
    for now, w in enumerate(sorted(pieces, reverse=True)):
        room = [(seq - sum(r), -last[i], i) for i, r in enumerate(rows) if sum(r) + w <= seq]
        if room:
            i = min(room)[2]
        else:
            i = len(rows)
            rows.append([])
            last.append(0)
        rows[i].append(w)
        last[i] = now
    return rows


@pytest.mark.parametrize("pack", PACKINGS)
@given(case=documents())
def test_a_packing_keeps_every_position_and_cuts_no_document_that_fits(pack, case):
    lengths, seq = case
    plan = pack(lengths, seq)
    assert plan.dtype == np.int64 and plan.shape[1] == 6 and np.all(np.diff(plan[:, ROW]) >= 0)
    equal(plan, pack(lengths, seq))
    assert np.all(plan[:, LENGTH] > 0) and not plan[:, QUIET].any()
    rows = int(plan[-1, ROW]) + 1 if len(plan) else 0
    filled = np.bincount(plan[:, ROW], plan[:, LENGTH], rows)
    assert np.all((filled > 0) & (filled <= seq))
    for row in range(rows):
        here = plan[plan[:, ROW] == row, SEGMENT]
        assert np.array_equal(here, 1 + np.arange(len(here)))
    for number, length in enumerate(lengths.tolist()):
        pieces = sorted((int(p[START]), int(p[LENGTH])) for p in plan[plan[:, DOCUMENT] == number])
        assert pieces == [(start, min(seq, length - start)) for start in range(0, length, seq)]


@given(case=documents())
def test_best_fit_makes_the_rows_that_a_search_through_all_rows_makes(case):
    lengths, seq = case
    assert rows_of(best_fit(lengths, seq)) == slow_best_fit(lengths.tolist(), seq)


@given(case=documents())
def test_first_fit_makes_the_rows_that_a_search_from_the_first_makes(case):
    lengths, seq = case
    rows = []
    for w in (min(seq, n - start) for n in lengths.tolist() for start in range(0, n, seq)):
        fits = next((r for r in rows if sum(r) + w <= seq), None)
        rows.append([w]) if fits is None else fits.append(w)
    assert rows_of(first_fit(lengths, seq)) == [sorted(r, reverse=True) for r in rows]


def test_best_fit_of_the_paper_s_documents():
    assert rows_of(best_fit(np.array([14, 7, 5, 2, 3]), 8)) == [[8], [7], [6, 2], [5, 3]]
    # rows that hold 8, 6, 6 and 4 of 8 after the longer documents: 3 goes where 4 are left
    assert rows_of(best_fit(np.array([8, 6, 6, 4, 3]), 8)) == [[8], [6], [6], [4, 3]]


@pytest.mark.parametrize("pack", PACKINGS)
def test_documents_longer_than_half_a_row_take_one_each(pack):
    lengths = np.random.default_rng(0).integers(33, 65, 500)
    assert sorted(pack(lengths, 64)[:, LENGTH]) == sorted(lengths) and pack(lengths, 64)[-1, ROW] == 499


@pytest.mark.parametrize("pack", PACKINGS)
def test_no_documents_give_an_empty_plan(pack):
    assert pack(np.array([], np.int64), 16).shape == (0, 6)


def test_best_fit_of_100_000_documents_wastes_next_to_nothing():
    lengths = np.random.default_rng(0).lognormal(6.2, 1.1, 100_000).astype(np.int64) + 1
    plan = best_fit(lengths, 2048)
    assert plan[:, LENGTH].sum() == lengths.sum()
    assert plan[-1, ROW] + 1 <= 1.0002 * math.ceil(lengths.sum() / 2048)
    assert np.all(np.bincount(plan[:, DOCUMENT])[lengths <= 2048] == 1)

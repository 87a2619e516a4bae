"""lib/packing.py: plans that keep every position, rows filled by hand, permutations."""
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
    permute_one,
)

equal = np.testing.assert_array_equal
PACKINGS = [best_fit, first_fit, one_per_row]


# ------------------------------------------------------------------------------------- permutations

NUMBERS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 100, 255, 256, 257, 1_000, 4_096, 5_003]


@pytest.mark.parametrize("n", NUMBERS)
def test_permute_is_a_permutation(n):
    found = permute(np.arange(n), n, 1, 2)
    equal(np.sort(found), np.arange(n))
    assert found.dtype == np.int64


def test_permute_of_nothing_is_nothing():
    assert permute(np.arange(0), 0, 1).shape == (0,)


KEYS = [
    (0, 0, 0),
    (1, 0, 0),
    (0, 1, 0),
    (0, 0, 1),
    (0, 0, 0, 1),
    (2**40, 0, 0),
]


def thousand_permuted(key) -> np.ndarray:
    """0 to 999 in the order of a key."""
    return permute(np.arange(1_000), 1_000, *key)


def test_permute_follows_its_key():
    images = [thousand_permuted(key) for key in KEYS]
    for one, other in itertools.combinations(images, 2):
        assert np.mean(one == other) < 0.02
    equal(images[0], thousand_permuted(KEYS[0]))


@pytest.mark.parametrize("key", KEYS)
def test_permute_parts_neighbours(key):
    steps = np.abs(np.diff(thousand_permuted(key)))
    assert np.mean(steps < 10) < 0.1


@given(st.integers(1, 10**12), st.data())
def test_permute_of_one_is_as_within_many(n, drawn):
    numbers = st.lists(st.integers(0, n - 1), min_size=1, max_size=5)
    index = drawn.draw(numbers)

    many = permute(np.array(index), n, 3).tolist()

    assert [permute_one(i, n, 3) for i in index] == many
    assert all(0 <= i < n for i in many)


# ----------------------------------------------------------------------------------- the plain plan

lengths = st.lists(st.integers(1, 40), max_size=25).map(lambda x: np.array(x, np.int64))


def times_taken(plan, sizes) -> list[np.ndarray]:
    """How often a plan takes each position of each document."""
    times = [np.zeros(n, int) for n in sizes]
    for _, _, document, start, length, _ in plan.tolist():
        assert length > 0
        assert start + length <= len(times[document])
        times[document][start:start + length] += 1
    return times


def times_predicted(plan, sizes) -> list[np.ndarray]:
    """How often a plan takes each position with a loss: those that are not quiet."""
    assert np.all(plan[:, QUIET] >= 0)
    assert np.all(plan[:, QUIET] < plan[:, LENGTH])
    loud = plan.copy()
    loud[:, START] += plan[:, QUIET]
    loud[:, LENGTH] -= plan[:, QUIET]
    return times_taken(loud, sizes)


def check_numbering(plan):
    """Rows are 0, 1, 2, ...; segments 1, 2, ... in each."""
    rows = plan[:, ROW].tolist()
    used = set(rows)
    assert rows == sorted(rows)
    assert used == set(range(len(used)))
    for row in used:
        segments = plan[plan[:, ROW] == row, SEGMENT]
        assert segments.tolist() == list(range(1, 1 + len(segments)))


def filled(plan) -> np.ndarray:
    """How many positions of each row are taken."""
    if not len(plan):
        return np.zeros(0)
    return np.bincount(plan[:, ROW], plan[:, LENGTH])


@given(lengths, st.integers(1, 50))
@example(np.array([], np.int64), 4)
@example(np.array([4, 4]), 4)
@example(np.array([1, 1, 1]), 1)
def test_concat_and_split_covers_everything_once_in_order(sizes, seq):
    plan = concat_and_split(sizes, seq)

    assert plan.shape[1] == 6
    assert plan.dtype.kind == "i"
    assert all(np.all(times == 1) for times in times_taken(plan, sizes))
    assert not np.any(plan[:, QUIET])
    check_numbering(plan)
    order = plan[:, [DOCUMENT, START]].tolist()
    assert order == sorted(order)
    positions = filled(plan)
    assert np.all(positions[:-1] == seq)
    assert np.all(positions <= seq)
    assert positions.sum() == sizes.sum()


@given(lengths, st.integers(1, 50), st.data())
def test_windows_predict_everything_once(sizes, seq, drawn):
    overlap = drawn.draw(st.integers(0, seq - 1))

    plan = windows(sizes, seq, overlap)

    times_taken(plan, sizes)
    assert all(np.all(times == 1) for times in times_predicted(plan, sizes))
    check_numbering(plan)
    assert np.all(filled(plan) <= seq)
    for _, _, document, start, length, quiet in plan.tolist():
        assert quiet == (overlap if start else 0)
        whole = (start, length) == (0, sizes[document])
        assert whole or sizes[document] > seq  # only what does not fit is cut


# ------------------------------------------------------------------------------------------ filling


def test_fill_by_hand():
    """Row 0: a whole document, the middle of another, padding. Row 1: its end, one position quiet,
    and two pieces that share a segment. Row 2 is not in the plan.
    """
    ids = [
        np.array([10, 11], np.uint16),
        np.array([20, 21, 22, 23, 24], np.uint16),
        np.array([30], np.uint16),
    ]
    plan = np.array([
        (0, 1, 0, 0, 3, 0),
        (0, 2, 1, 1, 3, 0),
        (1, 1, 1, 3, 3, 1),
        (1, 2, 2, 0, 2, 0),
        (1, 2, 0, 0, 2, 0),
    ])
    expected = dict(
        tokens=[[1, 10, 11, 20, 21, 22, 2], [22, 23, 24, 1, 30, 1, 10], [2] * 7],
        targets=[[10, 11, 2, 21, 22, 23, 2], [23, 24, 2, 30, 2, 10, 11], [2] * 7],
        segments=[[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 2, 2, 2, 2], [0] * 7],
        positions=[[0, 1, 2, 0, 1, 2, 0], [0, 1, 2, 0, 1, 2, 3], [0] * 7],
        weights=[[1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1], [0] * 7],
        document=[[0, 0, 0, 1, 1, 1, -1], [1, 1, 1, 2, 2, 0, 0], [-1] * 7],
    )
    special = SimpleNamespace(bos=1, eos=2)

    got = fill(plan, np.array([0, 1, 2]), 7, lambda document: ids[document], special)

    assert set(got) == set(expected)
    for key, value in expected.items():
        dtype = np.float32 if key == "weights" else np.int32
        equal(got[key], value, err_msg=key)
        assert got[key].dtype == dtype


BOS, EOS = -1, -2


def ids_of(document: int, positions: int) -> np.ndarray:
    """Ids that tell where they are from, of a document with so many positions."""
    return 100 * document + np.arange(positions - 1)


def check_segment(segment: dict, sizes) -> list[tuple[int, int]]:
    """(document, position) of what a segment predicts; each target must be the next token."""
    tokens = segment["tokens"].tolist()
    targets = segment["targets"].tolist()
    (document,) = set(segment["document"].tolist())
    whole = [BOS, *ids_of(document, sizes[document]).tolist(), EOS]
    start = whole.index(tokens[0])
    assert whole[start:start + len(tokens) + 1] == [*tokens, targets[-1]]
    assert tokens[1:] == targets[:-1]
    equal(segment["positions"], np.arange(len(tokens)))
    weighted = np.flatnonzero(segment["weights"])
    return [(document, start + i) for i in weighted.tolist()]


def check_rows(plan, sizes, seq):
    """What `fill` makes of a plan predicts every position of the documents once."""
    def ids(document):
        return ids_of(document, sizes[document])

    rows = np.arange(plan[-1, ROW] + 1)
    got = fill(plan, rows, seq, ids, SimpleNamespace(bos=BOS, eos=EOS))
    predicted = []
    for row in rows:
        here = {name: values[row] for name, values in got.items()}
        for number in range(1, here["segments"].max() + 1):
            where = here["segments"] == number
            segment = {name: values[where] for name, values in here.items()}
            predicted += check_segment(segment, sizes)

    everything = []
    for document, positions in enumerate(sizes.tolist()):
        everything += [(document, position) for position in range(positions)]
    assert sorted(predicted) == everything
    padding = got["segments"] == 0
    assert np.all(got["tokens"][padding] == EOS)
    assert not np.any(got["weights"][padding])


@given(lengths.filter(len), st.integers(1, 50), st.data())
def test_fill_gives_each_position_its_next_token(sizes, seq, drawn):
    """In the plans of training and in those of evaluation."""
    overlap = drawn.draw(st.integers(0, seq - 1))
    check_rows(concat_and_split(sizes, seq), sizes, seq)
    check_rows(windows(sizes, seq, overlap), sizes, seq)


# -------------------------------------------------------------------------------------- bin-packings


@st.composite
def documents(draw) -> tuple[np.ndarray, int]:
    """(lengths, seq): many lengths are near a multiple, a half or a third of seq."""
    seq = draw(st.integers(1, 40))

    def near_part(sixths, offset):
        return max(1, seq * sixths // 6 + offset)

    near = st.builds(near_part, st.integers(0, 15), st.integers(-1, 1))
    anywhere = st.integers(1, 4 * seq)
    lengths = draw(st.lists(st.one_of(near, anywhere), max_size=60))
    return np.array(lengths, np.int64), seq


def rows_of(plan: np.ndarray) -> list[list[int]]:
    """The lengths of the pieces in each row, in falling order, rows in order."""
    rows = []
    for _, pieces in itertools.groupby(plan, lambda piece: piece[ROW]):
        lengths = [int(piece[LENGTH]) for piece in pieces]
        rows.append(sorted(lengths, reverse=True))
    return rows


def pieces_of(length: int, seq: int) -> list[tuple[int, int]]:
    """(start, length) of the pieces of a document: full ones, then what is left."""
    return [(start, min(seq, length - start)) for start in range(0, length, seq)]


def slow_best_fit(pieces: list[int], seq: int) -> list[list[int]]:
    """Best-fit decreasing by looking at every row.

    Of rows with as much room left it takes the last one to get a piece.
    """
    rows = []
    last = []  # when each row got its last piece
    for time, piece in enumerate(sorted(pieces, reverse=True)):
        fits = []
        for number, row in enumerate(rows):
            room = seq - sum(row)
            if room >= piece:
                fits.append((room, -last[number], number))
        if fits:
            *_, number = min(fits)
            rows[number].append(piece)
            last[number] = time
        else:
            rows.append([piece])
            last.append(time)
    return rows


def slow_first_fit(pieces: list[int], seq: int) -> list[list[int]]:
    """First-fit by looking at every row from the first."""
    rows = []
    for piece in pieces:
        fits = [row for row in rows if sum(row) + piece <= seq]
        if fits:
            fits[0].append(piece)
        else:
            rows.append([piece])
    return [sorted(row, reverse=True) for row in rows]


def all_pieces(lengths: np.ndarray, seq: int) -> list[int]:
    """The lengths of the pieces of all documents."""
    cut = [pieces_of(length, seq) for length in lengths.tolist()]
    return [length for pieces in cut for _, length in pieces]


@pytest.mark.parametrize("pack", PACKINGS)
@given(case=documents())
def test_a_packing_keeps_every_position_and_cuts_no_document_that_fits(pack, case):
    lengths, seq = case

    plan = pack(lengths, seq)

    assert plan.dtype == np.int64
    assert plan.shape[1] == 6
    assert np.all(plan[:, LENGTH] > 0)
    assert not plan[:, QUIET].any()
    check_numbering(plan)
    positions = filled(plan)
    assert np.all(positions > 0)
    assert np.all(positions <= seq)
    for number, length in enumerate(lengths.tolist()):
        own = plan[plan[:, DOCUMENT] == number]
        pieces = own[:, [START, LENGTH]].tolist()
        expected = [list(piece) for piece in pieces_of(length, seq)]
        assert sorted(pieces) == expected
    equal(plan, pack(lengths, seq))


@given(case=documents())
def test_best_fit_makes_the_rows_that_a_search_through_all_rows_makes(case):
    lengths, seq = case
    plan = best_fit(lengths, seq)
    assert rows_of(plan) == slow_best_fit(all_pieces(lengths, seq), seq)


@given(case=documents())
def test_first_fit_makes_the_rows_that_a_search_from_the_first_makes(case):
    lengths, seq = case
    plan = first_fit(lengths, seq)
    assert rows_of(plan) == slow_first_fit(all_pieces(lengths, seq), seq)


def test_best_fit_of_the_paper_s_documents():
    plan = best_fit(np.array([14, 7, 5, 2, 3]), 8)
    assert rows_of(plan) == [[8], [7], [6, 2], [5, 3]]

    # Rows that hold 8, 6, 6 and 4 of 8 after the longer documents: 3 goes where 4 are left.
    plan = best_fit(np.array([8, 6, 6, 4, 3]), 8)
    assert rows_of(plan) == [[8], [6], [6], [4, 3]]


@pytest.mark.parametrize("pack", PACKINGS)
def test_documents_longer_than_half_a_row_take_one_each(pack):
    lengths = np.random.default_rng(0).integers(33, 65, 500)
    plan = pack(lengths, 64)
    assert sorted(plan[:, LENGTH]) == sorted(lengths)
    assert plan[-1, ROW] == 499


@pytest.mark.parametrize("pack", PACKINGS)
def test_no_documents_give_an_empty_plan(pack):
    plan = pack(np.array([], np.int64), 16)
    assert plan.shape == (0, 6)


def test_best_fit_of_100_000_documents_wastes_next_to_nothing():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(6.2, 1.1, 100_000).astype(np.int64) + 1
    total = lengths.sum()

    plan = best_fit(lengths, 2048)

    assert plan[:, LENGTH].sum() == total
    rows = plan[-1, ROW] + 1
    assert rows <= 1.0002 * math.ceil(total / 2048)
    pieces = np.bincount(plan[:, DOCUMENT])
    assert np.all(pieces[lengths <= 2048] == 1)

"""Packing: which document pieces make up which row.

A document of n tokens has n + 1 positions: inputs bos t1 .. tn, targets t1 .. tn eos. So each token
and the end are predicted once, no target belongs to another document, and a document may be cut
anywhere.

A packing takes the positions of each document [documents] and the length of a row. It returns a
plan: an integer array [pieces, 6], ordered by row, with the columns ROW, SEGMENT, DOCUMENT, START,
LENGTH and QUIET. Segments count from 1 in each row. The first QUIET positions of a piece carry no
loss. A packing with a parameter `documents` is told more about them, see `data.Documents`; with a
parameter `tokenizer` it is told the tokenizer.
"""
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np

from lib.seams import PACKING, require_gave
from lib.tokenizers import Tokenizer

PLAN = ROW, SEGMENT, DOCUMENT, START, LENGTH, QUIET = range(6)
BOUNDS = 1, 8, 32, 128  # on the segments of a row, that a step may be compiled for
WORD = 2**64 - 1


def plan_of(
    row: np.ndarray,
    document: np.ndarray,
    start: np.ndarray,
    length: np.ndarray,
) -> np.ndarray:
    """The plan that puts each piece into a row, as a segment of its own.

    All arguments are [pieces]. Rows count from 0 without a gap and keep the order of their pieces.
    """
    order = np.argsort(row, kind="stable")
    row = np.asarray(row, np.int64)[order]
    first = np.searchsorted(row, row)  # the first piece of each piece's row
    segment = np.arange(len(row)) - first + 1
    columns = [
        row,
        segment,
        document[order],
        start[order],
        length[order],
        np.zeros_like(row),
    ]
    return np.stack(columns, axis=1)


def checked_plan(plan, lengths: np.ndarray, seq: int, packing: Callable) -> np.ndarray:
    """What a packing gave for documents of `lengths`, as int64 [pieces, 6].

    Raises InputError for what is no plan, or for a piece that is not there or does not fit.
    """
    array = np.asarray(plan)
    if not array.size:
        array = np.zeros((0, len(PLAN)), np.int64)
    fine = array.shape[1:] == (len(PLAN),)
    fine = fine and array.dtype.kind in "iu"
    require_gave(fine, PACKING, packing, plan, ": integers [pieces, 6]")
    whole = array.astype(np.int64)
    for broken, rule in plan_rules(whole, lengths, seq):
        which = np.flatnonzero(broken)
        if len(which):
            piece = whole[which[0]].tolist()
            require_gave(False, PACKING, packing, piece, f": {rule}")
    return whole


def plan_rules(plan: np.ndarray, lengths: np.ndarray, seq: int) -> Iterator[tuple]:
    """Pairs of which pieces of a plan break a rule [pieces], and the rule."""
    row, segment, document, start, length, quiet = plan.T
    last = len(lengths) - 1
    unknown = document < 0
    unknown |= document > last
    yield unknown, f"documents from 0 to {last}"
    left = lengths[document] - start
    outside = start < 0
    outside |= length > left
    outside |= length < 1
    yield outside, "pieces within their documents"
    before = np.append(-1, row[:-1])
    yield row - before > 1, "rows from 0 without a gap"
    back = row < np.maximum(before, 0)
    yield back, "pieces in the order of their rows"
    used = np.bincount(row, length)
    full = used[row] > seq
    yield full, f"rows of at most {seq} positions"
    loud = quiet < 0
    loud |= quiet > length
    yield loud, "QUIET from 0 to LENGTH"
    yield segment < 1, "segments from 1"


def concat_and_split(lengths: np.ndarray, seq: int) -> np.ndarray:
    """The plain packing: all positions end to end, cut every `seq`. Only the last row is padded."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    rows = np.arange(0, lengths.sum(), seq)
    cuts = np.concatenate([starts[lengths > 0], rows])
    cuts = np.unique(cuts)
    document = np.searchsorted(ends, cuts, side="right")
    start = cuts - starts[document]
    length = np.diff(np.append(cuts, ends[-1:]))
    return plan_of(cuts // seq, document, start, length)


def cut(lengths: np.ndarray, seq: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, length) of pieces [pieces]: a document's full ones, then what is left."""
    lengths = np.asarray(lengths, np.int64)
    number = -(-lengths // seq)  # rounded up
    document = np.repeat(np.arange(len(lengths)), number)
    before = np.cumsum(number) - number
    first = np.repeat(before, number)
    start = seq * (np.arange(len(document)) - first)
    length = np.minimum(seq, lengths[document] - start)
    return document, start, length


def one_per_row(lengths: np.ndarray, seq: int) -> np.ndarray:
    """A row for each piece, the rest of it padding."""
    document, start, length = cut(lengths, seq)
    return plan_of(np.arange(len(length)), document, start, length)


# The two packings below look for room in a segment tree. It is a list: node i has the children 2i
# and 2i + 1 and holds the larger of their values, and the leaves are the second half.


def leftmost(tree: list[int], least: int) -> int:
    """The leftmost leaf that holds `least` or more. There must be one: tree[1] is the largest."""
    node = 1
    while node < len(tree) // 2:
        node *= 2
        if tree[node] < least:
            node += 1
    return node


def set_leaf(tree: list[int], node: int, value: int):
    """Set a leaf, and what changes above it."""
    tree[node] = value
    while node > 1:
        node //= 2
        value = max(tree[2 * node], tree[2 * node + 1])
        if tree[node] == value:
            return
        tree[node] = value


def first_fit(lengths: np.ndarray, seq: int) -> np.ndarray:
    """First fit: pieces in the order given, each into the first row with room. O(n log n)."""
    document, start, length = cut(lengths, seq)
    leaves = 1 << len(length).bit_length()
    tree = [seq] * (2 * leaves)  # leaf i holds the room that row i has left
    row = []
    for size in length.tolist():
        leaf = leftmost(tree, size)
        set_leaf(tree, leaf, tree[leaf] - size)
        row.append(leaf - leaves)
    return plan_of(np.array(row, np.int64), document, start, length)


def best_fit(lengths: np.ndarray, seq: int) -> np.ndarray:
    """Best-fit decreasing: the longest piece first, each into the row where it leaves least room.

    Only documents longer than `seq` are cut. Of rows with as much room, the last to have come there
    is taken. O(n log seq) by a tree over room (Ding et al. 2024, "Fewer Truncations Improve
    Language Modeling", 2.2).
    """
    document, start, length = cut(lengths, seq)
    order = np.argsort(-length, kind="stable")
    full = int(np.sum(length == seq))
    row = np.empty(len(length), np.int64)
    row[order[:full]] = np.arange(full)
    rest = order[full:]
    row[rest] = fit_pieces(length[rest].tolist(), seq, full)
    return plan_of(row, document, start, length)


def fit_pieces(sizes: list[int], seq: int, rows: int) -> list[int]:
    """The row of each piece by best fit, in the order given; `rows` rows before are full."""
    leaves = 1 << seq.bit_length()
    tree = [0] * (2 * leaves)  # leaf c holds c where some row has room for exactly c
    set_leaf(tree, leaves + seq, seq)  # a fresh row, always
    having = [[] for _ in range(seq + 1)]  # rows with room for exactly so much
    placed = []
    for size in sizes:
        leaf = leftmost(tree, size)
        room = leaf - leaves
        if room == seq:
            row = rows
            rows += 1
        else:
            row = having[room].pop()
            if not having[room]:
                set_leaf(tree, leaf, 0)
        room -= size
        if room:
            having[room].append(row)
            set_leaf(tree, leaves + room, room)
        placed.append(row)
    return placed


def fill(
    plan: np.ndarray,
    rows: np.ndarray,
    seq: int,
    tokens_of: Callable[[int], np.ndarray],
    tokenizer: Tokenizer,
) -> dict[str, np.ndarray]:
    """Rows of a plan as arrays [len(rows), seq], float32 weights and otherwise int32.

    They are: tokens targets segments positions weights document. tokens_of: gives a document's ids.
    Padding, and a row that is not in the plan, is eos in segment 0 of document -1.
    """
    first = np.searchsorted(plan[:, ROW], rows)
    last = np.searchsorted(plan[:, ROW], rows, side="right")
    filled = []  # a row each
    for begin, end in zip(first, last, strict=True):
        pieces = plan[begin:end]
        row = fill_row(pieces, seq, tokens_of, tokenizer)
        filled.append(row | {"document": spread(pieces, DOCUMENT, seq, -1)})
    return {name: np.stack([row[name] for row in filled]) for name in filled[0]}


def fill_row(
    pieces: np.ndarray,
    seq: int,
    tokens_of: Callable[[int], np.ndarray],
    tokenizer: Tokenizer,
) -> dict[str, np.ndarray]:
    """`fill` for one row, without `document`: arrays [seq] of its pieces."""
    tokens = np.full(seq, tokenizer.eos, np.int32)
    targets = tokens.copy()
    positions, weights = np.zeros(seq, np.int32), np.zeros(seq, np.float32)
    at = 0  # where the next piece begins
    current, begun = 0, 0  # the segment, and where it began
    for _, segment, document, start, length, quiet in pieces.tolist():
        if segment != current:
            current, begun = segment, at
        end = at + length
        ids = tokens_of(document)
        first = at
        if start == 0:  # bos stands before a document's first token
            tokens[at] = tokenizer.bos
            first += 1
        tokens[first:end] = ids[start + first - at - 1:start + length - 1]
        rest = ids[start:start + length]  # eos follows the last token
        targets[at:at + len(rest)] = rest
        positions[at:end] = np.arange(at - begun, end - begun)
        weights[at + quiet:end] = 1
        at = end
    return {
        "tokens": tokens,
        "targets": targets,
        "segments": segments_of(pieces, seq),
        "positions": positions,
        "weights": weights,
    }


def segments_of(pieces: np.ndarray, seq: int) -> np.ndarray:
    """The segments [seq] of one row, int32, 0 on padding; pieces: as its plan has them."""
    return spread(pieces, SEGMENT, seq, 0)


def spread(pieces: np.ndarray, column: int, seq: int, rest: int) -> np.ndarray:
    """A column of a row's pieces at each of its positions [seq], int32; rest: on padding."""
    row = np.full(seq, rest, np.int32)
    values = np.repeat(pieces[:, column], pieces[:, LENGTH])
    row[:len(values)] = values
    return row


def fill_marks(
    pieces: np.ndarray, seq: int, marks_of: Callable[[int], np.ndarray]
) -> np.ndarray:
    """The marks [seq] of one row's targets, int32: 1 where a target is a marked token, else 0.

    pieces: of the row, as its plan has them. marks_of: gives 0 or 1 for each token of a document.
    """
    row = np.zeros(seq, np.int32)
    at = 0
    for _, _, document, start, length, _ in pieces.tolist():
        marks = marks_of(document)[start:start + length]  # the end of a document is not marked
        row[at:at + len(marks)] = marks
        at += length
    return row


def bound_on_segments(segments: np.ndarray) -> int:
    """The first of BOUNDS that no row of `segments` [rows, seq] has more of them than.

    Padding counts as one. 0 where a row has more than any of BOUNDS, or one that does not lie
    together.
    """
    in_order = np.sort(segments, axis=1)
    runs = 1 + np.count_nonzero(np.diff(segments), axis=1)
    distinct = 1 + np.count_nonzero(np.diff(in_order), axis=1)
    if np.any(distinct < runs):
        return 0
    most = np.max(runs)
    enough = [bound for bound in BOUNDS if most <= bound]
    return min(enough, default=0)


def permute(index: np.ndarray, n: int, *key: int) -> np.ndarray:
    """The image [m] of `index` [m], in 0..n-1, under a permutation of 0..n-1 that `key` chooses.

    A four-round Feistel network permutes the next even power of 2. What comes out above n - 1 goes
    in again. So no table of n numbers is needed.
    """
    bits, seeds = half_of(n), seeds_of(*key)
    image = np.array(index, np.uint64)
    todo = np.ones(len(image), bool)
    while todo.any():
        image[todo] = network(image[todo], bits, seeds)
        todo = image >= n
    return image.astype(np.int64)


def permute_one(index: int, n: int, *key: int) -> int:
    """`permute` of one number, in a tenth of the time."""
    bits, seeds = half_of(n), seeds_of(*key)
    image = network(index, bits, seeds)
    while image >= n:
        image = network(image, bits, seeds)
    return image


def half_of(n: int) -> int:
    """Bits of each half of a number below `n`, in a power of 2 that is even."""
    bits = (n - 1).bit_length()
    return max(1, (bits + 1) // 2)


@lru_cache(256)
def seeds_of(*key: int) -> list[int]:
    """The seeds of the rounds of a network."""
    seeds = np.random.SeedSequence((len(key), *key))
    rounds = seeds.generate_state(4, np.uint64)
    return rounds.tolist()


def network(index: np.ndarray | int, bits: int, seeds: list[int]) -> np.ndarray | int:
    """The image of `index`, uint64 [m] or a number, whose halves have so many bits."""
    low = 2**bits - 1
    left = index >> bits
    right = index & low
    for seed in seeds:
        left, right = right, left ^ (mix(right ^ seed) & low)
    return (left << bits) | right


def mix(bits: np.ndarray | int) -> np.ndarray | int:
    """The upper halves of scrambled 64-bit numbers, with the constants of SplitMix64."""
    bits = (bits * 0x9E3779B97F4A7C15) & WORD
    bits = bits ^ (bits >> 29)
    bits = (bits * 0xBF58476D1CE4E5B9) & WORD
    return bits >> 32


def sorted_rows(plan: np.ndarray, score: np.ndarray) -> np.ndarray:
    """A plan with its rows by rising mean score [documents] of their positions."""
    row = plan[:, ROW]
    positions = plan[:, LENGTH]
    of_piece = score[plan[:, DOCUMENT]]
    total = np.bincount(row, positions * of_piece)
    mean = total / np.bincount(row, positions)
    order = np.argsort(mean, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    plan = plan.copy()
    plan[:, ROW] = place[row]
    order = np.argsort(plan[:, ROW], kind="stable")
    return plan[order]

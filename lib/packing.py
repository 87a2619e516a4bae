"""Packing: which document pieces make up which row."""
from collections.abc import Callable

import numpy as np

from lib.tokenizers import Tokenizer

#
# A document of n tokens has n + 1 positions: inputs bos t1 .. tn, targets t1 .. tn eos. So each token and the
# end are predicted once, no target belongs to another document, and a document may be cut anywhere. A plan is
# an integer array [pieces, 6], ordered by row, with these columns; the first QUIET positions carry no loss.

PLAN = ROW, SEGMENT, DOCUMENT, START, LENGTH, QUIET = range(6)


def concat_and_split(lengths: np.ndarray, seq: int) -> np.ndarray:
    """The plain packing: all positions end to end, cut every `seq`; only the last row is padded.

    lengths: positions of each document [n], 0 to leave it out. Returns a plan; every piece is a segment of
    its own. A packing with a third parameter `documents` is told more about them, see `Documents`.
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    cuts = np.unique(np.concatenate([starts[lengths > 0], np.arange(0, lengths.sum(), seq)]))
    document = np.searchsorted(ends, cuts, side="right")
    row = cuts // seq
    first = np.searchsorted(row, row)  # the first piece of each piece's row
    length = np.diff(np.append(cuts, ends[-1:]))
    return np.stack([row, np.arange(len(cuts)) - first + 1, document, cuts - starts[document], length,
                     np.zeros_like(cuts)], axis=1)


def fill(plan: np.ndarray, rows: np.ndarray, seq: int, tokens_of: Callable, tokenizer: Tokenizer) -> dict:
    """Rows of a plan as arrays [len(rows), seq]: tokens targets segments positions weights document.

    tokens_of(document) gives its ids. Padding, and a row that is not in the plan, is eos in segment 0.
    """
    shape, eos = (len(rows), seq), tokenizer.eos
    out = dict(tokens=np.full(shape, eos, np.int32), targets=np.full(shape, eos, np.int32),
               segments=np.zeros(shape, np.int32), positions=np.zeros(shape, np.int32),
               weights=np.zeros(shape, np.float32), document=np.full(shape, -1, np.int32))
    first, last = np.searchsorted(plan[:, ROW], rows), np.searchsorted(plan[:, ROW], rows, side="right")
    for r in range(len(rows)):
        at, segment_at, before = 0, 0, 0
        for _, segment, document, start, length, quiet in plan[first[r]:last[r]].tolist():
            ids, to = tokens_of(document), slice(at, at + length)
            inputs = ids[max(0, start - 1):start + length - 1].astype(np.int32)
            out["tokens"][r, to] = inputs if start else np.insert(inputs, 0, tokenizer.bos)
            out["targets"][r, to] = np.append(ids[start:start + length].astype(np.int32), eos)[:length]
            segment_at, before = (segment_at, before) if segment == before else (at, segment)
            out["segments"][r, to], out["document"][r, to] = segment, document
            out["positions"][r, to] = np.arange(at - segment_at, at - segment_at + length)
            out["weights"][r, at + quiet:at + length] = 1
            at += length
    return out


def permute(index, n: int, *key: int) -> np.ndarray:
    """The image of `index` (in 0..n-1) under a pseudo-random permutation of n things that `key` chooses:
    a four-round Feistel network on the next even number of bits, walked until below n."""
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    low = np.uint64(2**bits - 1)
    seeds = np.random.SeedSequence((len(key), *key)).generate_state(4, np.uint64)
    out = np.atleast_1d(np.asarray(index, np.uint64)).copy()
    todo = np.ones(len(out), bool)
    while todo.any():
        left, right = out[todo] >> np.uint64(bits), out[todo] & low
        for seed in seeds:
            mixed = (right ^ seed) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & low)
        out[todo] = (left << np.uint64(bits)) | right
        todo = out >= n
    return out.astype(np.int64)
# A packing gets the documents of a window, permuted, and gives a plan (see data.py); each piece is a segment
# here. A bin-packer opens its rows by falling length: harmless, as `data.Rows` permutes the rows of a
# window after packing. Within a row, pieces stand in the order in which the documents came.


def cut(lengths: np.ndarray, seq: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, length) of the pieces of documents: full ones of `seq`, and what remains [pieces]."""
    lengths = np.asarray(lengths, np.int64)
    number = -(-lengths // seq)
    document = np.repeat(np.arange(len(lengths)), number)
    start = seq * (np.arange(len(document)) - np.repeat(np.cumsum(number) - number, number))
    return document, start, np.minimum(seq, lengths[document] - start)


def plan_of(row: np.ndarray, document: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The plan that puts each piece into a row, in rows from 0 without a gap."""
    order = np.argsort(row, kind="stable")
    row = np.asarray(row, np.int64)[order]
    segment = np.arange(len(row)) - np.searchsorted(row, row) + 1
    return np.stack([row, segment, document[order], start[order], length[order], np.zeros_like(row)], axis=1)
# A segment tree in a list: node i has the children 2i and 2i + 1 and holds the larger of their values; the
# leaves are the second half.


def leftmost(tree: list[int], least: int) -> int:
    """The leftmost leaf that holds `least` or more; there must be one (tree[1] says)."""
    node, leaves = 1, len(tree) // 2
    while node < leaves:
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


def best_fit(lengths: np.ndarray, seq: int) -> np.ndarray:
    """Best-fit decreasing: the longest piece first, each into the row where it leaves the least.

    Only documents longer than `seq` are cut. Of rows with as much left, the last to come there is filled.
    O(n log seq) by a tree over what rows have left: leaf c holds c where some row has exactly c left, and
    leaf `seq` always, for a fresh row (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", 2.2).
    """
    document, start, length = cut(lengths, seq)
    order = np.argsort(-length, kind="stable")
    row, rows = np.empty(len(length), np.int64), int(np.sum(length == seq))
    row[order[:rows]] = np.arange(rows)
    leaves = 1 << seq.bit_length()
    tree, having = [0] * (2 * leaves), [[] for _ in range(seq + 1)]  # rows that have exactly so much left
    set_leaf(tree, leaves + seq, seq)
    into = []
    for size in length[order[rows:]].tolist():
        leaf = leftmost(tree, size)
        left = leaf - leaves
        if left == seq:
            found, rows = rows, rows + 1
        else:
            found = having[left].pop()
            if not having[left]:
                set_leaf(tree, leaf, 0)
        left -= size
        if left:
            if not having[left]:
                set_leaf(tree, leaves + left, left)
            having[left].append(found)
        into.append(found)
    row[order[len(order) - len(into):]] = into
    return plan_of(row, document, start, length)


def first_fit(lengths: np.ndarray, seq: int) -> np.ndarray:
    """First fit: pieces in the order given, each into the first row with room for it. O(n log n)."""
    document, start, length = cut(lengths, seq)
    leaves = 1 << len(length).bit_length()
    tree, row = [seq] * (2 * leaves), []  # leaf i holds what row i has left
    for size in length.tolist():
        leaf = leftmost(tree, size)
        set_leaf(tree, leaf, tree[leaf] - size)
        row.append(leaf - leaves)
    return plan_of(np.array(row, np.int64), document, start, length)


def one_per_row(lengths: np.ndarray, seq: int) -> np.ndarray:
    """A row for each piece, the rest of it padding."""
    document, start, length = cut(lengths, seq)
    return plan_of(np.arange(len(length)), document, start, length)

"""Packing: does it pay to keep documents whole, and to keep their neighbours out of sight?

Three arms with one model, one budget of positions and one corpus:

    concat_no_mask   documents end to end, cut every `seq`; attention crosses from document to document
    concat           the same rows, but a document sees itself alone and its positions start at 0
    best_fit         besides that, no document that fits a row is cut (Ding et al. 2024)

The paper (7B, 2k): perplexity 9.64 without a mask and 9.53 with it, packed or not; whole documents show in
what is asked of the model, a third to a half of the gain being the mask's. Held-out bits per byte are
measured on documents alone in all arms, so concat_no_mask, the control, is judged on what it was not trained
on. What it costs: planning takes a third of a second for 100,000 documents, `data/waste` says how much is
padding, and the mask costs nothing, as attention computes all pairs in any case.

    python train.py study configs/packing.py --seeds 3 --jobs 2      about ten minutes on two CPU cores
    python train.py configs/packing.py:best_fit                      one arm by hand, a minute

The file holds the packings themselves too, for any config: `best_fit`, `first_fit`, `one_per_row`.
"""
from dataclasses import replace
from functools import partial

import numpy as np

import data
from data import DataConfig, Source
from model import ModelConfig
from train import Config, Phase, Schedule

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


def put(tree: list[int], node: int, value: int):
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
    put(tree, leaves + seq, seq)
    into = []
    for size in length[order[rows:]].tolist():
        leaf = leftmost(tree, size)
        left = leaf - leaves
        if left == seq:
            found, rows = rows, rows + 1
        else:
            found = having[left].pop()
            if not having[left]:
                put(tree, leaf, 0)
        left -= size
        if left:
            if not having[left]:
                put(tree, leaves + left, left)
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
        put(tree, leaf, tree[leaf] - size)
        row.append(leaf - leaves)
    return plan_of(np.array(row, np.int64), document, start, length)


def one_per_row(lengths: np.ndarray, seq: int) -> np.ndarray:
    """A row for each piece, the rest of it padding."""
    document, start, length = cut(lengths, seq)
    return plan_of(np.arange(len(length)), document, start, length)


def one_segment(row: dict, rng: np.random.Generator) -> tuple[dict, dict]:
    """An objective: causal attention across all documents of a row, whose positions run on."""
    real = (row["segments"] > 0).astype(np.int32)
    return data.causal(row | dict(segments=real, positions=np.arange(len(real), dtype=np.int32) * real), rng)


concat = Phase(steps=300, batch=4, seq=256)
config = Config(
    model=ModelConfig(layers=4, embed=128, heads=4, kv_heads=4, head_dim=32, mlp=344, vocab=1024),
    data=DataConfig(sources={"stdlib": Source(partial(data.stdlib, unit="definition"))}, dev=0.03, test=0.03),
    phases=(concat,),
    schedule=Schedule(shape="wsd", peak=8e-3, warmup=20, decay=0.4, final=0.05),
    overlap=32,
    eval_every=60,
    eval_tokens=16_384,
    keep=1,
    prompts=("def ",),
    sample_tokens=64,
)
arms = {
    "concat_no_mask": replace(config, phases=(replace(concat, objective=one_segment),)),
    "concat": config,
    "best_fit": replace(config, phases=(replace(concat, packing=best_fit),)),
}
control = "concat_no_mask"
rates = 2e-3, 4e-3, 8e-3
quick = {"phases.*.steps": 4, "overlap": 8, "model.embed": 32, "model.mlp": 32, "model.vocab": 258,
         "model.unroll": 1, "data.tokenizer": "bytes", "data.dev": 0.01, "data.test": 0.01, "eval_every": 2,
         "eval_tokens": 2_000, "sample_tokens": 4}  # rows as long as ever, so that some have two documents
claims = (
    dict(says="the mask helps", arm="concat", below=0.0),
    dict(says="whole documents under a mask beat what is cut and seen across", arm="best_fit", below=0.0),
    dict(says="whole documents cost no bits: at most 0.01 a byte behind what is cut, both masked",
         arm="best_fit", control="concat", below=0.01),
)

"""Related documents together: does a row teach more when its documents are about the same thing?

In-context pretraining (Shi et al. 2024) walks from each document to its nearest unseen neighbour and cuts the
path into rows, so that what comes first in a row helps to predict what comes next. Three arms with one model
and one corpus, the functions and classes of the standard library:

    chance         documents in a random order, end to end; attention crosses from document to document
    related        the same along the path
    related_apart  the same rows, each document a segment of its own: the control, since then only the order
                   within a batch differs, and nothing can be gained

Expect more of `related` in the loss on its own rows than on held-out documents, which come alone. What it
costs: all pairs of documents are compared, 1.2 s for 4,000 at a vocabulary of 2,048, and 100 times as long
for ten times as many; neighbours are found within a window of shards, so `data.window` is large. Where
near-copies stay in, the paper's gain is gone. By hand, about three minutes each on two CPU cores:

    python train.py configs/related.py:related --phases.0.packing.cluster 5
"""
from dataclasses import replace
from functools import partial

import numpy as np

from data import DataConfig, Documents, Source, causal, concat_and_split, stdlib
from lib.objectives import one_segment
from lib.packing import DOCUMENT
from lib.schedule import Schedule
from model import ModelConfig
from train import Config, Phase


def tf_idf(ids: list[np.ndarray]) -> np.ndarray:
    """(1 + log count) log(documents / documents with it) of each token, rows of norm 1 [documents, vocab]."""
    vocab = 1 + max((int(i.max()) for i in ids if len(i)), default=0)
    out = np.stack([np.bincount(i, minlength=vocab).astype(np.float32) for i in ids])
    seen = (out > 0).sum(0)
    out = np.where(out > 0, 1 + np.log(np.maximum(out, 1)), 0) * np.log(len(ids) / np.maximum(seen, 1))
    return (out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)).astype(np.float32)


def neighbours(vectors: np.ndarray, k: int) -> np.ndarray:
    """The k most similar others of each vector, the nearest first [documents, k]."""
    k, found = min(k, len(vectors) - 1), []
    for first in range(0, len(vectors), 1024):
        like = vectors[first:first + 1024] @ vectors.T
        like[np.arange(len(like)), first + np.arange(len(like))] = -np.inf
        some = np.argpartition(-like, k - 1, axis=1)[:, :k] if k else np.zeros((len(like), 0), np.int64)
        order = np.argsort(-np.take_along_axis(like, some, 1), axis=1, kind="stable")
        found.append(np.take_along_axis(some, order, 1))
    return np.concatenate(found)


def path(near: np.ndarray, cluster: int) -> list[int]:
    """All documents once: each followed by its nearest neighbour that is unseen, `cluster` in a row at most.

    Where none is left, or the cluster is full, it goes on at the next unseen document in the order given.
    """
    order, seen = [], np.zeros(len(near), bool)
    for start in range(len(near)):
        at, size = None if seen[start] else start, 0
        while at is not None and size < cluster:
            order.append(at)
            seen[at], size = True, size + 1
            at = next((i for i in near[at].tolist() if not seen[i]), None)
    return order


def distinct(order: list[int], ids: list[np.ndarray], alike: float) -> list[int]:
    """The path without a document whose first 100 tokens are nearly those of the last one kept.

    Nearly: Jaccard similarity of their runs of three above `alike` (the paper: 0.85, on characters).
    """
    kept, last = [], set()
    for i in order:
        some = ids[i][:100].tolist()
        runs = set(zip(some, some[1:], some[2:], strict=False)) or {tuple(some)}
        if not kept or len(runs & last) <= alike * len(runs | last):
            kept.append(i)
            last = runs
    return kept


def related(lengths, seq: int, documents: Documents, cluster: int = 21, k: int = 10,
            alike: float = 0.85) -> np.ndarray:
    """Documents end to end along a path of neighbours, cut every `seq`."""
    ids = [np.asarray(documents.ids(i), np.int64) for i in range(len(lengths))]
    order = np.array(distinct(path(neighbours(tf_idf(ids), k), cluster), ids, alike), np.int64)
    plan = concat_and_split(lengths[order], seq)
    plan[:, DOCUMENT] = order[plan[:, DOCUMENT]]
    return plan


phase = Phase(steps=600, batch=4, seq=512, objective=one_segment)
config = Config(
    model=ModelConfig(layers=4, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, vocab=2048),
    data=DataConfig(sources={"definitions": Source(partial(stdlib, unit="definition"))},
                    window=1_000_000),
    phases=(replace(phase, packing=partial(related, cluster=21, k=10, alike=0.85)),),
    schedule=Schedule(shape="wsd", peak=4e-3, warmup=20, decay=0.4, final=0.05),
    eval_every=100,
    prompts=("def ", "class "),
)
arms = {
    "chance": replace(config, phases=(phase,)),
    "related": config,
    "related_apart": replace(config, phases=(replace(config.phases[0], objective=causal),)),
}

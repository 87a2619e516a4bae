"""In-context pretraining: does a row teach more when its documents are about the same thing?

Paper: In-Context Pretraining: Language Modeling Beyond Document Boundaries, Shi et al. 2024
    (001:100)
Method: walk from each document to its nearest unseen neighbour, cut the path into rows, and let
    attention cross from document to document: what comes first in a row helps to predict the rest.
Here: functions and classes of Python's library, TF-IDF in place of a retriever, with one budget of
    positions. chance: documents in a random order, end to end. related: the same along the path.
    related_apart: these rows, each document a segment of its own; nothing can be gained but by the
    order. `in_context` asks for what the paper is about: nats of a held-out document after its
    nearest neighbour, after another one, and alone. Neighbours are found within a window of shards,
    so `data.window` is large; all pairs are compared, 1.2 s for 4,000 documents. Near-copies leave
    the path, as with them the paper's gain is gone. Left out: small clusters are not merged.
Cost: some 20 runs of half a minute, a quarter of an hour on two CPU cores.
Run:
    python train.py study configs/context/in_context_pretraining.py --jobs 2
    python train.py configs/context/in_context_pretraining.py:related --phases.0.packing.cluster 5
"""
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np

from configs import base
from data import DataConfig, Document, Documents, Source, causal, concat_and_split, stdlib
from lib.kernels import nll
from lib.objectives import one_segment
from lib.packing import DOCUMENT
from lib.sources import split_of
from lib.study import Claim, Paper, Study
from lib.tokenizers import Tokenizer
from train import Config

DEV = 1  # what `split_of` calls it


def tf_idf(ids: list[np.ndarray]) -> np.ndarray:
    """(1 + log count) log(documents / documents with it) of tokens, rows of norm 1 [n, vocab]."""
    vocab = 1 + max((int(i.max()) for i in ids if len(i)), default=0)
    out = np.stack([np.bincount(i, minlength=vocab).astype(np.float32) for i in ids])
    seen = (out > 0).sum(0)
    counts = np.where(out > 0, 1 + np.log(np.maximum(out, 1)), 0)
    out = counts * np.log(len(ids) / np.maximum(seen, 1))
    return (out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)).astype(np.float32)


def neighbours(vectors: np.ndarray, k: int) -> np.ndarray:
    """The k most similar others of each vector, the nearest first [documents, k]."""
    k, found = min(k, len(vectors) - 1), []
    for first in range(0, len(vectors), 1024):
        like = vectors[first:first + 1024] @ vectors.T
        like[np.arange(len(like)), first + np.arange(len(like))] = -np.inf
        some = np.zeros((len(like), 0), np.int64)
        if k:
            some = np.argpartition(-like, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(like, some, 1), axis=1, kind="stable")
        found.append(np.take_along_axis(some, order, 1))
    return np.concatenate(found)


def path(near: np.ndarray, cluster: int) -> list[int]:
    """All documents once: each, then its nearest unseen neighbour, at most `cluster` in a row.

    Where none is left, or the cluster is full, it goes on at the next unseen document in order.
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

    Nearly: Jaccard similarity of their runs of three above `alike` (the paper: 0.85, characters).
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


@lru_cache(1)
def held_out(dev: float, test: float) -> list[str]:
    """The functions and classes of the dev split."""
    found = [d for d in stdlib("definition") if isinstance(d, Document)]
    return [d.text for d in found if split_of(d.group or d.path, dev, test) == DEV]


def in_context(params, apply: Callable, tokenizer: Tokenizer, config: Config, n: int = 128,
               longest: int = 64) -> dict[str, float]:
    """Nats a token of n held-out documents: alone, after another, after their nearest neighbour.

    Documents are their first `longest` tokens, set end to end as in training without a mask.
    """
    texts = held_out(config.data.dev, config.data.test)
    ids = [np.asarray(tokenizer.encode(text)[:longest], np.int64) for text in texts]
    ids = np.stack([i for i in ids if len(i) == longest])
    near = neighbours(tf_idf(list(ids)), 1)[:n, 0]
    asked = ids[:n]
    bos = np.full((len(asked), 1), tokenizer.bos)

    def nats(*before):
        rows = np.concatenate([*before, bos, asked], 1).astype(np.int32)
        logits = apply(params, rows)[:, -longest - 1:-1]
        return float(nll(logits, asked).mean())

    other = np.roll(ids, len(ids) // 2, axis=0)[:n]
    return {"in_context/alone": nats(), "in_context/other": nats(bos, other),
            "in_context/related": nats(bos, ids[near])}


phase = replace(base.small.phases[0], batch=2, seq=512, objective=one_segment)
on_path = replace(phase, packing=partial(related, cluster=21, k=10, alike=0.85))
chance = replace(
    base.small,
    data=DataConfig(sources={"definitions": Source(partial(stdlib, unit="definition"))},
                    dev=0.03, test=0.03, window=1_000_000),
    phases=(phase,),
    evals=(partial(in_context, n=128, longest=64),),
    eval_every=100,
)
after = partial(Claim, arm="related", measure="in_context/related")
study = Study(
    question="Does a row teach more when its documents are about the same thing?",
    paper=Paper(title="In-Context Pretraining: Language Modeling Beyond Document Boundaries",
                authors="Shi et al.", year=2024, seeds=("001:100",)),
    arms={
        "chance": chance,
        "related": replace(chance, phases=(on_path,)),
        "related_apart": replace(chance, phases=(replace(on_path, objective=causal),)),
    },
    peak_lrs=base.RATES,
    quick=base.quick({"evals.0.n": 8, "evals.0.longest": 16}),
    claims=(
        after(says="it reads a related document better than one trained on unrelated ones",
              below=0.0),
        after(says="and than one that never saw across documents", control="related_apart",
              below=0.0),
        Claim(says="on documents alone it is at most 0.02 bits behind", arm="related", below=0.02),
    ),
    seeds=3,
)

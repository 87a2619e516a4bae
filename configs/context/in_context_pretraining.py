"""In-context pretraining: does a row teach more when its documents are about the same thing?

Paper: In-Context Pretraining: Language Modeling Beyond Document Boundaries, Shi et al. 2024
    (001:100)
Method: walk from each document to its nearest unseen neighbour, cut the path into rows, and let
    attention cross from document to document: what comes first in a row helps to predict the rest.
Here: functions and classes of Python's library, TF-IDF in place of a retriever, with one budget of
    positions. chance: documents in a random order, end to end. related: the same along the path.
    related_apart: these rows, each document a segment of its own; nothing can be gained but by the
    order. `in_context` asks for what the paper is about: nats of a dev document after its nearest
    neighbour in dev, after another one, and alone. It is asked of 128 documents, by the first 64
    tokens of each. Neighbours are found within a window of shards, so `data.window` is large; all
    pairs are compared, 1.2 s for 4,000 documents. Near-copies leave the path, as with them the
    paper's gain is gone; runs of three tokens stand for its characters. Left out: small clusters
    are not merged. Many documents are longer than a row, so that only a part of the positions has
    another document before it.
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
from lib.neighbours import neighbours, path, tf_idf, without_near_copies
from lib.objectives import one_segment
from lib.packing import DOCUMENT
from lib.sources import split_of
from lib.study import Claim, Paper, Study
from lib.tokenizers import Tokenizer
from train import Config

DEV = 1  # what `split_of` calls it


def related(lengths, seq: int, documents: Documents, cluster: int = 21, k: int = 10,
            alike: float = 0.85) -> np.ndarray:
    """Documents end to end along a path of neighbours, cut every `seq`."""
    ids = [np.asarray(documents.ids(i), np.int64) for i in range(len(lengths))]
    order = path(neighbours(tf_idf(ids), k), cluster)
    order = np.array(without_near_copies(order, ids, alike), np.int64)
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
    """Nats a token of n dev documents: alone, after another, after their nearest neighbour in dev.

    Documents are their first `longest` tokens, set end to end as in training without a mask; those
    of fewer are left out. There are fewer than n if dev has no more.
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
                    dev=0.05, test=0.03, window=1_000_000),
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

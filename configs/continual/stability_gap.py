"""Stability gap: which text spares a model the loss of what it knew when it goes on with a domain?

Paper: Efficient Continual Pre-training by Mitigating the Stability Gap, Guo et al. 2024 (000:8)
Method: when a model goes on with a new domain, what it could do before gets worse at first and
    comes back later: the stability gap. Three things make it smaller, at equal steps: a subset of
    the domain several times in place of all of it once; the best part of it; and old text in the
    shares of pre-training beside it. The paper joins all three.
Here: from Python's library without asyncio, email and tkinter (old) to asyncio (new), 200 steps
    more, the rate re-warmed. all: as it comes, about half of it once, the control. subset: a tenth
    by chance, four times. best: the tenth with most of its characters in docstrings and comments,
    which stands for the low perplexity of the paper. mixture: that and a quarter of old rows.
    replay: all, and a quarter of old rows. "gap" is how far the dev loss of the old text rose at
    most, in nats per byte, by an evaluation each 10 steps; "left" what of it is left at the end;
    "new" bits per byte on test of the new text.
Cost: five arms and a base, 18 runs of half a minute, five minutes on two CPU cores.
Run:
    python train.py study configs/continual/stability_gap.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import numpy as np

from configs import base as shared
from configs.continual.agem import package
from configs.continual.rewarm import base, cosine, first
from configs.selection.qurating import documented, sampled, top
from data import DataConfig, Documents, Source, concat_and_split
from lib.study import Claim, Paper, Study

NEW = "new"


def part(lengths: np.ndarray, seq: int, documents: Documents, share: float = 0.1,
         best: bool = False) -> np.ndarray:
    """A packing: of the new source a share, by chance or the best by score; the others whole."""
    if documents.cache.name != NEW:
        return concat_and_split(lengths, seq)
    if best:
        return top(lengths, seq, documents, share=share)
    return sampled(lengths, seq, documents, share=share, temperature=1e9)


def rise(rows: list[dict], at: int | None = None) -> float:
    """By how much the dev loss of the old text is above that of the first evaluation.

    at: the index of an evaluation; None is the one where it is highest.
    """
    found = [row["eval/old/loss"] for row in rows if "eval/old/loss" in row]
    return (max(found) if at is None else found[at]) - found[0]


sources = {"old": Source(partial(package, name="")),
           NEW: Source(partial(package, name="asyncio"), score=documented)}
before = replace(base, data=DataConfig(sources=sources, tokenizer="bytes", dev=0.03, test=0.03))


def later(replay: float = 0.0, packing=concat_and_split):
    """A run that goes on from the base."""
    phase = replace(first, mixture={"old": replay, NEW: 1 - replay}, packing=packing)
    return replace(before, init_from="needs:base", phases=(phase,), schedule=cosine,
                   eval_at=(0,), eval_every=10)


best = partial(part, share=0.1, best=True)
gap = partial(Claim, measure="gap", below=0.0)
study = Study(
    question="Which text spares a model the loss of what it knew when it goes on with a domain?",
    paper=Paper(title="Efficient Continual Pre-training by Mitigating the Stability Gap",
                authors="Guo et al.", year=2024, seeds=("000:8",)),
    arms={"all": later(), "subset": later(packing=partial(part, share=0.1, best=False)),
          "best": later(packing=best), "mixture": later(replay=0.25, packing=best),
          "replay": later(replay=0.25)},
    needs={"base": before}, seeds=3,
    measures={"gap": rise, "left": partial(rise, at=-1), "new": f"eval/{NEW}.test/bpb"},
    quick=shared.quick(keep=("data.dev", "data.test")),
    claims=(
        Claim(says="there is a gap", arm="all", control=None, measure="gap", above=0.02),
        gap(says="a subset read several times makes it smaller", arm="subset"),
        gap(says="so does its best part", arm="best"),
        gap(says="and old text besides", arm="mixture", control="best"),
        gap(says="the three together do more than old text alone", arm="mixture",
            control="replay"),
        Claim(says="and learn the new text no worse", arm="mixture", measure="new", below=0.02),
    ),
)

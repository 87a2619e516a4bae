"""QuRating: is half of the data, chosen by a rating, better than all of it?

Paper: QuRating: Selecting High-Quality Data for Training Language Models, Wettig et al. 2024
    (001:48)
Method: rate each document; draw documents without replacement with probabilities
    ~ exp(rating / temperature). The paper finds a temperature of 2.0 better than the top alone, as
    it keeps some of every kind.
Here: Python's library without exact duplicates, at equal steps: a tenth of it, so no arm reads
    anything twice. everything: all documents. top: the highest ratings, half of all positions.
    sampled: half, as in the paper. chance: half, without regard to the rating: the control. Draws
    of documents are the same for each seed. The rating is the share of a module that is
    documentation, on a guess. Left out: a judge of pairs and a rater.
Cost: 12 runs of half a minute to a minute, seven minutes on two CPU cores.
Run:
    python train.py study configs/selection/qurating.py --jobs 2
    python train.py configs/selection/qurating.py:sampled --phases.0.packing.temperature 1.0
"""
import re
from dataclasses import replace
from functools import partial

import numpy as np

from configs import base
from data import DataConfig, Document, Documents, InputError, Source, concat_and_split
from lib.cache import Shard
from lib.duplicates import distinct_stdlib
from lib.packing import DOCUMENT, best_fit
from lib.study import Claim, Paper, Study

PACKINGS = dict(concat=concat_and_split, best_fit=best_fit)


def documented(document: Document, tokens) -> float:
    """Share of a module's characters in docstrings and comments."""
    found = re.findall(r'"""(?s:.*?)"""|#.*', document.text)
    return sum(map(len, found)) / max(1, len(document.text))


def pack(keep: np.ndarray, lengths: np.ndarray, seq: int, packing: str) -> np.ndarray:
    """The plan of a packing (a name in PACKINGS) of the documents that are kept."""
    if packing not in PACKINGS:
        raise InputError(f"packing is {packing!r}; allowed are {', '.join(PACKINGS)}")
    kept = np.flatnonzero(keep)
    plan = PACKINGS[packing](lengths[kept], seq)
    plan[:, DOCUMENT] = kept[plan[:, DOCUMENT]]
    return plan


def scores(documents: Documents) -> np.ndarray:
    """The score of each document [documents]."""
    score = documents.of(lambda shard: shard.score).astype(float)
    if np.isnan(score).any():
        raise InputError("phases.packing goes by score, but a source has none; set Source.score")
    return score


def best(value: np.ndarray, lengths: np.ndarray, share: float) -> np.ndarray:
    """Which documents have the highest values, as many as reach `share` of all positions."""
    order = np.argsort(-value, kind="stable")
    before = np.cumsum(lengths[order]) - lengths[order]
    keep = np.zeros(len(value), bool)
    keep[order[before < share * lengths.sum()]] = True
    return keep


def threshold(lengths, seq: int, documents: Documents, least: float = 0.0,
              packing: str = "concat") -> np.ndarray:
    """Documents that score `least` or more."""
    return pack(scores(documents) >= least, lengths, seq, packing)


def top(lengths, seq: int, documents: Documents, share: float = 0.5,
        packing: str = "concat") -> np.ndarray:
    """The documents of highest score, until they hold `share` of all positions."""
    return pack(best(scores(documents), lengths, share), lengths, seq, packing)


def gumbel(shard: Shard, seed: int) -> np.ndarray:
    """Standard Gumbel noise for each document of a shard, which the seed alone decides."""
    return np.random.default_rng([seed, int(shard.directory.name)]).gumbel(size=len(shard.split))


def sampled(lengths, seq: int, documents: Documents, share: float = 0.5, temperature: float = 2.0,
            seed: int = 0, packing: str = "concat") -> np.ndarray:
    """Documents drawn one by one, ~ exp(standardised score / temperature) of those left.

    The highest of score / temperature + Gumbel noise are such a sample (Gumbel top-k, Kool et al.
    2019). The same documents for every seed of the run; a very high temperature ignores the score.
    """
    score = scores(documents)
    logits = (score - score.mean()) / max(score.std(), 1e-12) / temperature
    noise = documents.of(partial(gumbel, seed=seed))
    return pack(best(logits + noise, lengths, share), lengths, seq, packing)


(phase,) = base.small.phases
source = Source(partial(distinct_stdlib, near=0.0), score=documented)
everything = replace(base.small, data=DataConfig(sources={"stdlib": source}, dev=0.03, test=0.03,
                                                 window=1_000_000))
chosen = dict(top=partial(top, share=0.5), sampled=partial(sampled, share=0.5, temperature=2.0),
              chance=partial(sampled, share=0.5, temperature=1e9))
study = Study(
    question="Is half of the data, chosen by a rating, better than all of it?",
    paper=Paper(title="QuRating: Selecting High-Quality Data for Training Language Models",
                authors="Wettig et al.", year=2024, seeds=("001:48",)),
    arms={"everything": everything} | {
        name: replace(everything, phases=(replace(phase, packing=packing),))
        for name, packing in chosen.items()},
    control="chance",
    quick=base.quick(),
    claims=(
        Claim(says="what is sampled by rating beats half by chance", arm="sampled", below=0.0),
        Claim(says="so does what is rated highest", arm="top", below=0.0),
        Claim(says="sampling beats the top alone", arm="sampled", control="top", below=0.0),
        Claim(says="and everything", arm="sampled", control="everything", below=0.0),
    ),
    seeds=3,
)

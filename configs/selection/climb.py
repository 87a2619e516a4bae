"""CLIMB: does it pay to show easy text first?

Paper: CLIMB: Curriculum Learning for Infant-inspired Model Building, Martinez et al. 2023
    (001:121, 002:15)
Method: sort what is learnt from by difficulty, and draw from a share of it that grows with
    training. No curriculum of CLIMB's beats random order robustly: expect nothing.
Here: the data curriculum alone, on Python's library. A row's difficulty is the mean score of its
    documents, weighted by their positions: here what zlib leaves of them. random: from all rows.
    curriculum: from the easiest c(t) of all rows, where c grows from a tenth to all between 1/16
    and 7/8 of training (CLIMB's pacing, linear). anti: from the hardest: if both help alike, it is
    not the difficulty. Easy rows come more often than hard ones. Left out: the vocabulary's and the
    objective's curricula. Rows are sorted within a window, so `data.window` is large. Other scores:
    `loss` of a run, and those of lib/scores.py; `--phases.0.packing.by rarity` needs none.
Cost: some 20 runs of half a minute, ten minutes on two CPU cores.
Run:
    python train.py study configs/selection/climb.py --jobs 2
    python train.py configs/selection/climb.py:curriculum --phases.0.order.pacing root
"""
import math
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np

from configs import base
from configs.selection.qurating import PACKINGS, scores
from data import DataConfig, Document, Documents, InputError, Source, stdlib
from lib.kernels import nll
from lib.packing import DOCUMENT, sorted_rows
from lib.scores import compressibility, rarity
from lib.study import Claim, Paper, Study
from train import load

model_of = lru_cache(1)(load)


def loss(document: Document, tokens, run: str, context: int = 256) -> float:
    """A score: a run's mean nats on the document's first `context` tokens, in the run's pieces."""
    params, _, tokenizer, apply = model_of(run)
    ids = [tokenizer.bos, *tokenizer.encode(document.text), tokenizer.eos][:context + 1]
    row = np.full((1, context + 1), tokenizer.eos, np.int32)
    row[0, :len(ids)] = ids
    nats = nll(apply(params, row[:, :-1]), row[:, 1:])
    return float(nats[0, :len(ids) - 1].mean())


def easy_first(lengths, seq: int, documents: Documents, packing: str = "concat",
               by: str = "score") -> np.ndarray:
    """The rows of a packing (a name in PACKINGS), by the sources' "score" or by token "rarity".

    Documents are brought into that order before, so that a row holds what is about as difficult.
    """
    if packing not in PACKINGS or by not in ("score", "rarity"):
        raise InputError(f"phases.packing has packing {packing!r} and by {by!r}; allowed are "
                         f"{', '.join(PACKINGS)}, and score or rarity")
    score = rarity(documents) if by == "rarity" else scores(documents)
    order = np.argsort(score, kind="stable")
    plan = PACKINGS[packing](lengths[order], seq)
    plan[:, DOCUMENT] = order[plan[:, DOCUMENT]]
    return sorted_rows(plan, score)


def share(progress: float, pacing: str = "linear", first: float = 0.1, start: float = 1 / 16,
          end: float = 7 / 8, rate: float = 10.0) -> float:
    """c(t), the share of rows in use: `first` up to `start` of the phase, 1 from `end` on.

    Between, with u from 0 to 1: "linear" u, "root" sqrt(u), "exponential" (e^(rate u) - 1) /
    (e^rate - 1), "step" 0 until `end`.
    """
    u = min(max((progress - start) / (end - start), 0.0), 1.0)
    exponential = math.expm1(rate * u) / math.expm1(rate)
    curves = dict(linear=u, root=math.sqrt(u), exponential=exponential, step=float(u >= 1))
    if pacing not in curves:
        raise InputError(f"phases.order.pacing is {pacing!r}; allowed are {', '.join(curves)}")
    return first + (1 - first) * curves[pacing]


def paced(draw: int, rows: int, progress: float, key, pacing: str = "linear", first: float = 0.1,
          hard: bool = False) -> int:
    """An order for sorted rows: uniform among the easiest (or hardest) c(progress) of them."""
    pool = max(1, math.ceil(share(progress, pacing, first) * rows))
    place = int(np.random.default_rng([*key, draw]).integers(pool))
    return rows - 1 - place if hard else place


def sorted_once(draw: int, rows: int, progress: float, key, hard: bool = False) -> int:
    """An order for sorted rows: one after the other from the easiest (or hardest), each epoch."""
    return rows - 1 - draw % rows if hard else draw % rows


phase = replace(base.small.phases[0], packing=partial(easy_first, packing="concat", by="score"))
in_any_order = replace(
    base.small,
    data=DataConfig(sources={"stdlib": Source(stdlib, score=compressibility)}, dev=0.03, test=0.03,
                    window=1_000_000),
    phases=(phase,),
)
easy, hard = (replace(phase, order=partial(paced, pacing="linear", hard=hard))
              for hard in (False, True))
study = Study(
    question="Does it pay to show easy text first?",
    paper=Paper(title="CLIMB: Curriculum Learning for Infant-inspired Model Building",
                authors="Martinez et al.", year=2023, seeds=("001:121", "002:15")),
    arms={
        "random": in_any_order,
        "curriculum": replace(in_any_order, phases=(easy,)),
        "anti": replace(in_any_order, phases=(hard,)),
    },
    peak_lrs=base.RATES,
    quick=base.quick(),
    claims=(
        Claim(says="easy text first is not ahead of a random order by 0.01", arm="curriculum",
              above=-0.01),
        Claim(says="hard text first is behind a random order", arm="anti", above=0.0),
        Claim(says="and behind easy text first", arm="anti", control="curriculum", above=0.0),
    ),
    seeds=3,
)

"""Curriculum: does it pay to show easy text first?

Three arms, with one model and one corpus. A row's difficulty is the mean score of its documents, weighted by
their positions; at progress t of the phase a row is drawn from the easiest c(t) of all rows:

    random      c(t) = 1: the control
    curriculum  c grows from a tenth to all between 1/16 and 7/8 of training (CLIMB's pacing, linear here)
    anti        the same from the hardest rows: if both help alike, it is not the difficulty

Expect nothing: no curriculum of CLIMB beats random order robustly. What it costs: the score, once for each
document; and easy rows come more often than hard ones in the same number of steps. By hand, about three
minutes each on two CPU cores:

    python train.py configs/curriculum.py:curriculum --phases.0.order.pacing root

`data.window` is large, so that one window is the whole corpus: rows are sorted within a window. For another
score, set `data.sources.stdlib.score`: `length`, `compressibility`, `partial(field, key=...)`, or
`partial(loss, run="runs/quickstart")`; `--phases.0.packing.by rarity` needs none.
"""
import math
import zlib
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np

from data import DataConfig, Document, Documents, InputError, Source, concat_and_split, stdlib
from lib.packing import DOCUMENT, LENGTH, ROW, best_fit
from lib.schedule import Schedule
from model import ModelConfig
from train import Config, Phase, load

PACKINGS = dict(concat=concat_and_split, best_fit=best_fit)

# ----------------------------------------------------------- scores, (document, tokens) -> float: low is easy


def length(document: Document, tokens) -> float:
    """Tokens."""
    return float(len(tokens))


def compressibility(document: Document, tokens) -> float:
    """Bytes after zlib, over bytes: what repeats itself is easy."""
    text = document.text.encode("utf-8")
    return len(zlib.compress(text, 9)) / max(1, len(text))


def field(document: Document, tokens, key: str) -> float:
    """A number of the document's metadata; infinitely hard where there is none."""
    return float(document.meta.get(key, math.inf))


model_of = lru_cache(1)(load)


def loss(document: Document, tokens, run: str, context: int = 256) -> float:
    """Mean nats per token of a run's checkpoint on the document's first `context` tokens, in its pieces."""
    params, _, tokenizer, apply = model_of(run)
    ids = np.array([tokenizer.bos, *tokenizer.encode(document.text), tokenizer.eos])[:context + 1]
    padded = np.pad(ids[:-1], (0, context + 1 - len(ids)), constant_values=tokenizer.eos)
    logits = np.asarray(apply(params, padded[None].astype(np.int32)), np.float64)[0, :len(ids) - 1]
    top = logits.max(1)
    logs = top + np.log(np.exp(logits - top[:, None]).sum(1)) - logits[np.arange(len(logits)), ids[1:]]
    return float(logs.mean())


def rarity(documents: Documents) -> np.ndarray:
    """Mean -log frequency of each document's tokens, counted over the documents themselves [documents]."""
    ids = [np.asarray(documents.ids(i), np.int64) for i in range(len(documents.shard))]
    counts = np.bincount(np.concatenate(ids))
    surprise = np.log(counts.sum() / np.maximum(counts, 1))
    return np.array([surprise[i].mean() for i in ids])


# --------------------------------------------------------------------------------- rows from easy to hard


def sort_rows(plan: np.ndarray, score: np.ndarray) -> np.ndarray:
    """A plan with its rows by rising mean score [documents] of their positions."""
    weight = np.bincount(plan[:, ROW], plan[:, LENGTH])
    mean = np.bincount(plan[:, ROW], plan[:, LENGTH] * score[plan[:, DOCUMENT]]) / weight
    place = np.empty(len(mean), np.int64)
    place[np.argsort(mean, kind="stable")] = np.arange(len(mean))
    plan = plan.copy()
    plan[:, ROW] = place[plan[:, ROW]]
    return plan[np.argsort(plan[:, ROW], kind="stable")]


def easy_first(lengths, seq: int, documents: Documents, packing: str = "concat",
               by: str = "score") -> np.ndarray:
    """The rows of a packing (a name in PACKINGS), sorted by the sources' "score" or by token "rarity".

    Documents are brought into that order before, so that a row holds what is about as difficult.
    """
    if packing not in PACKINGS or by not in ("score", "rarity"):
        raise InputError(f"phases.packing has packing {packing!r} and by {by!r}; allowed are "
                              f"{', '.join(PACKINGS)}, and score or rarity")
    score = rarity(documents) if by == "rarity" else documents.of(lambda shard: shard.score)
    if np.isnan(score).any():
        raise InputError("phases.packing sorts by score, but the source has none; set Source.score, or "
                              "packing.by to rarity")
    order = np.argsort(score, kind="stable")
    plan = PACKINGS[packing](lengths[order], seq)
    plan[:, DOCUMENT] = order[plan[:, DOCUMENT]]
    return sort_rows(plan, score)


def share(progress: float, pacing: str = "linear", first: float = 0.1, start: float = 1 / 16,
          end: float = 7 / 8, rate: float = 10.0) -> float:
    """c(t), the share of the easiest rows in use: `first` up to `start` of the phase, 1 from `end` on.

    Between, with u from 0 to 1: "linear" u, "root" sqrt(u), "exponential" (e^(rate u) - 1) / (e^rate - 1),
    "step" 0 until `end` (CLIMB, Martinez et al. 2023).
    """
    u = min(max((progress - start) / (end - start), 0.0), 1.0)
    curves = dict(linear=u, root=math.sqrt(u), exponential=math.expm1(rate * u) / math.expm1(rate),
                  step=float(u >= 1))
    if pacing not in curves:
        raise InputError(f"phases.order.pacing is {pacing!r}; allowed are {', '.join(curves)}")
    return first + (1 - first) * curves[pacing]


def paced(draw: int, rows: int, progress: float, key, pacing: str = "linear", first: float = 0.1,
          hard: bool = False) -> int:
    """An order for sorted rows: uniform, with replacement, among the easiest (or hardest) c(progress)."""
    pool = max(1, math.ceil(share(progress, pacing, first) * rows))
    place = int(np.random.default_rng([*key, draw]).integers(pool))
    return rows - 1 - place if hard else place


def sorted_once(draw: int, rows: int, progress: float, key, hard: bool = False) -> int:
    """An order for sorted rows: one after the other from the easiest (or hardest), and again each epoch."""
    return rows - 1 - draw % rows if hard else draw % rows


phase = Phase(steps=600, batch=8, seq=256, packing=partial(easy_first, packing="concat", by="score"))
config = Config(
    model=ModelConfig(layers=4, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, vocab=2048),
    data=DataConfig(sources={"stdlib": Source(stdlib, score=compressibility)}, window=1_000_000),
    phases=(phase,),
    schedule=Schedule(shape="wsd", peak=4e-3, warmup=20, decay=0.4, final=0.05),
    eval_every=100,
    prompts=("def ", "class "),
)
arms = {
    "random": config,
    "curriculum": replace(config, phases=(replace(phase, order=partial(paced, pacing="linear")),)),
    "anti": replace(config, phases=(replace(phase, order=partial(paced, pacing="linear", hard=True)),)),
}

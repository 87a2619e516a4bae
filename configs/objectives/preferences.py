"""Pre-training with preferences: does a model that is told which lines are bad write fewer?

Paper: Pretraining Language Models with Human Preferences, Korbak et al. 2023
    (000:5, 001:73, 002:38)
Method: a reward R for each segment of a text, and objectives besides likelihood (mle). conditional:
    a token before each segment says good or bad, a few are left out, and samples follow good.
    filtering: bad documents are left out. unlikelihood: -log(1 - p) in bad segments. rwr:
    likelihood times exp(R / beta). awr, the fifth: awr.py beside this file.
Here: a line is bad, R = -1, if it has a double quote, as a ninth of the library's, else R is 0.
    Filtering leaves two thirds of all definitions out. Each line of a sample is made after its
    token, as the paper forbids models to write these. beta is 0.5; the paper has 10 for other
    rewards. Bits a byte are of text without tokens, so they are no measure of conditional.
Cost: 15 runs of half a minute, 4 minutes on two CPU cores.
Run:
    python train.py study configs/objectives/preferences.py --jobs 2
"""
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np

from configs import base
from data import DataConfig, Document, Skipped, Source, stdlib
from lib.study import Claim, Paper, Study
from model import cross_entropy
from train import Phase

GOOD, BAD = "\x01", "\x02"  # characters that no file of the library has


def is_bad(line: str) -> bool:
    """The preference: a line with a double quote is bad."""
    return '"' in line


def judged() -> Iterator[Document | Skipped]:
    """The functions and classes of Python's library, their bad lines marked."""
    for document in stdlib("definition"):
        if isinstance(document, Document):
            lines = document.text.splitlines(keepends=True)
            ends = np.cumsum([len(line) for line in lines]).tolist()
            marks = tuple((end - len(line), end)
                          for line, end in zip(lines, ends, strict=True) if is_bad(line))
            document = replace(document, marks=marks)
        yield document


def told(document: Document, rng, drop: float = 0.01) -> Document:
    """A `prepare`: each line after the token that judges it, of which a few are dropped."""
    parts = [(BAD if is_bad(line) else GOOD) * (rng.random() >= drop) + line
             for line in document.text.splitlines(keepends=True)]
    return replace(document, text="".join(parts), marks=())


def clean(document: Document, tokens, most: float = 0.05) -> float:
    """A `score`: the share of bad lines; a document with more than `most` is left out."""
    share = float(np.mean([is_bad(line) for line in document.text.splitlines()] or [0]))
    return share if share <= most else -math.inf


def unlikelihood(logits, batch, extras, alpha: float = 1.0):
    """-log p of good targets, -alpha log(1 - p) of bad ones."""
    nats = cross_entropy(logits, batch, extras)
    against = -jnp.log(-jnp.expm1(-jnp.maximum(nats, 1e-6)))
    return jnp.where(batch["marks"] > 0, alpha * against, nats)


def rwr(logits, batch, extras, beta: float = 0.5):
    """Likelihood weighted by exp(R / beta)."""
    return jnp.exp(-batch["marks"] / beta) * cross_entropy(logits, batch, extras)


def write_lines(generate, texts: list[str], tag: str, lines: int) -> list[list[str]]:
    """The next lines of each text [lines][texts]; each is made after `tag`, as the text ends."""
    found = []
    for i in range(lines):
        made = generate(texts, temperature=1.0, stops=("\n",), seed=i * len(texts))
        texts = [f"{text}{line}\n{tag}" for text, line in zip(texts, made, strict=True)]
        found.append(made)
    return found


def bad_lines(params, apply, config, generate, n: int = 128, lines: int = 3) -> dict[str, float]:
    """`own/bad`: the share of bad lines in n samples of so many, after good where it was told."""
    tag = GOOD if any(source.prepare for source in config.data.sources.values()) else ""
    made = sum(write_lines(generate, [tag] * n, tag, lines), [])
    return {"own/bad": float(np.mean([is_bad(line) for line in made]))}


def sourced(**how) -> DataConfig:
    """The marked definitions, with something done to them."""
    source = Source(judged, marks=True)
    return replace(base.small.data, sources={"stdlib": replace(source, **how)}, tokenizer="bytes")


mle = replace(base.small, model=base.shape(3, 96, 0), data=sourced(), eval_every=300, prompts=(),
              phases=(Phase(steps=300, batch=8, seq=128),), evals=(partial(bad_lines, n=128),),
              sample_tokens=48)
fewer = partial(Claim, measure="own/bad", below=0.0)
study = Study(
    question="Does a model that is told which lines are bad write fewer of them?",
    paper=Paper(title="Pretraining Language Models with Human Preferences",
                authors="Korbak et al.", year=2023, seeds=("000:5", "001:73", "002:38")),
    arms={"mle": mle,
          "conditional": replace(mle, data=sourced(prepare=told)),
          "filtering": replace(mle, data=sourced(score=clean)),
          "unlikelihood": replace(mle, token_loss=unlikelihood),
          "rwr": replace(mle, token_loss=rwr)},
    quick=base.quick({"eval_every": 4, "evals.0.n": 4}),
    claims=(
        fewer(says="after good, lines are bad less often", arm="conditional"),
        fewer(says="so it is without bad documents", arm="filtering"),
        fewer(says="and with unlikelihood", arm="unlikelihood"),
        fewer(says="and with weights by reward", arm="rwr"),
        fewer(says="conditional is ahead of filtering", arm="conditional", control="filtering"),
        Claim(says="leaving bad documents out costs bits a byte", arm="filtering", above=0.0),
    ), seeds=3)

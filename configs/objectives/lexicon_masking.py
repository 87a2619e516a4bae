"""Lexicon-guided masking: should the words of a domain be masked before any others?

Paper: Chinese MentalBERT: Domain-Adaptive Pre-training on Social Media for Chinese Mental Health
    Text Analysis, Zhai et al. 2024 (000:37)
Method: masked language modelling on the text of a domain. In each text the words of a lexicon of
    the domain are masked first. Where they are less than a fifth, others at random fill it up.
Here: the domain is code of eight packages of Python's library, byte by byte, and its lexicon is
    Python's keywords, which also stand in prose where they are English. Each encoder is then
    trained for 200 steps of prose.py; `nats` and `right` are of that task, on held-out modules.
    `lexicon` is the nats of the lexicon's words, masked first, at the end of the first part: a
    phase of one step at no rate measures it. random: any bytes are masked, as many. So `lexicon`
    is under a mask that random was not trained on. scratch: the task alone. One of its seeds learns
    the task as well as the other arms do, and two do not learn it, so its interval is wide. Left
    out: Chinese, and a lexicon made by doctors.
Cost: 9 runs of half a minute, 5 minutes on two CPU cores.
Run:
    python train.py study configs/objectives/lexicon_masking.py --jobs 2
"""
import keyword
import re
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np

from configs import base
from configs.objectives.prose import MEASURES, fine, pre
from configs.objectives.prose import config as plain
from lib.objectives import BIDIRECTIONAL, choose, hide
from lib.study import Claim, Paper, Study
from model import weighted_mean
from train import Schedule

WORDS = re.compile(rb"\b(?:%s)\b" % "|".join(keyword.kwlist).encode())


def of_lexicon(ids: np.ndarray) -> np.ndarray:
    """Whether each byte of a row is one of a word of the lexicon, bool [seq]."""
    text = np.where(ids < 256, ids, ord("\n")).astype(np.uint8).tobytes()  # bos and eos end words
    found = np.zeros(len(ids), bool)
    for word in WORDS.finditer(text):
        found[word.start():word.end()] = True
    return found


def lexicon_masked(row: dict, rng, tokenizer, share: float = 0.2, guided: bool = True):
    """An objective: predict a share of the bytes; guided: those of the lexicon come first.

    `lexicon` [seq] is 1 for these.
    """
    words = of_lexicon(row["targets"])
    chosen = choose(row["weights"] > 0, share, rng, words if guided else None)
    row = row | {"lexicon": words.astype(np.int32)}
    return hide(row, chosen, rng, tokenizer), BIDIRECTIONAL


lexicon_masked.masks = (BIDIRECTIONAL,)


def on_lexicon(losses, batch):
    """A `reduce`: the weighted mean, and that of the lexicon's words as `lexicon`."""
    ends, _ = weighted_mean(losses, batch)
    (total, number), _ = weighted_mean(losses, {"weights": batch["weights"] * batch["lexicon"]})
    return ends, {"lexicon": total / jnp.maximum(number, 1)}


def on_words(rows: list[dict]) -> float:
    """The measure: nats a byte of the lexicon's words after the first part."""
    return next(row["eval/code/lexicon"] for row in rows if "eval/code/lexicon" in row)


def arm(guided: bool):
    """A run that masks the lexicon first, or anything, before the task."""
    own = replace(pre, objective=partial(lexicon_masked, guided=guided))
    return replace(scratch, phases=(own, measured, fine))


measured = replace(pre, steps=1, objective=lexicon_masked, reduce=on_lexicon,
                   schedule=Schedule(shape="constant", peak=1e-9))
scratch = replace(plain, phases=(measured, fine))
nats = partial(Claim, measure="nats", below=0.0)
study = Study(
    question="Should the words of a domain be masked before any others?",
    paper=Paper(title="Chinese MentalBERT: Domain-Adaptive Pre-training on Social Media for "
                "Chinese Mental Health Text Analysis", authors="Zhai et al.", year=2024,
                seeds=("000:37",)),
    arms={"random": arm(False), "lexicon": arm(True), "scratch": scratch},
    measures=MEASURES | {"lexicon": on_words},
    quick=base.quick(keep=("data.dev", "data.test")),
    claims=(
        Claim(says="words that are masked first are predicted better", arm="lexicon",
              measure="lexicon", below=0.0),
        nats(says="masked words of a lexicon help the task more than any words", arm="lexicon"),
        nats(says="masking helps the task", arm="random", control="scratch"),
    ), seeds=3)

"""Lexicon-guided masking: should the words of a domain be masked before any others?

Paper: Chinese MentalBERT: Domain-Adaptive Pre-training on Social Media for Chinese Mental Health
    Text Analysis, Zhai et al. 2024 (000:37)
Method: masked language modelling on the text of a domain. In each text the words of a lexicon of
    the domain are masked first. Where they are less than a fifth, others at random fill it up.
Here: the domain is code of eight packages of Python's library, its lexicon names that tell these
    apart. Each encoder is then trained for 60 steps to tell of which package a piece of code is;
    `nats` and `sure` are of that task, on held-out modules. `lexicon` is the nats of the lexicon's
    words, masked first, at the end of the first part: a phase of one step at no rate measures it.
    random: any tokens are masked, as many. scratch: the task alone. Left out: Chinese, and a
    lexicon made by doctors.
Cost: 9 runs of half a minute, 5 minutes on two CPU cores.
Run:
    python train.py study configs/objectives/lexicon_masking.py --jobs 2
"""
import re
from dataclasses import replace
from functools import partial

import jax.numpy as jnp

from configs import base
from configs.objectives.packages import MEASURES, PACKAGES, fine, over_sources, package, pre
from configs.objectives.packages import config as plain
from data import Document, Source
from lib.objectives import BIDIRECTIONAL, choose, hide
from lib.study import Claim, Paper, Study
from model import weighted_mean
from train import Schedule

LEXICON = re.compile(
    "loop|future|transport|protocol|await|coroutine|command|compiler|build|install|option|header|"
    "message|charset|payload|address|policy|module|spec|loader|import|path|process|lock|pool|queue|"
    "pickle|widget|font|event|window|canvas|test|mock|assert|suite|result|node|element|parser|"
    "attribute|document|namespace")


def with_lexicon(name: str):
    """The definitions of a package, the words of the lexicon marked."""
    for document in package(name):
        if isinstance(document, Document):
            spans = (match.span() for match in LEXICON.finditer(document.text))
            document = replace(document, marks=tuple(spans))
        yield document


def lexicon_masked(row: dict, rng, tokenizer, share: float = 0.2, guided: bool = True):
    """An objective: predict a share of the tokens; guided: those that are marked come first."""
    marked = (row["marks"] > 0) if guided else None
    chosen = choose(row["weights"] > 0, share, rng, marked)
    return hide(row, chosen, rng, tokenizer), BIDIRECTIONAL


lexicon_masked.masks = (BIDIRECTIONAL,)


def on_lexicon(losses, batch):
    """A `reduce`: the weighted mean, and that of the lexicon's words as `lexicon`."""
    ends, _ = weighted_mean(losses, batch)
    (total, number), _ = weighted_mean(losses, {"weights": batch["weights"] * batch["marks"]})
    return ends, {"lexicon": total / jnp.maximum(number, 1)}


def arm(guided: bool):
    """A run that masks the lexicon first, or anything, before the task."""
    own = replace(pre, objective=partial(lexicon_masked, guided=guided))
    return replace(scratch, phases=(own, measured, fine))


measured = replace(pre, steps=1, objective=lexicon_masked, reduce=on_lexicon,
                   schedule=Schedule(shape="constant", peak=1e-9))
marked = {name: Source(partial(with_lexicon, name=name), marks=True) for name in PACKAGES}
scratch = replace(plain, data=replace(plain.data, sources=marked), phases=(measured, fine))
nats = partial(Claim, measure="nats", below=0.0)
study = Study(
    question="Should the words of a domain be masked before any others?",
    paper=Paper(title="Chinese MentalBERT: Domain-Adaptive Pre-training on Social Media for "
                "Chinese Mental Health Text Analysis", authors="Zhai et al.", year=2024,
                seeds=("000:37",)),
    arms={"random": arm(False), "lexicon": arm(True), "scratch": scratch},
    measures=MEASURES | {"lexicon": partial(over_sources, metric="lexicon")},
    quick=base.quick(keep=("data.dev", "data.test")),
    claims=(
        Claim(says="words that are masked first are predicted better", arm="lexicon",
              measure="lexicon", below=0.0),
        nats(says="masked words of a lexicon help the task more than any words", arm="lexicon"),
        nats(says="masking helps the task", arm="random", control="scratch"),
    ), seeds=3)

"""Arithmetic: does a sum come out right sooner if written in another order, or with its steps?

Paper: Teaching Arithmetic to Small Transformers, Lee et al. 2023 (001:178); Show Your Work:
    Scratchpads for Intermediate Computation with Language Models, Nye et al. 2021 (001:164)
Method: sums are text, learnt by predicting the next character. `plain` writes 29+57=86. `reverse`
    writes the answer from its last digit, as each digit then needs no digit to come: $29+57=68$.
    A scratchpad writes the steps first. `simplified` (Lee) has each digit and carry; `scratchpad`
    (Nye) has at each step what is left to add, what is done, and the carry. The papers find plain
    behind reverse, and that behind scratchpads, at equal numbers of sums.
Here: sums of two numbers of up to two digits, 2,000 of the 10,000 pairs, all of one digit among
    them, in new orders in 20 passes; a line each. `exact` is the share of 400 other pairs whose
    whole answer, steps included, is the likeliest at each character, so what greedy decoding
    writes. Equal rows make fewer sums of the longer formats. Left out: three digits, for which
    these sizes take half an hour, multiplication, square roots, text mixed in, programs.
Cost: four arms, 12 runs of half a minute, four minutes on two CPU cores.
Run:
    python train.py study configs/understanding/arithmetic.py --jobs 2
"""
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np

from configs import base as shared
from data import DataConfig, Document, Source
from lib.study import Claim, Paper, Study
from lib.tasks import judged

Form = Literal["plain", "reverse", "simplified", "scratchpad"]


def written(a: int, b: int, form: Form) -> tuple[str, str]:
    """(what is asked, the answer) of a sum; a + b stands last in the answer but in "reverse"."""
    if form == "plain":
        return f"{a}+{b}=", f"{a + b}"
    if form == "reverse":
        return f"${a}+{b}=", f"{a + b}"[::-1] + "$"
    width = max(len(str(a)), len(str(b)))
    x, y = f"{a:0{width}}", f"{b:0{width}}"
    steps, done, carry = [], "", 0
    if form == "scratchpad":
        steps.append(f"{x}+{y},,C{carry}")
    for i in reversed(range(width)):
        total = int(x[i]) + int(y[i]) + carry
        if form == "simplified":
            steps.append(f"{x[i]}+{y[i]}+{carry}={total % 10}C{total // 10}")
        carry, done = total // 10, f"{total % 10}{done}"
        if form == "scratchpad":
            steps.append(f"{x[:i]}+{y[:i]},{done},C{carry}")
    return f"{a}+{b}:", ";".join([*steps, f"{a + b}"])


def pairs(taught: bool, known: int = 2_000, asked: int = 400) -> np.ndarray:
    """[n, 2] pairs of numbers below 100: those taught, with all of one digit, or those asked."""
    every = np.stack(np.divmod(np.arange(10_000), 100), 1)
    order = np.random.default_rng(0).permutation(10_000)
    short = (every[order] < 10).all(1)
    chosen = every[np.concatenate([order[short], order[~short]])]
    return chosen[:known] if taught else chosen[known:known + asked]


def sums(form: Form, passes: int = 20) -> Iterator[Document]:
    """All sums that are taught, a line each, a document for each pass."""
    for number in range(passes):
        lines = []
        for a, b in np.random.default_rng(number).permutation(pairs(True)).tolist():
            lines.append("".join(written(a, b, form)) + "\n")
        yield Document(f"{form}/{number}", "".join(lines))


def exact(params, apply, tokenizer, config, form: Form) -> dict[str, float]:
    """An `evals`: the share of sums not taught whose answer would be written as it should."""
    items = []
    for a, b in pairs(False).tolist():
        ask, answer = written(a, b, form)
        items.append((tokenizer.encode(f"\n{ask}"), tokenizer.encode(f"{answer}\n")))
    _, right = judged(params, apply, tokenizer, items, config.phases[-1].seq)
    return {"own/exact": float(right.mean())}


(phase,) = shared.small.phases


def arm(form: Form):
    """A run that learns one format."""
    data = DataConfig(sources={"sums": Source(partial(sums, form=form), split="train")},
                      tokenizer="bytes", dev=0.0, test=0.0)
    return replace(shared.small, model=shared.shape(3, 64, vocab=258), data=data, overlap=0,
                   phases=(replace(phase, steps=1_500, batch=32, seq=64),), eval_every=500,
                   evals=(partial(exact, form=form),), prompts=("\n12+34",), sample_tokens=32)


claim = partial(Claim, measure="exact", above=0.0)
study = Study(
    question="Does a sum come out right sooner in another order, or with its steps?",
    paper=(Paper(title="Teaching Arithmetic to Small Transformers", authors="Lee et al.",
                 year=2023, seeds=("001:178",)),
           Paper(title="Show Your Work: Scratchpads for Intermediate Computation with Language "
                 "Models", authors="Nye et al.", year=2021, seeds=("001:164",))),
    arms={form: arm(form) for form in ("plain", "reverse", "simplified", "scratchpad")},
    measures={"exact": "own/exact"}, seeds=3,
    quick=shared.quick(keep=("phases.*.seq", "overlap", "data.dev", "data.test")),
    claims=(
        claim(says="the answer from its last digit comes out right more often", arm="reverse"),
        claim(says="so it does after its steps", arm="simplified"),
        claim(says="and after a scratchpad", arm="scratchpad"),
        claim(says="steps are ahead of the order", arm="simplified", control="reverse"),
    ),
)

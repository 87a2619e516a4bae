"""Number pieces: do sums come out right more often if numbers are cut into pieces from the right?

Paper: Tokenization counts: the impact of tokenization on arithmetic in frontier LLMs,
    Singh & Strouse 2024 (003:54)
Method: tokenizers cut long numbers into pieces of up to three digits, from the left (GPT-4) or, if
    commas say so, from the right. From the right, pieces of both numbers and of the answer stand
    for the same powers of ten. The paper finds sums more often right so, and that errors from the
    left are many where the answer is longer than the numbers, and lie in one place.
Here: pieces of up to two digits, so that a small model can learn their sums, each a token of its
    own; sums of numbers of 1 to 5 digits, each length as likely, 30,000 of them; the question has
    no loss (`Document.prefix`). left, the control, and right differ in nothing else. `exact` is
    the share of 512 new sums of 4 and 5 digits that greedy decoding gets right, `longer` that of
    those whose answer is longer than both numbers, `uneven` of numbers with unlike lengths. These
    models are made for the task: what the paper finds in large ones cannot be tested here. So few
    sums come out right, .001 from the left and .05 from the right, that little can be told.
Cost: two arms, six runs of a minute, three minutes on two CPU cores.
Run:
    python train.py study configs/understanding/number_pieces.py --jobs 2
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

PLUS, EQUALS = 110, 111  # after the pieces 0 to 9 and 00 to 99
Side = Literal["left", "right"]


def cut(number: int, side: Side) -> list[int]:
    """The pieces of a number, counted in twos from one side: ids 0 to 9, and 10 for 00 upwards."""
    digits = str(number)
    odd = len(digits) % 2
    begin = odd if side == "right" else 0
    texts = [digits[:begin]] + [digits[i:i + 2] for i in range(begin, len(digits), 2)]
    return [int(text) + 10 * (len(text) == 2) for text in texts if text]


def item(a: int, b: int, side: Side) -> tuple[list[int], list[int]]:
    """(what is asked, the answer) of a sum, as ids."""
    return [*cut(a, side), PLUS, *cut(b, side), EQUALS], cut(a + b, side)


def spelt(ids: list[int]) -> str:
    """Numbers as the tokenizer reads them."""
    return " ".join(map(str, ids))


def pairs(rng: np.random.Generator, count: int, shortest: int, longest: int) -> np.ndarray:
    """[count, 2] numbers, each length as likely."""
    length = rng.integers(shortest, longest + 1, (count, 2))
    least = np.where(length == 1, 0, 10 ** (length - 1))
    return rng.integers(least, 10**length)


def sums(side: Side, count: int = 30_000) -> Iterator[Document]:
    """Sums, a document each; the same ones for both sides."""
    for number, (a, b) in enumerate(pairs(np.random.default_rng(0), count, 1, 5).tolist()):
        ask, answer = item(a, b, side)
        yield Document(f"sum/{number}", spelt(answer), prefix=spelt(ask))


def accuracy(params, apply, tokenizer, config, side: Side, count: int = 512) -> dict[str, float]:
    """An `evals`: the shares of sums that come out right; `longer`, `uneven`: of those alone."""
    asked = pairs(np.random.default_rng(1), count, 4, 5)
    rows = [item(a, b, side) for a, b in asked.tolist()]
    rows = [([tokenizer.bos, *ask], [*answer, tokenizer.eos]) for ask, answer in rows]
    _, right = judged(params, apply, tokenizer, rows, config.phases[-1].seq)
    size = np.char.str_len(asked.astype(str))
    longer = np.char.str_len(asked.sum(1).astype(str)) > size.max(1)
    which = {"exact": right >= 0, "longer": longer, "uneven": size[:, 0] != size[:, 1]}
    return {f"own/{name}": float(right[here].mean()) for name, here in which.items()}


(phase,) = shared.small.phases


def arm(side: Side):
    """A run on numbers cut from one side."""
    data = DataConfig(sources={"sums": Source(partial(sums, side=side), split="train")},
                      tokenizer=f"numbers:{EQUALS + 1}", dev=0.0, test=0.0)
    return replace(shared.small, model=shared.shape(3, 96, vocab=0), data=data, eval_every=500,
                   phases=(replace(phase, steps=1_500, batch=32, seq=64),),
                   evals=(partial(accuracy, side=side),), prompts=(spelt(item(12, 345, side)[0]),),
                   sample_tokens=8)


claim = partial(Claim, arm="right", above=0.0)
study = Study(
    question="Do sums come out right more often if numbers are cut from the right?",
    paper=Paper(title="Tokenization counts: the impact of tokenization on arithmetic in frontier "
                "LLMs", authors="Singh & Strouse", year=2024, seeds=("003:54",)),
    arms={"left": arm("left"), "right": arm("right")},
    measures={name: f"own/{name}" for name in ("exact", "longer", "uneven")}, seeds=3,
    quick=shared.quick({"model.vocab": 0}, keep=("data.tokenizer", "data.dev", "data.test")),
    claims=(
        claim(says="from the right, a tenth more come out right", measure="exact", above=0.1),
        claim(says="also where the answer is longer", measure="longer"),
        claim(says="and where the numbers have unlike lengths", measure="uneven"),
    ),
)

"""Biographies: can a model be asked about what it knows, if it has read it in one form alone?

Paper: Physics of Language Models: Part 3.1, Knowledge Storage and Extraction, Allen-Zhu & Li 2023
    (000:73)
Method: people's lives are told in biographies, and of half of the people there are questions with
    answers beside them. Then the other half are asked about. The paper finds that a model which has
    read one biography a person knows it by heart and cannot answer; with several, in other words
    and orders of sentences, it can.
Here: 100 people, with a birthplace, an employer and a subject, each one of 20 words. single: one
    biography each. permuted: five, of the same sentences in other orders. varied: five, each
    sentence in one of three wordings too. Half of the rows are questions about the first half of
    the people. `asked` is the share of right answers, greedily, about the other half; `by_heart`
    that after the words of a biography. Left out: the probe, and questions in a later phase.
Cost: three arms, nine runs of half a minute, four minutes on two CPU cores.
Run:
    python train.py study configs/understanding/biographies.py --jobs 2
"""
import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from configs import base as shared
from data import DataConfig, Document, Source
from lib.study import Claim, Paper, Study
from lib.tasks import judged

SENTENCES = {  # of each attribute; {0} is the person, {1} the attribute
    "place": ("{0} was born in {1}.", "{0} is a native of {1}.", "{0} grew up in {1}."),
    "work": ("{0} worked for {1}.", "{0} had a job at {1}.", "{0} was employed by {1}."),
    "subject": ("{0} studied {1}.", "{0} took a degree in {1}.", "{0} learnt about {1}."),
}
QUESTIONS = {"place": "Where was {0} born?", "work": "Who did {0} work for?",
             "subject": "What did {0} study?"}
KNOWN = "by_heart", "taught", "asked"


def people(count: int = 100) -> list[dict[str, str]]:
    """A name and an attribute of each kind for each person, of made-up words."""
    rng = np.random.default_rng(0)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = rng.permutation([a + b for a in syllables for b in syllables]).tolist()
    names = [a.capitalize() + b for a, b in zip(words[:count], words[-count:], strict=True)]
    values = np.reshape([word.capitalize() for word in words[count:count + 60]], (3, 20))
    drawn = [[name, *(str(rng.choice(each)) for each in values)] for name in names]
    return [dict(zip(("name", *SENTENCES), own, strict=True)) for own in drawn]


def biography(person: dict[str, str], telling: str, number: int) -> str:
    """One of the biographies of a person; the first one is the same for all tellings."""
    rng = np.random.default_rng([number, *person["name"].encode()])
    kinds, wording = [*SENTENCES], [0, 0, 0]
    if telling != "single" and number:
        kinds = rng.permutation(kinds).tolist()
    if telling == "varied" and number:
        wording = rng.integers(3, size=3).tolist()
    told = [SENTENCES[kind][i].format(person["name"], person[kind])
            for kind, i in zip(kinds, wording, strict=True)]
    return " ".join(told) + "\n"


def lives(telling: str, copies: int = 20) -> Iterator[Document]:
    """Five biographies a person, or five times the same, a document each."""
    for copy, person in itertools.product(range(5 * copies), people()):
        yield Document(f"{copy}/{person['name']}", biography(person, telling, copy % 5))


def question(person: dict[str, str], kind: str) -> tuple[str, str]:
    """(a question about a person, its answer)."""
    return f"Q: {QUESTIONS[kind].format(person['name'])} A:", f" {person[kind]}."


def questions(copies: int = 40) -> Iterator[Document]:
    """All questions about the first half of the people, with their answers."""
    for copy, person, kind in itertools.product(range(copies), people()[:50], SENTENCES):
        yield Document(f"{copy}/{kind}/{person['name']}", "".join(question(person, kind)) + "\n")


def knows(params, apply, tokenizer, config) -> dict[str, float]:
    """An `evals`: shares of attributes that are right, greedily, from a biography or a question."""
    told, asked = [], []
    for person, kind in itertools.product(people(), SENTENCES):
        asked.append(question(person, kind))
        life, _, _ = biography(person, "single", 0).partition(asked[-1][1])
        told.append((life, asked[-1][1]))
    pairs = [([tokenizer.bos, *tokenizer.encode(a)], tokenizer.encode(b)) for a, b in told + asked]
    _, right = judged(params, apply, tokenizer, pairs, config.phases[-1].seq)
    parts = np.split(right, [len(told), len(told) * 3 // 2])
    return {f"own/{name}": float(part.mean()) for name, part in zip(KNOWN, parts, strict=True)}


def arm(telling: str):
    """A run on biographies and questions."""
    sources = {"lives": Source(partial(lives, telling=telling), split="train"),
               "questions": Source(questions, split="train")}
    return replace(
        shared.small, model=shared.shape(3, 96, vocab=258), evals=(knows,), eval_every=10_000,
        data=DataConfig(sources=sources, tokenizer="bytes", dev=0.0, test=0.0), prompts=("Q:",),
        phases=(phase,))


(plain,) = shared.small.phases
phase = replace(plain, steps=600, batch=16, mixture={"lives": 0.5, "questions": 0.5})
single = partial(Claim, arm="single", control=None)
study = Study(
    question="Can a model be asked about what it knows, if it has read it in one form alone?",
    paper=Paper(title="Physics of Language Models: Part 3.1, Knowledge Storage and Extraction",
                authors="Allen-Zhu & Li", year=2023, seeds=("000:73",)),
    arms={telling: arm(telling) for telling in ("single", "permuted", "varied")},
    measures={name: f"own/{name}" for name in KNOWN}, seeds=3,
    quick=shared.quick(keep=("data.dev", "data.test")),
    claims=(
        single(says="one biography is known by heart", measure="by_heart", above=0.8),
        single(says="and cannot be asked about", measure="asked", below=0.2),
        Claim(says="five in other words can", arm="varied", measure="asked", above=0.3),
        Claim(says="so can five in other orders", arm="permuted", measure="asked", above=0.1),
    ),
)

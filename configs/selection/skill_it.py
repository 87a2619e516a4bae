"""Skill-it: in which shares should four genres be read, when each counts alike?

Paper: Skill-it! A Data-Driven Skills Framework for Understanding and Training Language Models,
    Chen et al. 2023 (000:11, 001:37)
Method: what is still hard comes more often, by windowed multiplicative weights on dev losses, and
    so does what helps that, by a graph that says what learning one thing does for another.
Here: the genres of TinyHelen's "leaner" text, up to three times as much of one as of another, with
    one budget of positions. uniform: a quarter each. proportional: by size. moving: from
    conversation and math to textbook and wiki. steered: Skill-it's rule every 50 steps with no
    graph, so each genre helps itself alone; without one its shares hardly leave the uniform ones.
    The figure is the mean over genres of bits per byte. All arms evaluate every 50 steps, as
    `steered` must. The text lies in ../shared/data; elsewhere, give
    `--data.sources.GENRE.documents.path`. Left out: the graph estimated from runs.
Cost: some 26 runs, a quarter of an hour on two CPU cores.
Run: in the directory of train.py,
    python train.py study configs/selection/skill_it.py --jobs 2
    python train.py configs/selection/skill_it.py:steered --phases.0.mixture.eta 0.2    by hand
"""
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from configs import base
from data import DataConfig, Document, Skipped, Source
from lib.readers import jsonl
from lib.study import Claim, Paper, Study

GENRES = ["textbook", "wiki", "conversation", "math"]


def problems(path: str) -> Iterator[Document | Skipped]:
    """Documents of JSON Lines: a `problem`, and its `hints` a line each."""
    for made in jsonl(path, content="problem", meta=("hints",)):
        if isinstance(made, Document):
            text = "\n".join([made.text, *made.meta["hints"]])
            made = replace(made, text=text, meta={})
        yield made


def moving(progress: float, log: list, first: dict, last: dict) -> dict[str, float]:
    """Shares that go in a straight line from `first` to `last`."""
    return {name: (1 - progress) * first[name] + progress * last[name] for name in first}


def steered(progress: float, log: list, names: list, graph: list | None = None, eta: float = 0.1,
            window: int = 3) -> dict[str, float]:
    """Shares ~ exp(eta A L): L sums the last `window` dev losses of each name; ones at first.

    A is the graph [n, n] with its 1s off the diagonal halved: A[i, j] is what learning i does for
    j. None is the identity. From Skill-it's code: no memory beyond the window.
    """
    A = np.eye(len(names)) if graph is None else np.array(graph, float)
    A = np.where((A == 1) & ~np.eye(len(A), dtype=bool), 0.5, A)
    losses = [[row[name] for name in names] for row in log[-window:]] or [[1.0] * len(names)]
    power = eta * A @ np.array(losses).sum(0)
    return dict(zip(names, np.exp(power - power.max()).tolist(), strict=True))


def source(genre: str) -> Source:
    """A genre; held-out documents are drawn from the same file."""
    read = problems if genre == "math" else jsonl
    return Source(partial(read, path=f"../shared/data/leaner/train/{genre}.jsonl"))


(phase,) = base.small.phases
plain = replace(
    base.small,
    data=DataConfig(sources={genre: source(genre) for genre in GENRES}, dev=0.05,
                    test=0.14),  # the least with one of the 25 conversations, which are long
    eval_every=50,
    eval_tokens=4_096,
    prompts=("The ",),
)
start = dict(textbook=0.1, wiki=0.1, conversation=0.4, math=0.4)
end = dict(textbook=0.4, wiki=0.4, conversation=0.1, math=0.1)
rule = partial(steered, names=GENRES, graph=None, eta=0.1, window=3)
phases = {
    "uniform": replace(phase, mixture=dict.fromkeys(GENRES, 0.25)),
    "proportional": phase,
    "moving": replace(phase, mixture=partial(moving, first=start, last=end)),
    "steered": replace(phase, mixture=rule, steer=50),
}
study = Study(
    question="In which shares should four genres be read, when each counts alike?",
    paper=Paper(title="Skill-it! A Data-Driven Skills Framework for Understanding and Training "
                "Language Models", authors="Chen et al.", year=2023, seeds=("000:11", "001:37")),
    arms={name: replace(plain, phases=(own,)) for name, own in phases.items()},
    peak_lrs=base.RATES,
    quick=base.quick({"phases.*.steps": 60, "model.layers": 1, "eval_tokens": 500},  # one decision
                     keep=("data.dev", "data.test", "eval_every")),
    claims=(
        Claim(says="shares steered by losses beat equal ones", arm="steered", below=0.0),
        Claim(says="shares by size are behind equal ones where each genre counts alike",
              arm="proportional", above=0.0),
        Claim(says="an order of genres does not beat equal shares by 0.01", arm="moving",
              above=-0.01),
    ),
    seeds=3,
)

"""Mixtures: in which shares should four genres be read, when each counts alike?

The genres of TinyHelen's "leaner" text (textbook, wiki, conversation, math), up to three times as much of
one as of another. Four arms with one model and one budget of positions:

    uniform       a quarter each: the control
    proportional  by size
    moving        from conversation and math to textbook and wiki, as progress goes
    steered       by the dev losses every 50 steps: what is still hard comes more often, by windowed
                  multiplicative weights (Skill-it, Chen et al. 2023); each genre helps itself alone

The figure to compare is the mean over genres of `eval/GENRE.test/bpb`. Skill-it reports gains where the graph
says what helps what; with none its shares hardly leave the uniform ones. No curriculum of CLIMB's (Martinez
et al. 2023) beats random order for certain. What it costs: every arm evaluates every 50 steps, as `steered`
must. Give `--data.sources.GENRE.documents.path` where the text lies elsewhere.

    python train.py study configs/mixtures.py --seeds 3 --jobs 2     a quarter of an hour on two CPU cores
    python train.py configs/mixtures.py:steered --phases.0.mixture.eta 0.2      one arm by hand, a minute

Run these in the directory of train.py.
"""
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from data import DataConfig, Document, Skipped, Source
from lib.readers import jsonl
from lib.schedule import Schedule
from model import ModelConfig
from train import Config, Phase

GENRES = ["textbook", "wiki", "conversation", "math"]


def problems(path: str) -> Iterator[Document | Skipped]:
    """Documents of JSON Lines: a `problem`, and its `hints` a line each."""
    for made in jsonl(path, content="problem", meta=("hints",)):
        yield replace(made, text="\n".join([made.text, *made.meta["hints"]]), meta={}) if isinstance(
            made, Document) else made


def moving(progress: float, log: list, first: dict, last: dict) -> dict[str, float]:
    """Shares that go in a straight line from `first` to `last`."""
    return {name: (1 - progress) * first[name] + progress * last[name] for name in first}


def steered(progress: float, log: list, names: list, graph: list | None = None, eta: float = 0.1,
            window: int = 3) -> dict[str, float]:
    """Shares ~ exp(eta A L): L sums the last `window` dev losses of each name, ones before the first.

    A is the graph [n, n] with its 1s off the diagonal halved: A[i, j] is what learning i does for j. None is
    the identity. From Skill-it's code (trainer/mw_trainer.py): no memory beyond the window.
    """
    A = np.eye(len(names)) if graph is None else np.array(graph, float)
    A = np.where((A == 1) & ~np.eye(len(A), dtype=bool), 0.5, A)
    losses = np.array([[row[name] for name in names] for row in log[-window:]] or [[1.0] * len(names)])
    power = eta * A @ losses.sum(0)
    return dict(zip(names, np.exp(power - power.max()).tolist(), strict=True))


def source(genre: str) -> Source:
    """A genre, from the directory beside this one's; held-out documents are drawn from the same file."""
    return Source(partial(problems if genre == "math" else jsonl,
                          path=f"../shared/data/leaner/train/{genre}.jsonl"))


phase = Phase(steps=300, batch=8, seq=128)
config = Config(
    model=ModelConfig(layers=4, embed=128, heads=4, kv_heads=4, head_dim=32, mlp=344, vocab=1024),
    data=DataConfig(sources={genre: source(genre) for genre in GENRES}, dev=0.05,
                    test=0.14),  # the least with one of the 25 conversations: there are not many, but long
    phases=(phase,),
    schedule=Schedule(shape="wsd", peak=8e-3, warmup=20, decay=0.4, final=0.05),
    overlap=16,
    eval_every=50,
    eval_tokens=4_096,
    keep=1,
    prompts=("The ",),
    sample_tokens=64,
)
mixtures = {
    "uniform": dict.fromkeys(GENRES, 0.25),
    "proportional": None,
    "moving": partial(moving, first=dict(textbook=0.1, wiki=0.1, conversation=0.4, math=0.4),
                      last=dict(textbook=0.4, wiki=0.4, conversation=0.1, math=0.1)),
    "steered": partial(steered, names=GENRES, graph=None, eta=0.1, window=3),
}
arms = {name: replace(config, phases=(replace(phase, mixture=mixture, steer=50 if name == "steered" else 0),))
        for name, mixture in mixtures.items()}
control = "uniform"
rates = 2e-3, 4e-3, 8e-3
quick = {"phases.*.steps": 60, "phases.*.seq": 64, "overlap": 8, "model.layers": 1, "model.embed": 32,
         "model.mlp": 32, "model.vocab": 258, "model.unroll": 1, "data.tokenizer": "bytes",
         "eval_tokens": 500, "sample_tokens": 4}  # long enough to be steered once
claims = (
    dict(says="shares steered by losses beat equal ones", arm="steered", below=0.0),
    dict(says="shares by size are behind equal ones where each genre counts alike", arm="proportional",
         above=0.0),
    dict(says="an order of genres does not beat equal shares by 0.01", arm="moving", above=-0.01),
)

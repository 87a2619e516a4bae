"""Active forgetting: does a body that was often given new embeddings learn a new language from less text?

Chen et al. 2023: every K steps of pre-training, draw the token embeddings (and the tied head) anew, with
their moments and count at zero and a learning rate that warms up and falls again in each such episode. The
body's rate takes no notice. Then a new language: the body is frozen, and new embeddings are trained.

Arms, equal but for their pre-training on the old language, the functions and classes of Python's library:

    standard     without resets: the control
    forgetting   with one every 250 of the 1,500 steps, none at the end: six episodes
    random_body  none: a body as it was drawn, what embeddings learn by themselves

The new language is the same text with its ASCII characters permuted: same structure, other ids. A run takes
four cells in turn, one a phase, each from embeddings drawn anew: 2k, 20k and 200k tokens (k is 1,024), seen
again as often as the steps ask for, and all that 600 steps take. The frozen body is the same in each. A
cell's figure is the best loss on dev of the new language at its evaluations, in nats per byte; "own language"
is that of the old one where pre-training ends.

What decides, named before it was run: the cell of 20k. In the paper forgetting gains where there is little of
the new language, costs something on its own, and loses where there is a lot; with very little, nothing helps.
All rates of a run, those of adaptation too, scale together. There is no test split, since the figures are the
best of several evaluations: those of dev, on the same documents for all arms, are compared.

    python train.py study configs/active_forgetting.py --jobs 2         three quarters of an hour on two cores
    python train.py configs/active_forgetting.py:forgetting                  one arm by hand, three minutes
"""
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from data import DataConfig, Document, InputError, Skipped, Source, concat_and_split, stdlib
from lib.edits import reset_embeddings
from lib.packing import ROW
from lib.schedule import Schedule
from model import ModelConfig
from train import Config, Edit, Phase

CELLS = {"2k": (2_048, 100), "20k": (20_480, 200), "200k": (204_800, 200), "all": (2**30, 600)}  # and steps


def alphabet(seed: int) -> dict[int, int]:
    """A permutation of the ASCII characters, as `str.translate` takes it."""
    return dict(enumerate(np.random.default_rng(seed).permutation(128).tolist()))


def permuted(seed: int) -> Iterator[Document | Skipped]:
    """The old language's documents in another alphabet. Their paths, and so their splits, stay the same."""
    table = alphabet(seed)
    for document in stdlib("definition"):
        whole = isinstance(document, Document)
        yield replace(document, text=document.text.translate(table)) if whole else document


def few(lengths: np.ndarray, seq: int, tokens: int) -> np.ndarray:
    """A packing: of concatenated documents so many rows as hold `tokens`, spread evenly; all if it has fewer.

    It is asked once per window, so `data.window` is to hold the corpus. Raises InputError below one token.
    """
    if tokens < 1:
        raise InputError(f"few: tokens is {tokens}; allowed is 1 or more")
    plan = concat_and_split(lengths, seq)
    rows = int(plan[-1, ROW]) + 1 if len(plan) else 0
    keep = np.arange(n := min(rows, math.ceil(tokens / seq))) * rows // max(n, 1)
    plan = plan[np.isin(plan[:, ROW], keep)]
    plan[:, ROW] = np.searchsorted(keep, plan[:, ROW])
    return plan


def best(rows: list[dict], metric: str, phase: int) -> float:
    """The least value of a metric in the rows of a phase; inf where it has none."""
    values = [row.get(metric) for row in rows if row["phase"] == phase]
    return min((v for v in values if v is not None), default=math.inf)


def last(rows: list[dict], metric: str, phase: int) -> float:
    """The last value of a metric in the rows of a phase; inf where it has none."""
    return ([row[metric] for row in rows if row["phase"] == phase and row.get(metric) is not None]
            or [math.inf])[-1]
K = 250  # steps between resets
rate = Schedule(shape="linear", peak=8e-3, warmup=50, final=0.1)  # above 0: the last episode teaches the body
pretrain = Phase(steps=1_500, batch=16, seq=64, mixture={"old": 1.0}, schedule=rate)
adapt = replace(pretrain, mixture={"new": 1.0}, edits=(reset_embeddings,),
                schedule=Schedule(shape="linear", peak=1.2e-2, warmup=10, final=0.0),
                lr={"matrix": 0.0, "vector": 0.0})  # nor does weight decay move what has no rate
cells = tuple(replace(adapt, steps=steps, packing=partial(few, tokens=n)) for n, steps in CELLS.values())
config = Config(
    model=ModelConfig(layers=4, embed=64, heads=2, kv_heads=2, head_dim=32, mlp=128),
    data=DataConfig(sources={"old": Source(partial(stdlib, unit="definition")),
                             "new": Source(partial(permuted, seed=0))},
                    tokenizer="bytes", dev=0.02, test=0.0),
    phases=(pretrain, *cells),
    schedule=rate,
    clip=0.5,  # as in the paper: gradients are large after a reset
    eval_every=50,
    eval_tokens=16_384,
    overlap=32,
    keep=1,
)
forget = replace(pretrain, repeat=(Edit(reset_embeddings, every=K),),
                 lr={"embed": replace(rate, warmup=20, final=0.0, cycle=K)})
as_drawn = replace(pretrain, steps=1, lr={"matrix": 0.0, "vector": 0.0})
arms = {
    "standard": config,
    "forgetting": replace(config, phases=(forget, *cells)),
    "random_body": replace(config, phases=(as_drawn, *cells)),
}
control = "standard"
rates = 4e-3, 8e-3, 1.6e-2  # on seed 0, 4e-3 was better than 2e-3 in every cell
measures = {"own language": partial(last, metric="eval/old/loss", phase=0)} | {
    name: partial(best, metric="eval/new/loss", phase=i) for i, name in enumerate(CELLS, 1)}
tuned_by = "20k"
quick = {"phases.*.steps": 4, "phases.0.steps": K + 2, "phases.*.batch": 2, "phases.*.seq": 16, "overlap": 4,
         "model.layers": 1, "model.embed": 16, "model.head_dim": 8, "model.mlp": 16, "eval_every": 200,
         "eval_tokens": 500, "sample_tokens": 4}
claims = (
    dict(says="20k tokens of a new language are learnt better after forgetting", arm="forgetting",
         measure="20k", below=0.0),
    dict(says="so are 2k", arm="forgetting", measure="2k", below=0.0),
    dict(says="so are 200k", arm="forgetting", measure="200k", below=0.0),
    dict(says="with all there is, forgetting is behind", arm="forgetting", measure="all", above=0.0),
    dict(says="forgetting costs something on its own language", arm="forgetting", measure="own language",
         above=0.0),
    dict(says="at 20k a random body is worse than a trained one", arm="random_body", measure="20k",
         above=0.0),
    dict(says="... and than one that forgot", arm="random_body", control="forgetting", measure="20k",
         above=0.0),
)

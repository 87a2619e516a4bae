"""Active forgetting: does a body that often got new embeddings learn a new language from less text?

Paper: Improving Language Plasticity via Pretraining with Active Forgetting, Chen et al. 2023
    (001:199)
Method: every K steps of pre-training, draw the token embeddings and the head anew, their
    moments and count at zero, with a learning rate that warms up and falls again in each such
    episode. Then freeze the body, and train new embeddings on a new language. In the paper this
    gains where there is little of it, loses where there is a lot, and costs something at home.
Here: functions and classes of Python's library; the new language is the same text with its ASCII
    characters permuted. standard: no resets. forgetting: one every 200 of 1,200 steps, none at the
    end. random_body: as drawn. A run takes four cells in turn, one a phase, from new embeddings
    each: 2k, 20k, 200k tokens (k is 1,024) and all. A cell's figure is its best loss on dev of the
    new language, in nats per byte, as there is no test split; "own language" is that of the old one
    where pre-training ends. What decides, named before it was run: the cell of 20k.
Cost: 15 runs, a quarter of an hour on two CPU cores. The rate is the middle of an earlier grid.
Run:
    python train.py study configs/forgetting/active_forgetting.py --jobs 2
"""
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from configs import base
from data import DataConfig, Document, InputError, Skipped, Source, concat_and_split, stdlib
from lib.edits import reset_embeddings
from lib.packing import ROW
from lib.study import Claim, Paper, Study
from model import ModelConfig
from train import Config, Edit, Phase, Schedule

CELLS = {"2k": (2_048, 100), "20k": (20_480, 200), "200k": (204_800, 200), "all": (2**30, 400)}
K = 200  # steps between resets; above, the tokens and steps of each cell


def alphabet(seed: int) -> dict[int, int]:
    """A permutation of the ASCII characters, as `str.translate` takes it."""
    return dict(enumerate(np.random.default_rng(seed).permutation(128).tolist()))


def permuted(seed: int) -> Iterator[Document | Skipped]:
    """The old language's documents in another alphabet; paths, and so splits, are the same."""
    table = alphabet(seed)
    for document in stdlib("definition"):
        whole = isinstance(document, Document)
        yield replace(document, text=document.text.translate(table)) if whole else document


def few(lengths: np.ndarray, seq: int, tokens: int) -> np.ndarray:
    """A packing: of concatenated documents so many rows as hold `tokens`, spread evenly.

    All rows if there are fewer. A window is to hold the corpus. Raises InputError below a token.
    """
    if tokens < 1:
        raise InputError(f"few: tokens is {tokens}; allowed is 1 or more")
    plan = concat_and_split(lengths, seq)
    rows = int(plan[-1, ROW]) + 1 if len(plan) else 0
    n = min(rows, math.ceil(tokens / seq))
    keep = np.arange(n) * rows // max(n, 1)
    plan = plan[np.isin(plan[:, ROW], keep)]
    plan[:, ROW] = np.searchsorted(keep, plan[:, ROW])
    return plan


def values(rows: list[dict], metric: str, phase: int) -> list[float]:
    """A metric's values in the rows of a phase; infinity before the first, so that there is one."""
    found = [row.get(metric) for row in rows if row["phase"] == phase]
    return [math.inf, *(value for value in found if value is not None)]


def best(rows: list[dict], metric: str, phase: int) -> float:
    """The least value of a metric in the rows of a phase; inf where it has none."""
    return min(values(rows, metric, phase))


def last(rows: list[dict], metric: str, phase: int) -> float:
    """The last value of a metric in the rows of a phase; inf where it has none."""
    return values(rows, metric, phase)[-1]


body = {"matrix": 0.0, "vector": 0.0}  # frozen: nor does weight decay move what has no rate
rate = Schedule(shape="linear", peak=8e-3, warmup=50, final=0.1)  # so the last episode counts too
pretrain = Phase(steps=1_200, batch=16, seq=64, mixture={"old": 1.0}, schedule=rate)
adapt = replace(pretrain, mixture={"new": 1.0}, edits=(reset_embeddings,), lr=body,
                schedule=Schedule(shape="linear", peak=1.2e-2, warmup=10, final=0.0))
cells = [replace(adapt, steps=n, packing=partial(few, tokens=t)) for t, n in CELLS.values()]
forget = replace(pretrain, repeat=(Edit(reset_embeddings, every=K),), lr=dict.fromkeys(
    ("embed", "head"), replace(rate, warmup=20, final=0.0, cycle=K)))
standard = Config(
    model=ModelConfig(layers=4, embed=64, heads=2, kv_heads=2, head_dim=32, mlp=128),
    data=DataConfig(sources={"old": Source(partial(stdlib, unit="definition")), "new": Source(
        partial(permuted, seed=0))}, tokenizer="bytes", dev=0.02, test=0.0),
    phases=(pretrain, *cells), schedule=rate, clip=0.5,  # gradients are large after a reset
    eval_every=50, eval_tokens=16_384, overlap=32, keep=1,
)
claim = partial(Claim, arm="forgetting", measure="20k")
study = Study(
    question="Does a body that often got new embeddings learn a new language from less text?",
    paper=Paper(title="Improving Language Plasticity via Pretraining with Active Forgetting",
                authors="Chen et al.", year=2023, seeds=("001:199",)),
    arms={"standard": standard, "forgetting": replace(standard, phases=(forget, *cells)),
          "random_body": replace(standard, phases=(replace(pretrain, steps=1, lr=body), *cells),
                                 model=replace(standard.model, rows=base.loud))},
    measures={"own language": partial(last, metric="eval/old/loss", phase=0)} | {
        name: partial(best, metric="eval/new/loss", phase=i) for i, name in enumerate(CELLS, 1)},
    quick={"phases.*.steps": 4, "phases.0.steps": K + 2, "phases.*.batch": 2, "phases.*.seq": 16,
           "overlap": 4, "model.layers": 1, "model.embed": 16, "model.head_dim": 8, "model.mlp": 16,
           "eval_every": 200, "eval_tokens": 500, "sample_tokens": 4},
    claims=(
        claim(says="20k tokens of a new language are learnt better after it", below=0.0),
        claim(says="so are 2k", measure="2k", below=0.0),
        claim(says="so are 200k", measure="200k", below=0.0),
        claim(says="with all there is, forgetting is behind", measure="all", above=0.0),
        claim(says="it costs something at home", measure="own language", above=0.0),
        claim(says="a random body is worse than a trained one", arm="random_body", above=0.0),
        claim(says="and than one that forgot", arm="random_body", control="forgetting", above=0.0),
    ),
)

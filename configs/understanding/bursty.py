"""Bursty rows: when does a model read a label off its context, and when does it know it by heart?

Paper: Data Distributional Properties Drive Emergent In-Context Learning in Transformers,
    Chan et al. 2022 (003:30)
Method: a row is 8 pairs of an item and its label, and a query. Items are noisy and of many classes,
    each with a label for good. In a bursty row the query's class comes three times among the pairs,
    and so does another. Burstiness, many classes and noise within a class make a transformer read
    the context, rare classes of a Zipfian law beside frequent ones let it do both; a recurrent
    model does not.
Here: a class is a point of 32 dimensions, an item that and noise, a label one of 16. Two layers of
    64 units. context: accuracy on new classes, two in a row, with labels drawn for the row: a half
    is chance for who copies a label, and what recurrent has. swapped: two known classes have each
    other's label. weights: known classes, drawn as in training, the query's not in the context: one
    answer to all is right on .11 of zipf's, .16 of few_classes' and .08 of the others'. All rows
    are bursty but uniform's.
Cost: five arms, 15 runs of half a minute, seven minutes on two CPU cores.
Run:
    python train.py study configs/understanding/bursty.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import numpy as np

from configs.bursty import LABELS, LENGTH, WIDTH, burstiness, rows_of
from configs.points import PROCESS, read_vectors, reader, vectors
from configs.understanding.mixers import gru, gru_rows
from lib.study import Claim, Paper, Study
from model import ModelConfig
from train import Config, Phase, Schedule

KNOWN, STEPS = 2048, 2000


def accuracies(params, apply, known: int, zipf: float, n: int = 1024) -> dict[str, float]:
    """{icl/KIND: the share of rows whose query's label is the likeliest}."""
    found = {}
    for kind in ("context", "swapped", "weights"):
        x, right = rows_of(kind, known, zipf, n, np.random.default_rng(3))
        said = np.asarray(apply(params, dict(x=x)))[:, -1].argmax(-1)
        found[f"icl/{kind}"] = float(np.mean(said == right))
    return found


def recurrent_rows(config: ModelConfig, rows: dict, width: int, outputs: int = 1) -> dict:
    """A `rows`: a GRU for attention, that reads vectors and gives numbers."""
    return vectors(config, gru_rows(config, rows), width, outputs)


def recurrent(params, batch, mask, config: ModelConfig):
    """A `forward` of these."""
    return read_vectors(params, batch, mask, config, partial(gru, positions=batch["positions"]))


def arm(known: int = KNOWN, zipf: float = 0.0, burst: int = 3, share: float = 1.0) -> Config:
    """A distribution of rows."""
    drawn = dict(known=known, zipf=zipf)
    objective = partial(burstiness, **drawn, burst=burst, share=share)
    shape = dict(layers=2, embed=64, heads=2, kv_heads=2, head_dim=32, mlp=128)
    return Config(
        model=reader(WIDTH, LABELS, **shape), data=PROCESS, prompts=(), overlap=0,
        phases=(Phase(steps=STEPS, batch=16, seq=4 * LENGTH, objective=objective),),
        schedule=Schedule(shape="wsd", peak=3e-3, warmup=100, final=0.05),
        evals=(partial(accuracies, **drawn),), eval_every=500, save_every=STEPS, keep=1)


bursty = arm()
gru_model = replace(bursty.model, forward=recurrent, rows=partial(
    recurrent_rows, width=WIDTH, outputs=LABELS))
study = Study(
    question="When does a model read a label off its context, and when from its weights?",
    paper=Paper(title="Data Distributional Properties Drive Emergent In-Context Learning in "
                "Transformers", authors="Chan et al.", year=2022, seeds=("003:30",)),
    arms={"uniform": arm(share=0.0), "bursty": bursty, "few_classes": arm(known=32),
          "zipf": arm(zipf=1.0), "recurrent": replace(bursty, model=gru_model)},
    measures={kind: f"icl/{kind}" for kind in ("context", "swapped", "weights")},
    quick={"phases.*.steps": 4, "model.embed": 48, "model.mlp": 16, "eval_every": 4},
    claims=(
        Claim(says="bursty rows teach it to read", arm="bursty", control=None, measure="context",
              above=0.9),
        Claim(says="uniform ones do not", arm="uniform", control=None, measure="context",
              below=0.5),
        Claim(says="they are learnt by heart", arm="uniform", control=None, measure="weights",
              above=0.5),
        Claim(says="so are few classes", arm="few_classes", control="bursty", measure="weights",
              above=0.5),
        Claim(says="which it then reads less", arm="few_classes", control="bursty",
              measure="context", below=0.0),
        Claim(says="a Zipfian law leaves both: it reads", arm="zipf", measure="context", above=0.2),
        Claim(says="and knows more than of equal classes", arm="zipf", control="bursty",
              measure="weights", above=0.1),
        Claim(says="a recurrent model reads less", arm="recurrent", control="bursty",
              measure="context", below=0.0),
    ),
    seeds=3,
)

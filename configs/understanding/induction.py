"""Induction heads: how abruptly does reading the context come, and what forms when it does?

Paper: The mechanistic basis of data dependence and abrupt learning in an in-context classification
    task, Reddy 2024 (003:25)
Method: bursty rows, and the least network that can do both: two layers of attention alone, one head
    each, and a classifier. Reading forms abruptly, as an induction head: labels attend to the item
    before them, the query to labels of items like it, in the course of three nested logits. It
    comes earlier by more classes and more burstiness.
Here: as in bursty.py, with 1, 2 or 4 items of the query's class. new: accuracy on new classes with
    new labels in such rows; who copies any label has .54 in b4. onset: the share of the run after
    which it is above .75, 1 if never, as in b1. rise: that from .6 to .9, 1 if it does not come.
    induction: the query's attention to labels of its class in the second layer; .51 in b4 if to all
    labels alike. nested: the least distance of `new`'s course to one of three numbers that rises.
Cost: 12 runs of half a minute, seven minutes on two CPU cores.
Run:
    python train.py study configs/understanding/induction.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from configs.bursty import LABELS, LENGTH, WIDTH, burstiness, crossing, distance, new_rows
from configs.points import PROCESS, reader, vectors
from configs.understanding.bursty import accuracies
from lib.study import Claim, Paper, Study
from model import CAUSAL, ModelConfig, Param, plain_table, rms_norm, stream, whole
from train import Config, Phase, Schedule

STEPS, MLP = 2_400, ("mlp_norm", "gate", "up", "down")


def attention_rows(config: ModelConfig, rows: dict) -> dict:
    """A `rows`: attention alone, and a classifier of one hidden layer."""
    kept = {name: row for name, row in rows.items() if name not in MLP}
    hidden = Param(("embed", "out"), (config.embed, config.mlp), config.embed**-0.5)
    out = Param(("in", "out"), (config.mlp, LABELS), config.mlp**-0.5)
    return vectors(config, kept, WIDTH) | {"hidden": hidden, "out": out}


def through(params, batch, mask, config: ModelConfig, attend=None):
    """(final states, what `attend` keeps in each layer) of layers whose MLP is silent."""
    silent = {name: jnp.zeros(plain_table(config)[name].shape) for name in MLP}
    first = batch["x"].astype(config.dtype) @ params["in"]
    x, (kept, _) = stream(params | silent, first, batch, mask, config, attend=attend)
    return rms_norm(x, params["norm"], config.norm_eps), kept


def attention_alone(params, batch, mask, config: ModelConfig):
    """A `forward`: these states."""
    return through(params, batch, mask, config)[0]


def classified(params, states, batch, config: ModelConfig):
    """An `outputs`: numbers [b t LABELS] through the hidden layer."""
    return jax.nn.relu(states @ params["hidden"]) @ params["out"]


def shown(q, k, v):
    """Causal attention that keeps its shares [b k g t s]."""
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * q.shape[-1] ** -0.5
    shares = jax.nn.softmax(scores, -1, where=jnp.tri(q.shape[1], dtype=bool))
    return jnp.einsum("bkgts,bskh->btkgh", shares, v), shares


def measure(params, apply, config, burst: int, n: int = 512) -> dict[str, float]:
    """new and induction, as above."""
    x, right, same = new_rows(n, burst, np.random.default_rng(3))
    said = np.asarray(apply(params, dict(x=x)))[:, -1].argmax(-1)
    _, maps = through(params, whole({"x": jnp.asarray(x)}), CAUSAL, config.model, shown)
    on_labels = np.sum(np.asarray(maps)[-1, :, 0, 0, -1, 1::2] * same, 1)
    return {"icl/new": float(np.mean(said == right)), "icl/induction": float(np.mean(on_labels))}


def nested(rows: list[dict]) -> float:
    """The least root mean square distance of the course to that of three numbers."""
    return distance(np.array([row["icl/new"] for row in rows if "icl/new" in row]))


def onset(rows: list[dict], level: float = 0.75) -> float:
    """The share of the run after which `new` is above a level; 1 where it never is."""
    return crossing([row["icl/new"] for row in rows if "icl/new" in row], level)


def rise(rows: list[dict]) -> float:
    """The share of the run in which `new` goes from .6 to .9; 1 if it does not."""
    end = onset(rows, 0.9)
    return end - onset(rows, 0.6) if end < 1 else 1.0


def arm(burst: int, known: int = 2048) -> Config:
    """Rows with so many items of the query's class, of so many classes."""
    drawn = partial(burstiness, known=known, zipf=0.0, burst=burst, share=1.0)
    shape = reader(WIDTH, LABELS, layers=2, embed=64, heads=1, kv_heads=1, head_dim=64, mlp=128)
    return Config(
        model=replace(shape, rows=attention_rows, forward=attention_alone, outputs=classified),
        data=PROCESS, phases=(Phase(steps=STEPS, batch=16, seq=4 * LENGTH, objective=drawn),),
        evals=(partial(measure, burst=burst), partial(accuracies, known=known, zipf=0.0, n=256)),
        eval_every=STEPS // 30, keep=1, prompts=(), overlap=0, save_every=STEPS,
        schedule=Schedule(shape="constant", peak=3e-3, warmup=50))


study = Study(
    question="How abruptly does reading the context come, and what forms when it does?",
    paper=Paper(title="The mechanistic basis of data dependence and abrupt learning in an "
                "in-context classification task", authors="Reddy", year=2024, seeds=("003:25",)),
    arms={"b4": arm(4), "b2": arm(2), "b1": arm(1), "few_classes": arm(4, 32)},
    measures=dict(onset=onset, rise=rise, nested=nested, new="icl/new", induction="icl/induction"),
    quick={"phases.*.steps": 4, "model.embed": 16, "model.mlp": 16, "eval_every": 2},
    claims=(
        Claim(says="within a tenth of the run", arm="b4", control=None, measure="rise", below=0.1),
        Claim(says="by an induction head", arm="b4", control=None, measure="induction", above=0.8),
        Claim(says="as three nested logits", arm="b4", control=None, measure="nested", below=0.1),
        Claim(says="less bursty is later", arm="b2", measure="onset", above=0.0),
        Claim(says="and later still", arm="b1", control="b2", measure="onset", above=0.0),
        Claim(says="few are learnt by heart", arm="few_classes", measure="icl/weights", above=0.5),
        Claim(says="and read less", arm="few_classes", measure="new", below=0.0),
    ), seeds=3)

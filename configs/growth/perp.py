"""PERP: after pruning, is it enough to retrain a small part of the parameters?

Paper: PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs, Zimmer et al. 2023 (002:25)
Method: set the smallest weights to zero, and retrain gains and biases alone, or the embeddings, the
    head, or adapters of low rank. The paper regains with 0.3 % of the parameters of a language
    model what retraining all of them does.
Here: nine tenths of the weights of each layer's matrix go, by magnitude, in a trained model, as
    half of them cost 0.01 bits here. A tenth of its steps follow. none: nothing trains. gains,
    embeddings, head, all: only these. biases: gains, and biases that the model did not have. lora:
    gains, and adapters of rank 4 to each matrix, whose product is masked as the weights are
    (MaskLoRA), so that they can be merged. In each arm what is zero stays zero. recovered: an arm's
    gain on none over that of all. all gains 0.04 bits, and gains, biases and lora are ahead of it.
    Each arm has its best of three to five rates. That of gains is the highest tried, 0.512.
Cost: 54 runs, most of 5 seconds, seven minutes on two CPU cores.
Run:
    python train.py study configs/growth/perp.py --jobs 2
"""
import math
from dataclasses import replace
from functools import partial

import jax.numpy as jnp

from configs import base
from lib.biases import biased, biases
from lib.optim import adamw
from lib.study import Claim, Paper, Study
from lib.widen import fan_in
from model import Context, Edited, Model, ModelConfig, Param, draw, plain_table, table

GROUPS = "embed", "head", "matrix", "vector"  # of the plain, untied Llama


def matrices(config: ModelConfig) -> list[str]:
    """The names of a plain Llama's matrices, those of its blocks."""
    return [name for name, row in plain_table(config).items() if row.group == "matrix"]


def adapters(config: ModelConfig, rows: dict[str, Param], rank: int = 4) -> dict[str, Param]:
    """A `rows`: two factors besides, for each matrix of each layer; the second begins as zero."""
    found = {}
    for name in matrices(config):
        row = rows[name]
        size = dict(zip(row.axes, row.shape, strict=True))
        inputs = math.prod(size[axis] for axis in fan_in(row))
        outputs = row.size // (config.layers * inputs)
        one, two = (config.layers, inputs, rank), (config.layers, rank, outputs)
        found[f"{name}_in"] = Param(("layers", "in", "rank"), one, inputs**-0.5, "adapter")
        found[f"{name}_out"] = Param(("layers", "rank", "out"), two, 0.0, "adapter")
    return rows | found


def masked(params, step, batch, config: ModelConfig) -> dict:
    """A `reparam`: what is zero stays zero, and the adapters' product is added to the rest."""
    used = dict(params)
    for name in matrices(config):
        x = params[name]
        if f"{name}_in" in params:
            change = params[f"{name}_in"] @ params[f"{name}_out"]
            used[name] = x + change.reshape(x.shape)
        used[name] = jnp.where(x == 0, 0, used[name])
    return used


def sparsify(model: Model, context: Context, share: float = 0.9, rank: int = 0,
             bias: bool = False) -> Edited:
    """Set this share of the weights of each layer's matrix to zero, the smallest ones.

    rank: of adapters that are put beside a plain Llama; bias: it gets biases. Both add nothing yet.
    """
    params, config = dict(model.params), model.config
    for name in matrices(config):
        size = jnp.abs(params[name]).reshape(config.layers, -1)
        kept = jnp.argsort(jnp.argsort(size, 1), 1) >= round(share * size.shape[1])
        params[name] = params[name] * kept.reshape(params[name].shape)
    if rank:
        config = replace(config, rows=partial(adapters, rank=rank))
    if bias:
        config = replace(config, rows=biases, forward=biased)
    for name, row in table(config).items():
        if name not in params:
            params[name] = draw(name, row, context.key, params["embed"].dtype)
    return Edited(Model(config, params), dict.fromkeys(GROUPS, "reset"), preserves=share == 0)


def arm(*groups: str, steps: int = 20, **added):
    """A run that prunes the trained model, and retrains these optimiser groups."""
    phase = replace(trained.phases[0], steps=steps, edits=(partial(sparsify, **added),))
    frozen = tuple(group for group in GROUPS if group not in groups)
    return replace(trained, init_from="needs:trained", phases=(phase,), reparam=masked,
                   optimizer=partial(adamw, frozen=frozen), schedule=retraining)


def recovered(figures: dict) -> dict[str, float]:
    """{arm: what it regains as a share of what retraining all does}."""
    bits = {name: found["bpb"].mean() for name, found in figures.items()}
    lost = bits["none"] - bits["all"]
    return {name: float((bits["none"] - each) / lost) for name, each in bits.items()}


trained = base.scaled(replace(base.small, model=replace(base.shape(), tied=False)), 200)
retraining = replace(trained.schedule, shape="linear", warmup=2, decay=1.0, final=0.0)
study = Study(
    question="After pruning, is it enough to retrain a small part of the parameters?",
    paper=Paper(title="PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs",
                authors="Zimmer et al.", year=2023, seeds=("002:25",)),
    needs={"trained": trained},
    arms={"all": arm(*GROUPS), "none": arm(steps=1), "gains": arm("vector"),
          "biases": arm("vector", bias=True), "embeddings": arm("embed"), "head": arm("head"),
          "lora": arm("vector", rank=4)},
    peak_lrs=(2e-3, 8e-3, 3.2e-2), quick=base.quick(), conclusions={"recovered": recovered},
    claims=(
        Claim(says="gains alone, a thousandth of all, regain half of the loss",
              measure="recovered: gains", above=0.5),
        Claim(says="biases help them", arm="biases", control="gains", below=0.0),
        Claim(says="adapters regain nine tenths", measure="recovered: lora", above=0.9),
        Claim(says="the head regains half", measure="recovered: head", above=0.5),
    ),
    seeds=3,
)

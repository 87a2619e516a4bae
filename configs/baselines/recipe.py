"""Recipe: what is each part of the defaults worth, of draws, learning rates and an untied head?

Paper: Tensor Programs V, Yang et al. 2022; nanochat, Karpathy 2025, which has draws like these
Method: embeddings drawn with 0.8, the head with 0.001, outputs of blocks with 0; embeddings at ten
    times the rate, what touches the residual stream at 64 / its inputs; a head of its own.
Here: the plain Llama as it is by default, without each of these, and without all of them, as it was
    by default before. 0.8 million tokens, four layers of 64, where rates by inputs are 1 but for
    one matrix; transfer.py asks whether one rate is good at other sizes. A tied table has draws of
    its own, see `model.plain_table`. steps_500.py has large and fast embeddings apart and together.
Cost: about nine minutes on two CPU cores that do nothing else, an estimate.
Run:
    python train.py study configs/baselines/recipe.py --jobs 2
"""
import math
from dataclasses import replace
from functools import partial

from configs import base
from lib.optim import adamw
from lib.study import Claim, Paper, Study
from model import ModelConfig
from train import Config


def redrawn(config: ModelConfig, rows: dict, embed: float = 0.0, head: float = 0.0,
            write: float = 0.0) -> dict:
    """`rows`: other deviations of draws; 0 leaves those of the default."""
    draws = {"embed": embed, "head": head, "o": write, "down": write}
    return {name: replace(row, init=draws.get(name) or row.init) for name, row in rows.items()}


def old(config: Config) -> Config:
    """A config with the defaults that the recipe took the place of, at its own peak rate."""
    tied = replace(config.model, rows=as_before, tied=True)
    return replace(config, model=tied, optimizer=partial(adamw, base_width=0))


def as_before(config: ModelConfig, rows: dict) -> dict:
    """`rows`: outputs of blocks drawn as they were."""
    return redrawn(config, rows, write=0.02 / math.sqrt(2 * config.layers))


def lacks(optimizer=adamw, tied: bool = False, **draws: float) -> Config:
    """The plain run with another optimiser, a tied table or other draws."""
    rows = partial(redrawn, **draws) if draws else None
    return replace(plain, model=replace(model, rows=rows, tied=tied), optimizer=optimizer)


model = base.shape(embed=64)
read = model.embed**-0.5  # the deviation that the other draws had
phase = replace(base.small.phases[0], steps=400, seq=256)
plain = replace(base.small, model=model, phases=(phase,), overlap=32,
                schedule=replace(base.small.schedule, warmup=80), eval_every=200)
arms = {  # by what is left out
    "large_embeddings": lacks(embed=read),
    "small_head": lacks(head=read),
    "zero_outputs": replace(plain, model=replace(model, rows=as_before)),
    "fast_embeddings": lacks(optimizer=partial(adamw, embed_lr=1.0)),
    "rates_by_inputs": lacks(optimizer=partial(adamw, base_width=0)),
    "own_head": lacks(tied=True),
    "all_of_it": old(plain),
}
study = Study(
    question="What is each part of the default recipe worth?",
    paper=Paper(title="Tensor Programs V: Tuning Large Neural Networks via Zero-Shot "
                      "Hyperparameter Transfer", authors="Yang et al.", year=2022),
    arms={"recipe": plain} | arms,
    quick=base.quick({"model.layers": 2}),
    claims=[Claim(says=f"without {name.replace('_', ' ')} it is behind", arm=name, above=0.0)
            for name in arms],
    seeds=3,
)

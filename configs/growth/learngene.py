"""Learngenes: are layers made of few shared ones a good start for another depth?

Paper: Transformer as Linear Expansion of Learngene, Xia et al. 2024 (003:35);
    Exploring Learngene via Stage-wise Weight Sharing, Xia et al. 2024 (003:4)
Method: train a model whose layers are a function of a few genes, expand the genes to any depth, and
    set each layer free. TLEG: layer l of L is (1 - l/L) a + (l/L) b. SWS: the layers of a stage
    share theirs.
Here: four layers of two genes, then six, with one budget of model FLOPs, the shared phase included.
    Genes are the first rows along `layers`; the rest has no gradient, and `asleep` keeps weight
    decay off it. Both papers are about vision, have a teacher, which is left out, and count the
    expanded model's training alone. The two genes are the layers at both ends, in place of an
    offset and a slope, so that both have the table's scale. Growth warms up again.
Cost: some 20 runs, ten to twenty minutes on two CPU cores.
Run:
    python train.py study configs/growth/learngene.py --jobs 2
    python train.py configs/growth/learngene.py:linear              one arm by hand, a minute
"""
from dataclasses import replace
from functools import partial

import jax.numpy as jnp

from configs import base
from lib.freezing import asleep
from lib.study import Claim, Paper, Study
from model import Context, Edited, Model, ModelConfig, blocks, groups
from train import Config


def mixed(params, rows, config: ModelConfig) -> dict:
    """Parameters whose blocks are combinations [layers, genes] of the first rows of those given."""
    genes, used = rows.shape[1], dict(params)
    for name, x in blocks(params, config).items():
        # in full precision, so that a shared layer is its gene exactly
        used[name] = jnp.tensordot(rows.astype(x.dtype), x[:genes], 1, precision="highest")
    return used


def depth_rows(layers: int):
    """[layers, 2] The shares of the two ends in each layer: 1 - l/L and l/L (TLEG, eq. 1)."""
    t = jnp.arange(layers) / layers
    return jnp.stack([1 - t, t], 1)


def stage_rows(stages):
    """[layers, genes] One gene for each layer."""
    return (jnp.array(stages)[:, None] == jnp.arange(max(stages) + 1)).astype(jnp.float32)


def linear(params, step, batch, config: ModelConfig, layers: int = 4) -> dict:
    """A `reparam`: layers as a linear function of depth, in a model of so many, and in no other."""
    return mixed(params, depth_rows(layers), config) if config.layers == layers else params


def stagewise(params, step, batch, config: ModelConfig,
              stages: tuple[int, ...] = (0, 0, 1, 1)) -> dict:
    """A `reparam`: layer i is gene stages[i], in a model of so many layers, and in no other."""
    fits = config.layers == len(stages)
    return mixed(params, stage_rows(stages), config) if fits else params


def expand(model: Model, context: Context, layers: int = 0,
           stages: tuple[int, ...] = ()) -> Edited:
    """Genes to a model of any depth: linear to so many `layers`, or by a list of `stages`.

    Every optimiser group starts afresh, as what is trained is another thing. A run whose `reparam`
    is `linear` or `stagewise` must expand to another depth than theirs, as they know a model by its
    depth. Raises ValueError for more genes than the model has layers.
    """
    genes = 2 if layers else max(stages, default=-1) + 1
    odd = bool(layers) == bool(stages) or layers < 0 or min(stages, default=0) < 0
    if odd or model.config.layers < genes:
        raise ValueError(f"expand: layers is {layers} and stages is {stages}; allowed is one of "
                         "them, with no more genes than the model has layers "
                         f"({model.config.layers})")
    rows = depth_rows(layers) if layers else stage_rows(stages)
    new = replace(model.config, layers=len(rows))
    policy = dict.fromkeys(groups(new), "reset")
    return Edited(Model(new, mixed(model.params, rows, new)), policy, preserves=False)


SHARED = 120  # steps of the shared phase
scratch = replace(base.small, model=base.shape(6, 96), eval_every=60)


def arm(reparam, **how) -> Config:
    """A run that trains genes, then expands them."""
    run = base.grown(scratch, base.shape(4, 96), SHARED, partial(expand, **how))
    return replace(run, reparam=reparam, optimizer=asleep)


study = Study(
    question="Are layers that are a function of few shared ones a good start for another depth?",
    paper=(Paper(title="Transformer as Linear Expansion of Learngene", authors="Xia et al.",
                 year=2024, seeds=("003:35",)),
           Paper(title="Exploring Learngene via Stage-wise Weight Sharing for Initializing "
                 "Variable-sized Models", authors="Xia et al.", year=2024, seeds=("003:4",))),
    arms={
        "scratch": scratch,
        "linear": arm(partial(linear, layers=4), layers=6),
        "stagewise": arm(partial(stagewise, stages=(0, 0, 1, 1)), stages=(0, 0, 0, 1, 1, 1)),
    },
    peak_lrs=base.RATES,
    quick=base.quick(),
    claims=(
        Claim(says="a linear learngene beats full depth, its own cost counted", arm="linear",
              below=0.0),
        Claim(says="shared stages beat full depth, their own cost counted", arm="stagewise",
              below=0.0),
    ),
    seeds=3,
)

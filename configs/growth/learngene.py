"""Learngenes: are layers made of few shared ones a good start for another depth?

Paper: Transformer as Linear Expansion of Learngene, Xia et al. 2024 (003:35);
    Exploring Learngene via Stage-wise Weight Sharing, Xia et al. 2024 (003:4)
Method: train a model whose layers are a function of a few genes by soft distillation from a
    teacher, expand the genes to any depth, and set each layer free. TLEG: layer l of L is
    (1 - l/L) a + (l/L) b. SWS: the layers of a stage share theirs.
Here: four layers of two genes, then six, with one budget of model FLOPs, the shared phase and the
    teacher's forward passes in it included. Genes are the first rows along `layers`; the rest has
    no gradient, and `asleep` keeps weight decay off it. taught, stages_taught: half of the loss is
    the divergence from the model of `scratch`, whose FLOPs come on top. The papers are about
    vision, and count the expanded model's training alone. The two genes are the ends, l = 0 and
    l = L, in place of an offset and a slope, so that both have the table's scale. No layer is at L.
    At the one rate of the recipe the seeds of scratch are up to 0.14 bits apart.
Cost: 15 runs of some 200 steps, five minutes on two CPU cores. The teachers are runs of `scratch`.
Run:
    python train.py study configs/growth/learngene.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import jax.numpy as jnp

from configs import base
from lib.freezing import asleep
from lib.study import Claim, Paper, Study
from lib.teacher import adopt, divergence, release, taught
from model import Context, Edited, Model, ModelConfig, blocks, cross_entropy, groups


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


def stagewise(params, step, batch, config: ModelConfig, stages: tuple[int, ...] = (0, 0, 1, 1)):
    """A `reparam`: layer i is gene stages[i], in a model of so many layers, and in no other."""
    fits = config.layers == len(stages)
    return mixed(params, stage_rows(stages), config) if fits else params


def expand(model: Model, context: Context, layers: int = 0, stages: tuple[int, ...] = ()):
    """Genes to a model of any depth: linear to so many `layers`, or by a list of `stages`.

    The optimiser starts afresh. A run whose `reparam` is `linear` or `stagewise` must expand to
    another depth than theirs, by which they know a model. Raises ValueError for more genes than the
    model has layers.
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


def soft(logits, batch, extras, share: float = 0.5):
    """A `token_loss` in nats: soft distillation, `share` of it the divergence from a teacher."""
    own = cross_entropy(logits, batch, extras)
    return (1 - share) * own + share * divergence(logits, batch, extras)


scratch = replace(base.scaled(base.small, 200), model=base.shape(6, 96), eval_every=50)
SHARED, aux = 80, base.shape(4, 96)  # steps and model of the shared phase


def arm(reparam, teacher: bool = False, **how):
    """A run that trains genes, perhaps by a teacher, then expands them."""
    shape = taught(aux, scratch.model, "teacher") if teacher else aux
    shared, free = base.grown(scratch, shape, SHARED, partial(expand, **how)).phases
    if teacher:
        shared = replace(shared, edits=(partial(adopt, run="needs:teacher"),), token_loss=soft)
        free = replace(free, edits=(release, *free.edits))
    return replace(scratch, model=aux, phases=(shared, free), reparam=reparam,
                   optimizer=partial(asleep, frozen=("teacher",)))


six = (0, 0, 0, 1, 1, 1)  # the gene of each of six layers
study = Study(
    question="Are layers that are a function of few shared ones a good start for another depth?",
    paper=(Paper(title="Transformer as Linear Expansion of Learngene", authors="Xia et al.",
                 year=2024, seeds=("003:35",)),
           Paper(title="Exploring Learngene via Stage-wise Weight Sharing for Initializing "
                 "Variable-sized Models", authors="Xia et al.", year=2024, seeds=("003:4",))),
    needs={"teacher": scratch}, quick=base.quick(), seeds=3,
    arms={"scratch": scratch, "linear": arm(linear, layers=6),
          "stagewise": arm(stagewise, stages=six), "taught": arm(linear, True, layers=6),
          "stages_taught": arm(stagewise, True, stages=six)},
    claims=(
        Claim(says="linear genes beat full depth, their cost counted", arm="linear", below=0.0),
        Claim(says="so do shared stages", arm="stagewise", below=0.0),
        Claim(says="a teacher helps linear genes", arm="taught", control="linear", below=0.0),
        Claim(says="it helps shared stages", arm="stages_taught", control="stagewise", below=0.0),
    ),
)

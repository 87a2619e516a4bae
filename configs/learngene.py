"""Learngenes: layers trained as a function of few shared ones, then expanded to another depth and set free.

Arms, with one final shape and one budget of model FLOPs, the shared phase included:

    linear       layer l of L is (1 - l/L) a + (l/L) b, trained so, four layers; then six, each its own
    stagewise    two layers, each used twice in turn; then three times, each its own
    scratch      six layers from the start

"Transformer as Linear Expansion of Learngene" (TLEG; Xia et al. 2024: l/L from 0, gains too, here with the
layers at both ends in place of an offset and a slope, so that both have the table's scale) and "Exploring
Learngene via Stage-wise Weight Sharing" (SWS; Xia et al. 2024). Both are published for vision, with a
teacher, which is left out here. An arm by hand, some minutes on two CPU cores:

    python train.py configs/learngene.py:linear --seed 1 --name linear-1

The shape in the shared phase is that of the model run, so that FLOPs and sampling are right; the genes are
the first rows along `layers`, and the rest has no gradient. `asleep` keeps weight decay off it.
"""
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp

from data import DataConfig, Source, stdlib
from model import Context, Edited, Model, ModelConfig, flops_per_token, groups, table
from train import Config, Phase, Schedule, load_file

asleep = load_file(Path(__file__).with_name("incremental_layers.py")).asleep
BLOCKS = [name for name, p in table(ModelConfig()).items() if p.axes[0] == "layers"]


def mixed(params, rows) -> dict:
    """Parameters whose blocks are combinations [layers, genes] of the first rows of those given."""
    genes = rows.shape[1]
    return {n: jnp.tensordot(rows.astype(x.dtype), x[:genes], 1, precision="highest")  # shared ones exactly
            if n in BLOCKS else x for n, x in params.items()}


def depth_rows(layers: int):
    """[layers, 2] The shares of the two ends in each layer: 1 - l/L and l/L (TLEG, eq. 1)."""
    t = jnp.arange(layers) / layers
    return jnp.stack([1 - t, t], 1)


def stage_rows(stages):
    """[layers, genes] One gene for each layer."""
    return (jnp.array(stages)[:, None] == jnp.arange(max(stages) + 1)).astype(jnp.float32)


def linear(params, step, batch, layers: int = 4):
    """A `weights`: layers as a linear function of depth, in a model of so many; another is left alone."""
    return mixed(params, depth_rows(layers)) if len(params["q"]) == layers else params


def stagewise(params, step, batch, stages: tuple[int, ...] = (0, 0, 1, 1)):
    """A `weights`: layer i is gene stages[i], in a model of so many layers; another is left alone."""
    return mixed(params, stage_rows(stages)) if len(params["q"]) == len(stages) else params


def expand(model: Model, context: Context, layers: int = 0, stages: tuple[int, ...] = ()) -> Edited:
    """Genes to a model of any depth: linear to so many `layers`, or by a list of `stages`.

    Every optimiser group starts afresh, as what is trained is another thing. A run whose `weights` is
    `linear` or `stagewise` must expand to another depth than theirs, as they know a model by its depth.
    Raises ValueError for more genes than the model has layers.
    """
    genes = 2 if layers else max(stages, default=-1) + 1
    odd = bool(layers) == bool(stages) or layers < 0 or min(stages, default=0) < 0
    if odd or model.config.layers < genes:
        raise ValueError(f"expand: layers is {layers} and stages is {stages}; allowed is one of them, with "
                         f"no more genes than the model has layers ({model.config.layers})")
    rows = depth_rows(layers) if layers else stage_rows(stages)
    new = replace(model.config, layers=len(rows))
    policy = dict.fromkeys(groups(new), "reset")
    return Edited(Model(new, mixed(model.params, rows)), policy, preserves=False)


# ------------------------------------------------------------------------------------------------------ study

shallow = ModelConfig(layers=4, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, vocab=2048)
deep = replace(shallow, layers=6)
BATCH, SEQ = 8, 256
SHARED, SCRATCH = 200, 480  # steps of the shared phase, and of six layers from scratch
DEEP = round(SCRATCH - SHARED * flops_per_token(shallow, SEQ) / flops_per_token(deep, SEQ))  # equal FLOPs

scratch = Config(
    model=deep,
    data=DataConfig(sources={"stdlib": Source(stdlib)}, shard_tokens=1_048_576),
    phases=(Phase(steps=SCRATCH, batch=BATCH, seq=SEQ),),
    schedule=Schedule(shape="wsd", peak=4e-3, warmup=20, decay=0.4, final=0.05),
    eval_every=100,
    prompts=("def ", "class "),
)


def arm(weights, **arguments) -> Config:
    """A run that trains genes, then expands them."""
    return replace(scratch, model=shallow, weights=weights, optimizer=asleep, phases=(
        Phase(steps=SHARED, batch=BATCH, seq=SEQ),
        Phase(steps=DEEP, batch=BATCH, seq=SEQ, edits=(partial(expand, **arguments),))))


arms = {
    "linear": arm(partial(linear, layers=4), layers=6),
    "stagewise": arm(partial(stagewise, stages=(0, 0, 1, 1)), stages=(0, 0, 0, 1, 1, 1)),
    "scratch": scratch,
}
config = arms["linear"]

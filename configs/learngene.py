"""Learngenes: layers trained as a function of few shared ones, then expanded to another depth and set free.

Arms, with one final shape and one budget of model FLOPs, the shared phase included:

    scratch      six layers from the start: the control
    linear       layer l of L is (1 - l/L) a + (l/L) b, trained so, four layers; then six, each its own
    stagewise    two layers, each used twice in turn; then three times, each its own

"Transformer as Linear Expansion of Learngene" (TLEG; Xia et al. 2024: l/L from 0, gains too, here with the
layers at both ends in place of an offset and a slope, so that both have the table's scale) and "Exploring
Learngene via Stage-wise Weight Sharing" (SWS; Xia et al. 2024). Both are published for vision, with a
teacher, which is left out here; no figure is published for language, and what they count is the expanded
model's training, not that of the genes. As in `stacking.py`, the expansion warms up again, the shared phase's
rate does not decay, and all decay over the last 40 % of their FLOPs.

    python train.py study configs/learngene.py --seeds 3 --jobs 2    about ten minutes on two CPU cores
    python train.py configs/learngene.py:linear                      one arm by hand, a minute

The shape in the shared phase is that of the model run, so that FLOPs and sampling are right; the genes are
the first rows along `layers`, and the rest has no gradient. `asleep` keeps weight decay off it.
"""
from dataclasses import replace
from functools import partial

import jax.numpy as jnp

from data import DataConfig, Source, stdlib
from lib.freezing import asleep
from lib.schedule import Schedule
from model import Context, Edited, Model, ModelConfig, flops_per_token, groups, table
from train import Config, Phase

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
    """A `reparam`: layers as a linear function of depth, in a model of so many; another is left alone."""
    return mixed(params, depth_rows(layers)) if len(params["q"]) == layers else params


def stagewise(params, step, batch, stages: tuple[int, ...] = (0, 0, 1, 1)):
    """A `reparam`: layer i is gene stages[i], in a model of so many layers; another is left alone."""
    return mixed(params, stage_rows(stages)) if len(params["q"]) == len(stages) else params


def expand(model: Model, context: Context, layers: int = 0, stages: tuple[int, ...] = ()) -> Edited:
    """Genes to a model of any depth: linear to so many `layers`, or by a list of `stages`.

    Every optimiser group starts afresh, as what is trained is another thing. A run whose `reparam` is
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

DECAY = 0.4  # share of the FLOPs at the end over which the rate falls
deep = ModelConfig(layers=6, embed=96, heads=3, kv_heads=3, head_dim=32, mlp=256, vocab=1024)
shallow = replace(deep, layers=4)
plain = Phase(steps=300, batch=8, seq=128)
SHARED = 120  # steps of the shared phase
DEEP = round(plain.steps - SHARED * flops_per_token(shallow, plain.seq) / flops_per_token(deep, plain.seq))

scratch = Config(
    model=deep,
    data=DataConfig(sources={"stdlib": Source(stdlib)}, dev=0.03, test=0.03, shard_tokens=1_048_576),
    phases=(plain,),
    schedule=Schedule(shape="wsd", peak=8e-3, warmup=20, decay=DECAY, final=0.05),
    overlap=16,
    eval_every=60,
    eval_tokens=16_384,
    keep=1,
    prompts=("def ",),
    sample_tokens=64,
)


def arm(reparam, **arguments) -> Config:
    """A run that trains genes, then expands them."""
    return replace(scratch, model=shallow, reparam=reparam, optimizer=asleep, phases=(
        replace(plain, steps=SHARED, schedule=replace(scratch.schedule, shape="constant")),
        replace(plain, steps=DEEP, edits=(partial(expand, **arguments),),
                schedule=replace(scratch.schedule, decay=DECAY * plain.steps / DEEP))))


arms = {
    "scratch": scratch,
    "linear": arm(partial(linear, layers=4), layers=6),
    "stagewise": arm(partial(stagewise, stages=(0, 0, 1, 1)), stages=(0, 0, 0, 1, 1, 1)),
}
config = arms["linear"]
control = "scratch"
rates = 2e-3, 4e-3, 8e-3
quick = {"phases.*.steps": 4, "phases.*.seq": 64, "overlap": 8, "model.embed": 32, "model.mlp": 32,
         "model.vocab": 258, "model.unroll": 1, "data.tokenizer": "bytes", "data.dev": 0.01,
         "data.test": 0.01, "eval_every": 2, "eval_tokens": 2_000, "sample_tokens": 4}
claims = (
    dict(says="a linear learngene beats full depth from the start, its own cost counted", arm="linear",
         below=0.0),
    dict(says="stages that share their layer beat full depth from the start, their own cost counted",
         arm="stagewise", below=0.0),
)

"""bert2BERT: does a narrow model that is made wide learn faster than a wide one from scratch?

Paper: bert2BERT: Towards Reusable Pretrained Language Models, Chen et al. 2021 (000:17)
Method: copy units and divide what reads them, so that the function stays (FPI), or take the new
    units from the layer above (AKI). Two stages: at first sub-models of the lowest layers train.
    The paper saves 30 % of FLOPs by FPI, 38 % by AKI, 45 % by two stages, and does not count the
    narrow model's. Du et al. 2024 count these and find -1 % for copies, -18 % for the corner.
Here: 64 wide, then 128 wide, with one budget of model FLOPs, the narrow phase included.
    preserving: FPI. advanced: AKI. corner: old weights in a corner, and nothing reads what is new.
    uneven: what reads a copy is split unevenly, so that copies part under AdamW. two_stage: as
    advanced, then sub-models for an eighth of the wide steps. Each of these is charged as a whole
    step, though it costs less; bert2BERT charges what it computes.
Cost: 36 runs of 200 steps and fewer, half of them to tune the rates, about five minutes on two CPU
    cores that do nothing else, an estimate.
Run:
    python train.py study configs/growth/bert2bert.py --jobs 2
    python train.py study configs/growth/bert2bert.py --arms preserving,advanced
    python train.py configs/growth/bert2bert.py:preserving          one arm by hand, half a minute
"""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from configs import base
from lib.freezing import asleep
from lib.study import Claim, Paper, Study
from lib.widen import widen
from model import ModelConfig, table
from train import Config


def sub_models(params, step, batch, config: ModelConfig, embed: int = 0, begin: int = 0,
               until: int = 0, top: int = 1) -> dict:
    """A `reparam`: at batches begin+1 .. until the lowest layers alone; the upper `top` train.

    bert2BERT's first stage. A depth of `top`, 2 `top`, ... or all layers is drawn from the step,
    the same for every seed. Layers above it pass on what they get, and the `top` below it train.
    So do the final norm and the head, which a tied embedding is; an untied embedding does not.
    A model that is not `embed` wide is left alone. Under AdamW let `asleep` be the optimiser, so
    that what has no gradient stays. An evaluation in these steps is one of a sub-model: set
    `eval_every` so that there is none.
    """
    if config.embed != embed:
        return params
    layers, rows = config.layers, table(config)
    key = jax.random.fold_in(jax.random.key(0), step)
    depth = top * jax.random.randint(key, (), 1, layers // top + 1)
    now = (step >= begin) & (step < until)

    def part(name, x):
        if not rows[name].layered:
            still = name == "embed" and "head" in params
            return jnp.where(now, lax.stop_gradient(x), x) if still else x
        layer = jnp.arange(layers).reshape(-1, *[1] * (x.ndim - 1))
        x = jnp.where(now & (layer < depth - top), lax.stop_gradient(x), x)
        if name in ("o", "down"):
            x = jnp.where(now & (layer >= depth), 0, x)
        return x

    return {name: part(name, x) for name, x in params.items()}


NARROW = 100  # steps of the narrow model, where the wide one from scratch has 200
scratch = replace(base.scaled(base.small, 200), eval_every=50)
wide, narrow = scratch.model, base.shape(embed=64)


def arm(**how) -> Config:
    """A run that trains the narrow model, then widens it."""
    edit = partial(widen, embed=wide.embed, kv_heads=wide.kv_heads, mlp=wide.mlp, **how)
    return base.grown(scratch, narrow, NARROW, edit)


advanced = arm(new="next", units="random")
first_stage = partial(sub_models, embed=wide.embed, begin=NARROW,
                      until=NARROW + advanced.phases[1].steps // 8)
study = Study(
    question="Does a narrow model that is made wide learn faster than a wide one from scratch?",
    paper=Paper(title="bert2BERT: Towards Reusable Pretrained Language Models",
                authors="Chen et al.", year=2021, seeds=("000:17",)),
    arms={
        "scratch": scratch,
        "preserving": arm(),
        "advanced": advanced,
        "corner": arm(new="zero"),
        "uneven": arm(split="uneven"),
        "two_stage": replace(advanced, optimizer=asleep, reparam=first_stage),
    },
    peak_lrs=base.RATES,
    quick=base.quick(keep=("model.embed", "model.mlp")),
    claims=(
        Claim(says="copies beat the wide model at equal FLOPs", arm="preserving", below=0.0),
        Claim(says="but by less than a tenth of the FLOPs, the narrow phase counted",
              arm="preserving", measure="speed_up_flops", below=0.1),
        Claim(says="advanced knowledge beats the wide model", arm="advanced", below=0.0),
        Claim(says="advanced knowledge beats copies", arm="advanced", control="preserving",
              below=0.0),
        Claim(says="the corner is behind the wide model", arm="corner", above=0.0),
        Claim(says="the corner is behind copies", arm="corner", control="preserving", above=0.0),
        Claim(says="copies that part beat copies that stay equal", arm="uneven",
              control="preserving", below=0.0),
        Claim(says="two stages beat one", arm="two_stage", control="advanced", below=0.0),
    ),
    seeds=3,
)

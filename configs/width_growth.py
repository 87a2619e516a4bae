"""Width growth: does a narrow model that is made wide learn faster than a wide one from scratch?

Arms, all with one final shape, one corpus and one budget of model FLOPs, the narrow phase included:

    scratch      the wide model from the start: the control
    preserving   every unit copied, fan-in divided: the function stays (Net2Net; bert2BERT's FPI)
    advanced     new units from the next layer (bert2BERT's AKI): not the function, but no symmetry
    corner       old weights in a corner, nothing written by what is new: the function stays
    uneven       as `preserving`, but the fan-in is split unevenly, so that copies part under AdamW
    two_stage    as `advanced`, then for an eighth of the wide steps sub-models alone: of the lowest layers,
                 a depth drawn for each step, only the top layer and what comes after it train

bert2BERT (Chen et al. 2021) reports 30 % of FLOPs saved by FPI, 38 % by AKI and 45 % with two stages at
12 x 512 to 12 x 768, the source's cost not counted; Du et al. 2024 count it and find -1 % for copies and
-18 % for the corner. As in `stacking.py`, growth resets the optimiser and warms up again, the narrow phase's
rate does not decay, and all decay over the last 40 % of their FLOPs.

    python train.py study configs/width_growth.py --seeds 3 --jobs 2     a quarter of an hour on two CPU cores
    python train.py study configs/width_growth.py --seeds 3 --arms preserving,uneven,advanced,two_stage
    python train.py configs/width_growth.py:preserving                   one arm by hand, a minute

The file holds the edit for any config, `widen`, and a `reparam` for the first of two stages, `sub_models`.
Its steps are charged as whole ones, though a sub-model is cheaper, as the shape of a phase is one; bert2BERT
counts only what it computes, which flatters two stages, and this the other way round.
"""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from data import DataConfig, Source, stdlib
from lib.freezing import BLOCK, asleep
from lib.schedule import Schedule
from lib.widen import widen
from model import ModelConfig, flops_per_token
from train import Config, Phase


def sub_models(params, step, batch, embed: int = 0, begin: int = 0, until: int = 0, top: int = 1):
    """A `reparam`: at batches begin+1 .. until the lowest layers alone, of which the upper `top` train.

    bert2BERT's first stage. A depth of `top`, 2 `top`, ... or all layers is drawn from the step, the same for
    every seed; layers above it pass on what they get, those `top` below it train, and so do the final norm
    and the head, which a tied embedding is; an untied embedding does not. A model not `embed` wide is left
    alone. Under AdamW let `asleep` be the optimiser, so that what has no gradient stays. An evaluation in
    these steps is one of a sub-model: set `eval_every` so that there is none.
    """
    if params["embed"].shape[1] != embed:
        return params
    layers, now = len(params["q"]), (step >= begin) & (step < until)
    depth = top * jax.random.randint(jax.random.fold_in(jax.random.key(0), step), (), 1, layers // top + 1)

    def part(name, x):
        if not BLOCK[name]:
            still = name == "embed" and "head" in params
            return jnp.where(now, lax.stop_gradient(x), x) if still else x
        layer = jnp.arange(layers).reshape(-1, *[1] * (x.ndim - 1))
        x = jnp.where(now & (layer < depth - top), lax.stop_gradient(x), x)
        return jnp.where(now & (layer >= depth), 0, x) if name in ("o", "down") else x

    return {name: part(name, x) for name, x in params.items()}
DECAY = 0.4  # share of the FLOPs at the end over which the rate falls
wide = ModelConfig(layers=4, embed=128, heads=4, kv_heads=4, head_dim=32, mlp=344, vocab=1024)
narrow = replace(wide, embed=64, heads=2, kv_heads=2, mlp=172)
plain = Phase(steps=300, batch=8, seq=128)
NARROW = 150  # steps of the narrow phase
LATER = round(plain.steps - NARROW * flops_per_token(narrow, plain.seq) / flops_per_token(wide, plain.seq))


def arm(**arguments) -> Config:
    """A run that trains the narrow model, then widens it."""
    edit = partial(widen, embed=wide.embed, kv_heads=wide.kv_heads, mlp=wide.mlp, **arguments)
    rates = scratch.schedule
    return replace(scratch, model=narrow, phases=(
        replace(plain, steps=NARROW, schedule=replace(rates, shape="constant")),
        replace(plain, steps=LATER, edits=(edit,),
                schedule=replace(rates, decay=DECAY * plain.steps / LATER))))
scratch = Config(
    model=wide,
    data=DataConfig(sources={"stdlib": Source(stdlib)}, dev=0.03, test=0.03, shard_tokens=1_048_576),
    phases=(plain,),
    schedule=Schedule(shape="wsd", peak=8e-3, warmup=20, decay=DECAY, final=0.05),
    overlap=16,
    eval_every=75,
    eval_tokens=16_384,
    keep=1,
    prompts=("def ",),
    sample_tokens=64,
)
advanced = arm(new="next", units="random")
arms = {
    "scratch": scratch,
    "preserving": arm(),
    "advanced": advanced,
    "corner": arm(new="zero"),
    "uneven": arm(split="uneven"),
    "two_stage": replace(advanced, optimizer=asleep, reparam=partial(
        sub_models, embed=wide.embed, begin=NARROW, until=NARROW + LATER // 8)),
}
config = arms["preserving"]
default_arms = "scratch", "preserving", "advanced", "corner"
control = "scratch"
rates = 2e-3, 4e-3, 8e-3
quick = {"phases.*.steps": 4, "phases.*.seq": 64, "overlap": 8, "model.vocab": 258, "model.unroll": 1,
         "data.tokenizer": "bytes", "data.dev": 0.01, "data.test": 0.01, "eval_every": 2,
         "eval_tokens": 2_000, "sample_tokens": 4}
claims = (
    dict(says="copies beat the wide model from scratch at equal FLOPs", arm="preserving", below=0.0),
    dict(says="... but by less than a tenth of the FLOPs, the narrow phase counted", arm="preserving",
         measure="speed_up_flops", below=0.1),
    dict(says="advanced knowledge beats the wide model from scratch", arm="advanced", below=0.0),
    dict(says="advanced knowledge beats copies", arm="advanced", control="preserving", below=0.0),
    dict(says="the corner is behind the wide model from scratch", arm="corner", above=0.0),
    dict(says="the corner is behind copies", arm="corner", control="preserving", above=0.0),
    dict(says="copies that part beat copies that stay equal", arm="uneven", control="preserving", below=0.0),
    dict(says="two stages beat one", arm="two_stage", control="advanced", below=0.0),
)

"""LiGO: do maps that are learned from a small model to a large one beat plain copies?

Paper: Learning to Grow Pretrained Models for Efficient Transformer Training, Wang et al. 2023;
    Stacking Your Transformers, Du et al. 2024, where it is G_learn (001:65, 003:27)
Method: a large model's parameters are a linear function of a small one's. Layer l of a matrix is
    sum_j D[l, j] B_out W_j B_in', with a depth map D for each kind of parameter, and width maps B
    that what writes and what reads a unit share. For some 100 steps only these train, then they are
    multiplied out. Wang et al. save half of the FLOPs, Du et al. find plain stacking better.
Here: 2 layers 48 wide, then 4 layers 96 wide, with one budget of model FLOPs, small model and maps
    included. D begins as stacking, B as copies that keep the function, of whole heads. direct:
    that start, at once. The maps train for 60 steps, at a tenth of the rate; at all of it they made
    the model worse.
Cost: 9 runs of some 30 seconds, five minutes on two CPU cores.
Run:
    python train.py study configs/growth/ligo.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import jax.numpy as jnp

from configs import base
from lib.optim import adamw
from lib.study import Claim, Paper, Study
from model import Context, Edited, Model, ModelConfig, Param, plain_table, table

SHAPE = "layers", "embed", "heads", "kv_heads", "mlp"  # fields that may grow
SHARED = {"o": "v", "down": "up"}  # a parameter reads the units that another one writes
SUMMED = "width/embed", "width/v", "width/up"  # maps of units that are summed over


def maps_of(name: str, axes: tuple[str, ...]) -> list[str]:
    """The map of each axis of a parameter; empty for an axis that does not grow."""
    units = f"width/{SHARED.get(name, name)}"
    maps = dict(layers=f"depth/{name}", embed="width/embed", kv_heads=units, mlp=units)
    return [maps.get(axis, "") for axis in axes]


def copies(key, shape: tuple[int, int], dtype, unit: bool = False):
    """A map [new, old] that copies old units in turn, with columns of length 1 if `unit`."""
    made = jnp.arange(shape[0])[:, None] % shape[1] == jnp.arange(shape[1])
    return made / jnp.sqrt(jnp.sum(made, 0) if unit else 1)


def rows(config: ModelConfig, plain: dict, small: dict) -> dict:
    """A model's `rows`: those of a small one with these fields ("small/q"), and maps to its own."""
    old, found = plain_table(replace(config, **small)), {}
    for name, p in plain.items():
        axes = tuple(f"small/{axis}" for axis in p.axes)
        found[f"small/{name}"] = replace(old[name], axes=axes, group="small")
        for used, *shape in zip(maps_of(name, p.axes), p.shape, old[name].shape, strict=True):
            if used:
                init = partial(copies, unit=used in SUMMED)
                found[used] = Param(("out", "in"), tuple(shape), init, "maps")
    return found


def grown(params, step, batch, config: ModelConfig) -> dict:
    """A `reparam`: the parameters that maps make of a small model; others are left alone."""
    if "width/embed" not in params:
        return params
    made = {}
    for name, p in plain_table(config).items():
        x = params[f"small/{name}"]
        for i, used in enumerate(maps_of(name, p.axes)):
            if used:
                x = jnp.tensordot(params[used], x, (1, i), precision="highest")
                x = jnp.moveaxis(x, 0, i)
        made[name] = x
    return made


def open_maps(model: Model, context: Context, large: dict) -> Edited:
    """Put maps, to a shape with these fields SHAPE, before the model's parameters."""
    small = {name: getattr(model.config, name) for name in SHAPE}
    config = replace(model.config, rows=partial(rows, small=small), **large)
    params = {f"small/{name}": x for name, x in model.params.items()}
    params |= {name: p.init(None, p.shape, config.param_dtype)
               for name, p in table(config).items() if p.group == "maps"}
    return Edited(Model(config, params), {}, preserves=False)


def multiply_out(model: Model, context: Context) -> Edited:
    """Take the parameters that the maps make for the model's own; the function stays."""
    params = grown(model.params, context.step, {}, model.config)
    return Edited(Model(replace(model.config, rows=None), params), {}, preserves=True)


BEFORE, MAPS = 100, 60  # steps of the small model, and of the maps
scratch = replace(base.small, model=base.shape(4, 96), eval_every=60)
(plain,), rates, small = scratch.phases, scratch.schedule, base.shape(2, 48)
before = replace(plain, steps=BEFORE, schedule=replace(rates, shape="constant"))
opened = partial(open_maps, large={name: getattr(scratch.model, name) for name in SHAPE})
later = plain.steps - base.steps_for(base.flops(small, before), scratch.model, plain)


def arm(steps: int, *phases, edits: tuple):
    """A run of the small model, phases between, and so many steps of the large one."""
    after = replace(plain, steps=steps, edits=edits,
                    schedule=replace(rates, decay=rates.decay * plain.steps / steps))
    return replace(scratch, model=small, phases=(before, *phases, after), reparam=grown,
                   optimizer=partial(adamw, frozen=("small",)))


study = Study(
    question="Do maps that are learned from a small model to a large one beat plain copies?",
    paper=(Paper(title="Learning to Grow Pretrained Models for Efficient Transformer Training",
                 authors="Wang et al.", year=2023),
           Paper(title="Stacking Your Transformers: A Closer Look at Model Growth for Efficient "
                 "LLM Pre-Training", authors="Du et al.", year=2024, seeds=("001:65", "003:27"))),
    arms={"scratch": scratch, "direct": arm(later, edits=(opened, multiply_out)),
          "ligo": arm(later - MAPS, replace(before, steps=MAPS, edits=(opened,), lr={"maps": 0.1}),
                      edits=(multiply_out,))},
    claims=(
        Claim(says="learned maps beat plain copies", arm="ligo", control="direct", below=0.0),
        Claim(says="they beat the large model from scratch", arm="ligo", below=0.0),
        Claim(says="plain copies beat it", arm="direct", below=0.0),
    ),
    quick=base.quick(), seeds=3,
)

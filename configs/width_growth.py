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

The file holds the edit for any config, `widen`, and a `weights` for the first of two stages, `sub_models`.
Its steps are charged as whole ones, though a sub-model is cheaper, as the shape of a phase is one; bert2BERT
counts only what it computes, which flatters two stages, and this the other way round.
"""
import zlib
from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from configs import incremental_layers as freezing
from data import DataConfig, Source, stdlib
from model import Context, Edited, Model, ModelConfig, Param, draw, flops_per_token, groups, table
from train import Config, Phase, Schedule

# Widening is arithmetic on the table. A matrix's inputs stand before its outputs there, and one side is the
# residual stream, `embed`: so a matrix that begins with `embed` reads it, one that ends with it writes it.
#
# On an axis that grows from d to D units, new unit j is a copy of old unit m(j). Let the shares s(j) of an
# old unit's copies sum to 1, and let the stream carry a(j) x[m(j)], where the copies' a(j)² sum to D / d.
# Then the mean square in RMSNorm is as before, whatever m is, and these factors on the weights leave the
# function alone (for whole D / d and units in turn a(j) is 1, for others the gains take it back):
#
#     embed, written                      a(j)
#     embed, gain                         1 / a(j)
#     embed, gain before a tied head      s(j) / a(j)²
#     any other axis, written             1
#     any axis, read                      s(j)
#
# and with an even split the gradient of a weight is the old one times s(j) / its factor, on every row.


def fan_in(param: Param) -> tuple[str, ...]:
    """The axes that a parameter sums over; none for a gain."""
    axes = [a for a in param.axes if a != "layers"]
    return () if len(axes) == 1 else ("embed",) if axes[0] == "embed" else tuple(axes[:axes.index("embed")])


def along(factor, param: Param, axis: str):
    """A factor [n] or [layers, n] along an axis of a parameter, so that it broadcasts."""
    layers = factor.shape[0] if factor.ndim == 2 else 1
    return factor.reshape([layers if a == "layers" else factor.shape[-1] if a == axis else 1
                           for a in param.axes])


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The axes that may grow in width, and their sizes."""
    return dict(embed=config.embed, kv_heads=config.kv_heads, q_per_kv=config.heads // config.kv_heads,
                mlp=config.mlp)


def widen(model: Model, context: Context, embed: int = 0, kv_heads: int = 0, q_per_kv: int = 0, mlp: int = 0,
          new: Literal["copy", "next", "zero"] = "copy", units: Literal["tile", "random"] = "tile",
          split: Literal["even", "uneven"] = "even", moments: Literal["reset", "map"] = "reset") -> Edited:
    """Grow in width to the sizes given; an axis at 0 stays, and so does `head_dim`, which RoPE has fixed.

    new: "copy" copies units and divides their fan-in (Net2Net, Chen et al. 2015; bert2BERT 2021, FPI), which
    is exact for every map of units, as the stream's copies are scaled to keep its mean square; "next" takes
    what computes a new unit from the layer above (bert2BERT, AKI; the last layer copies itself), which is not
    exact; "zero" puts the old weights in a corner: what writes to the stream is zero where it is new, what
    reads from it is drawn (zeros on both sides would never learn), gains and the norm's epsilon take back the
    zeros in the mean square (G_zero of Du et al. 2024).
    units: new units copy the old ones in turn, or at random. split: a unit's copies have equal parts of its
    fan-in and stay equal for ever, or parts drawn for each parameter and layer, and separate.
    moments: "reset" starts every optimiser group afresh, "map" gives them the factors of the gradients.
    Raises ValueError for a size below the old one, and for moments that cannot be mapped.
    """
    old, before = model.config, axis_sizes(model.config)
    after = {a: n or before[a] for a, n in dict(
        embed=embed, kv_heads=kv_heads, q_per_kv=q_per_kv, mlp=mlp).items()}
    options = (("new", new, ("copy", "next", "zero")), ("units", units, ("tile", "random")),
               ("split", split, ("even", "uneven")), ("moments", moments, ("reset", "map")))
    for option, given, allowed in options:
        if given not in allowed:
            raise ValueError(f"widen: {option} is {given!r}, allowed are {', '.join(map(repr, allowed))}")
    if small := [f"{a} is {n}, but the model has {before[a]}" for a, n in after.items() if n < before[a]]:
        raise ValueError(f"widen: {'; '.join(small)}; allowed is as many and more")
    if moments == "map" and (new == "next" or split == "uneven"):
        raise ValueError('widen: moments is "map", but only with new "copy" or "zero" and an even split are '
                         "the new gradients multiples of the old ones")
    corner, ratio = new == "zero", after["embed"] / before["embed"]
    config = replace(old, embed=after["embed"], kv_heads=after["kv_heads"], mlp=after["mlp"],
                     heads=after["kv_heads"] * after["q_per_kv"],
                     norm_eps=old.norm_eps / ratio if corner else old.norm_eps)
    rows, dtype = table(config), next(iter(model.params.values())).dtype
    keys = dict(zip(after, jax.random.split(context.key, len(after)), strict=True))
    source = {a: unit_map(before[a], n, units, keys[a]) for a, n in after.items() if n > before[a]}
    count = {a: jnp.zeros(before[a], dtype).at[m].add(1)[m] for a, m in source.items()}

    def share(name: str, axis: str):
        """s, [n] or, where it is drawn, [layers, n] or [1, n]."""
        if split == "even":
            return 1 / count[axis]
        key = jax.random.fold_in(keys[axis], zlib.crc32(name.encode()))
        layers = old.layers if rows[name].axes[0] == "layers" else 1
        part = jax.random.uniform(key, (layers, after[axis]), dtype, 0.5, 1.5)
        total = jnp.zeros((layers, before[axis]), dtype).at[:, source[axis]].add(part)
        return part / total[:, source[axis]]

    def factor(name: str, axis: str):
        """What the copies of a parameter are multiplied by along an axis."""
        p = rows[name]
        if axis != "embed" or axis in fan_in(p):
            return share(name, axis) if axis in fan_in(p) else jnp.ones(after[axis], dtype)
        scale = jnp.sqrt(ratio / count[axis])
        if p.group != "vector":
            return scale
        return share(name, axis) / scale**2 if old.tied and p.axes == ("embed",) else 1 / scale

    def copies(x, name: str, kind: str):
        """Copies of a parameter ("value"), or of what is shaped like it, in the units of its gradient."""
        p = rows[name]
        for axis in (a for a in p.axes if a in source):
            f = along(factor(name, axis), p, axis)
            f = f if kind == "value" else along(1 / count[axis], p, axis) / f
            x = jnp.take(x, source[axis], axis=p.axes.index(axis)) * (f**2 if kind == "square" else f)
        return x

    def in_corner(x, name: str, kind: str):
        """A parameter, or what is shaped like it, in the corner of one of the new shape."""
        p, gain = rows[name], ratio**-0.5
        f = 1.0 if p.group != "vector" else {"value": gain, "gradient": 1 / gain, "square": gain**-2}[kind]
        if p.group == "vector":
            rest = jnp.full(p.shape, f if kind == "value" else 0.0, x.dtype)
        else:
            reads = kind == "value" and p.axes[-1] != "embed"
            rest = draw(name, p, context.key, x.dtype) if reads else jnp.zeros(p.shape, x.dtype)
        return rest.at[tuple(slice(n) for n in x.shape)].set(x * f)

    change = in_corner if corner else copies

    @jax.jit  # all in one program, since to compile operation by operation takes seconds
    def grown(params: dict) -> dict:
        params = {name: change(x, name, "value") for name, x in params.items()}
        return {n: from_above(x, rows[n], before) for n, x in params.items()} if new == "next" else params

    @partial(jax.jit, static_argnames="moment")
    def carried(tree: dict, moment: str) -> dict:
        return {n: change(x, n, "square" if moment == "nu" else "gradient") for n, x in tree.items()}

    policy = dict.fromkeys(groups(old), carried if moments == "map" else "reset")
    return Edited(Model(config, grown(model.params)), policy, preserves=new != "next")


def unit_map(old: int, new: int, how: str, key: jax.Array):
    """[new] The old unit that each new one is a copy of; the old ones come first, as they were."""
    tiled = jnp.array(np.arange(new) % old, jnp.int32)
    drawn = jax.random.randint(key, (max(new - old, 0),), 0, old, jnp.int32)
    return tiled if how == "tile" else tiled.at[old:].set(drawn)


def from_above(x, param: Param, before: dict[str, int]):
    """A widened parameter of blocks, but what computes its new units comes from the layer above."""
    out = [a for a in param.axes if a in before and a not in fan_in(param)]
    if param.axes[0] != "layers" or param.group == "vector":
        return x
    fresh = jnp.zeros((), bool)
    for axis in out:
        size = x.shape[param.axes.index(axis)]
        fresh = fresh | along(jnp.arange(size) >= before[axis], param, axis)
    return jnp.where(fresh, jnp.concatenate([x[1:], x[-1:]]), x)


def sub_models(params, step, batch, embed: int = 0, begin: int = 0, until: int = 0, top: int = 1):
    """A `weights`: at batches begin+1 .. until the lowest layers alone, of which the upper `top` train.

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
        if not freezing.BLOCK[name]:
            still = name == "embed" and "head" in params
            return jnp.where(now, lax.stop_gradient(x), x) if still else x
        layer = jnp.arange(layers).reshape(-1, *[1] * (x.ndim - 1))
        x = jnp.where(now & (layer < depth - top), lax.stop_gradient(x), x)
        return jnp.where(now & (layer >= depth), 0, x) if name in ("o", "down") else x

    return {name: part(name, x) for name, x in params.items()}


# ------------------------------------------------------------------------------------------------------ study

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
    "two_stage": replace(advanced, optimizer=freezing.asleep, weights=partial(
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

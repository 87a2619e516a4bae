"""Minitron: is a wide model that is cut, then trained on, better than a small one from scratch?

Paper: Compact Language Models via Pruning and Knowledge Distillation, Muralidharan et al. 2024
    (002:26)
Method: score layers, heads, MLP units and the stream's units on a few batches, cut the least, train
    on. The paper finds width a better thing to cut than depth, and activations a better score than
    weights.
Here: half of the heads, MLP units and stream of a wide model go, by one of three scores, at equal
    steps. magnitude: the smallest weights. activations: what does least on eight batches of
    training data. first: the units that stand last go, whatever they do: the control. scratch: the
    small shape from the start, at as many FLOPs as the wide and the cut model take together.
    Left out: distillation from the wide model's logits, and a search over shapes.
Cost: four arms, some 24 runs of half a minute, a quarter of an hour on two CPU cores.
Run:
    python train.py study configs/growth/minitron.py --jobs 2
    python train.py configs/growth/minitron.py:activations          one arm by hand, a minute
"""
from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from configs import base
from lib.kernels import Mask, attention
from lib.study import Claim, Paper, Study
from lib.widen import fan_in
from model import (
    Context,
    Edited,
    Model,
    ModelConfig,
    block,
    blocks,
    dense,
    groups,
    rms_norm,
    rope,
    table,
)

MLP = "embed", "mlp"  # axes of a layer's gate and up
SCORES = "magnitude", "activations", "first"


def squares(x, param, axis: str, layered: bool):
    """Sum of squares of a parameter along an axis: [n], or [layers, n] for a block's own units."""
    keep = [param.axes.index(axis)]
    if layered:
        keep.append(0)
    return jnp.sum(jnp.square(x), axis=tuple(i for i in range(x.ndim) if i not in keep))


def magnitude(params, config: ModelConfig) -> dict:
    """{axis: score}: squares of what writes a unit times those of what reads it.

    So a unit that nothing reads, or that nothing writes, has the score 0. Heads and MLP units are
    scored in each layer, [layers, n]; the stream's units [embed] and layers [layers] once, these by
    what they write. Besides, as `energy` [embed], the share of the stream's square in each unit.
    """
    rows = table(config)
    matrices = {n: p for n, p in rows.items() if len(fan_in(p))}
    out = {"layers": sum(squares(params[n], p, "layers", False) for n, p in matrices.items()
                         if p.axes[0] == "layers" and p.axes[-1] == "embed")}
    for axis in ("kv_heads", "mlp", "embed"):
        having = {n: p for n, p in matrices.items() if axis in p.axes}
        layered = axis != "embed"
        wrote, read = (sum(squares(params[n], p, axis, layered) for n, p in having.items()
                           if (axis in fan_in(p)) == reads) for reads in (False, True))
        if config.tied and axis == "embed":
            read = read + squares(params["embed"], rows["embed"], "embed", False)
        out[axis] = wrote * read
    return out | {"energy": wrote}


def mean_square(x, *keep: int):
    """Mean of squares over the axes that are not kept."""
    return jnp.mean(jnp.square(x), axis=tuple(i for i in range(x.ndim) if i not in keep))


def activity(params, batches: list[dict], config: ModelConfig) -> dict:
    """{axis: score} as `magnitude` has it, with mean squares of activations for what writes a unit.

    A layer's score is the share that it adds to the stream: mean square of (output - input) over
    input. Padding counts as all else does.
    """
    mask, rows = Mask("causal", 0), table(config)

    @jax.jit
    def one(batch):
        angles = rope(batch["positions"], config)

        def layer(x, w):
            def attend_fn(q, k, v):
                y = attention(q, k, v, mask, batch["segments"], None, config.attention)
                return y, mean_square(y, 2)

            y, heads = block(x, w, angles, attend_fn, config)
            silent = w | {"down": jnp.zeros_like(w["down"])}
            middle, _ = block(x, silent, angles, attend_fn, config)
            n = rms_norm(middle, w["mlp_norm"], config.norm_eps)
            units = jax.nn.silu(dense(n, w["gate"], MLP)) * dense(n, w["up"], MLP)
            added = jnp.sum(mean_square(y - x)) / jnp.sum(mean_square(x))
            return y, dict(kv_heads=heads, mlp=mean_square(units, 2), embed=mean_square(y, 2),
                           layers=added)

        x = params["embed"][batch["tokens"]].astype(config.dtype)
        _, found = jax.lax.scan(layer, x, blocks(params, config))
        stream = jnp.sum(found["embed"], 0) + mean_square(x, 2)
        return found | {"embed": stream, "energy": stream}

    seen = jax.tree.map(lambda *xs: sum(xs) / len(xs), *[one(batch) for batch in batches])
    for axis, name in dict(kv_heads="o", mlp="down").items():
        seen[axis] = seen[axis] * squares(params[name], rows[name], axis, True)
    return seen


def scores(model: Model, context: Context, by: str, batches: int) -> dict:
    """{axis: score} of a model's units by one of SCORES, as `magnitude` has it."""
    config = model.config
    if by == "activations":
        return activity(model.params, context.batches(batches), config)
    score = jax.jit(magnitude, static_argnums=1)(model.params, config)
    if by == "first":
        for axis, n in dict(layers=config.layers, embed=config.embed).items():
            score[axis] = -jnp.arange(n)
        for axis, n in dict(kv_heads=config.kv_heads, mlp=config.mlp).items():
            score[axis] = jnp.broadcast_to(-jnp.arange(n), (config.layers, n))
    return score


def take(x, axes: tuple[str, ...], index: dict):
    """A parameter's kept units; index: {axis: places [n], or [layers, n] where layers differ}."""
    for axis in reversed([a for a in axes if a in index]):  # layers last: others are by old layer
        at, i = axes.index(axis), index[axis]
        if i.ndim == 2:
            shape = [1] * x.ndim
            shape[0], shape[at] = i.shape
            x = jnp.take_along_axis(x, i.reshape(shape), axis=at)
        else:
            x = jnp.take(x, i, axis=at)
    return x


def prune(model: Model, context: Context, layers: int = 0, kv_heads: int = 0, mlp: int = 0,
          embed: int = 0, by: Literal["magnitude", "activations", "first"] = "magnitude",
          batches: int = 8, moments: Literal["reset", "map"] = "reset") -> Edited:
    """Cut axes down to the sizes given, keeping units of the highest score in order; 0: uncut.

    A key-value head goes with its query heads. When the stream is cut, gains take up the change of
    its mean square, as far as the scores tell, and the norm's epsilon that of a stream that loses
    zeros: cutting what `widen(new="zero")` or identity layers added gives the old model back.
    Copies are not merged. moments: "reset", or "map" to cut the optimiser's along. Raises
    ValueError for a size above the old one.
    """
    old, rows = model.config, table(model.config)
    before = dict(layers=old.layers, kv_heads=old.kv_heads, mlp=old.mlp, embed=old.embed)
    asked = dict(layers=layers, kv_heads=kv_heads, mlp=mlp, embed=embed)
    after = {axis: n or before[axis] for axis, n in asked.items()}
    large = [f"{axis} is {n}, but the model has {before[axis]}" for axis, n in after.items()
             if n > before[axis]]
    if large:
        raise ValueError(f"prune: {'; '.join(large)}; allowed is as many and fewer")
    for option, given, allowed in ("by", by, SCORES), ("moments", moments, ("reset", "map")):
        if given not in allowed:
            raise ValueError(f"prune: {option} is {given!r}, allowed are "
                             f"{', '.join(map(repr, allowed))}")
    score = scores(model, context, by, batches)
    index = {axis: jnp.sort(jnp.argsort(-score[axis], stable=True)[..., :n])
             for axis, n in after.items() if n < before[axis]}
    config = replace(old, **after, heads=after["kv_heads"] * (old.heads // old.kv_heads),
                     norm_eps=old.norm_eps / (after["embed"] / before["embed"]))

    @jax.jit
    def cut(tree):
        return {name: take(x, rows[name].axes, index) for name, x in tree.items()}

    params, energy = cut(model.params), score["energy"]
    if "embed" in index:
        gain = jnp.sqrt(jnp.mean(energy[index["embed"]]) / jnp.mean(energy))
        params |= {name: (x * gain).astype(x.dtype) for name, x in params.items()
                   if rows[name].group == "vector"}
    policy = (lambda tree, _: cut(tree)) if moments == "map" else "reset"
    return Edited(Model(config, params), dict.fromkeys(groups(old), policy), preserves=False)


wide, small = base.shape(4, 192), base.shape(4, 96)
(plain,) = base.small.phases
first, second = replace(plain, steps=200), replace(plain, steps=150)


def arm(by: str):
    """A run that trains the wide model, then cuts half of its heads, MLP units and stream."""
    edit = partial(prune, kv_heads=small.kv_heads, mlp=small.mlp, embed=small.embed, by=by)
    return replace(base.small, model=wide, phases=(first, replace(second, edits=(edit,))))


spent = base.flops(wide, first) + base.flops(small, second)
scratch = base.scaled(replace(base.small, model=small), base.steps_for(spent, small, plain))
study = Study(
    question="Is a wide model that is cut, then trained on, better than a small one from scratch?",
    paper=Paper(title="Compact Language Models via Pruning and Knowledge Distillation",
                authors="Muralidharan et al.", year=2024, seeds=("002:26",)),
    arms={by: arm(by) for by in SCORES} | {"scratch": scratch},
    control="first",
    peak_lrs=base.RATES,
    quick=base.quick(keep=("model.embed", "model.mlp")),
    claims=(
        Claim(says="activations choose better than chance", arm="activations", below=0.0),
        Claim(says="so do weights", arm="magnitude", below=0.0),
        Claim(says="activations choose better than weights", arm="activations",
              control="magnitude", below=0.0),
        Claim(says="what is cut beats the small shape from scratch at equal FLOPs",
              arm="activations", control="scratch", below=0.0),
    ),
    seeds=3,
)

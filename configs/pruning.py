"""Pruning along named axes, the inverse of growth: a wide model, cut, then trained on.

Arms, with one final shape and the same steps of each model:

    magnitude    the units with the smallest weights go
    activations  the units that do least on eight batches of training data go (as in Minitron)
    first        the units that stand last go, whatever they do: the control

Minitron (Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation") finds
width a better thing to cut than depth, and activations a better score than weights. An arm by hand, some
minutes on two CPU cores:

    python train.py configs/pruning.py:activations --seed 1 --name activations-1

The file holds the edit for any config: `prune`.
"""
from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from data import DataConfig, Source, stdlib
from lib.kernels import Mask, attention
from lib.schedule import Schedule
from lib.widen import fan_in
from model import Context, Edited, Model, ModelConfig, block, blocks, dense, groups, rms_norm, rope, table
from train import Config, Phase

MLP = "embed", "mlp"  # axes of a layer's gate and up


def squares(x, param, axis: str, layered: bool):
    """Sum of squares of a parameter along an axis: [n], or [layers, n] for a block's own units."""
    keep = [param.axes.index(axis)] + ([0] if layered else [])
    return jnp.sum(jnp.square(x), axis=tuple(i for i in range(x.ndim) if i not in keep))


def magnitude(params, config: ModelConfig) -> dict:
    """{axis: score}: squares of what writes a unit times those of what reads it; of layers, what they write.

    So a unit that nothing reads, or that nothing writes, has the score 0. Heads and MLP units are scored in
    each layer, [layers, n]; the stream's units [embed] and layers [layers] once. Besides, as `energy`
    [embed], what share of the stream's square a unit is taken to have.
    """
    rows, out = table(config), {}
    matrices = {n: p for n, p in rows.items() if len(fan_in(p))}
    out["layers"] = sum(squares(params[n], p, "layers", False) for n, p in matrices.items()
                        if p.axes[0] == "layers" and p.axes[-1] == "embed")
    for axis in ("kv_heads", "mlp", "embed"):
        having = {n: p for n, p in matrices.items() if axis in p.axes}
        wrote, read = (sum(squares(params[n], p, axis, axis != "embed") for n, p in having.items()
                           if (axis in fan_in(p)) == reads) for reads in (False, True))
        tied = config.tied and axis == "embed"
        out[axis] = wrote * (read + squares(params["embed"], rows["embed"], "embed", False) if tied else read)
    return out | {"energy": wrote}


def activity(params, batches: list[dict], config: ModelConfig) -> dict:
    """{axis: score} as `magnitude` has it, but with mean squares of activations for what writes a unit.

    A layer's score is the share that it adds to the stream: mean square of (output - input) over input.
    Padding counts as all else does.
    """
    mask, rows = Mask("causal", 0), table(config)

    def mean(x, *keep):  # square
        return jnp.mean(jnp.square(x), axis=tuple(i for i in range(x.ndim) if i not in keep))

    @jax.jit
    def one(batch):
        angles = rope(batch["positions"], config)

        def layer(x, w):
            def attend_fn(q, k, v):
                y = attention(q, k, v, mask, batch["segments"], None, config.attention)
                return y, mean(y, 2)

            y, heads = block(x, w, angles, attend_fn, config)
            middle, _ = block(x, w | {"down": jnp.zeros_like(w["down"])}, angles, attend_fn, config)
            n = rms_norm(middle, w["mlp_norm"], config.norm_eps)
            units = jax.nn.silu(dense(n, w["gate"], MLP)) * dense(n, w["up"], MLP)
            return y, dict(kv_heads=heads, mlp=mean(units, 2), embed=mean(y, 2),
                           layers=jnp.sum(mean(y - x)) / jnp.sum(mean(x)))

        x = params["embed"][batch["tokens"]].astype(config.dtype)
        _, found = jax.lax.scan(layer, x, blocks(params, config))
        stream = jnp.sum(found["embed"], 0) + mean(x, 2)
        return found | {"embed": stream, "energy": stream}

    seen = jax.tree.map(lambda *xs: sum(xs) / len(xs), *[one(batch) for batch in batches])
    for axis, name in dict(kv_heads="o", mlp="down").items():
        seen[axis] = seen[axis] * squares(params[name], rows[name], axis, True)
    return seen


def prune(model: Model, context: Context, layers: int = 0, kv_heads: int = 0, mlp: int = 0, embed: int = 0,
          by: Literal["magnitude", "activations", "first"] = "magnitude", batches: int = 8,
          moments: Literal["reset", "map"] = "reset") -> Edited:
    """Cut axes down to the sizes given, keeping the units of the highest score in order; 0 leaves an axis.

    A key-value head goes with its query heads. When the stream is cut, gains take up the change of its mean
    square, as far as the scores tell, and the norm's epsilon that of a stream that loses zeros: cutting what
    `widen(new="zero")` or identity layers added gives the old model back. Copies are not merged.
    by: `magnitude`, "activations" on so many training batches, or the "first" units. moments: "reset", or
    "map" to cut the optimiser's along. Raises ValueError for a size above the old one.
    """
    old, rows = model.config, table(model.config)
    before = dict(layers=old.layers, kv_heads=old.kv_heads, mlp=old.mlp, embed=old.embed)
    after = {a: n or before[a] for a, n in dict(
        layers=layers, kv_heads=kv_heads, mlp=mlp, embed=embed).items()}
    if large := [f"{a} is {n}, but the model has {before[a]}" for a, n in after.items() if n > before[a]]:
        raise ValueError(f"prune: {'; '.join(large)}; allowed is as many and fewer")
    for option, given, allowed in (("by", by, ("magnitude", "activations", "first")),
                                   ("moments", moments, ("reset", "map"))):
        if given not in allowed:
            raise ValueError(f"prune: {option} is {given!r}, allowed are {', '.join(map(repr, allowed))}")
    if by == "activations":
        score = activity(model.params, context.batches(batches), old)
    else:
        score = jax.jit(magnitude, static_argnums=1)(model.params, old)
    if by == "first":
        score |= {a: -jnp.arange(n) for a, n in before.items()}
        score |= {a: jnp.broadcast_to(score[a], (old.layers, before[a])) for a in ("kv_heads", "mlp")}
    index = {a: jnp.sort(jnp.argsort(-score[a], stable=True)[..., :n]) for a, n in after.items()
             if n < before[a]}
    ratio = after["embed"] / before["embed"]
    config = replace(old, layers=after["layers"], kv_heads=after["kv_heads"], mlp=after["mlp"],
                     heads=after["kv_heads"] * (old.heads // old.kv_heads), embed=after["embed"],
                     norm_eps=old.norm_eps / ratio)

    def take(x, p):
        for axis in (a for a in reversed(p.axes) if a in index):  # layers last: the others' indices have them
            at, i = p.axes.index(axis), index[axis]
            if i.ndim == 2:
                shape = [n if j in (0, at) else 1 for j, n in enumerate((old.layers, *x.shape[1:]))]
                shape[at] = i.shape[1]
                x = jnp.take_along_axis(x, i.reshape(shape), axis=at)
            else:
                x = jnp.take(x, i, axis=at)
        return x

    @jax.jit
    def cut(tree):
        return {n: take(x, rows[n]) for n, x in tree.items()}

    params, energy = cut(model.params), score["energy"]
    if "embed" in index:
        gain = jnp.sqrt(jnp.mean(energy[index["embed"]]) / jnp.mean(energy))
        params |= {n: (x * gain).astype(x.dtype) for n, x in params.items() if rows[n].group == "vector"}
    policy = dict.fromkeys(groups(old), (lambda tree, _: cut(tree)) if moments == "map" else "reset")
    return Edited(Model(config, params), policy, preserves=False)


# ------------------------------------------------------------------------------------------------------ study

wide = ModelConfig(layers=4, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, vocab=2048)


def arm(by: str) -> Config:
    """A run that trains the wide model, then cuts half of its heads, MLP units and stream."""
    edit = partial(prune, kv_heads=3, mlp=256, embed=96, by=by)
    return Config(
        model=wide,
        data=DataConfig(sources={"stdlib": Source(stdlib)}, shard_tokens=1_048_576),
        phases=(Phase(steps=400, batch=8, seq=256), Phase(steps=300, batch=8, seq=256, edits=(edit,))),
        schedule=Schedule(shape="wsd", peak=4e-3, warmup=20, decay=0.4, final=0.05),
        eval_every=100,
        prompts=("def ", "class "),
    )


arms = {by: arm(by) for by in ("magnitude", "activations", "first")}
config = arms["activations"]

"""Pruning: cut the layers, heads, MLP units and stream units that do the least (Minitron)."""
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp

from lib.edits import check_options
from lib.kernels import dense
from lib.widen import fan_in
from model import (
    CAUSAL,
    Context,
    Edited,
    Model,
    ModelConfig,
    Param,
    Params,
    blocks,
    embedded,
    groups,
    plain_attend,
    rms_norm,
    stream,
    table,
)

Scores = dict[str, jax.Array]  # by axis, see `magnitude`
MLP = "embed", "mlp"  # the axes of a layer's gate and up
HEADS = "kv_heads", "q_per_kv", "head_dim", "embed"  # and of its output projection
OWN = "kv_heads", "mlp"  # axes whose units are scored in each layer apart


def sum_of_squares(x, param: Param, axis: str, by_layer: bool) -> jax.Array:
    """Of a parameter along an axis: [n], or [layers, n]."""
    kept = {param.axes.index(axis)}
    if by_layer:
        kept.add(0)
    others = tuple(i for i in range(x.ndim) if i not in kept)
    return jnp.sum(jnp.square(x), axis=others)


def magnitude(params: Params, config: ModelConfig) -> Scores:
    """{axis: score}: squares of what writes a unit times those of what reads it.

    So a unit that nothing reads, or that nothing writes, has the score 0. Heads and MLP units are
    scored in each layer, [layers, n]; the stream's units [embed] and layers [layers] once, these by
    what they write. Besides, as `energy` [embed], the squares of what writes the stream.
    """
    rows = table(config)
    matrices = {name: param for name, param in rows.items() if fan_in(param)}
    scores = {}

    def total(names, axis):
        by_layer = axis in OWN
        squares = [sum_of_squares(params[name], rows[name], axis, by_layer) for name in names]
        return sum(squares)

    writers = []
    for name, param in matrices.items():
        if param.layered and param.axes[-1] == "embed":
            writers.append(name)
    scores["layers"] = total(writers, "layers")
    for axis in (*OWN, "embed"):
        readers, writers = [], []
        for name, param in matrices.items():
            if axis in fan_in(param):
                readers.append(name)
            elif axis in param.axes:
                writers.append(name)
        if config.tied and axis == "embed":
            readers.append("embed")
        wrote = total(writers, axis)
        scores[axis] = wrote * total(readers, axis)
    return scores | {"energy": wrote}


def mean_square(x, *kept: int) -> jax.Array:
    """Mean of squares over the axes that are not kept."""
    others = tuple(i for i in range(x.ndim) if i not in kept)
    return jnp.mean(jnp.square(x), axis=others)


def each_layer(params: Params, batch: dict, config: ModelConfig, summary: Callable) -> dict:
    """{name: [layers ...]} what `summary` says of each layer on a batch; causal.

    It is called with the stream before the layer and after it [b t d], the means of v that `o`
    reads [b t k g h], and the units that `down` reads [b t f], and gives {name: array}.
    """
    plain = plain_attend(batch, CAUSAL, config)

    def attend(q, k, v):
        mixed, _ = plain(q, k, v)
        return mixed, mixed

    def visit(x, layer, w):
        return x, x

    def of_layer(before, mixed, after, w):
        x = before + dense(mixed, w["o"], HEADS)
        n = rms_norm(x, w["mlp_norm"], config.norm_eps)
        gate = dense(n, w["gate"], MLP)
        up = dense(n, w["up"], MLP)
        units = jax.nn.silu(gate) * up
        return summary(before, after, mixed, units)

    first = embedded(params, batch, config)
    _, (mixed, after) = stream(params, first, batch, CAUSAL, config, attend=attend, visit=visit)
    before = jnp.concatenate([first[None], after[:-1]])
    layers = before, mixed, after, blocks(params, config)
    return jax.lax.map(lambda layer: of_layer(*layer), layers)


def activity(params: Params, batch: dict, config: ModelConfig) -> Scores:
    """{axis: mean square of a unit on a batch}, as `magnitude` has them.

    A layer's is the share that it adds to the stream: mean square of output less input, over that
    of the input. Padding counts as all else does.
    """

    def summary(before, after, mixed, units):
        added = mean_square(after - before)
        return dict(
            kv_heads=mean_square(mixed, 2),
            mlp=mean_square(units, 2),
            embed=mean_square(after, 2),
            layers=added / mean_square(before),
        )

    found = each_layer(params, batch, config, summary)
    first = embedded(params, batch, config)
    units = jnp.sum(found["embed"], 0)
    units = units + mean_square(first, 2)
    return found | {"embed": units, "energy": units}


def activities(params: Params, batches: list[dict], config: ModelConfig) -> Scores:
    """{axis: score} as `magnitude` has it, with activations for what writes a unit."""
    of_batch = jax.jit(activity, static_argnums=2)
    found = [of_batch(params, batch, config) for batch in batches]
    scores = jax.tree.map(lambda *each: sum(each) / len(each), *found)
    rows = table(config)
    for axis, name in dict(kv_heads="o", mlp="down").items():
        reads = sum_of_squares(params[name], rows[name], axis, True)
        scores[axis] = scores[axis] * reads
    return scores


def first_units(config: ModelConfig) -> Scores:
    """{axis: score} by which the units that stand last go, whatever they do: a control."""
    scores = {}
    for axis in ("layers", "embed", *OWN):
        n = getattr(config, axis)
        order = -jnp.arange(n)
        if axis in OWN:
            order = jnp.broadcast_to(order, (config.layers, n))
        scores[axis] = order
    return scores


def importance(model: Model, context: Context, by: str, batches: int) -> Scores:
    """{axis: score} of a model's units, as `prune` names them, and the stream's `energy`."""
    config = model.config
    if by == "activations":
        return activities(model.params, context.batches(batches), config)
    scores = jax.jit(magnitude, static_argnums=1)(model.params, config)
    if by == "first":
        return scores | first_units(config)
    return scores


def take(x, axes: tuple[str, ...], index: dict[str, jax.Array]) -> jax.Array:
    """A parameter's kept units. index: {axis: places [n], or [layers, n] where layers differ}."""
    cut = [axis for axis in axes if axis in index]
    for axis in reversed(cut):  # layers last: the other places are by old layer
        at, places = axes.index(axis), index[axis]
        if places.ndim == 1:
            x = jnp.take(x, places, axis=at)
            continue
        shape = [1] * x.ndim
        shape[0], shape[at] = places.shape
        x = jnp.take_along_axis(x, places.reshape(shape), axis=at)
    return x


def cut_by(index: dict[str, jax.Array], rows: dict[str, Param]) -> Callable[[Params], Params]:
    """A compiled function: parameters, or moments like them -> what is kept of them."""

    @jax.jit
    def cut(tree):
        return {name: take(x, rows[name].axes, index) for name, x in tree.items()}

    return cut


def kept_units(scores: Scores, old: ModelConfig, new: ModelConfig) -> dict[str, jax.Array]:
    """{axis: places of the best units, ascending} of the axes that shrink."""
    index = {}
    for axis in ("layers", "kv_heads", "mlp", "embed"):
        size = getattr(new, axis)
        if size < getattr(old, axis):
            order = jnp.argsort(-scores[axis], stable=True)
            index[axis] = jnp.sort(order[..., :size])
    return index


def smaller(config: ModelConfig, asked: dict[str, int]) -> ModelConfig:
    """The shape with axes of the sizes asked; 0 leaves one as it is.

    The norm's epsilon follows the stream's width. Raises ValueError for a size above the old one.
    """
    before = {axis: getattr(config, axis) for axis in asked}
    after = {axis: size or before[axis] for axis, size in asked.items()}
    large = []
    for axis, size in after.items():
        if size > before[axis]:
            large.append(f"{axis} is {size}, but the model has {before[axis]}")
    if large:
        raise ValueError(f"prune: {'; '.join(large)}; allowed is as many and fewer")
    heads = after["kv_heads"] * (config.heads // config.kv_heads)
    norm_eps = config.norm_eps / (after["embed"] / before["embed"])
    return replace(config, **after, heads=heads, norm_eps=norm_eps)


def with_gains(params: Params, rows: dict[str, Param], factor) -> Params:
    """Parameters with the gains along the stream, which begin as 1, multiplied by a factor."""
    out = dict(params)
    for name, row in rows.items():
        if row.init is None and "embed" in row.axes:
            x = out[name]
            out[name] = (x * factor).astype(x.dtype)
    return out


def prune(
    model: Model,
    context: Context,
    layers: int = 0,
    kv_heads: int = 0,
    mlp: int = 0,
    embed: int = 0,
    by: Literal["magnitude", "activations", "first"] = "magnitude",
    batches: int = 8,
    moments: Literal["reset", "map"] = "reset",
) -> Edited:
    """Cut axes down to the sizes given (0: uncut), keeping units of the highest score in order.

    A key-value head goes with its query heads. When the stream is cut, gains take up the change of
    its mean square, as far as the scores tell. So cutting what `widen(new="zero")` or identity
    layers added gives the old model back. Copies are not merged. moments: "map" cuts the
    optimiser's along. Raises ValueError for a size above the old one, and for an unknown option.
    Source: Muralidharan et al. 2024 (002:26).
    """
    old, rows = model.config, table(model.config)
    asked = dict(layers=layers, kv_heads=kv_heads, mlp=mlp, embed=embed)
    config = smaller(old, asked)
    check_options(prune, by=by, moments=moments)
    scores = importance(model, context, by, batches)
    index = kept_units(scores, old, config)
    cut = cut_by(index, rows)
    params = cut(model.params)
    if "embed" in index:
        energy = scores["energy"]
        left = energy[index["embed"]]
        gain = jnp.sqrt(jnp.mean(left) / jnp.mean(energy))
        params = with_gains(params, rows, gain)

    def mapped(tree, moment):
        return cut(tree)

    policy = mapped if moments == "map" else "reset"
    return Edited(Model(config, params), dict.fromkeys(groups(old), policy), preserves=False)

"""Growth in width.

Widening is arithmetic on the table. On an axis that grows from d to D units each new unit is a
copy of an old one. Three numbers belong to a copy:

    c    how many copies its old unit has
    s    its share of what is read from them; the shares of an old unit's copies sum to 1
    a    along `embed`, the residual stream: it carries a times the old unit, where a² = D / (d c).
         The copies' a² sum to D / d, so that the mean square in RMSNorm is as before

The function stays the same if weights are multiplied, along each axis that grows, by

    s           where they sum over the axis: they read it
    1           where they give the axis, if that is not `embed`: they write it
    a           where they write `embed`
    1 / a       in a gain along `embed`
    s / a²      in the gain before a tied head, which is the embedding and so has its factor a

With an even split s is 1 / c. Then the gradient of a weight is the old one times s / its factor.
"""
import zlib
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lib.edits import check_options
from lib.sharding import FREE
from model import (
    Context,
    Edited,
    Model,
    ModelConfig,
    Param,
    Params,
    axis_sizes,
    draw,
    groups,
    plain_table,
    table,
)


def widen(
    model: Model,
    context: Context,
    embed: int = 0,
    kv_heads: int = 0,
    q_per_kv: int = 0,
    mlp: int = 0,
    new: Literal["copy", "next", "zero"] = "copy",
    units: Literal["tile", "random"] = "tile",
    split: Literal["even", "uneven"] = "even",
    moments: Literal["reset", "map"] = "reset",
) -> Edited:
    """Grow in width to the sizes given; an axis at 0 stays, and so does `head_dim`, fixed by RoPE.

    new: "copy" copies units and divides their fan-in (Net2Net, Chen et al. 2015; bert2BERT 2021,
    FPI). "next" gives new units what computes those of the layer above (bert2BERT, AKI); that
    alone changes the function. "zero" puts the old weights in a corner: see `in_corner`.
    units: copies are of the old units in turn, or at random. split: copies have equal shares and
    stay equal for ever, or shares drawn for each parameter and layer, and separate.
    moments: "reset" starts every optimiser group afresh, "map" scales moments as gradients are.
    Raises ValueError for a size below the old one, and for moments that cannot be mapped.
    """
    check_options(widen, new=new, units=units, split=split, moments=moments)
    if moments == "map" and (new == "next" or split == "uneven"):
        raise ValueError(
            'widen: moments is "map", but only with new "copy" or "zero" and an even split are '
            "the new gradients multiples of the old ones"
        )
    sizes = dict(embed=embed, kv_heads=kv_heads, q_per_kv=q_per_kv, mlp=mlp)
    growth = plan_growth(model, context.key, sizes, new, units, split)
    # Each in one program: to compile operation by operation takes seconds.
    params = jax.jit(partial(grown, growth))(model.params)
    policy = "reset"
    if moments == "map":
        policy = jax.jit(partial(mapped, growth), static_argnames="moment")
    return Edited(
        Model(growth.config, params),
        policy=dict.fromkeys(groups(model.config), policy),
        preserves=new != "next" and has_plain_vectors(model.config),
    )


def has_plain_vectors(config: ModelConfig) -> bool:
    """Whether the vectors along `embed` are the gains of the plain Llama alone.

    The factors above are for those. Norms that stand behind a block's parts, LayerNorm and biases
    of the stream need others, so a model with them is changed a little.
    """
    known = plain_table(config)
    for name, row in table(config).items():
        if row.group in ("vector", "bias") and "embed" in row.axes and name not in known:
            return False
    return True


class Axis(NamedTuple):
    """An axis that grows from d to D units."""

    old: int  # d
    new: int  # D
    source: jax.Array  # int32 [D], the old unit that each is a copy of
    copies: jax.Array  # [D], c
    key: jax.Array  # for the shares


class Growth(NamedTuple):
    """A growth in width, worked out."""

    new: str  # see `widen`
    split: str
    config: ModelConfig  # of the wide model
    rows: dict[str, Param]  # its table
    axes: dict[str, Axis]  # those that grow
    ratio: float  # D / d of `embed`
    key: jax.Array  # for weights drawn as at initialisation


def plan_growth(model: Model, key, sizes: dict[str, int], new, units, split) -> Growth:
    """Check the sizes of axes, and draw the units that new ones copy.

    Raises ValueError for a size below the old one.
    """
    old = axis_sizes(model.config)
    after = {axis: size or old[axis] for axis, size in sizes.items()}
    check_sizes(old, after)
    dtype = next(iter(model.params.values())).dtype
    axes = {}
    keys = jax.random.split(key, len(after))
    for own_key, (axis, size) in zip(keys, after.items(), strict=True):
        if size > old[axis]:
            source = unit_map(old[axis], size, units, own_key)
            count = jnp.zeros(old[axis], dtype).at[source].add(1)
            axes[axis] = Axis(old[axis], size, source, count[source], own_key)
    ratio = after["embed"] / old["embed"]
    config = replace(
        model.config,
        embed=after["embed"],
        kv_heads=after["kv_heads"],
        heads=after["kv_heads"] * after["q_per_kv"],
        mlp=after["mlp"],
    )
    if new == "zero":
        config = replace(config, norm_eps=config.norm_eps / ratio)
    return Growth(new, split, config, table(config), axes, ratio, key)


def check_sizes(old: dict[str, int], after: dict[str, int]) -> None:
    """Raise ValueError for axes that would shrink."""
    small = []
    for axis, size in after.items():
        if size < old[axis]:
            small.append(f"{axis} is {size}, but the model has {old[axis]}")
    if small:
        raise ValueError(f"widen: {'; '.join(small)}; allowed is as many and more")


def unit_map(old: int, new: int, how: str, key: jax.Array) -> jax.Array:
    """[new] The old unit that each new one is a copy of; the old ones come first, as they were.

    how: the others copy old ones in turn ("tile"), or such as are drawn ("random").
    """
    tiled = jnp.array(np.arange(new) % old, jnp.int32)
    if how == "tile":
        return tiled
    drawn = jax.random.randint(key, (new - old,), 0, old, jnp.int32)
    return tiled.at[old:].set(drawn)


def grown(growth: Growth, params: Params) -> Params:
    """The wide model's parameters."""
    change = in_corner if growth.new == "zero" else copied
    wide = {name: change(growth, name, x, "value") for name, x in params.items()}
    if growth.new != "next":
        return wide
    return {name: from_above(growth, name, x) for name, x in wide.items()}


def mapped(growth: Growth, tree: Params, moment: str) -> Params:
    """Moments of the optimiser, scaled as the gradients are, Adam's `nu` as their squares."""
    change = in_corner if growth.new == "zero" else copied
    kind = "square" if moment == "nu" else "gradient"
    return {name: change(growth, name, x, kind) for name, x in tree.items()}


Kind = Literal["value", "gradient", "square"]  # a parameter, its gradient, that squared


def copied(growth: Growth, name: str, x, kind: Kind):
    """A parameter, or what is scaled as its gradient is, with its units copied."""
    param = growth.rows[name]
    for axis in param.axes:
        if axis not in growth.axes:
            continue
        grows = growth.axes[axis]
        factor = along(value_factor(growth, name, axis), param, axis)
        if kind != "value":
            factor = along(1 / grows.copies, param, axis) / factor
        if kind == "square":
            factor = factor**2
        x = jnp.take(x, grows.source, axis=param.axes.index(axis)) * factor
    return x


def value_factor(growth: Growth, name: str, axis: str):
    """What the copies of a parameter are multiplied by along an axis: the table of this file.

    [D] or, where it differs by layer, [layers D].
    """
    param, grows = growth.rows[name], growth.axes[axis]
    if axis in fan_in(param):
        return shares(growth, name, axis)
    if axis != "embed":
        return jnp.ones(grows.new, grows.copies.dtype)
    carried = jnp.sqrt(growth.ratio / grows.copies)  # a
    if param.group != "vector":
        return carried
    if growth.config.tied and param.axes == ("embed",):
        return shares(growth, name, axis) / carried**2
    return 1 / carried


def fan_in(param: Param) -> tuple[str, ...]:
    """The axes that a parameter sums over; none for a gain.

    A matrix's inputs stand before its outputs, and one side is the residual stream, `embed`, or a
    free axis such as `rank`. What has no such side sums over nothing.
    """
    axes = [axis for axis in param.axes if axis != "layers"]
    sides = [i for i, axis in enumerate(axes) if axis == "embed" or axis in FREE]
    if len(axes) == 1 or not sides:
        return ()
    return tuple(axes[: max(1, sides[0])])


def shares(growth: Growth, name: str, axis: str):
    """The copies' shares s of what reads them: [D] or, where they are drawn, [layers or 1, D]."""
    grows = growth.axes[axis]
    if growth.split == "even":
        return 1 / grows.copies
    param = growth.rows[name]
    layers = param.shape[0] if param.layered else 1
    key = jax.random.fold_in(grows.key, zlib.crc32(name.encode()))
    dtype = grows.copies.dtype
    drawn = jax.random.uniform(key, (layers, grows.new), dtype, 0.5, 1.5)
    total = jnp.zeros((layers, grows.old), dtype)
    total = total.at[:, grows.source].add(drawn)
    return drawn / total[:, grows.source]


def along(factor, param: Param, axis: str):
    """A factor [D] or [layers D] along an axis of a parameter, shaped so that it broadcasts."""
    sizes = {axis: factor.shape[-1]}
    if factor.ndim == 2:
        sizes["layers"] = factor.shape[0]
    return factor.reshape([sizes.get(name, 1) for name in param.axes])


def in_corner(growth: Growth, name: str, x, kind: Kind):
    """A parameter, or what is scaled as its gradient is, in the corner of a wide one.

    What writes to the stream is zero where it is new. What reads the stream is drawn, since zeros
    on both sides would never learn. Gains, and the norm's epsilon, take back the zeros in the mean
    square. Moments of what is new are zero.
    """
    param = growth.rows[name]
    if not growth.axes.keys() & set(param.axes):
        return x
    factor = 1.0
    rest = jnp.zeros(param.shape, x.dtype)
    if param.group == "vector":
        gain = growth.ratio**-0.5
        factor = {"value": gain, "gradient": 1 / gain, "square": gain**-2}[kind]
        if kind == "value":
            rest = jnp.full(param.shape, gain, x.dtype)
    elif kind == "value" and param.axes[-1] != "embed":
        rest = draw(name, param, growth.key, x.dtype)
    corner = tuple(slice(size) for size in x.shape)
    return rest.at[corner].set(x * factor)


def from_above(growth: Growth, name: str, x):
    """A wide parameter whose new units get what the layer above has; the last layer keeps its own.

    Only matrices of blocks, and only along what they write, are concerned.
    """
    param = growth.rows[name]
    if not param.layered or param.group == "vector":
        return x
    is_new = jnp.zeros((), bool)
    for axis, grows in growth.axes.items():
        if axis in param.axes and axis not in fan_in(param):
            unit = jnp.arange(grows.new)
            is_new = is_new | along(unit >= grows.old, param, axis)
    above = jnp.concatenate([x[1:], x[-1:]])
    return jnp.where(is_new, above, x)

"""Growth in width."""
import zlib
from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from model import Context, Edited, Model, ModelConfig, Param, draw, groups, table

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

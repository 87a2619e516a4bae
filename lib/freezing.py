"""Freezing: parameters that a run leaves as they are for a while."""
from fnmatch import fnmatch

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lib.edits import per_layer
from lib.optim import adamw
from model import ModelConfig, Param, Params, table


def freeze(
    params: Params,
    step,
    batch,
    config: ModelConfig,
    begin: int = 0,
    until: int = 0,
    layers: int = 0,
    names: str = "*",
) -> Params:
    """A reparametrisation: some parameters get no gradient at batches begin+1 .. until.

    So they do not count in the clipped norm. Moments and weight decay move them: see `asleep`.

    names: a pattern (fnmatch) of parameter names; the other parameters train.
    layers: freeze the first so many layers of blocks, and nothing outside blocks; 0 freezes every
    parameter that fits `names`.

    To freeze whole optimiser groups, a learning rate of 0 in a phase is enough.
    """
    now = (step >= begin) & (step < until)
    used = dict(params)
    rows = table(config)
    for name, x in params.items():
        if not fnmatch(name, names):
            continue
        frozen = lax.stop_gradient(x)
        if not layers:
            used[name] = jnp.where(now, frozen, x)
        elif rows[name].layered:
            lowest = per_layer(jnp.arange(len(x)) < layers, x)
            used[name] = jnp.where(now & lowest, frozen, x)
    return used


def asleep(
    table: dict[str, Param],
    weight_decay: float = 0.1,
    frozen: tuple[str, ...] = (),
) -> dict[str, optax.GradientTransformation]:
    """An optimiser: AdamW, under which what has no gradient at all stays as it is, bit for bit.

    Plain AdamW moves a parameter whose gradient is zero: by weight decay and by old moments. Here
    neither moves a layer of a block that has no gradient, nor another parameter that has none.
    Their moments stay too. The count belongs to the group and goes on. frozen: groups left out.
    """
    transforms = adamw(table, weight_decay=weight_decay, frozen=frozen)
    return {group: only_awake(transforms[group], table) for group in transforms}


def only_awake(
    transform: optax.GradientTransformation,
    table: dict[str, Param],
) -> optax.GradientTransformation:
    """`transform` for parameters, and layers of blocks, that have a gradient; others stay."""
    transform = optax.with_extra_args_support(transform)

    def has_gradient(name, gradient):
        first = 1 if table[name].layered else 0
        inner = tuple(range(first, gradient.ndim))
        return jnp.any(gradient != 0, axis=inner, keepdims=True)

    def update(gradients, state, params, **extra):
        awake = {name: has_gradient(name, x) for name, x in gradients.items()}

        def mirrors(x) -> bool:
            return isinstance(x, dict) and x.keys() == awake.keys()

        def select(new, old):
            if not mirrors(new):
                return new
            return {name: jnp.where(awake[name], new[name], old[name]) for name in new}

        directions, moved = transform.update(gradients, state, params, **extra)
        still = jax.tree.map(jnp.zeros_like, directions)
        moved = jax.tree.map(select, moved, state, is_leaf=mirrors)
        return select(directions, still), moved

    return optax.GradientTransformationExtraArgs(transform.init, update)

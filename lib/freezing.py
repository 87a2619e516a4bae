"""Freezing: parameters that a run leaves as they are for a while."""
from fnmatch import fnmatch

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lib.optim import adamw
from model import ModelConfig, table

BLOCK = {name: p.axes[0] == "layers" for name, p in table(ModelConfig(tied=False)).items()}


def freeze(params, step, batch, begin: int = 0, until: int = 0, layers: int = 0,
           names: str = "*") -> dict:
    """A reparametrisation: some parameters get no gradient at batches begin+1 .. until.

    They do not count in the clipped norm either. Moments and weight decay still move them: see `asleep`.

    names: a pattern (fnmatch) of parameter names; the other parameters train.
    layers: of blocks, freeze the first so many layers and nothing outside blocks. 0 freezes every parameter
    that fits `names`.

    To freeze whole optimiser groups, a learning rate of 0 in a phase is enough.
    """
    now = (step >= begin) & (step < until)
    used = dict(params)
    for name, x in params.items():
        if not fnmatch(name, names):
            continue
        if layers and not BLOCK[name]:
            continue
        chosen = jnp.arange(len(x)) < layers if layers else jnp.ones(1, bool)
        chosen = chosen.reshape(-1, *[1] * (x.ndim - 1))
        used[name] = jnp.where(now & chosen, lax.stop_gradient(x), x)
    return used


def asleep(rows, weight_decay: float = 0.1) -> dict[str, optax.GradientTransformation]:
    """An optimiser: AdamW, under which what has no gradient at all stays as it is, bit for bit.

    Plain AdamW moves a parameter whose gradient is zero: by weight decay and by old moments. Here neither
    acts on a layer of a block that has no gradient, nor on another parameter that has none. The moments
    stay too. The count belongs to the group and goes on.
    """
    return {group: only_awake(transform, rows)
            for group, transform in adamw(rows, weight_decay=weight_decay).items()}


def only_awake(transform: optax.GradientTransformation, rows) -> optax.GradientTransformation:
    """`transform` for parameters, and layers of blocks, that have a gradient; the others stay."""
    def has_gradient(name, gradient):
        first = 1 if rows[name].axes[0] == "layers" else 0
        inner = tuple(range(first, gradient.ndim))
        return jnp.any(gradient != 0, axis=inner, keepdims=True)

    def update(gradients, state, params):
        directions, moved = transform.update(gradients, state, params)
        awake = {name: has_gradient(name, gradient) for name, gradient in gradients.items()}
        still = {name: jnp.zeros_like(direction) for name, direction in directions.items()}

        def mirrors(x):
            return isinstance(x, dict) and x.keys() == gradients.keys()

        def select(new, old):
            if not mirrors(new):
                return new
            return {name: jnp.where(awake[name], new[name], old[name]) for name in new}

        return select(directions, still), jax.tree.map(select, moved, state, is_leaf=mirrors)

    return optax.GradientTransformation(transform.init, update)

"""Optimisers: AdamW, and the state that a step changes."""
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lib.sharding import shardings
from model import ModelConfig, Param, groups, init, table


def adamw(table: dict[str, Param], b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8,
          weight_decay: float = 0.1) -> dict[str, optax.GradientTransformation]:
    """AdamW (Loshchilov & Hutter 2019) for each group of the table; matrices decay, embeddings and gains not.

    Returns unscaled descent directions; the step multiplies each group's by its rate.
    """
    decay = {"matrix": weight_decay, "head": weight_decay}
    return {g: optax.chain(optax.scale_by_adam(b1, b2, eps), optax.add_decayed_weights(decay.get(g, 0.0)))
            for g in dict.fromkeys(p.group for p in table.values())}


def init_opt_state(params, config: ModelConfig, optimizer: Callable) -> dict[str, Any]:
    """The state {group: optax state} that an optimiser `table -> {group: transformation}` begins with."""
    transforms = optimizer(table(config))
    return {g: transforms[g].init({n: params[n] for n in names}) for g, names in groups(config).items()}


class State(flax.struct.PyTreeNode):
    """What a step changes."""

    params: dict[str, jax.Array]
    opt: dict[str, Any]  # {optimiser group: optax state}
    step: jax.Array  # int32, batches consumed
    skipped: jax.Array  # int32, updates in a row left out for a non-finite loss or gradient


def state_like(config: ModelConfig, optimizer: Callable, mesh: Mesh) -> State:
    """Shapes, dtypes and places of a state: the optimiser's mirrors of parameters live where these do."""
    def place(x, where):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    where, whole = shardings(table(config), mesh), NamedSharding(mesh, PartitionSpec())
    params = {name: jax.ShapeDtypeStruct(p.shape, config.param_dtype, sharding=where[name])
              for name, p in table(config).items()}
    opt = jax.eval_shape(lambda p: init_opt_state(p, config, optimizer), params)
    opt = {group: map_like_params(opt[group], names, lambda x, _: {n: place(x[n], where[n]) for n in x},
                           lambda x: place(x, whole)) for group, names in groups(config).items()}
    return State(params, opt, *2 * (jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),))


def places(like: State) -> State:
    """The shardings of `state_like`."""
    return jax.tree.map(lambda x: x.sharding, like)


def first_state(config: ModelConfig, optimizer: Callable, mesh: Mesh, key: jax.Array) -> State:
    """The state before any step, born sharded."""
    def make():
        params = init(config, key)
        return State(params, init_opt_state(params, config, optimizer), jnp.int32(0), jnp.int32(0))

    return jax.jit(make, out_shardings=places(state_like(config, optimizer, mesh)))()


@partial(jax.jit, static_argnames="config")
def update_ratios(before, after, config: ModelConfig) -> dict[str, jax.Array]:
    """How far an update moved each optimiser group's parameters, as a share of their norm."""
    def norm(trees, names):
        return jnp.sqrt(sum(jnp.sum(jnp.square(trees[n])) for n in names))
    moved = {n: after[n] - before[n] for n in after}
    return {f"{group}/update_ratio": norm(moved, names) / norm(before, names)
            for group, names in groups(config).items()}


def map_like_params(tree, names, change: Callable, other: Callable = lambda x: x):
    """In an optimiser state, each dictionary x with keys `names` becomes change(x, its field's name), what is
    not in one other(x).
    """
    def mirror(x):
        return isinstance(x, dict) and set(x) == set(names)

    def one(path, x):
        fields = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        return change(x, fields[-1] if fields else "") if mirror(x) else other(x)

    return jax.tree.map_with_path(one, tree, is_leaf=mirror)

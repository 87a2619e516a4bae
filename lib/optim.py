"""Optimisers: AdamW, and the state that a step changes."""
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey

from lib.fields import Decay, NotNegative, Positive, Whole
from lib.matrices import sides
from lib.seams import OPTIMIZER, require_gave
from lib.sharding import FREE, shardings
from model import ModelConfig, Param, Params, dtype_of, groups, init, table


def adamw(
    table: dict[str, Param],
    b1: Decay = 0.9,
    b2: Decay = 0.95,
    eps: Positive = 1e-8,
    weight_decay: NotNegative = 0.1,
    frozen: tuple[str, ...] = (),
    embed_lr: Positive = 10.0,
    base_width: Whole = 64,
) -> dict[str, optax.GradientTransformation]:
    """AdamW (Loshchilov & Hutter 2019) for each optimiser group of the table.

    Matrices and the head decay, embeddings and gains do not. Returns descent directions; the step
    multiplies each group's by its learning rate. frozen: groups that it leaves out.

    One learning rate serves all widths by the factors of maximal update parametrisation (Yang et
    al. 2022, table 8), see `lr_factors`. configs/baselines/transfer.py asks whether it does.
    """
    decay = {"matrix": weight_decay, "head": weight_decay}
    factors = lr_factors(table, embed_lr, base_width)
    transforms = {}
    for param in table.values():
        group = param.group
        if group in frozen:
            continue
        transforms[group] = optax.chain(
            optax.scale_by_adam(b1, b2, eps),
            optax.add_decayed_weights(decay.get(group, 0.0)),
            scale_each(factors),
        )
    return transforms


def lr_factors(table: dict[str, Param], embed_lr: float, base_width: int) -> dict[str, float]:
    """{name: factor on its learning rate} of the rows of a table.

    What reads or writes the residual stream learns at base_width / its inputs; at 1 if base_width
    is 0. Embeddings that are no head learn at embed_lr, whatever the width. All else learns at 1:
    gains, a tied table, and rows with axes of a config's own. A row of another model in the table,
    whose axes have a prefix, learns as it would in that model.
    """
    untied = "head" in table
    factors = {}
    for name, row in table.items():
        row = replace(row, axes=tuple(axis.rpartition("/")[2] for axis in row.axes))
        factors[name] = 1.0
        if row.group == "embed" and untied:
            factors[name] = embed_lr
        elif base_width and on_stream(row):
            inputs = sides(row)[0] if row.layered else row.shape[0]
            factors[name] = base_width / inputs
    return factors


def on_stream(param: Param) -> bool:
    """Whether a parameter is a matrix or the head, with none but the model's own axes."""
    own = not set(param.axes) & set(FREE)
    return own and param.group in ("matrix", "head")


def scale_each(factors: dict[str, float]) -> optax.GradientTransformation:
    """Multiply the update of each parameter by its factor."""
    def scaled(updates, params):
        return {name: factors[name] * x for name, x in updates.items()}

    return optax.stateless(scaled)


class State(flax.struct.PyTreeNode):
    """What a step changes."""

    params: Params
    opt: dict[str, Any]  # {optimiser group: optax state}
    step: jax.Array  # int32, batches consumed
    skipped: jax.Array  # int32, updates in a row left out for a non-finite loss or gradient


def transforms_of(optimizer: Callable, config: ModelConfig) -> dict:
    """{group: optax transformation} of an optimiser; raises InputError for anything else."""
    rows = table(config)
    found = optimizer(rows)
    known = [row.group for row in rows.values()]
    names = list(dict.fromkeys(known))
    fine = isinstance(found, dict)
    if fine:
        every = found.values()
        fine = all(hasattr(each, "update") for each in every)
        fine = fine and found.keys() <= set(names)
    more = f"; the groups are {', '.join(names)}"
    require_gave(fine, OPTIMIZER, optimizer, found, more)
    return found


def init_opt_state(params: Params, config: ModelConfig, optimizer: Callable):
    """The state {group: optax state} that an optimiser begins with.

    optimizer: table -> {group: optax transformation}. A group that it leaves out is frozen, and has
    no state.
    """
    transforms = transforms_of(optimizer, config)
    opt = {}
    for group, names in groups(config).items():
        if group in transforms:
            members = {name: params[name] for name in names}
            opt[group] = transforms[group].init(members)
    return opt


def trained_groups(
    config: ModelConfig, optimizer: Callable, asleep: frozenset[str] = frozenset()
) -> dict[str, list[str]]:
    """{group: parameter names} of what an optimiser trains, but for groups that are `asleep`."""
    transforms = transforms_of(optimizer, config)
    members = groups(config)
    return {g: members[g] for g in members if g in transforms and g not in asleep}


def first_state(
    config: ModelConfig,
    optimizer: Callable,
    mesh: Mesh,
    key: jax.Array,
) -> State:
    """The state before any step, born sharded."""
    return drawing(config, optimizer, mesh)(key)


@lru_cache(maxsize=8)
def drawing(config: ModelConfig, optimizer: Callable, mesh: Mesh) -> Callable:
    """The program key -> first state, which runs of all seeds share."""

    def draw(key: jax.Array) -> State:
        params = init(config, key)
        opt = init_opt_state(params, config, optimizer)
        zero = jnp.int32(0)
        return State(params, opt, step=zero, skipped=zero)

    like = state_like(config, optimizer, mesh)
    return jax.jit(draw, out_shardings=places(like))


def state_like(config: ModelConfig, optimizer: Callable, mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of a state.

    What the optimiser holds for a parameter lives where that parameter does; the rest of its state
    is whole on each device.
    """
    rows = table(config)
    home = shardings(rows, mesh)
    whole = NamedSharding(mesh, PartitionSpec())

    def at_home(arrays, field=""):
        return {name: placed(x, home[name]) for name, x in arrays.items()}

    def everywhere(x):
        return placed(x, whole)

    params = {}
    for name, param in rows.items():
        dtype = dtype_of(param, config)
        params[name] = jax.ShapeDtypeStruct(param.shape, dtype)
    begin = partial(init_opt_state, config=config, optimizer=optimizer)
    opt = jax.eval_shape(begin, params)
    for group in opt:
        members = {name: rows[name] for name in groups(config)[group]}
        opt[group] = map_like_params(opt[group], members, at_home, everywhere)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return State(at_home(params), opt, step=count, skipped=count)


def placed(x, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """The shape and dtype of x, on a mesh."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def places(like: State) -> State:
    """The shardings of `state_like`."""
    return jax.tree.map(lambda x: x.sharding, like)


def map_like_params(tree, like: dict[str, Any], change: Callable, other: Callable = lambda x: x):
    """An optimiser state in which what is shaped like the parameters is changed.

    like: {name: anything with the shape of that parameter}. Each dictionary x of such names and
    shapes becomes change(x, field), where `field` is the name of the field that holds it: for Adam
    "mu" or "nu". Each leaf outside of these becomes other(leaf).
    """
    shapes = {name: tuple(param.shape) for name, param in like.items()}

    def mirrors(x) -> bool:
        if not isinstance(x, dict) or x.keys() != shapes.keys():
            return False
        return all(getattr(x[name], "shape", None) == shape for name, shape in shapes.items())

    def one(path, x):
        if not mirrors(x):
            return other(x)
        fields = [""]
        fields += [key.name for key in path if isinstance(key, GetAttrKey)]
        return change(x, fields[-1])

    return jax.tree.map_with_path(one, tree, is_leaf=mirrors)


@partial(jax.jit, static_argnames="config")
def update_ratios(before: Params, after: Params, config: ModelConfig) -> dict[str, jax.Array]:
    """How far an update moved each group's parameters, as a share of their norm."""

    def norm(arrays):
        squares = [jnp.sum(jnp.square(x)) for x in arrays]
        return jnp.sqrt(sum(squares))

    ratios = {}
    for group, names in groups(config).items():
        if not all(jnp.issubdtype(before[name].dtype, jnp.floating) for name in names):
            continue
        moved = norm(after[name] - before[name] for name in names)
        size = norm(before[name] for name in names)
        ratios[f"{group}/update_ratio"] = moved / size
    return ratios

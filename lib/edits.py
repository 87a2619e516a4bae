"""Edits: growth in depth, and new embeddings."""
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args, get_type_hints

import jax.numpy as jnp

from lib.fields import Count
from model import Context, Edited, Model, Param, Params, draw, groups, table


def check_options(edit: Callable, **given: str) -> None:
    """Raise ValueError for an option that is none of those that an edit's signature names."""
    types = get_type_hints(edit)
    for name, value in given.items():
        allowed = get_args(types[name])
        if value not in allowed:
            names = ", ".join(map(repr, allowed))
            raise ValueError(f"{edit.__name__}: {name} is {value!r}; allowed are {names}")


def stack(
    model: Model,
    context: Context,
    times: Count = 2,
    layers: tuple[int, ...] | None = None,
    moments: Literal["reset", "map"] = "reset",
    new: Literal["random", "loud", "identity"] = "random",
) -> Edited:
    """Grow in depth: the blocks, `times` over (G_stack, Du et al. 2024).

    layers: in place of that, old layers in any order; -1 is a new layer. new: it is drawn as at
    initialisation ("random"), where output projections are 0 by default; with these drawn as what
    reads the stream is ("loud"); or with zeros in their place, so that it changes nothing yet
    ("identity"). Copies keep the output scale of the shallow model.
    moments: "reset" starts every optimiser group afresh, as the paper does. "map" copies the
    blocks' moments along; those of new layers are 0.
    Raises ValueError for a layer that is not there, and for an unknown option.
    """
    old = model.config
    order = list(range(old.layers)) * times if layers is None else list(layers)
    check_layers(order, old.layers)
    check_options(stack, moments=moments, new=new)
    config = replace(old, layers=len(order))
    rows = table(config)

    def drawn(name, like):
        row = rows[name]
        if writes_stream(row) and new != "random":
            row = replace(row, init=0.0 if new == "identity" else config.embed**-0.5)
        return draw(name, row, context.key, like.dtype)

    def mapped(tree, moment):
        return in_order(tree, order, rows, lambda _, like: jnp.zeros_like(like))

    params = in_order(model.params, order, rows, drawn)
    policy = dict.fromkeys(groups(old), mapped if moments == "map" else "reset")
    silent = new == "identity" or -1 not in order
    preserves = silent and all_kept(order, old.layers)
    return Edited(Model(config, params), policy, preserves)


def writes_stream(param: Param) -> bool:
    """Whether a parameter of blocks is a matrix whose outputs are the residual stream."""
    inner = param.axes[1:]  # without `layers`
    return inner[-1:] == ("embed",) and inner[0] != "embed"


def check_layers(order: list[int], layers: int) -> None:
    """Raise ValueError for a list of layers that the model does not have, but for -1."""
    if order and -1 <= min(order) and max(order) < layers:
        return
    raise ValueError(
        f"stack: layers is {order}, but the model has layers 0 to {layers - 1}; -1 is a new one"
    )


def all_kept(order: list[int], layers: int) -> bool:
    """Whether an order has every old layer once, in turn; new ones may stand between."""
    kept = [layer for layer in order if layer >= 0]
    return kept == list(range(layers))


def in_order(
    tree: Params,
    order: list[int],
    rows: dict[str, Param],
    fresh: Callable,
) -> Params:
    """Arrays {name: array} with their layers in a new order; a layer -1 is fresh(name, like)."""
    index = jnp.array(order)
    out = dict(tree)
    for name, x in tree.items():
        if not rows[name].layered:
            continue
        out[name] = x[jnp.maximum(index, 0)]
        if -1 in order:
            is_old = per_layer(index >= 0, x)
            new = fresh(name, out[name])
            out[name] = jnp.where(is_old, out[name], new)
    return out


def per_layer(values, x):
    """Values [layers], shaped so that they broadcast against x [layers ...]."""
    ones = [1] * (x.ndim - 1)
    return values.reshape(-1, *ones)


def reset_embeddings(model: Model, context: Context, head: bool = True) -> Edited:
    """Active forgetting (Chen et al. 2023): draw the embeddings again and reset their optimiser.

    Moments and the count are reset. A tied head goes with the embeddings; an untied one does where
    `head` says so. The body and its optimiser stay as they are.
    """
    gone = {"embed", "head"} if head else {"embed"}
    params = dict(model.params)
    policy = {}
    for name, param in table(model.config).items():
        if param.group in gone:
            dtype = params[name].dtype
            params[name] = draw(name, param, context.key, dtype)
            policy[param.group] = "reset"
    return Edited(Model(model.config, params), policy, preserves=False)


def silence(model: Model, context: Context, layers: tuple[int, ...]) -> Edited:
    """Set the output projections of these layers to zero, so that they add nothing yet.

    The optimiser's state is kept.
    """
    where = jnp.array(layers)
    params = dict(model.params)
    for name in ("o", "down"):
        silent = params[name].at[where].set(0)
        params[name] = silent
    silenced = model._replace(params=params)
    return Edited(silenced, {}, preserves=False)

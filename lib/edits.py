"""Edits: growth in depth, and new embeddings."""
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import jax.numpy as jnp

from model import Context, Edited, Model, draw, groups, table


def stack(model: Model, context: Context, times: int = 2, layers: tuple[int, ...] | None = None,
          moments: Literal["reset", "map"] = "reset",
          new: Literal["random", "identity"] = "random") -> Edited:
    """Grow in depth: the blocks, `times` over (G_stack, Du et al. 2024), or any `layers`, taken in order.

    A layer -1 is a new one, drawn as at initialisation: as it is ("random"), or with zero output projections,
    so that it changes nothing yet ("identity"). The copies keep the shallow model's output scale. moments:
    "reset" starts every optimiser group afresh, as the paper does; "map" copies the blocks' moments along,
    new ones are 0. Raises ValueError for a layer that is not there.
    """
    old = model.config
    index = list(layers) if layers is not None else list(range(old.layers)) * times
    if not index or not all(-1 <= i < old.layers for i in index):
        raise ValueError(f"stack: layers is {index}, but the model has layers 0 to {old.layers - 1}; "
                         "-1 is a new one")
    for name, value, one, other in ("moments", moments, "reset", "map"), ("new", new, "random", "identity"):
        if value not in (one, other):
            raise ValueError(f'stack: {name} is {value!r}, allowed are "{one}" and "{other}"')
    config, where = replace(old, layers=len(index)), jnp.array(index)
    rows = table(config)

    def take(tree: dict, fresh: Callable = lambda name, x: jnp.zeros_like(x)) -> dict:
        def layer(name, x):
            taken = x[jnp.maximum(where, 0)]
            there = (where >= 0).reshape(-1, *[1] * (x.ndim - 1))
            return taken if min(index) >= 0 else jnp.where(there, taken, fresh(name, taken))
        return {n: layer(n, x) if rows[n].axes[0] == "layers" else x for n, x in tree.items()}

    def drawn(name, x):
        zero = new == "identity" and rows[name].axes[-1] == "embed" != rows[name].axes[1]
        return jnp.zeros_like(x) if zero else draw(name, rows[name], context.key, x.dtype)

    policy = dict.fromkeys(groups(old), (lambda tree, _: take(tree)) if moments == "map" else "reset")
    kept = [i for i in index if i >= 0] == list(range(old.layers)) and (new == "identity" or min(index) >= 0)
    return Edited(Model(config, take(model.params, drawn)), policy, preserves=kept)


def reset_embeddings(model: Model, context: Context, head: bool = True) -> Edited:
    """Active forgetting (Chen et al. 2023): draw embeddings again and reset their optimiser, count and all.

    A tied head goes with them; an untied one where `head` says so. The body and its optimiser are untouched.
    """
    gone = {"embed", "head"} if head else {"embed"}
    fresh = {n: draw(n, p, context.key, model.params[n].dtype)
             for n, p in table(model.config).items() if p.group in gone}
    policy = dict.fromkeys(gone & set(groups(model.config)), "reset")
    return Edited(Model(model.config, model.params | fresh), policy, preserves=False)


def silence(model: Model, context: Context, layers: tuple[int, ...]) -> Edited:
    """Set the output projections of these layers to zero, so that they add nothing yet.

    The optimiser's state is kept.
    """
    params = dict(model.params)
    for name in ("o", "down"):
        params[name] = params[name].at[jnp.array(layers)].set(0)
    return Edited(model._replace(params=params), {}, preserves=False)

"""LoRA (Hu et al. 2021): W + (alpha / r) A B, where W is frozen and A [n r] and B [r m] train.

A config takes `lora_rows` as its model's `rows`, `adapted` as `reparam` and `unfrozen` as
`optimizer`. A model that is there already, of any family, gets adapters by the edit `add_lora`.
"""
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import optax

from lib.config import function_of, to_json
from lib.fields import plain
from lib.matrices import matrices, sides
from lib.optim import adamw
from model import Context, Edited, Model, ModelConfig, Param, Params, draw, dtype_of, groups, table

FROZEN = "frozen"  # the optimiser group that does not train


def freeze_rows(
    rows: dict[str, Param], config: ModelConfig, alone: bool = False
) -> dict[str, Param]:
    """The rows of a model with the matrices of its blocks frozen; `alone`: with all of it."""
    frozen = rows if alone else matrices(config).keys() & rows
    return rows | {name: replace(rows[name], group=FROZEN) for name in frozen}


def lora_rows(
    config: ModelConfig,
    rows: dict[str, Param],
    rank: int = 8,
    layers: tuple[int, ...] = (),
    alone: bool = False,
) -> dict[str, Param]:
    """A `rows`: factors beside each matrix of the blocks, which is frozen.

    layers: those that have factors, -1 the last; empty: all. alone: nothing but the factors trains.
    B begins as zero.
    """
    stored = freeze_rows(rows, config, alone)
    first, number = "layers", config.layers
    if layers:
        first, number = "state", len(layers)
    for name, row in matrices(config).items():
        if name not in rows:  # such as the gate, which some families have not
            continue
        n, m = sides(row)
        deviation = (3 * n) ** -0.5  # of Kaiming's uniform draw, as in the paper's code
        stored[f"{name}/a"] = Param((first, "in", "rank"), (number, n, rank), deviation)
        stored[f"{name}/b"] = Param((first, "rank", "out"), (number, rank, m), 0.0)
    return stored


def adapted(
    params: Params,
    step,
    batch,
    config: ModelConfig,
    alpha: float = 16.0,
    layers: tuple[int, ...] = (),
) -> Params:
    """A `reparam`: W + (alpha / r) A B, with alpha and layers as `lora_rows` had them.

    A model without factors stays as it is.
    """
    used = {name: x for name, x in params.items() if "/" not in name}
    for name, row in matrices(config).items():
        if f"{name}/a" not in params:
            continue
        a, b = params[f"{name}/a"], params[f"{name}/b"]
        change = alpha / a.shape[-1] * (a @ b)
        change = change.reshape(len(a), *row.shape[1:])
        if layers:
            change = spread(change, layers, config.layers)
        used[name] = used[name] + change
    return used


def spread(x, layers: tuple[int, ...], number: int):
    """What is given for some of a number of layers [some ...], and zeros for the others."""
    places = [layer % number for layer in layers]
    chosen = jax.nn.one_hot(jnp.array(places), number, axis=0, dtype=x.dtype)
    return jnp.tensordot(chosen, x, 1)  # a scatter here ends XLA 0.10.2 on a CPU


def unfrozen(table: dict[str, Param], **adam: float) -> dict[str, optax.GradientTransformation]:
    """An `optimizer`: AdamW for all but what is frozen."""
    transforms = adamw(table, **adam)
    transforms.pop(FROZEN, None)
    return transforms


def in_turn(
    config: ModelConfig, rows: dict[str, Param], first: dict, then: dict
) -> dict[str, Param]:
    """A `rows`: two of them, given as JSON, one after the other."""
    return function_of(then)(config, function_of(first)(config, rows))


def rows_before(config: ModelConfig) -> Callable | None:
    """The `rows` that a model had before `attach` gave it more, such as those of its family."""
    rows = config.rows
    while rows and plain(rows) is in_turn:
        rows = function_of(rows.keywords["first"])
    return rows


def attach(model: Model, context: Context, rows: Callable) -> Edited:
    """Give a model the parameters that `rows` adds, which must change nothing as they are drawn.

    `rows` is given those that the model has, of a family or of its own. The optimiser begins
    afresh.
    """
    own = model.config.rows
    if own:
        written = to_json(partial(in_turn, first=to_json(own), then=to_json(rows)))
        rows = function_of(written)
    config = replace(model.config, rows=rows)
    params = dict(model.params)
    for name, row in table(config).items():
        if name not in params:
            params[name] = draw(name, row, context.key, dtype_of(row, config))
    policy = dict.fromkeys(groups(config), "reset")
    return Edited(Model(config, params), policy, preserves=True)


def add_lora(
    model: Model,
    context: Context,
    rank: int = 8,
    layers: tuple[int, ...] = (),
    alone: bool = False,
) -> Edited:
    """Give a model factors beside its matrices, see `lora_rows`; what they add is zero yet."""
    rows = partial(lora_rows, rank=rank, layers=tuple(layers), alone=alone)
    return attach(model, context, rows)

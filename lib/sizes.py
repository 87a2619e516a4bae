"""What a phase trains, and what its optimiser holds."""

import math
from collections.abc import Callable
from functools import partial

import jax

from lib.optim import init_opt_state, trained_groups
from lib.schedule import Plan
from model import ModelConfig, dtype_of, table


def sizes_of(plan: Plan, optimizer: Callable) -> dict[int, dict[str, int]]:
    """{phase: what each of its rows says of the model besides its parameters}."""
    found = {}
    for phase, model in enumerate(plan.models):
        found[phase] = sizes(model, optimizer, plan.frozen(phase))
    return found


def sizes(model: ModelConfig, optimizer: Callable, frozen: frozenset[str]) -> dict[str, int]:
    """Parameters with a gradient, and bytes of the optimiser's state on all devices together.

    optimizer: table -> {group: optax transformation}; a group that it leaves out is not trained and
    has no state. frozen: groups that are not trained either, though their state is there.
    """
    params = {}
    for name, param in table(model).items():
        params[name] = jax.ShapeDtypeStruct(param.shape, dtype_of(param, model))
    begin = partial(init_opt_state, config=model, optimizer=optimizer)
    trained = 0
    for names in trained_groups(model, optimizer, frozen).values():
        for name in names:
            trained += math.prod(params[name].shape)
    held = 0
    state = jax.eval_shape(begin, params)
    for x in jax.tree.leaves(state):
        size = math.prod(x.shape)
        held += size * x.dtype.itemsize
    return {"model/trained": trained, "model/opt_bytes": held}

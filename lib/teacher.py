"""A frozen model inside a model: a teacher whose states the loss sees.

It is rows of the table such as "teacher/q", in an optimiser group of its own, with axes such as
"teacher/embed". What grows the model leaves it alone. These edits begin and end it:

    adopt          another run's parameters
    adopt_self     a copy of the model as it is now
    adopt_random   a new draw
    release        no teacher any more

An optimiser that leaves the group out keeps it frozen: `optimizer=partial(adamw,
frozen=("teacher",))`. A `token_loss` gets the teacher's logits from `teacher_logits`.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from lib.checkpoint import find_checkpoint
from lib.config import from_json, to_json
from lib.keys import run_step
from model import (
    Context,
    Edited,
    Model,
    ModelConfig,
    Param,
    Params,
    dtype_of,
    forward,
    init,
    reparametrised,
    table,
)

PREFIX = "teacher"
HOW = "dtype", "param_dtype", "attention"  # a teacher is computed as its student is


# --------------------------------------------------------------------- the functions of the config


def beside_rows(
    config: ModelConfig,
    rows: dict[str, Param],
    teacher: dict,
    prefix: str,
    own: dict | None,
) -> dict[str, Param]:
    """A model's `rows`: its own, and those of a teacher.

    teacher: its ModelConfig as JSON. own: the `rows` that the model had, as JSON.
    """
    if own:
        rows = of_json(own)(config, rows)
    inner = teacher_config(teacher, config)
    theirs = {}
    for name, param in table(inner).items():
        axes = tuple(f"{prefix}/{axis}" for axis in param.axes)
        theirs[f"{prefix}/{name}"] = replace(param, axes=axes, group=prefix)
    return rows | theirs


def beside_forward(
    params: Params,
    batch,
    mask,
    config: ModelConfig,
    teacher: dict,
    prefix: str,
    own: dict,
):
    """A model's `forward`: its states and what it gives, and what the teacher's gives.

    That is {prefix: its states} and, where its own `forward` gives x besides, {"prefix/x": x}.
    """
    student = replace(config, forward=of_json(own))
    states, given = forward(params, batch, mask, student)
    inner = teacher_config(teacher, config)
    theirs, beside = forward(part(params, prefix), batch, mask, inner)
    found = {prefix: theirs}
    for name, x in beside.items():
        found[f"{prefix}/{name}"] = x
    return states, given | lax.stop_gradient(found)


def beside_flops(config: ModelConfig, seq: int, teacher: dict, prefix: str, own: dict) -> float:
    """A model's `flops`: its own, and the teacher's forward pass, a third of its training."""
    inner = teacher_config(teacher, config)
    ours = of_json(own)(config, seq)
    return ours + inner.flops(inner, seq) / 3


# The fields of a model's config that a teacher adds to, and by what.
BESIDE = {
    "rows": beside_rows,
    "forward": beside_forward,
    "flops": beside_flops,
}


def of_json(written: dict) -> Callable:
    """The function that JSON names."""
    return from_json(Callable, written)


@functools.cache
def config_of(text: str) -> ModelConfig:
    """The ModelConfig of a text of JSON."""
    return from_json(ModelConfig, json.loads(text))


def teacher_config(teacher: dict, student: ModelConfig) -> ModelConfig:
    """The ModelConfig of a teacher, given as JSON, inside a student."""
    how = {field: getattr(student, field) for field in HOW}
    config = config_of(json.dumps(teacher))
    return replace(config, **how)


# ------------------------------------------------------------------------------- what a loss asks


def part(params: Params, prefix: str = PREFIX) -> Params:
    """The parameters of the model inside, by their own names."""
    begin = f"{prefix}/"
    found = {}
    for name, x in params.items():
        if name.startswith(begin):
            found[name.removeprefix(begin)] = x
    return found


def teacher_logits(extras: dict, batch=None, prefix: str = PREFIX) -> jax.Array:
    """A teacher's logits [b c v] in float32 or wider, for a `token_loss`; no gradient flows.

    batch: for a teacher whose `outputs` look at it.
    """
    config = inside(extras["config"], prefix)
    params = part(extras["params"], prefix)
    states = extras[prefix]
    logits = config.outputs(params, states, batch, config)
    return lax.stop_gradient(logits)


def divergence(logits, batch, extras, temperature: float = 1.0, prefix: str = PREFIX):
    """A `token_loss`: KL(teacher || model) [b c] in nats, times the square of the temperature.

    Hinton et al. 2015. At a high temperature the gradient is that of matching logits.
    """
    theirs = teacher_logits(extras, batch, prefix)
    theirs = jax.nn.log_softmax(theirs / temperature)
    ours = jax.nn.log_softmax(logits / temperature)
    nats = jnp.sum(jnp.exp(theirs) * (theirs - ours), -1)
    return temperature**2 * nats


# --------------------------------------------------------------------------- configs with teachers


def teacher_of(function: Callable | None) -> dict | None:
    """The arguments that a function of this file has been given; None for any other function."""
    if getattr(function, "func", None) in BESIDE.values():
        return function.keywords
    return None


def taught(config: ModelConfig, teacher: ModelConfig, prefix: str) -> ModelConfig:
    """A model's config with a teacher beside it."""
    given = {"teacher": to_json(teacher), "prefix": prefix}
    fields = {}
    for field, function in BESIDE.items():
        own = to_json(getattr(config, field))
        made = functools.partial(function, **given, own=own)
        fields[field] = of_json(to_json(made))  # one object for the same arguments
    return replace(config, **fields)


def inside(config: ModelConfig, prefix: str = PREFIX) -> ModelConfig:
    """The config of a teacher inside a model. Raises ValueError where there is none."""
    given = teacher_of(config.forward)
    if given is None:
        raise ValueError(f"the model has no teacher {prefix!r}; allowed is one that was adopted")
    if given["prefix"] == prefix:
        return teacher_config(given["teacher"], config)
    below = replace(config, forward=of_json(given["own"]))
    return inside(below, prefix)


def teachers(config: ModelConfig) -> list[str]:
    """The prefixes of the teachers inside a model, the last one adopted first."""
    given = teacher_of(config.forward)
    if given is None:
        return []
    below = replace(config, forward=of_json(given["own"]))
    return [given["prefix"], *teachers(below)]


def without(config: ModelConfig, prefix: str = PREFIX) -> ModelConfig:
    """A model's config without a teacher. Raises ValueError where it has none of this prefix."""
    found = teachers(config)
    if not found:
        raise ValueError(f"the model has no teacher {prefix!r}; allowed is one that was adopted")
    outer = teacher_of(config.forward)
    fields = {}
    for field in BESIDE:
        given = teacher_of(getattr(config, field))
        if given is None:
            raise ValueError(
                f"the model's {field} was replaced while it had a teacher; "
                "allowed is to release it before"
            )
        fields[field] = from_json(Callable, given["own"])
    below = replace(config, **fields)
    if found[0] == prefix:
        return below
    teacher = teacher_config(outer["teacher"], config)
    rest = without(below, prefix)
    return taught(rest, teacher, found[0])


def alone(config: ModelConfig) -> ModelConfig:
    """A model's config without any teacher: what it computes itself, such as to sample."""
    for prefix in teachers(config):
        config = without(config, prefix)
    return config


# ----------------------------------------------------------------------------------------- edits


def with_teacher(
    model: Model,
    prefix: str,
    teacher: ModelConfig,
    params: Params,
    borrowed: dict | None = None,
) -> Edited:
    """The model and a teacher beside it. Raises ValueError for a prefix or vocabulary in use."""
    config = model.config
    if any(name.startswith(f"{prefix}/") for name in model.params):
        raise ValueError(f"the model has a teacher {prefix!r} already; allowed is another prefix")
    if teacher.vocab != config.vocab:
        raise ValueError(
            f"the teacher has {teacher.vocab} pieces, the model {config.vocab}; allowed is a "
            "teacher with the same tokenizer"
        )
    theirs = {f"{prefix}/{name}": params[name] for name in table(teacher)}
    new = Model(taught(config, teacher, prefix), model.params | theirs)
    return Edited(new, {}, preserves=True, borrowed=borrowed or {})


def adopt(model: Model, context: Context, run: str, prefix: str = PREFIX) -> Edited:
    """Put another run's model, RUN or RUN@STEP, beside this one.

    Checkpoints name that run instead of writing its parameters again, while they are frozen. A run
    with a `reparam` gives the parameters that its forward pass uses.
    """
    place, step = run_step(run)
    checkpoints, step, _ = find_checkpoint(place, step)
    params, config, *_ = context.load(place, step)
    written = to_json(alone(config.model))
    teacher = teacher_config(written, model.config)
    used = reparametrised(config.reparam, params, step, {}, config.model)
    home = checkpoints.root.parent
    cast, borrowed = {}, {}
    for name, row in table(teacher).items():
        cast[name] = used[name].astype(dtype_of(row, teacher))
        if used[name] is params[name] and cast[name].dtype == params[name].dtype:
            borrowed[f"{prefix}/{name}"] = f"{home}@{step}:{name}"
    return with_teacher(model, prefix, teacher, cast, borrowed)


def adopt_self(model: Model, context: Context, prefix: str = PREFIX) -> Edited:
    """Put a copy of the model as it is now beside it, such as for the divergence from it."""
    teacher = alone(model.config)
    copies = {name: jnp.copy(model.params[name]) for name in table(teacher)}
    return with_teacher(model, prefix, teacher, copies)


def adopt_random(
    model: Model,
    context: Context,
    prefix: str = PREFIX,
    shape: dict[str, int] | None = None,
) -> Edited:
    """Put a newly drawn model beside this one; shape: fields of its ModelConfig that are others."""
    teacher = replace(alone(model.config), **shape or {})
    drawn = init(teacher, context.key)
    return with_teacher(model, prefix, teacher, drawn)


def release(model: Model, context: Context, prefix: str = PREFIX) -> Edited:
    """Let a teacher go: its rows, and what it added to forward pass and FLOPs."""
    config = without(model.config, prefix)
    kept = {name: model.params[name] for name in table(config)}
    return Edited(Model(config, kept), {}, preserves=True)

"""What a run goes on from: what its past steps depend on, and what `init_from` names."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from data import shuffled
from lib.checkpoint import Loan, borrow, find_checkpoint, unchanged
from lib.config import FUNCTION, flatten, from_json, run_json, to_json
from lib.disk import digest, file_hash
from lib.errors import InputError, user_errors
from lib.hf import read_params, read_shape
from lib.keys import names_place, run_step
from lib.objectives import asks, causal
from lib.optim import State, init_opt_state, places
from lib.schedule import Plan
from model import ModelConfig, cross_entropy, weighted_mean

# Fields of a config that the steps taken so far depend on.
PAST = (
    *("seed", "model", "init_from", "init_with", "data", "phases", "optimizer"),
    *("clip", "max_skipped", "reparam", "token_loss", "reduce", "gradient"),
)
# Fields of a model that say how it is computed; a run that starts from another run sets its own.
HOW = ("dtype", "param_dtype", "attention", "unroll", "remat", "logits_mib")
# Those of them that change rounding alone: a run may go on with others.
ROUNDING = ("attention", "unroll", "remat", "logits_mib")


def as_json(value) -> Any:
    """A config, or part of one, as it comes back from a JSON file."""
    return json.loads(json.dumps(to_json(value)))


def resume_key(config, plan: Plan, step: int) -> dict[str, Any]:
    """What the first `step` steps depend on, flat; a run that goes on must have it in common."""
    fields = past_fields(config)
    fields["phases"] = past_phases(fields["phases"], config, plan, step)
    for name in ROUNDING:
        del fields["model"][name]
    rates = {}
    for group, lr in plan.lr.items():
        taken = lr[1 : step + 1]
        if taken.any():
            rates[group] = taken.tolist()
    return flatten(without_places(fields)) | {
        "data.sources (their order)": list(config.data.sources),
        "schedule (the rates of steps already taken)": digest(rates),
    }


def past_phases(fields: list[dict], config, plan: Plan, step: int) -> list[dict]:
    """What the first `step` steps depend on of the phases, whose fields are given as JSON."""
    phases = []
    for written, phase, end in zip(fields, config.phases, plan.ends, strict=True):
        begin = end - phase.steps
        if begin >= step:
            continue
        del written["schedule"], written["lr"]  # their effect, the rates, is compared below
        if sums_alone(config, phase):
            del written["accumulate"]
        by_progress = callable(phase.mixture) or phase.lengths or phase.order is not shuffled
        by_progress = by_progress or asks(phase.objective, "progress")
        if end >= step and not by_progress:
            del written["steps"]  # the phase may become longer
        phases.append(written)
    return phases


def sums_alone(config, phase) -> bool:
    """Whether the parts that a phase's batch is taken in change no more than the order of sums."""
    reduce = phase.reduce or config.reduce
    token_loss = phase.token_loss or config.token_loss
    plain = reduce is weighted_mean and token_loss is cross_entropy
    return plain and phase.objective is causal and config.gradient is None


def rounding_key(config, devices: int) -> dict[str, Any]:
    """What changes rounding alone, by field."""
    found = {"devices": devices}
    for name in ROUNDING:
        found[f"model.{name}"] = getattr(config.model, name)
    for i, phase in enumerate(config.phases):
        found[f"phases.{i}.accumulate"] = phase.accumulate
    return found


def past_fields(config) -> dict[str, Any]:
    """Fields that steps depend on, as JSON, but not the settings that say where texts are.

    What is in them is known by the fingerprint, wherever they are now.
    """
    fields = {}
    for name, value in as_json(config).items():
        if name in PAST:
            fields[name] = value
    for source in fields["data"]["sources"].values():
        for use in ("documents", "prepare", "score"):
            if source[use] is None:
                continue
            given = source[use]["arguments"]
            places = [name for name, value in given.items() if names_place(name, value)]
            for name in places:
                del given[name]
    return fields


def without_places(written: Any) -> Any:
    """A config's JSON without the directories of its functions: their source is in it."""
    if isinstance(written, list):
        return [without_places(part) for part in written]
    if not isinstance(written, dict):
        return written
    found = {name: without_places(part) for name, part in written.items()}
    if FUNCTION <= found.keys():
        found["function"] = found["function"].rpartition("/")[2]
    return found


def changed_fields(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two `resume_key`s, in words."""
    said = []
    rounding = {f"model.{name}" for name in ROUNDING}
    for key in sorted(before.keys() | now.keys()):
        if key not in now and (key in rounding or key.endswith(".accumulate")):
            continue  # a checkpoint of an older version
        old, new = before.get(key), now.get(key)
        if old != new:
            said.append(key if "(" in key else f"{key} was {old!r} and is {new!r}")
    return said


def start_config(config, directory: Path) -> tuple[Any, Path | None]:
    """(config with shape and tokenizer of what `init_from` names, file of the run's own tokenizer).

    A tokenizer that the config names stays. Once the run in `directory` has a checkpoint, shape and
    tokenizer are read there: what it started from need not be any more.
    """
    name = config.init_from
    begun = any(directory.glob("checkpoints/[0-9]*"))
    if begun:
        shape = run_json(directory)["model"]
    elif name.startswith("hf:"):
        shape = as_json(read_shape(name))
    else:
        shape = find_checkpoint(*run_step(name))[2]["model"]
    how = {field: getattr(config.model, field) for field in HOW}
    model = replace(from_json(ModelConfig, shape), **how)
    config = replace(config, model=model)
    if config.data.tokenizer == "bpe":
        data = replace(config.data, tokenizer=tokenizer_of(name))
        config = replace(config, data=data)
    if begun:
        return config, own_tokenizer(directory, find_checkpoint(str(directory))[2])
    return config, None


def tokenizer_of(name: str) -> str:
    """The tokenizer of what `init_from` names, as `data.tokenizer` says it."""
    if name.startswith("hf:"):
        return name
    checkpoints, _, meta = find_checkpoint(*run_step(name))
    return str(own_tokenizer(checkpoints.root.parent, meta))


def own_tokenizer(directory: Path, meta: dict) -> Path:
    """The file of a run's tokenizer; raises InputError where it is not as its checkpoint says."""
    file = directory / "tokenizer.model"
    with user_errors(OSError, sentence=f"the tokenizer of run {directory} is gone ({{reason}})"):
        known = file_hash(file)
    if meta.get("tokenizer", known) != known:  # an older version did not write it
        raise InputError(f"{file} is damaged (not what its checkpoints know); put back what it was")
    return file


class Start(NamedTuple):
    """What a run begins with besides what it draws."""

    state: State
    since_reset: int | None = None  # steps since its embeddings were drawn anew, None if never
    positions: dict[str, int] | None = None  # of each source, that another run has drawn
    borrowed: dict[str, Loan] = {}  # parameters that are another run's


def start_from(config, model: ModelConfig, state: State, like: State) -> Start:
    """A state just drawn, with what `init_from` names in it: parameters, or all of a checkpoint.

    like: shapes, dtypes and places of the state.
    """
    name = config.init_from
    if name.startswith("hf:"):
        params = read_params(name, model, like.params)
        return Start(with_params(state, params, config.optimizer, model, like))
    checkpoints, step, meta = find_checkpoint(*run_step(name))
    home = checkpoints.root.parent
    loans = borrow({n: f"{home}@{step}:{n}" for n in like.params}) if "format" in meta else {}
    if config.init_with == "params":
        params = checkpoints.params(step, like)
        begun = with_params(state, params, config.optimizer, model, like)
        return Start(begun, meta["since_reset"], borrowed=unchanged(loans, params))
    written = run_json(home)["optimizer"]
    same = without_places(as_json(config.optimizer)) == without_places(written)
    if not same:
        raise InputError(f'init_with is "all", but {name} has another optimizer')
    taken = checkpoints.state(step, like)
    state = state.replace(params=taken.params, opt=taken.opt)
    return Start(state, meta["since_reset"], meta["positions"], unchanged(loans, taken.params))


def with_params(
    state: State, params: dict, optimizer: Callable, model: ModelConfig, like: State
) -> State:
    """A state that begins with other parameters; so does an optimiser that copies them."""
    begin = partial(init_opt_state, config=model, optimizer=optimizer)
    opt = jax.jit(begin, out_shardings=places(like).opt)(params)
    return state.replace(params=params, opt=opt)

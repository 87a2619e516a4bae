"""One run: a config becomes phases, a schedule, an optimiser and a loop that can be killed at any moment.

    python train.py [CONFIG] [--path.to.field VALUE ...]     train, or resume; CONFIG is configs/quickstart.py by default
    python train.py VERB ...                                 run tools/VERB.py: sample, eval, bench, corpus

Steps count batches consumed, from 1. Checkpoint s is the state after s steps and before the edits due at s; these are
functions of (seed, step, index) and are applied again on resume.
"""
import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

ROOT = Path(__file__).resolve().parent
if __name__ == "__main__" and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    # XLA on CPU asks the C library for a step's scratch memory anew each step: mapping it in huge pages makes steps
    # about a quarter faster here (the README's benchmark). The library reads this only when a process starts.
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from flax.linen import logical_to_mesh_axes
from jax.sharding import NamedSharding, PartitionSpec

import data
import model
from data import DataConfig, InputError, Loader
from model import ModelConfig, cross_entropy

# ------------------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the consumed budget: a linear warm-up to the peak, then a shape."""

    shape: Literal["constant", "cosine", "wsd"] = "wsd"  # wsd: stable, then a linear decay
    peak: float = 3e-3  # rate after the warm-up
    warmup: int = 20  # steps
    decay: float = 0.2  # wsd: the share of the budget at the end over which the rate falls
    final: float = 0.1  # the rate at the end, as a share of the peak (cosine and wsd)
    budget: Literal["flops", "tokens"] = "flops"  # what is consumed; tokens are batch x seq, padding included


def adamw(table: dict[str, model.Param], b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8,
          weight_decay: float = 0.1) -> dict[str, optax.GradientTransformation]:
    """AdamW (Loshchilov & Hutter 2019) for each group of the table; matrices decay, embeddings and gains do not.

    Returns unscaled descent directions; the step multiplies each group's by its rate.
    """
    decay = {"matrix": weight_decay, "head": weight_decay}
    return {group: optax.chain(optax.scale_by_adam(b1, b2, eps), optax.add_decayed_weights(decay.get(group, 0.0)))
            for group in dict.fromkeys(p.group for p in table.values())}


def weighted_mean(losses, batch):
    """The plain `reduce`: ((numerator, denominator), metrics) of losses [b t] weighted by `batch["weights"]`."""
    return (jnp.sum(losses * batch["weights"]), jnp.sum(batch["weights"])), {}


@dataclass(frozen=True)
class Edit:
    """An edit every so many steps of a phase, for one that keeps the shapes; see `model.Edited`."""

    apply: Callable  # model, context -> Edited
    every: int = 1_000  # due after each multiple of this many steps of the phase, but for its last step
    until: int = 0  # steps of the phase after which it stops; 0 is never


@dataclass(frozen=True)
class Phase:
    """A stretch of a run with one model shape, batch shape, mixture and objective."""

    steps: int = 100  # updates
    batch: int = 16  # rows per update
    seq: int = 256  # tokens per row
    edits: tuple[Callable, ...] = ()  # applied to the model on entering: model, context -> Edited
    repeat: tuple[Edit, ...] = ()  # edits that recur within the phase
    mixture: dict[str, float] | Callable | None = None  # weights of sources; None: in proportion to their size
    packing: Callable = data.concat_and_split  # lengths, seq -> plan
    objective: Callable = data.causal  # row, rng -> row, mask
    schedule: Schedule | None = None  # over this phase's own budget, in place of the run's over the whole
    rates: dict[str, float] = field(default_factory=dict)  # factor on an optimiser group's rate; 0 freezes it


@dataclass(frozen=True)
class MeshConfig:
    """Devices by axis; -1 takes what is left."""

    data: int = -1  # rows of the batch
    fsdp: int = 1  # rows of the batch, and parameters along `embed`
    tensor: int = 1  # parameters along `vocab`, `mlp` and `kv_heads`


@dataclass(frozen=True)
class Config:
    """One experiment."""

    name: str = ""  # of the run; empty: the config file's stem
    runs: str = "runs"  # directory that runs live in
    seed: int = 0  # initialisation, data order and edits draw from seeds derived from it
    model: ModelConfig = ModelConfig()  # the model the run starts with
    data: DataConfig = field(default_factory=DataConfig)
    phases: tuple[Phase, ...] = (Phase(),)
    schedule: Schedule = Schedule()
    optimizer: Callable = adamw  # table -> {group: optax transformation of unscaled directions}
    clip: float = 1.0  # global gradient norm; 0 is off
    max_skipped: int = 10  # non-finite updates in a row after which the run stops
    mesh: MeshConfig = MeshConfig()
    weights: Callable | None = None  # in jit: params, step, batch -> params used
    token_loss: Callable = cross_entropy  # in jit: logits [b c v], batch chunk, extras -> losses [b c]
    reduce: Callable = weighted_mean  # in jit: losses [b t], batch -> (numerator, denominator), metrics
    evals: tuple[Callable, ...] = ()  # params, apply -> {metric: value}, at every evaluation
    eval_every: int = 200  # steps between evaluations on dev; there is one at the end of each phase too
    eval_tokens: int = 65_536  # of dev documents, per source, in an evaluation during the run
    overlap: int = 64  # positions of context that a window of a long held-out document shares with the one before
    save_every: int = 200  # steps between checkpoints; there is one at the end of each phase too
    keep: int = 3  # checkpoints kept
    prompts: tuple[str, ...] = ("",)  # continued in samples.txt at the end
    sample_tokens: int = 200  # of each continuation
    sample_temperature: float = 0.8  # 0 takes the likeliest token


# ------------------------------------------------------------------------------------- configs in, out and checked


def hints(kind) -> dict[str, Any]:
    """Field types of a config dataclass."""
    return typing.get_type_hints(kind)


def load_file(path: str | Path):
    """Run a Python file as a module of its own, once per process."""
    path = Path(path).resolve()
    if path.parent == ROOT:
        return importlib.import_module(path.stem)
    name = f"file_{path.stem}_{data.digest(str(path))[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def load_config(path: str) -> Config:
    """The `config` of a config file."""
    if not Path(path).is_file():
        known = ", ".join(sorted(f"configs/{p.name}" for p in (ROOT / "configs").glob("*.py")))
        verbs = ", ".join(sorted(p.stem for p in (ROOT / "tools").glob("*.py")))
        raise InputError(f"{path!r} is neither a config file (there are {known}) nor a verb ({verbs})")
    try:
        config = getattr(load_file(path), "config", None)
    except InputError:
        raise
    except Exception as error:  # whatever a config file does wrong is the user's to mend
        lines = [f.lineno for f in inspect.getinnerframes(error.__traceback__) if f.filename == str(Path(path).resolve())]
        where = f", line {lines[-1]}" if lines else ""
        raise InputError(f"config file {path}{where}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise InputError(f"config file {path} defines no `config = Config(...)`")
    return config


def to_json(value):
    """A config as JSON: dataclasses by field, a function as its `file:name`, its arguments and a hash of its source."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    if callable(value):
        arguments = value.keywords if isinstance(value, functools.partial) else {}
        function = value.func if isinstance(value, functools.partial) else value
        file = Path(inspect.getsourcefile(function)).resolve()
        file = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
        source = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12]
        return {"function": f"{file.as_posix()}:{function.__qualname__}", "arguments": to_json(arguments), "source": source}
    return value


def from_json(hint, value):
    """The inverse of `to_json`, given the type; ROOT and the files named must be where they were."""
    if isinstance(value, dict) and {"function", "arguments"} <= value.keys():
        file, name = value["function"].rsplit(":", 1)
        function = getattr(load_file(ROOT / file), name)
        return functools.partial(function, **value["arguments"]) if value["arguments"] else function
    options = [h for h in typing.get_args(hint) if h is not type(None)]
    if dataclasses.is_dataclass(hint):
        return hint(**{k: from_json(hints(hint)[k], v) for k, v in value.items() if k in hints(hint)})
    if isinstance(hint, types.UnionType) and isinstance(value, dict):
        return from_json(options[0], value)
    if typing.get_origin(hint) is dict:
        return {k: from_json(options[1], v) for k, v in value.items()}
    if typing.get_origin(hint) is tuple:
        return tuple(from_json(options[0], v) for v in value)
    return value


def flatten(value, path: str = "") -> dict[str, Any]:
    """Leaves of a JSON value by dotted path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        return {path: value}
    return {k: v for key, child in items for k, v in flatten(child, f"{path}.{key}".strip(".")).items()}


def override(value, names: list[str], word: str, flag: str):
    """`value` with the field at a path set from a word of the command line.

    A path leads through dataclasses, tuples by number, dictionaries by key, and into the arguments of a partial
    function. The type is `check`'s to judge.
    """
    if not names:
        if isinstance(value, str) or callable(value):
            return word
        try:
            parsed = ast.literal_eval(word.capitalize() if word in ("true", "false", "none") else word)
        except (ValueError, SyntaxError):
            return word
        return float(parsed) if isinstance(value, float) and type(parsed) is int else parsed
    head, rest = names[0], names[1:]
    if isinstance(value, functools.partial):
        allowed = {p: value.keywords.get(p, q.default) for p, q in inspect.signature(value.func).parameters.items()}
    elif dataclasses.is_dataclass(value):
        allowed = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    elif isinstance(value, dict):
        allowed = value
    elif isinstance(value, tuple):
        allowed = {str(i): v for i, v in enumerate(value)}
    else:
        allowed = {}
    head = head.replace("-", "_") if head not in allowed else head
    if head not in allowed:
        close = difflib.get_close_matches(head, allowed, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed are: {', '.join(allowed) or 'none'}"
        raise InputError(f"unknown field {flag}: there is no {head!r} here; {hint}")
    new = override(allowed[head], rest, word, flag)
    if isinstance(value, functools.partial):
        return functools.partial(value.func, **value.keywords | {head: new})
    if isinstance(value, dict):
        return value | {head: new}
    if isinstance(value, tuple):
        return tuple(new if str(i) == head else v for i, v in enumerate(value))
    return replace(value, **{head: new})


def parse(arguments: list[str]) -> tuple[Config, str]:
    """(config, its file) from the command line of a run."""
    arguments = list(arguments)
    file = arguments.pop(0) if arguments and not arguments[0].startswith("-") else str(ROOT / "configs/quickstart.py")
    config = load_config(file)
    if {"-h", "--help"} & set(arguments):
        import tyro  # only help needs it: types, defaults and the comments beside the fields
        tyro.cli(Config, default=config, args=["--help"], prog=f"python train.py {file}", use_underscores=True,
                 config=(tyro.conf.FlagConversionOff, tyro.conf.SuppressFixed))
    while arguments:
        flag, equals, word = arguments.pop(0).partition("=")
        if not flag.startswith("--") or len(flag) < 3:
            raise InputError(f"{flag!r} is not understood here; fields are set by --path.to.field VALUE")
        if not equals and (not arguments or arguments[0].startswith("--")):
            raise InputError(f"{flag} needs a value: {flag} VALUE")
        config = override(config, flag[2:].split("."), word if equals else arguments.pop(0), flag)
    return replace(config, name=config.name or Path(file).stem), file


def fits(value, hint, path: str):
    """Raise InputError unless a config value has its declared type."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, hint):
        for name, inner in hints(hint).items():
            fits(getattr(value, name), inner, f"{path}.{name}".strip("."))
        return
    if origin is dict and isinstance(value, dict):
        for key, item in value.items():
            fits(item, options[1], f"{path}.{key}")
        return
    if origin is tuple and isinstance(value, tuple):
        for i, item in enumerate(value):
            fits(item, options[0], f"{path}.{i}")
        return
    if isinstance(hint, types.UnionType):
        for option in options:
            if isinstance(value, typing.get_origin(option) or option) and option is not Callable:
                return fits(value, option, path)
        if Callable not in options:
            raise InputError(f"{path} is {value!r} ({type(value).__name__}); allowed is {describe(hint)}")
        hint = Callable
    if hint is Callable or origin is Callable:
        function = value.func if isinstance(value, functools.partial) else value
        name = getattr(function, "__qualname__", "")
        if not callable(value) or not name or "<" in name:
            raise InputError(f"{path} is {name or repr(value)}; allowed is a function at the top level of a file, or a "
                             "functools.partial of one with JSON arguments, set in a config file")
        if isinstance(value, functools.partial):
            try:
                assert not value.args
                json.dumps(to_json(value.keywords))
            except (AssertionError, TypeError):
                raise InputError(f"{path} is a partial of {name} whose arguments are not all keywords with JSON "
                                 "values") from None
        return
    if origin is Literal:
        good = value in options
    else:
        good = (type(value) in (int, float) if hint is float else type(value) is hint)
    if not good:
        raise InputError(f"{path} is {value!r} ({type(value).__name__}); allowed is {describe(hint)}")


def describe(hint) -> str:
    """A type in words."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(v) for v in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)


def check(config: Config) -> None:
    """Raise InputError for a wrong type or an impossible combination, before anything is built or compiled."""
    fits(config, Config, "")
    m = config.model
    positive = {f"model.{n}": getattr(m, n) for n in ("layers", "embed", "heads", "kv_heads", "head_dim", "mlp")}
    positive |= {f"phases.{i}.{n}": getattr(p, n) for i, p in enumerate(config.phases) for n in ("steps", "batch", "seq")}
    positive |= {n: getattr(config, n) for n in ("eval_every", "eval_tokens", "save_every", "keep", "max_skipped")}
    positive |= {f"phases.{i}.repeat.{j}.every": e.every for i, p in enumerate(config.phases)
                 for j, e in enumerate(p.repeat)}
    positive |= {"data.shard_tokens": config.data.shard_tokens, "data.window": config.data.window,
                 "data.sample_mib": config.data.sample_mib, "schedule.peak": config.schedule.peak}
    for name, value in positive.items():
        if value <= 0:
            raise InputError(f"{name} is {value}; allowed is more than 0")
    for name, value in {"model.vocab": m.vocab, "model.unroll": m.unroll, "clip": config.clip, "seed": config.seed,
                        "schedule.warmup": config.schedule.warmup, "schedule.final": config.schedule.final,
                        "overlap": config.overlap, "sample_tokens": config.sample_tokens}.items():
        if value < 0:
            raise InputError(f"{name} is {value}; allowed is 0 or more")
    if m.heads % m.kv_heads:
        raise InputError(f"model.heads is {m.heads}, which model.kv_heads ({m.kv_heads}) does not divide; each "
                         "key-value head serves the same number of query heads")
    if m.head_dim % 2:
        raise InputError(f"model.head_dim is {m.head_dim}; allowed is an even number, since RoPE rotates pairs")
    if m.layers % max(1, m.unroll) and m.unroll:
        raise InputError(f"model.unroll is {m.unroll}, which does not divide model.layers ({m.layers}); 0 unrolls all")
    if not config.phases:
        raise InputError("phases is empty; a run needs one phase at least")
    if not config.data.sources:
        raise InputError("data.sources is empty; a run needs one source at least")
    if not (0 <= config.data.dev and 0 <= config.data.test and config.data.dev + config.data.test < 1):
        raise InputError(f"data.dev and data.test are {config.data.dev} and {config.data.test}; allowed are shares of 0 "
                         "and more that leave something to train on")
    for i, schedule in [(None, config.schedule), *((i, p.schedule) for i, p in enumerate(config.phases) if p.schedule)]:
        if not 0 < schedule.decay <= 1:
            where = "schedule" if i is None else f"phases.{i}.schedule"
            raise InputError(f"{where}.decay is {schedule.decay}; allowed is a share above 0 and at most 1")
    for i, phase in enumerate(config.phases):
        if config.overlap >= phase.seq:
            raise InputError(f"overlap is {config.overlap}; allowed is less than phases.{i}.seq ({phase.seq})")
        if isinstance(phase.mixture, dict) and (set(phase.mixture) - set(config.data.sources)
                                                or not sum(phase.mixture.values())):
            raise InputError(f"phases.{i}.mixture is {phase.mixture}; allowed are weights, not all 0, for the sources "
                             f"{', '.join(config.data.sources)}")


# ------------------------------------------------------------------------------------- the run, worked out in advance


class Course(NamedTuple):
    """What each step of a run is to be, from the config alone. Index s is after s steps; index 0 is the start."""

    ends: np.ndarray  # last step of each phase
    models: list[ModelConfig]  # of each phase
    tokens: np.ndarray  # consumed [steps + 1]
    flops: np.ndarray  # model FLOPs consumed [steps + 1]
    rates: dict[str, np.ndarray]  # learning rate of each optimiser group [steps + 1]


def edited(edit: Callable, state: model.Model, context: model.Context) -> model.Edited:
    """Apply an edit; a ValueError of its is the config's fault."""
    try:
        return edit(state, context)
    except ValueError as error:
        raise InputError(str(error)) from error


def shapes(config: Config, context: model.Context) -> list[ModelConfig]:
    """The model's shape in each phase: the edits, run on shapes alone."""
    out, current = [], config.model
    for phase in config.phases:
        for edit in phase.edits:
            box = []

            def abstract(params, edit=edit, current=current, box=box):
                box.append(edited(edit, model.Model(current, params), context).model)
                return box[-1].params

            jax.eval_shape(abstract, model.init_shape(current))
            current = box[-1].config
        out.append(current)
    return out


def curve(schedule: Schedule, spent: np.ndarray, start: int, steps: int) -> np.ndarray:
    """The rate at steps start+1 .. start+steps, where `spent` [s] is the budget consumed after s steps of the run.

    A step's rate belongs to the budget consumed with that step, so a row's own figures give its rate.
    """
    used = (spent[start + 1:start + steps + 1] - spent[start]).astype(float)
    total = float(spent[start + steps] - spent[start])
    warm = used[min(schedule.warmup, steps) - 1] if schedule.warmup else 0.0
    rise = np.minimum(1.0, used / warm) if warm else np.ones(steps)
    if schedule.shape == "cosine":
        through = np.clip((used - warm) / max(total - warm, 1e-9), 0, 1)
        fall = schedule.final + (1 - schedule.final) * 0.5 * (1 + np.cos(np.pi * through))
    elif schedule.shape == "wsd":
        through = np.clip((used / total - (1 - schedule.decay)) / schedule.decay, 0, 1)
        fall = 1 - (1 - schedule.final) * through
    else:
        fall = np.ones(steps)
    return schedule.peak * rise * fall


def plot_course(config: Config, models: list[ModelConfig]) -> Course:
    """Budgets and rates of every step."""
    steps = np.array([p.steps for p in config.phases])
    per_step = np.array([p.batch * p.seq for p in config.phases])
    per_token = np.array([model.flops_per_token(m, p.seq) for m, p in zip(models, config.phases, strict=True)])
    tokens = np.concatenate([[0], np.cumsum(np.repeat(per_step, steps))])
    flops = np.concatenate([[0], np.cumsum(np.repeat((per_step * per_token).astype(float), steps))])
    ends = np.cumsum(steps)
    names = list(dict.fromkeys(g for m in models for g in model.groups(m)))
    rates = {group: np.zeros(ends[-1] + 1) for group in names}
    base = np.concatenate([[0], curve(config.schedule, dict(tokens=tokens, flops=flops)[config.schedule.budget], 0,
                                      int(ends[-1]))])
    for i, phase in enumerate(config.phases):
        begin, span = int(ends[i]) - phase.steps, slice(int(ends[i]) - phase.steps + 1, int(ends[i]) + 1)
        unknown = set(phase.rates) - set(names)
        if unknown:
            raise InputError(f"phases.{i}.rates names {', '.join(sorted(unknown))}; allowed are the optimiser groups "
                             f"{', '.join(names)}")
        own = base[span] if phase.schedule is None else curve(
            phase.schedule, dict(tokens=tokens, flops=flops)[phase.schedule.budget], begin, phase.steps)
        for group in names:
            rates[group][span] = own * phase.rates.get(group, 1.0)
    return Course(ends, models, tokens, flops, rates)


def due(config: Config, course: Course, step: int) -> list[Callable]:
    """The edits to apply to the state after `step` steps: a phase's own at its beginning, recurring ones within it."""
    for i, phase in enumerate(config.phases):
        begin, end = int(course.ends[i]) - phase.steps, int(course.ends[i])
        if step == begin:
            return list(phase.edits)
        if begin < step < end:
            return [e.apply for e in phase.repeat
                    if (step - begin) % e.every == 0 and not 0 < e.until < step - begin]
    return []


# ------------------------------------------------------------------------------------------ mesh, state and the step

# Named axes of the parameter table to mesh axes; an axis of the table that is missing here is an error, not a copy.
RULES = {"layers": None, "vocab": "tensor", "embed": "fsdp", "kv_heads": "tensor", "q_per_kv": None, "head_dim": None,
         "mlp": "tensor"}


def make_mesh(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
    """The devices as a grid with axes data, fsdp and tensor."""
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(s for s in sizes if s > 0)
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes) or len(devices) % known or \
            (-1 not in sizes and known != len(devices)):
        raise InputError(f"mesh is data {sizes[0]}, fsdp {sizes[1]}, tensor {sizes[2]}, which does not divide the "
                         f"{len(devices)} devices here; allowed are sizes whose product is that, one of them -1 for the rest")
    grid = np.array(devices).reshape([s if s > 0 else len(devices) // known for s in sizes])
    return jax.sharding.Mesh(grid, ("data", "fsdp", "tensor"))


def shardings(config: ModelConfig, mesh) -> dict[str, NamedSharding]:
    """Where each parameter lives, from its named axes."""
    out = {}
    for name, p in model.table(config).items():
        spec = logical_to_mesh_axes(p.axes, tuple((axis, RULES[axis]) for axis in p.axes))
        for axis, size, on in zip(p.axes, p.shape, spec, strict=True):
            if on is not None and size % mesh.shape[on]:
                raise InputError(f"axis {axis} of parameter {name} is {size}, which mesh.{on} ({mesh.shape[on]}) does "
                                 "not divide")
        out[name] = NamedSharding(mesh, spec)
    return out


class State(flax.struct.PyTreeNode):
    """What a step changes."""

    params: dict[str, jax.Array]
    opt: dict[str, Any]  # {optimiser group: optax state}
    step: jax.Array  # int32, batches consumed
    skipped: jax.Array  # int32, updates in a row left out for a non-finite loss or gradient


def pick(tree: dict, names) -> dict:
    """The named entries of a flat dictionary."""
    return {name: tree[name] for name in names}


def mirrored(tree, names, change: Callable, other: Callable = lambda x: x):
    """Apply `change` to every dictionary in an optimiser state that has one entry per parameter, `other` to the rest."""
    def mirror(x):
        return isinstance(x, dict) and set(x) == set(names)
    return jax.tree.map(lambda x: change(x) if mirror(x) else other(x), tree, is_leaf=mirror)


def fresh(params, config: Config, shape: ModelConfig) -> dict[str, Any]:
    """The optimiser's first state for these parameters."""
    rows = config.optimizer(model.table(shape))
    return {group: rows[group].init(pick(params, names)) for group, names in model.groups(shape).items()}


def state_shardings(config: Config, shape: ModelConfig, mesh) -> State:
    """Where everything in the state lives: the optimiser's mirrors with their parameters, the rest on every device."""
    where, whole = shardings(shape, mesh), NamedSharding(mesh, PartitionSpec())
    opt = jax.eval_shape(lambda p: fresh(p, config, shape), model.init_shape(shape))
    opt = {group: mirrored(opt[group], names, lambda x: pick(where, x), lambda x: whole)
           for group, names in model.groups(shape).items()}
    return State(where, opt, whole, whole)


def seeds(config: Config) -> dict[str, jax.Array]:
    """Separate keys for initialisation and edits (the data's come from the seed by numpy)."""
    return {use: jax.random.fold_in(jax.random.key(config.seed), i) for i, use in enumerate(("init", "edits"))}


def first_state(config: Config, mesh) -> State:
    """The state before any step, born sharded."""
    def make():
        params = model.init(config.model, seeds(config)["init"])
        return State(params, fresh(params, config, config.model), jnp.int32(0), jnp.int32(0))
    return jax.jit(make, out_shardings=state_shardings(config, config.model, mesh))()


def apply_edits(edits: list[Callable], state: State, shape: ModelConfig, config: Config, mesh, context: model.Context):
    """(state, shape) after the edits due at a step; each optimiser group kept, reset or mapped as its edit says."""
    for i, edit in enumerate(edits):
        result = edited(edit, model.Model(shape, state.params), context._replace(key=jax.random.fold_in(context.key, i)))
        old_groups, (new, params), opt = model.groups(shape), result.model, {}
        first = fresh(params, config, new)
        for group, names in model.groups(new).items():
            policy = result.policy.get(group, "keep") if group in old_groups else "reset"
            if policy == "reset":
                opt[group] = first[group]
            elif policy == "keep":
                opt[group] = state.opt[group]
            else:
                opt[group] = mirrored(state.opt[group], old_groups[group], policy)
            if jax.tree.map(jnp.shape, opt[group]) != jax.tree.map(jnp.shape, first[group]):
                raise InputError(f"edit {getattr(edit, 'func', edit).__name__} says {policy!r} for the optimiser group "
                                 f"{group!r}, whose state then does not fit its parameters")
        state, shape = State(params, opt, state.step, state.skipped), new
        state = jax.device_put(state, state_shardings(config, shape, mesh))
    return state, shape


def make_step(config: Config, shape: ModelConfig) -> Callable:
    """`step(state, batch, rates, mask) -> (state, metrics)`: pure, so it can be jitted, sharded and mapped.

    rates: {group: float32}, at run time. An update whose loss or gradient is not finite leaves parameters and optimiser
    as they were, and counts.
    """
    transforms, groups = config.optimizer(model.table(shape)), model.groups(shape)

    def loss(params, batch, step, mask):
        losses = model.losses(effective(config, params, step, batch), batch, mask, shape, config.token_loss, {"step": step})
        (numerator, denominator), metrics = config.reduce(losses, batch)
        return numerator / jnp.maximum(denominator, 1e-9), metrics

    def step(state: State, batch, rates, mask: model.Mask):
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch, state.step, mask)
        squares = {g: sum(jnp.sum(jnp.square(grads[n]), dtype=value.dtype) for n in names) for g, names in groups.items()}
        norm = jnp.sqrt(sum(squares.values()))
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        scale = jnp.minimum(1.0, config.clip / jnp.maximum(norm, 1e-9)) if config.clip else 1.0
        params, opt = {}, {}
        for group, names in groups.items():
            clipped = {n: grads[n] * scale for n in names}
            old = pick(state.params, names)
            direction, opt[group] = transforms[group].update(clipped, state.opt[group], old)
            params |= {n: old[n] - (rates[group] * direction[n]).astype(old[n].dtype) for n in names}
            metrics[f"{group}/grad_norm"] = jnp.sqrt(squares[group])
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (params, opt), (state.params, state.opt))
        skipped = jnp.where(finite, 0, state.skipped + 1)
        new = State(*kept, state.step + 1, skipped)
        return new, metrics | {"train/loss": value, "train/grad_norm": norm, "skipped": skipped}

    return step


def compiled(config: Config, shape: ModelConfig, mesh, state: State, batch, rates, mask: model.Mask):
    """The step as an executable `(state, batch, rates) -> (state, metrics)` that gives its first argument's memory up."""
    step = jax.jit(make_step(config, shape), static_argnames="mask", donate_argnums=0,
                   out_shardings=(state_shardings(config, shape, mesh), None))
    return step.lower(state, batch, rates, mask=mask).compile()


@functools.partial(jax.jit, static_argnames="shape")
def probe(before, after, shape: ModelConfig) -> dict[str, jax.Array]:
    """How far an update moved each optimiser group's parameters, as a share of their norm."""
    def norm(trees, names):
        return jnp.sqrt(sum(jnp.sum(jnp.square(trees[n]), dtype=jnp.float32) for n in names))
    moved = jax.tree.map(jnp.subtract, after, before)
    return {f"{group}/update_ratio": norm(moved, names) / norm(before, names)
            for group, names in model.groups(shape).items()}


# -------------------------------------------------------------------------------------------------------- checkpoints


class Checkpoints:
    """Orbax checkpoints of a run: STEP/ with params, opt and meta, complete or absent, the last `keep` of them.

    Only the process that trains may open them with keep; readers clean up and delete nothing.
    """

    def __init__(self, root: Path, keep: int | None = None):
        absl_logging.set_verbosity(absl_logging.FATAL)  # what goes wrong reaches us as exceptions
        self.root, self.trash = root.resolve(), root.resolve() / "trash"
        if keep is not None:
            shutil.rmtree(self.trash, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False) if keep is None \
            else ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True, todelete_subdir="trash",  # retired by a rename: whole or gone
                preservation_policy=ocp.checkpoint_managers.LatestN(keep))
        self.manager = ocp.CheckpointManager(self.root, options=options)

    def steps(self) -> list[int]:
        """Steps that are complete on disk, ascending."""
        return sorted(int(p.name) for p in self.root.iterdir() if p.name.isdigit()) if self.root.is_dir() else []

    def save(self, step: int, state: State, meta: dict):
        """Begin to save; returns when the state may change again. Raises what the previous save met."""
        self.wait()
        rest = dict(opt=state.opt, step=state.step, skipped=state.skipped)
        self.manager.save(step, force=True, args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params), opt=ocp.args.StandardSave(rest), meta=ocp.args.JsonSave(meta)))

    def wait(self):
        """Until the save in flight is on disk."""
        self.manager.wait_until_finished()
        shutil.rmtree(self.trash, ignore_errors=True)

    def close(self):
        """Wait and stop; without this the last save is lost at exit."""
        self.wait()
        self.manager.close()

    def restore(self, step: int, **items):
        """Some of a checkpoint's items; raises InputError for one that is damaged."""
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax raises bare Exceptions, KeyErrors and ValueErrors for damaged files
            cause = error
            while cause.__cause__:
                cause = cause.__cause__
            reason = (str(cause).splitlines() or [""])[0][:160]
            raise InputError(f"checkpoint {self.root / str(step)} is damaged ({type(cause).__name__}: {reason}); "
                             "delete that directory and the run goes on from the checkpoint before it") from error

    def meta(self, step: int) -> dict:
        """What is known of a checkpoint before its arrays are read."""
        return self.restore(step, meta=ocp.args.JsonRestore())["meta"]

    def params(self, step: int, shape: ModelConfig, where: dict) -> dict[str, jax.Array]:
        """Parameters alone, onto any devices."""
        wanted = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[n])
                  for n, x in model.init_shape(shape).items()}
        return self.restore(step, params=ocp.args.StandardRestore(wanted))["params"]

    def state(self, step: int, config: Config, shape: ModelConfig, mesh) -> State:
        """The whole state, onto any mesh."""
        def make():
            params = model.init(shape, jax.random.key(0))
            return State(params, fresh(params, config, shape), jnp.int32(0), jnp.int32(0))
        want = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                            jax.eval_shape(make), state_shardings(config, shape, mesh))
        rest = dict(opt=want.opt, step=want.step, skipped=want.skipped)
        got = self.restore(step, params=ocp.args.StandardRestore(want.params), opt=ocp.args.StandardRestore(rest))
        return State(got["params"], **got["opt"])


# --------------------------------------------------------------------------------------------------------- evaluation


def evaluate(losses: Callable, params, step, sets: dict[str, data.HeldOut], suffix: str = "") -> dict[str, float]:
    """Held-out loss (nats per token) and bits per byte of each source, the latter with its standard error.

    losses: params, step, arrays -> [b, t]. The standard error is that of a ratio of sums over documents.
    """
    out = {}
    for name, held in sets.items():
        nats, tokens = np.zeros(len(held.paths)), 0
        for arrays, document in held.batches():
            here = np.asarray(losses(params, step, arrays), np.float64)
            np.add.at(nats, document[document >= 0], here[document >= 0])
            tokens += int(np.sum(document >= 0))
        size = held.bytes.sum()
        bits = nats / math.log(2)
        rate = bits.sum() / size
        n = len(bits)
        error = math.sqrt(np.sum((bits - rate * held.bytes) ** 2) * n / (n - 1)) / size if n > 1 else math.nan
        out |= {f"eval/{name}{suffix}/loss": nats.sum() / tokens, f"eval/{name}{suffix}/bpb": rate,
                f"eval/{name}{suffix}/bpb_se": error}
    return {k: float(v) for k, v in out.items()}


# ---------------------------------------------------------------------------------------------------------- reporting

# Dense bfloat16 peak of one device, FLOP/s, from the makers' data sheets. MFU is given where the device is known.
PEAK = {"NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12, "TPU v4": 275e12,
        "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12}


def peak() -> float | None:
    """Peak FLOP/s of all devices together, or None where the kind is not known."""
    kind = jax.devices()[0].device_kind
    known = [v for k, v in sorted(PEAK.items()) if kind.startswith(k)]
    return known[-1] * jax.device_count() if known else None


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


class Reporter:
    """metrics.jsonl, and a live line on a terminal or a plain one at intervals elsewhere."""

    def __init__(self, path: Path, start: int, course: Course):
        rows = []
        if path.exists():  # keep what the checkpoint has seen; the end's own rows are written again
            for line in path.read_bytes().split(b"\n")[:-1]:
                row = json.loads(line)
                if row["step"] <= start and not any(k.endswith(".test/bpb") for k in row):
                    rows.append(line + b"\n")
        partly = path.with_suffix(".partial")
        partly.write_bytes(b"".join(rows))
        partly.rename(path)
        self.file, self.course, self.start = open(path, "a"), course, start
        self.live, self.begun, self.last, self.said = sys.stdout.isatty(), time.perf_counter(), None, 0.0

    def row(self, row: dict):
        """One JSON object on a line of its own."""
        self.file.write(json.dumps({k: v if not isinstance(v, float) or math.isfinite(v) else None
                                    for k, v in row.items()}) + "\n")

    def sync(self):
        """Every row so far onto the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def step(self, row: dict):
        """Write a step's row and show where the run is."""
        now, step, total = time.perf_counter(), row["step"], int(self.course.ends[-1])
        seconds = now - (self.last or now)
        if self.last:
            work = self.course.flops[step] - self.course.flops[step - 1]
            row |= {"perf/step_ms": 1e3 * seconds,
                    "perf/tokens_per_s": (self.course.tokens[step] - self.course.tokens[step - 1]) / seconds}
            row |= {"perf/mfu": work / seconds / peak()} if peak() else {}
            row["perf/host_stall"] = row.pop("waited") / seconds
        row.pop("waited", None)
        self.last = now
        self.row(row)
        if not self.live and now - self.said < 5 and step != total:
            return
        self.said = now
        done = self.course.flops[step] - self.course.flops[self.start]
        left = (self.course.flops[-1] - self.course.flops[step]) / done * (now - self.begun)
        loss = row["train/loss"]
        mfu = f" | mfu {row['perf/mfu']:.1%}" if "perf/mfu" in row else ""
        text = (f"{100 * self.course.flops[step] / self.course.flops[-1]:5.1f}% | step {step}/{total} | loss {loss:.3f} | "
                f"lr {row['train/lr']:.2e} | grad {row['train/grad_norm']:.2f} | "
                f"{row.get('perf/tokens_per_s', 0):,.0f} tok/s{mfu} | ETA {duration(left)}")
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[2K{text[:width]}", end="", flush=True)
        else:
            print(text, flush=True)

    def say(self, text: str):
        """A line of its own, above the live one."""
        print(("\r\x1b[2K" if self.live else "") + text, flush=True)

    def pause(self):
        """Leave what comes now out of the next step's time."""
        self.last = None
        self.sync()




# --------------------------------------------------------------------------------------------------------------- the run


def put(batch: dict, mesh) -> dict[str, jax.Array]:
    """A batch onto the devices, its rows over the mesh axes data and fsdp."""
    where = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return {k: jax.device_put(v, where) for k, v in batch.items()}


def past(config: Config, course: Course, written: dict, step: int) -> dict[str, Any]:
    """What the first `step` steps depend on in a config and its JSON, flat, so that two configs can be compared by it."""
    fields = ("seed", "model", "data", "phases", "optimizer", "clip", "max_skipped", "weights", "token_loss", "reduce")
    out = {k: json.loads(json.dumps(written[k])) for k in fields}
    out["phases"] = [p for p, end, now in zip(out["phases"], course.ends, config.phases, strict=True)
                     if end - now.steps < step]
    for phase, now, end in zip(out["phases"], config.phases, course.ends, strict=False):
        del phase["schedule"], phase["rates"]  # their effect, the rates, is compared below
        if end >= step and not callable(now.mixture):
            del phase["steps"]
    return flatten(out) | {"schedule (it would change the rates of steps already taken)": data.digest(
        {group: r[1:step + 1].tolist() for group, r in course.rates.items() if r[1:step + 1].any()})}


def check_resume(run: Path, config: Config, course: Course, step: int, context: model.Context):
    """Refuse a config under which the steps that a run has taken would have been others."""
    written = json.loads((run / "config.json").read_text())
    try:
        old = from_json(Config, written)
        old_course = plot_course(old, shapes(old, context))
    except (AttributeError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{run / 'config.json'} cannot be compared with this config ({error}); give the run another "
                         "--name") from error
    before, now = past(old, old_course, written, step), past(config, course, to_json(config), step)
    changed = [f"{k} was {before.get(k)!r} and is {now.get(k)!r}" if "schedule" not in k else k
               for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    if step > course.ends[-1]:
        changed.append(f"phases end at step {course.ends[-1]}")
    if changed:
        raise InputError(f"run {run} has taken {step} steps under another config: {'; '.join(changed)}; change it back, "
                         "or give this one another --name")


def banner(config: Config, course: Course, loader: Loader, mesh, memory):
    """What is about to run, before it runs."""
    devices, first, last = mesh.devices.size, course.models[0], course.models[-1]
    params = " -> ".join(f"{model.count(m):,}" for m in dict.fromkeys(course.models))
    size = 1024
    square = jnp.ones((size, size), first.dtype)
    multiply = jax.jit(lambda x: x @ x)
    multiply(square).block_until_ready()
    begun = time.perf_counter()
    for _ in range(4):
        multiply(square).block_until_ready()
    speed = 0.5 * devices * 4 * 2 * size**3 / (time.perf_counter() - begun)  # half of a bare matmul, say
    lines = {
        "run": f"{config.runs}/{config.name}",
        "parameters": f"{params} ({first.layers} -> {last.layers} layers)" if first != last else params,
        "tokens": f"{course.tokens[-1]:,}, {course.tokens[-1] / model.count(last):.1f} a parameter; epochs: "
                  + ", ".join(f"{name} {n:.2f}" for name, n in loader.epochs(int(course.ends[-1])).items()),
        "FLOPs": f"{course.flops[-1]:.3g}",
        "memory": f"{(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20:,.0f} MiB a device for the first "
                  "phase's step",
        "devices": f"{devices} x {jax.devices()[0].device_kind}, mesh "
                   + " ".join(f"{k} {v}" for k, v in mesh.shape.items()),
        "attention": f"{first.attention}, {first.dtype}",
        "expected": f"about {duration(course.flops[-1] / speed)} at half the speed of a bare matmul here",
    }
    print("\n".join(f"{k:>11}  {v}" for k, v in lines.items()), flush=True)


def assemble(config: Config):
    """(config with its vocabulary, tokenizer, caches): everything a run reads."""
    tokenizer = data.make_tokenizer(config.data, config.model.vocab)
    if config.model.vocab not in (0, tokenizer.vocab):
        raise InputError(f"model.vocab is {config.model.vocab}, but the tokenizer {config.data.tokenizer!r} has "
                         f"{tokenizer.vocab} pieces; allowed is that, or 0 to take it from the tokenizer")
    caches = {name: data.build(name, config.data, tokenizer, config.seed) for name in config.data.sources}
    for name, cache in caches.items():
        for kind, number in cache.total["counts"].items():
            if kind.startswith("skipped") and not kind.endswith("empty"):
                print(f"source {name}: {number} documents {kind}")
        for split in ("train", *(["test"] if config.data.test else []), *(["dev"] if config.data.dev else [])):
            if not cache.total["counts"].get(f"{split} documents"):
                raise InputError(f"source {name!r} has {cache.total['counts']['documents']} documents, of which none is in "
                                 f"the {split} split; give it more documents (a separator cuts a text file into many), "
                                 f"or another data.{'test' if split == 'train' else split}")
    return replace(config, model=replace(config.model, vocab=tokenizer.vocab)), tokenizer, caches


class Stopped(Exception):
    """SIGTERM came, and the state is saved."""


@contextlib.contextmanager
def sigterm():
    """A list that is no longer empty once SIGTERM has come."""
    came = []
    old = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, old)


class Run:
    """A run in progress: what was worked out for it, and the state that its steps change."""

    def __init__(self, config: Config, file: str = ""):
        check(config)
        jax.config.update("jax_enable_x64", "float64" in (config.model.dtype, config.model.param_dtype))
        self.mesh = make_mesh(config.mesh)
        rows = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        for i, phase in enumerate(config.phases):
            if phase.batch % rows:
                raise InputError(f"phases.{i}.batch is {phase.batch}, which the {rows} devices on the mesh axes data and "
                                 "fsdp do not divide")
        self.config, self.tokenizer, self.caches = assemble(config)
        self.file, self.directory = file, Path(config.runs).expanduser() / config.name
        self.loader = Loader(self.caches, config.phases, config.data, self.tokenizer, config.seed)
        self.context = model.Context(jax.random.key(0), 0, self.tokenizer,
                                     lambda n: [self.loader.batch(i + 1).arrays for i in range(n)], load)
        self.course = plot_course(self.config, shapes(self.config, self.context))
        for shape in self.course.models:
            shardings(shape, self.mesh)
        self.total = int(self.course.ends[-1])
        self.compiled: dict = {}

    def begin(self) -> int:
        """Restore the last checkpoint, or draw the first state; gives the step the run is at."""
        self.checkpoints = Checkpoints(self.directory / "checkpoints", self.config.keep)
        self.fingerprints = {name: cache.fingerprint for name, cache in self.caches.items()}
        start = (self.checkpoints.steps() or [0])[-1]
        if start and (self.directory / "config.json").exists():
            check_resume(self.directory, self.config, self.course, start, self.context)
            meta = self.checkpoints.meta(start)
            if meta["fingerprints"] != self.fingerprints:
                raise InputError(f"run {self.directory} was trained on other text than {', '.join(self.fingerprints)} now "
                                 "gives; put it back, or give this config another --name")
            self.shape, self.since = from_json(ModelConfig, meta["model"]), meta["since_reset"]
            self.state = self.checkpoints.state(start, self.config, self.shape, self.mesh)
        else:
            self.shape, self.since, self.state = self.config.model, None, first_state(self.config, self.mesh)
        self.describe()
        self.out = Reporter(self.directory / "metrics.jsonl", start, self.course)
        if start:
            self.out.say(f"resuming from step {start}")
        return start

    def describe(self):
        """config.json, tokenizer.model and source/ of the run directory."""
        (self.directory / "source").mkdir(exist_ok=True)
        for path in [ROOT / f"{m}.py" for m in ("train", "model", "data")] + [Path(self.file)] * bool(self.file):
            shutil.copy(path, self.directory / "source")
        for name, content in {"tokenizer.model": self.tokenizer.model,
                              "config.json": json.dumps(to_json(self.config), indent=1).encode()}.items():
            (self.directory / f"{name}.partial").write_bytes(content)
            (self.directory / f"{name}.partial").rename(self.directory / name)

    def edit(self, edits: list[Callable], step: int):
        """Apply the edits due after a step."""
        key = jax.random.fold_in(seeds(self.config)["edits"], step)
        self.state, self.shape = apply_edits(edits, self.state, self.shape, self.config, self.mesh,
                                             self.context._replace(key=key, step=step))
        if any(e.apply in edits for p in self.config.phases for e in p.repeat):
            self.since = 0
        names = ", ".join(getattr(e, "func", e).__name__ for e in edits)
        self.out.say(f"step {step}: {names}; {self.shape.layers} layers, {model.count(self.shape):,} parameters")

    def update(self, step: int, batch: data.Batch, watch: bool):
        """Dispatch one update, compiling where the phase is new; gives its metrics, still on the device."""
        arrays, mask = put(batch.arrays, self.mesh), model.Mask(**batch.mask)
        rates = {g: np.float32(self.course.rates[g][step]) for g in model.groups(self.shape)}
        key = (self.loader.phase_of(step), mask)
        if key not in self.compiled:
            self.out.pause()
            self.compiled[key] = compiled(self.config, self.shape, self.mesh, self.state, arrays, rates, mask)
            if len(self.compiled) == 1:
                banner(self.config, self.course, self.loader, self.mesh, self.compiled[key].memory_analysis())
        before = jax.tree.map(jnp.copy, self.state.params) if watch else None
        self.state, metrics = self.compiled[key](self.state, arrays, rates)
        return metrics | (probe(before, self.state.params, self.shape) if watch else {})

    def finish(self, step: int, metrics: dict, extra: dict):
        """Fetch a step's metrics and write its row: one step late, so that the device never waits for the host."""
        metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
        phase, skipped = self.loader.phase_of(step), int(metrics.pop("skipped"))
        self.out.step({"step": step, **metrics, "train/lr": float(self.course.rates["matrix"][step]),
                       "train/tokens": int(self.course.tokens[step]), "train/flops": float(self.course.flops[step]),
                       **extra, "phase": phase, "model/params": model.count(self.course.models[phase]),
                       "train/skipped": skipped})
        if skipped >= self.config.max_skipped:
            self.out.sync()
            self.checkpoints.close()
            raise InputError(f"the loss or gradient was not finite at step {step} and the {skipped - 1} steps before it; "
                             "give a lower schedule.peak or another clip under another --name, or look at that data")

    def evaluate(self, step: int):
        """A row of held-out figures on the fixed subset of dev, and of the config's own evals."""
        phase = self.config.phases[self.loader.phase_of(step)]
        sets = {name: data.held_out(cache, "dev", self.tokenizer, phase.seq, phase.batch, self.config.overlap,
                                    self.config.eval_tokens) for name, cache in self.caches.items()}
        losses, apply = evaluators(self.config, self.shape)
        row = evaluate(losses, self.state.params, self.state.step, sets) if self.config.data.dev else {}
        for own in self.config.evals:
            row |= own(self.state.params, apply)
        if row:
            self.out.row({"step": step, **row, "train/tokens": int(self.course.tokens[step]),
                          "train/flops": float(self.course.flops[step]), "phase": self.loader.phase_of(step)})
            self.out.say(f"step {step}: " + ", ".join(f"{k.removeprefix('eval/')} {v:.4f}" for k, v in row.items()))

    def save(self, step: int):
        """Begin a checkpoint, once every row up to it is on disk."""
        self.out.sync()
        self.checkpoints.save(step, self.state, dict(
            step=step, model=to_json(self.shape), fingerprints=self.fingerprints, since_reset=self.since,
            tokens=int(self.course.tokens[step]), flops=float(self.course.flops[step])))

    def train(self) -> dict[str, Any]:
        """From the last checkpoint to the end; gives what summary.json holds. Raises Stopped after a SIGTERM."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with data.locked(self.directory / ".lock", f"run {self.directory}"), sigterm() as stop:
            step = self.begin()
            if step == self.total and (self.directory / "summary.json").exists():
                self.checkpoints.close()
                return json.loads((self.directory / "summary.json").read_text())
            pending, edited_at = None, -math.inf
            while step < self.total:
                phase = self.loader.phase_of(step + 1)
                end = int(self.course.ends[phase])
                with contextlib.closing(data.prefetch(self.loader.batch, range(step + 1, end + 1))) as batches:
                    while step < end:
                        if edits := due(self.config, self.course, step):
                            pending = self.finish(*pending) if pending else None
                            self.edit(edits, step)
                            edited_at = step
                            self.out.pause()
                        waiting, step = time.perf_counter(), step + 1
                        batch = next(batches)
                        waited = time.perf_counter() - waiting
                        metrics = self.update(step, batch, watch=step - edited_at <= 5)
                        if pending:
                            self.finish(*pending)
                        pending = step, metrics, batch.metrics | {"waited": waited}
                        evaluating = step == end or step % self.config.eval_every == 0
                        saving = step == end or step % self.config.save_every == 0 or bool(stop)
                        if evaluating or saving:
                            pending = self.finish(*pending)
                            if evaluating and not stop:
                                self.evaluate(step)
                            if saving:
                                self.save(step)
                            if stop:
                                self.checkpoints.close()
                                raise Stopped(f"stopped by SIGTERM; step {step} is saved, and the same command goes on")
                            self.out.pause()
                        self.since = None if self.since is None else self.since + 1
            self.checkpoints.close()
            return self.conclude()

    def conclude(self) -> dict[str, Any]:
        """The last row, samples, curves and summary.json, by the commands in tools/."""
        (self.directory / "samples.txt").write_text(verb("sample", [str(self.directory)]), "utf-8")
        result = verb("eval", [str(self.directory)])
        held_out = {k: v for k, v in result.items() if k.startswith("eval/")}
        self.out.row({"step": self.total, **held_out, "train/tokens": int(self.course.tokens[-1]),
                      "train/flops": float(self.course.flops[-1]), "phase": len(self.config.phases) - 1})
        self.out.sync()
        verb("curves", [str(self.directory)])
        rows = [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]
        last = next(r for r in reversed(rows) if "train/loss" in r)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        versions = {name: importlib.metadata.version(name) for name in
                    ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "sentencepiece", "numpy")}
        summary = {**last, **result, "versions": versions | {"python": platform.python_version()}, "commit": commit,
                   "host": platform.node(), "device": jax.devices()[0].device_kind, "devices": jax.device_count()}
        (self.directory / "summary.partial").write_text(json.dumps(summary, indent=1))
        (self.directory / "summary.partial").rename(self.directory / "summary.json")
        return summary


def effective(config: Config, params, step, batch) -> dict[str, jax.Array]:
    """The parameters that the forward pass uses: through the config's `weights`, where it has one."""
    return config.weights(params, step, batch) if config.weights else params


def evaluators(config: Config, shape: ModelConfig) -> tuple[Callable, Callable]:
    """(losses(params, step, arrays) -> [b t], apply(params, ids [b t]) -> logits [b t v]), jitted; causal attention."""
    causal = model.Mask("causal", 0)

    @jax.jit
    def losses(params, step, arrays):
        return model.losses(effective(config, params, step, arrays), arrays, causal, shape)

    @jax.jit
    def apply(params, ids):
        one = jnp.ones_like(ids)
        arrays = dict(tokens=ids, segments=one, positions=jnp.cumsum(one, 1) - 1)
        ready = effective(config, params, jnp.int32(0), arrays)
        return model.logits(ready, model.hidden(ready, **arrays, mask=causal, config=shape), shape)

    return losses, apply


def load(run: str, step: int | None = None):
    """(params, config, tokenizer, apply) of a run's checkpoint, for notebooks: apply(params, ids [b t]) -> logits [b t v].

    `config.model` is the shape of that checkpoint. Without a step: the newest, or where embeddings are being reset, the
    one longest after a reset.
    """
    directory = Path(run).expanduser()
    if not (directory / "config.json").is_file():
        raise InputError(f"{run!r} is no run directory: it has no config.json")
    checkpoints = Checkpoints(directory / "checkpoints")
    found = checkpoints.steps()
    if not found or (step is not None and step not in found):
        raise InputError(f"run {run} has no checkpoint{f' {step}' if step is not None else ''}; there are {found}")
    metas = {s: checkpoints.meta(s) for s in (found if step is None else [step])}
    age = {s: math.inf if m["since_reset"] is None else m["since_reset"] for s, m in metas.items()}
    step = max(metas, key=lambda s: (age[s], s))
    config = from_json(Config, json.loads((directory / "config.json").read_text()))
    config = replace(config, model=from_json(ModelConfig, metas[step]["model"]))
    jax.config.update("jax_enable_x64", "float64" in (config.model.dtype, config.model.param_dtype))
    where = dict.fromkeys(model.table(config.model), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    params = checkpoints.params(step, config.model, where)
    return params, config, data.load_tokenizer(directory / "tokenizer.model"), evaluators(config, config.model)[1]


# ---------------------------------------------------------------------------------------------------- the command line


class Arguments(argparse.ArgumentParser):
    """The arguments of a verb, whose mistakes are InputErrors."""

    def __init__(self, verb: str, text: str):
        super().__init__(prog=f"python train.py {verb}", description=text, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        """Raise instead of printing the usage."""
        raise InputError(f"{self.prog.removeprefix('python train.py ')}: {message}; --help shows what is allowed")


def verb(name: str, arguments: list[str]):
    """Run tools/NAME.py."""
    return load_file(ROOT / "tools" / f"{name}.py").main(arguments)


def main(arguments: list[str]) -> int:
    """The command line; 2 for what the user can mend, in one sentence on stderr."""
    jax.config.update("jax_compilation_cache_dir", str(data.cache_home() / "compiled"))
    try:
        if arguments and (ROOT / "tools" / f"{arguments[0]}.py").is_file():
            verb(arguments[0], arguments[1:])
        else:
            config, file = parse(arguments)
            Run(config, file).train()
            directory = Path(config.runs) / config.name
            print(f"\nthe run is complete: {directory}; see curves.png, samples.txt, metrics.jsonl, summary.json there\n"
                  f"  python train.py sample {directory} --prompt 'def main('\n"
                  f"  python train.py {os.path.relpath(file)} --schedule.peak 2e-3 --name gentler   # change something\n"
                  "a run that was stopped resumes by the command that began it")
        return 0
    except Stopped as stopped:
        print(f"\n{stopped}", flush=True)
        return 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":  # one module called `train`, for this process and for every config that imports it
    sys.path.insert(0, str(ROOT))
    import train
    sys.exit(train.main(sys.argv[1:]))

"""One run: a config becomes phases, a schedule, an optimiser and a loop that can be killed at any moment.

    python train.py [CONFIG] [--path.to.field VALUE ...]   train, or resume; CONFIG: configs/quickstart.py
    python train.py VERB ...                               run tools/VERB.py: sample, eval, bench, corpus, ...

Steps count batches consumed, from 1. Checkpoint s is the state after s steps and before the edits due at s;
these are functions of (seed, step, index) and are applied again on resume.
"""
import argparse
import ast
import collections
import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
import traceback
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import typeguard
import tyro
from jax.experimental import multihost_utils

import data
import model
from data import DataConfig, InputError, Loader
from model import MeshConfig, ModelConfig, Schedule, adamw, cross_entropy, weighted_mean

ROOT = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------------- config

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
    accumulate: int = 1  # parts that a batch is taken in, one after the other; it must divide the batch
    lengths: Callable | None = None  # progress -> {row length: weight}; a batch stays batch x seq tokens
    edits: tuple[Callable, ...] = ()  # applied to the model on entering: model, context -> Edited
    repeat: tuple[Edit, ...] = ()  # edits that recur within the phase
    mixture: dict[str, float] | Callable | None = None  # of sources, or progress, log -> it; None: by size
    steer: int = 0  # steps between evaluations whose dev losses go into that log; 0 is none
    packing: Callable = data.concat_and_split  # lengths, seq (, documents) -> plan
    order: Callable = data.shuffled  # draw, rows, progress, key -> place in the plan
    objective: Callable = data.causal  # row, rng -> row, mask
    schedule: Schedule | None = None  # over this phase's own budget, in place of the run's over the whole
    rates: dict[str, Schedule | float] = field(default_factory=dict)  # a group's own, or a factor; 0 freezes


@dataclass(frozen=True)
class Config:
    """One experiment."""

    name: str = ""  # of the run; empty: the config file's stem
    runs: str = "runs"  # directory that runs live in
    seed: int = 0  # initialisation, data order and edits draw from seeds derived from it
    model: ModelConfig = ModelConfig()  # the model the run starts with
    init_from: str = ""  # RUN, RUN@STEP or hf:DIRECTORY to start from; a run's own checkpoints come first
    init_with: Literal["params", "all"] = "params"  # "all": its optimiser state and place in the data too
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
    overlap: int = 64  # positions that a window of a long held-out document shares with the last
    save_every: int = 200  # steps between checkpoints; there is one at the end of each phase too
    save_minutes: float = 15.0  # from one checkpoint to the next at most
    keep: int = 3  # checkpoints kept, the newest
    keep_every: int = 0  # and those of each multiple of so many steps; 0 is none
    prompts: tuple[str, ...] = ("",)  # continued in samples.txt at the end
    sample_tokens: int = 200  # of each continuation
    sample_temperature: float = 0.8  # 0 takes the likeliest token
    tracker: Literal["none", "tensorboard", "wandb"] = "none"  # gets the rows of metrics.jsonl too


# -------------------------------------------------------------------------------- configs in, out and checked

def load_file(path: str | Path):
    """Run a Python file as a module of its own, once per process."""
    path = Path(path).resolve()
    if path.parent in (ROOT, ROOT / "configs", ROOT / "tools"):  # these import one another, by these names
        return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    name = f"{path.stem}_{data.digest(str(path))[:8]}"
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
    """The `config` of a config file or, of FILE:ARM, one of its `arms`."""
    path, _, arm = path.partition(":")
    if not Path(path).is_file():
        known, verbs = (sorted(p.stem for p in (ROOT / d).glob("*.py")) for d in ("configs", "tools"))
        raise InputError(f"{path!r} is neither a config file (configs/ has {', '.join(known)}) nor a verb "
                         f"({', '.join(verbs)})")
    try:
        if path.endswith(".json"):  # of a run
            return from_json(Config, json.loads(Path(path).read_text()))
        arms = {"": getattr(load_file(path), "config", None)} | getattr(load_file(path), "arms", {})
    except InputError:
        raise
    except Exception as error:  # whatever a config file does wrong is the user's to mend
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if f.filename == str(Path(path).resolve())]
        line = f", line {lines[-1]}" if lines else ""
        raise InputError(f"config file {path}{line}: {type(error).__name__}: {error}") from error
    if not isinstance(arms.get(arm), Config):
        raise InputError(f"config file {path} defines no " + (
            f"arm {arm!r}; its arms: {', '.join(arms)[2:] or 'none'}" if arm else "`config = Config(...)`"))
    return arms[arm]


def parts(value) -> dict[str, tuple[Any, Any]]:
    """{name: (part, type)} of a config value: fields, dictionary entries, items, a partial's arguments."""
    if dataclasses.is_dataclass(value):
        return {n: (getattr(value, n), hint) for n, hint in typing.get_type_hints(type(value)).items()}
    if isinstance(value, dict):
        return {name: (part, Any) for name, part in value.items()}
    if isinstance(value, tuple):
        return {str(i): (part, Any) for i, part in enumerate(value)}
    if isinstance(value, functools.partial):
        takes = inspect.signature(value.func).parameters.items()
        return {name: (value.keywords.get(name, p.default), Any) for name, p in takes}
    return {}


def to_json(value):
    """A config as JSON; a function is its `file:name`, its arguments and a hash of its source."""
    if callable(value):
        function = getattr(value, "func", value)
        file = Path(inspect.getsourcefile(function)).resolve()
        file = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
        return {"function": f"{file.as_posix()}:{function.__qualname__}",
                "arguments": {k: to_json(v) for k, v in getattr(value, "keywords", {}).items()},
                "source": data.digest(inspect.getsource(function))}
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    if isinstance(value, dict) or dataclasses.is_dataclass(value):
        return {name: to_json(part) for name, (part, _) in parts(value).items()}
    return value


def from_json(hint, value):
    """The inverse of `to_json` for a type; the files of the functions must be where they were."""
    if isinstance(value, dict) and {"function", "arguments"} <= value.keys():
        file, name = value["function"].rsplit(":", 1)
        function = getattr(load_file(ROOT / file), name)
        return functools.partial(function, **value["arguments"]) if value["arguments"] else function
    options = [h for h in typing.get_args(hint) if h is not type(None)]
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{k: from_json(hints[k], v) for k, v in value.items()})
    if isinstance(value, dict):
        return from_json(options[0], value) if typing.get_origin(hint) is not dict else \
            {k: from_json(options[1], v) for k, v in value.items()}
    return tuple(from_json(options[0], v) for v in value) if isinstance(value, list) else value


def flatten(value, path: str = "") -> dict[str, Any]:
    """Leaves of a JSON value by dotted path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items or not value:
        return {path: value}
    return {k: v for key, child in items for k, v in flatten(child, f"{path}.{key}".strip(".")).items()}


def override(value, names: list[str], word: str, flag: str):
    """`value` with the part at a path set from a word of the command line; `check` judges its type."""
    if not names:
        if isinstance(value, str):
            return word
        try:
            parsed = ast.literal_eval(word.capitalize() if word in ("true", "false", "none") else word)
        except (ValueError, SyntaxError):
            return word
        return float(parsed) if isinstance(value, float) and type(parsed) is int else parsed
    inside = parts(value)
    name = names[0] if names[0] in inside else names[0].replace("-", "_")
    if name not in inside:
        close = difflib.get_close_matches(name, inside, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed are: {', '.join(inside) or 'none'}"
        raise InputError(f"unknown field {flag}: there is no {name!r} here; {hint}")
    part = override(inside[name][0], names[1:], word, flag)
    if isinstance(value, functools.partial):
        return functools.partial(value.func, **value.keywords | {name: part})
    if isinstance(value, tuple):
        return tuple(part if str(i) == name else v for i, v in enumerate(value))
    return value | {name: part} if isinstance(value, dict) else replace(value, **{name: part})


def parse(arguments: list[str]) -> tuple[Config, str]:
    """(config, its file) from the command line of a run."""
    arguments = list(arguments)
    named = arguments and not arguments[0].startswith("-")
    file = arguments.pop(0) if named else str(ROOT / "configs/quickstart.py")
    config = load_config(file)
    if {"-h", "--help"} & set(arguments):
        tyro.cli(Config, default=config, args=["--help"], prog=f"python train.py {file}",
                 use_underscores=True, config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands))
    while arguments:
        flag, equals, word = arguments.pop(0).partition("=")
        if not flag.startswith("--"):
            raise InputError(f"{flag!r} is not understood here; fields are set by --path.to.field VALUE")
        if not equals and (not arguments or arguments[0].startswith("--")):
            raise InputError(f"{flag} needs a value: {flag} VALUE")
        config = override(config, flag[2:].split("."), word if equals else arguments.pop(0), flag)
    return replace(config, name=config.name or Path(file.replace(".py:", "-")).name.removesuffix(".py")), file


def fits(value, hint, path: str):
    """Raise InputError unless a config value has its declared type, and its functions can be written down."""
    if callable(value):
        inner = getattr(value, "func", value)
        if not inspect.isfunction(inner) or "<" in inner.__qualname__ or getattr(value, "args", ()):
            raise InputError(f"{path} is {getattr(inner, '__qualname__', inner)!r}; allowed is a top-level "
                             "function of a file, or a functools.partial of one with keyword arguments")
        for name, part in getattr(value, "keywords", {}).items():
            try:
                json.dumps(part)
            except TypeError:
                raise InputError(f"{path}.{name} is {part!r}; allowed is what JSON can hold") from None
    try:
        every = typeguard.CollectionCheckStrategy.ALL_ITEMS
        typeguard.check_type(value, hint, collection_check_strategy=every)
        if isinstance(value, bool) and hint is not bool:
            raise typeguard.TypeCheckError(f"is not {hint}")
    except typeguard.TypeCheckError:
        options = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        allowed = " or ".join(map(repr, options)) or getattr(hint, "__name__", str(hint))
        raise InputError(f"{path} is {value!r} ({type(value).__name__}); allowed is {allowed}") from None
    for name, (part, part_hint) in parts(value).items() if not callable(value) else ():
        fits(part, part_hint, f"{path}.{name}".strip("."))


POSITIVE = set("layers embed heads kv_heads head_dim mlp steps batch seq accumulate every peak keep "
               "eval_every eval_tokens save_every max_skipped sample_tokens shard_tokens window sample_mib "
               "logits_mib rope_theta save_minutes".split())
NOT_NEGATIVE = set("seed vocab unroll clip warmup final overlap until dev test sample_temperature steer "
                   "epochs cycle keep_every".split())


def check(config: Config) -> None:
    """Raise InputError for a wrong type or an impossible combination, before anything is built."""
    fits(config, Config, "")
    for path, value in flatten(to_json(config)).items():
        name = path.rsplit(".", 1)[-1]
        if ".arguments." in path or name not in POSITIVE | NOT_NEGATIVE:
            continue
        if not value >= 0 or (name in POSITIVE and value == 0):  # so that NaN is caught
            least = "more than 0" if name in POSITIVE else "0 or more"
            raise InputError(f"{path} is {value}; allowed is {least}")
    m, d = config.model, config.data
    rules = [
        (m.heads % m.kv_heads, f"model.heads is {m.heads}, which model.kv_heads ({m.kv_heads}) does not "
         "divide; allowed is a multiple of it, since every key-value head serves as many query heads"),
        (m.head_dim % 2, f"model.head_dim is {m.head_dim}; allowed is an even number: RoPE rotates pairs"),
        (len(m.rope_scaling) not in (0, 1, 4) or not all(0 < x < math.inf for x in m.rope_scaling)
         or m.rope_scaling[1:2] >= m.rope_scaling[2:3] != (), f"model.rope_scaling is {m.rope_scaling}; "
         "allowed are (), (factor,) and (factor, low, high, old context), above 0 with low below high"),
        (config.init_with == "all" and config.init_from.startswith("hf:"), 'init_with is "all", but '
         f"{config.init_from} has no optimiser state; allowed is \"params\""),
        (m.unroll and m.layers % m.unroll, f"model.unroll is {m.unroll}, which does not divide model.layers "
         f"({m.layers}); allowed is a divisor, or 0 for all"),
        (not config.phases, "phases is empty; allowed is one phase and more"),
        (not d.sources, "data.sources is empty; allowed is one source and more"),
        (d.dev + d.test >= 1, f"data.dev and data.test are {d.dev} and {d.test}; allowed are shares that "
         "leave something to train on"),
        (config.tracker != "none" and not getattr(importlib.util.find_spec(config.tracker), "origin", None),
         f"tracker is {config.tracker!r}, which is not installed; pip install {config.tracker}"),
    ]
    for i, phase in enumerate(config.phases):
        mix = phase.mixture if isinstance(phase.mixture, dict) else dict.fromkeys(d.sources, 1.0)
        lengths = list(phase.lengths(0.0)) if phase.lengths else [phase.seq]
        odd = not any(mix.values()) or not all(0 <= w < math.inf for w in mix.values())
        rules += [
            (config.overlap >= phase.seq, f"overlap is {config.overlap}; allowed is less than phases.{i}.seq "
             f"({phase.seq})"),
            (odd or mix.keys() - d.sources,
             f"phases.{i}.mixture is {mix}; allowed are weights of 0 and more, not all 0, for the sources "
             f"{', '.join(d.sources)}"),
            (phase.steer and not (callable(phase.mixture) and d.dev), f"phases.{i}.steer is {phase.steer}; "
             "allowed is 0, unless the mixture is a function and there is a dev split to steer by"),
            (d.stream and (phase.mixture is None and len(d.sources) > 1 or any(
                s.epochs for s in d.sources.values())), f"data.stream is true, but phases.{i}.mixture or a "
             "source's epochs ask how large a source is; allowed are weights, and epochs of 0"),
            (any(phase.batch * phase.seq % n for n in lengths), f"phases.{i}.lengths gives {lengths}; "
             f"allowed are divisors of batch x seq ({phase.batch * phase.seq})")]
    rules += [(not 0 < s.decay <= 1, f"{path}.decay is {s.decay}; allowed is above 0 and at most 1")
              for path, s in model.schedules(config).items()]
    for broken, sentence in rules:
        if broken:
            raise InputError(sentence)


# ------------------------------------------------------------------------------------------------ checkpoints

def leads() -> bool:
    """Is this the one of a run's processes that writes files and prints?"""
    return jax.process_index() == 0


def everywhere(value) -> np.ndarray:
    """What each process gives [processes]; all of them wait for each other."""
    return multihost_utils.process_allgather(np.array(value))


class Damaged(InputError):
    """A checkpoint that cannot be read, or is not what was written."""


@contextlib.contextmanager
def blame(errors=ValueError, kind: type[InputError] = InputError, sentence: str = "{error}"):
    """What goes wrong inside (mesh and edits raise ValueErrors), for the user; {reason}: its first cause."""
    try:
        yield
    except errors as error:
        cause = error
        while cause.__cause__:
            cause = cause.__cause__
        text = (str(cause).splitlines() or [""])[0].partition(" [tensorstore_spec")[0]
        reason = f"{type(cause).__name__}: {text if len(text) < 166 else text[:60] + ' ... ' + text[-100:]}"
        raise kind(sentence.replace("{error}", str(error)).replace("{reason}", reason)) from error


class Checkpoints:
    """Orbax checkpoints of a run: STEP/ with params, opt and meta, whole or absent.

    keep: how many of the newest are kept, keep_every: and of which steps. Only a run that trains, in each of
    its processes, may open them with these; readers clean up and delete nothing.
    """

    def __init__(self, root: Path, keep: int | None = None, keep_every: int = 0):
        for name in ("absl", "asyncio"):  # what goes wrong reaches us as exceptions
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        self.root, self.trash = root.resolve(), root.resolve() / "trash"
        policies = ocp.checkpoint_managers
        kept = [policies.LatestN(keep)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        options = dict(read_only=True, save_interval_steps=0, create=False) if keep is None else dict(
            cleanup_tmp_directories=True, todelete_subdir="trash",  # retired by a rename: whole or gone
            preservation_policy=policies.AnyPreservationPolicy(kept))
        self.manager = ocp.CheckpointManager(self.root, options=ocp.CheckpointManagerOptions(**options))

    def steps(self) -> list[int]:
        """Steps that are complete on disk, ascending."""
        return sorted(int(p.name) for p in self.root.glob("*") if p.name.isdigit())

    def save(self, step: int, state: model.State, meta: dict):
        """Begin to save; returns when the state may change again. Raises what the previous save met."""
        self.wait()
        arrays, rest = ocp.args.StandardSave, dict(opt=state.opt, step=state.step, skipped=state.skipped)
        meta = meta | {"checksums": {k: int(v) for k, v in jax.device_get(model.checksums(state)).items()}}
        with self.writing():
            self.manager.save(step, force=True, args=ocp.args.Composite(
                params=arrays(state.params), opt=arrays(rest), meta=ocp.args.JsonSave(meta)))

    def wait(self):
        """Until the save in flight is on disk."""
        with self.writing():
            self.manager.wait_until_finished()
        if leads():
            shutil.rmtree(self.trash, ignore_errors=True)

    def writing(self):
        """What writing meets (a full disk is an OSError, a ValueError or a bare Exception), said in full."""
        return blame(Exception, InputError, f"no checkpoint can be written to {self.root} ({{reason}}); make "
                     f"room, and the same command resumes from step {(self.steps() or [0])[-1]}")

    def close(self):
        """Wait and stop; without this the last save is lost at exit."""
        self.wait()
        self.manager.close()

    def restore(self, step: int, **items):
        """Some of a checkpoint's items; raises Damaged where Orbax raises, for which it has many kinds."""
        sentence = f"checkpoint {self.root / str(step)} is damaged ({{reason}}); there are {self.steps()}"
        with blame(Exception, Damaged, sentence):
            return self.manager.restore(step, args=ocp.args.Composite(**items))

    def meta(self, step: int) -> dict:
        """What is known of a checkpoint before its arrays are read."""
        return self.restore(step, meta=ocp.args.JsonRestore())["meta"]

    def params(self, step: int, like: model.State) -> dict[str, jax.Array]:
        """Parameters alone, placed as `like` says."""
        return self.restore(step, params=ocp.args.StandardRestore(like.params))["params"]

    def state(self, step: int, like: model.State) -> model.State:
        """The whole state, onto any mesh."""
        rest = dict(opt=like.opt, step=like.step, skipped=like.skipped)
        arrays, kept = ocp.args.StandardRestore, self.meta(step).get("checksums")
        got = self.restore(step, params=arrays(like.params), opt=arrays(rest))
        state = model.State(got["params"], **got["opt"])
        sums = jax.device_get(model.checksums(state))
        if changed := ", ".join(n for n in sums if kept and kept[n] != sums[n]):
            raise Damaged(f"checkpoint {self.root / str(step)} is damaged (not as written: {changed})")
        return state


# -------------------------------------------------------------------------------------------------- reporting

class Reporter:
    """metrics.jsonl, and a live line on a terminal or plain ones every five seconds elsewhere."""

    def __init__(self, path: Path, start: int, course: model.Course, done: bool = False):
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        rows = [(line, json.loads(line)) for line in lines if line.endswith(b"\n")]
        # What the checkpoint has not seen will come again; so will the test figures, which end a run.
        kept = [line for line, row in rows if row["step"] <= start and (done or ".test/" not in "".join(row))]
        if leads():
            data.write(path, b"".join(kept))
        self.file, self.course, self.start = open(path if leads() else os.devnull, "a"), course, start
        self.live, self.begun, self.last, self.track = sys.stdout.isatty(), time.perf_counter(), None, None
        self.shown = self.waited = self.stall = 0.0
        self.peak, self.recent = load_file(ROOT / "tools/fit.py").peak(), collections.deque(maxlen=100)

    def row(self, row: dict):
        """One JSON object on a line of its own; what is not finite becomes null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.file.write(json.dumps(finite) + "\n")
        if self.track:
            self.track(finite)

    def sync(self):
        """Every row so far onto the disk, and what comes now out of the next step's time."""
        self.file.flush()
        if leads():
            os.fsync(self.file.fileno())
        self.last, self.waited = None, 0.0

    def step(self, row: dict):
        """Write a step's row and show where the run is; `waited`: seconds spent on batches since the last."""
        c, step, now = self.course, row["step"], time.perf_counter()
        if self.last:
            seconds = now - self.last
            tokens, flops = c.tokens[step] - c.tokens[step - 1], c.flops[step] - c.flops[step - 1]
            row |= {"perf/step_ms": 1e3 * seconds, "perf/tokens_per_s": tokens / seconds,
                    "perf/host_stall": self.waited / seconds}
            row |= {"perf/mfu": flops / seconds / self.peak} if self.peak else {}
        loss, spread = row["train/loss"], np.std(self.recent) if len(self.recent) > 50 else math.inf
        if (above := loss - np.mean(self.recent or [loss])) > 6 * spread:
            self.say(f"step {step}: loss {loss:.3f}, {above / spread:.0f} deviations above the last; python "
                     f"train.py corpus inspect {Path(self.file.name).with_name('config.json')} --step {step}")
        self.recent += [loss] if math.isfinite(loss) else []
        row |= {"perf/save_s": round(self.stall, 4)} if self.stall else {}  # that a checkpoint held the loop
        self.last, self.waited, self.stall = now, 0.0, 0.0
        self.row(row)
        if not self.live and now - self.shown < 5 and step != c.ends[-1]:
            return
        self.shown, text = now, load_file(ROOT / "tools/track.py").line(self, row, now)
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[2K{text[:width]}" if self.live else text, end="" if self.live else "\n", flush=True)

    def say(self, text: str):
        """A line of its own, in place of the live one."""
        print(("\r\x1b[2K" if self.live else "") + text, flush=True)


# ---------------------------------------------------------------------------------------------------- the run

def past(config: Config, course: model.Course, step: int) -> dict[str, Any]:
    """What the first `step` steps depend on, flat: a run that goes on from there must have it in common."""
    fields = "seed model init_from init_with data phases optimizer clip max_skipped weights token_loss reduce"
    out = {k: v for k, v in json.loads(json.dumps(to_json(config))).items() if k in fields.split()}
    out["phases"] = [p for p, end, now in zip(out["phases"], course.ends, config.phases, strict=True)
                     if end - now.steps < step]
    for phase, now, end in zip(out["phases"], config.phases, course.ends, strict=False):
        del phase["schedule"], phase["rates"]  # their effect, the rates, is compared below
        if end >= step and not (callable(now.mixture) or now.lengths or now.order is not data.shuffled):
            del phase["steps"]
    rates = {group: r[1:step + 1].tolist() for group, r in course.rates.items() if r[1:step + 1].any()}
    return flatten(out) | {"data.sources (their order)": list(config.data.sources),
                           "schedule (the rates of steps already taken)": data.digest(rates)}


def assemble(config: Config, own: Path | None = None):
    """(config with its vocabulary, tokenizer, caches by source): all that a run reads, built if need be.

    own: a tokenizer file to use in place of what the config names.
    """
    corpus = load_file(ROOT / "tools/corpus.py")
    tokenizer = data.load_tokenizer(own) if own else corpus.make_tokenizer(config.data, config.model.vocab)
    if config.model.vocab not in (0, tokenizer.vocab) and not config.init_from:
        raise InputError(f"model.vocab is {config.model.vocab}, but the tokenizer {config.data.tokenizer!r} "
                         f"has {tokenizer.vocab} pieces; allowed is that, or 0 for as many as it has")
    config = replace(config, model=replace(config.model, vocab=config.model.vocab or tokenizer.vocab))
    caches = corpus.open_caches(config, tokenizer)
    most = config.data.window if config.data.stream else math.inf
    for name, cache in caches.items():
        counts = cache.counts(min(most, cache.wait(most)))
        for kind in (k for k in counts if k.startswith("skipped")):
            print(f"source {name}: {counts[kind]} documents {kind}")
        for split, share in dict(train=1, dev=config.data.dev, test=config.data.test).items():
            if share and not counts.get(f"{split} documents"):
                raise InputError(f"source {name!r} has {counts['documents']} documents, none in {split}; "
                                 "give it more (a separator cuts a file), or set data.dev or data.test to 0")
    return config, tokenizer, caches


class Run:
    """A run: all that is worked out for it in advance, and the state that its steps change."""

    def __init__(self, config: Config, file: str = ""):
        check(config)
        self.file, self.directory = file, Path(config.runs).expanduser() / config.name
        own = None
        if config.init_from:
            config, own = load_file(ROOT / "tools/export.py").branch(config, self.directory)
        jax.config.update("jax_enable_x64", "float64" in (config.model.dtype, config.model.param_dtype))
        with blame():
            self.mesh = model.make_mesh(config.mesh)
            rows = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        for i, phase in enumerate(config.phases):
            parts = rows * phase.accumulate
            if any(phase.batch * phase.seq // n % parts for n in data.batch_lengths(phase)[0]):
                raise InputError(f"phases.{i}.batch is {phase.batch}; allowed is a multiple of {parts}: "
                                 f"{rows} devices on the mesh axes data and fsdp, times accumulate")
        self.config, self.tokenizer, self.caches = assemble(config, own)
        jax.config.update("jax_enable_x64", "float64" in (config.model.dtype, config.model.param_dtype))
        self.loader = Loader(self.caches, config.phases, config.data, self.tokenizer, config.seed)
        self.context = model.Context(jax.random.key(0), 0, self.tokenizer,
                                     lambda n: [self.loader.batch(i + 1).arrays for i in range(n)], load)
        with blame():
            lengths = [data.batch_lengths(phase) for phase in config.phases]
            self.course = model.plot_course(self.config, self.context, lengths)
            for i, shape in enumerate(self.course.models):
                model.shardings(shape, self.mesh)
                if shape.vocab != (n := self.tokenizer.vocab):
                    raise InputError(f"phases.{i}: the model has {shape.vocab} pieces, the tokenizer {n}; "
                                     "use the same data.tokenizer, or an edit that swaps the vocabulary")
        self.total, self.compiled = int(self.course.ends[-1]), {}
        self.stops = {int(end): None for end in self.course.ends}  # {step: phase to be steered there, if any}
        for i, (phase, end) in enumerate(zip(config.phases, [*self.stops], strict=True)):
            self.stops |= dict.fromkeys(range(end - phase.steps, end, phase.steer or phase.steps)[1:], i)

    def first(self):
        """The state and shape before any step: drawn, or that of what `init_from` names."""
        self.shape, self.since = self.config.model, None
        self.state = model.first_state(self.shape, self.config.optimizer, self.mesh, self.key("init"))
        if self.config.init_from:
            load_file(ROOT / "tools/export.py").start(self)

    def key(self, use: Literal["init", "edits"]) -> jax.Array:
        """A key of its own for each use of the seed; the order of data draws from the seed by numpy."""
        return jax.random.fold_in(jax.random.key(self.config.seed), ("init", "edits").index(use))

    def begin(self) -> int:
        """Restore the last checkpoint or draw the first state, and set the directory up; gives its step."""
        root = self.directory / "checkpoints"
        self.checkpoints = Checkpoints(root, self.config.keep, self.config.keep_every)
        found = [0, *self.checkpoints.steps()]
        if len(np.unique(everywhere(int(data.digest([to_json(self.config), found])[:7], 16)))) > 1:
            raise InputError(f"the processes of run {self.directory} have different configs or checkpoints; "
                             "allowed is the same command everywhere, and a directory that all of them see")
        while start := found.pop():
            try:
                self.restore(start)
                break
            except Damaged as error:
                if len(found) == 1:
                    raise InputError(f"{error}, with none before it; delete it to begin anew") from None
                print(f"{error}; it is now {start}.damaged, and the run goes back to step {found[-1]}")
                if leads():
                    (root / str(start)).rename(root / f"{start}.damaged")
                everywhere(0)
                self.checkpoints.manager.reload()
        if not start:
            self.first()
        end = self.directory / "summary.json"
        self.done = json.loads(end.read_text()) if start == self.total and end.exists() else None
        if leads():
            if not self.done:  # what an extended run left there is not its end any more
                end.unlink(missing_ok=True)
            (self.directory / "source").mkdir(exist_ok=True)
            for path in filter(None, [*ROOT.glob("*.py"), self.file.split(":")[0]]):
                shutil.copy(path, self.directory / "source")
            data.write(self.directory / "tokenizer.model", self.tokenizer.model)
            data.write(self.directory / "config.json", json.dumps(to_json(self.config), indent=1))
        self.out = Reporter(self.directory / "metrics.jsonl", start, self.course, bool(self.done))
        self.out.track = load_file(ROOT / "tools/track.py").begin(self, start)
        if start:
            self.out.say(f"resuming from step {start}" + (": this run is complete" if self.done else ""))
        return start

    def restore(self, step: int):
        """The state, shape and place in the data at a checkpoint, where this config leads there."""
        meta = self.checkpoints.meta(step)
        before, now = meta["past"], past(self.config, self.course, step)
        changed = [k if "(" in k else f"{k} was {before.get(k)!r} and is {now.get(k)!r}"
                   for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
        changed += [f"the phases end at step {self.total}"] if step > self.total else []
        if changed:
            raise InputError(f"run {self.directory} has taken {step} steps under another config: "
                             f"{'; '.join(changed)}; change that back, or use another --name")
        if self.fingerprints(meta["sealed"]) != meta["fingerprints"]:
            raise InputError(f"run {self.directory} was trained on other text than the sources give now "
                             f"({', '.join(self.caches)}); put that back, or use another --name")
        self.loader.start = meta["start"]
        self.loader.log[:len(meta["log"])] = meta["log"]  # phases may have been added
        self.shape, self.since = from_json(ModelConfig, meta["model"]), meta["since_reset"]
        like = model.state_like(self.shape, self.config.optimizer, self.mesh)
        self.state = self.checkpoints.state(step, like)

    def fingerprints(self, sealed: dict[str, int]) -> dict[str, str | None]:
        """Of each source's first so many shards."""
        return {n: c.facts(min(sealed[n], c.wait(sealed[n])) - 1)["fingerprint"]
                for n, c in self.caches.items()}

    def edit(self, edits: list[Callable], step: int):
        """Apply the edits due after a step."""
        context = self.context._replace(key=jax.random.fold_in(self.key("edits"), step), step=step)
        with blame():
            self.state, self.shape = model.apply_edits(edits, self.state, self.shape, self.config.optimizer,
                                                       self.mesh, context)
        self.since = 0 if step not in (0, *self.course.ends) else self.since  # a recurring edit: see `load`
        names = ", ".join(getattr(e, "func", e).__name__ for e in edits)
        size = f"{self.shape.layers} layers, {model.count(self.shape):,} parameters"
        self.out.recent.clear()
        self.out.say(f"step {step}: {names}; now {size}")

    def update(self, step: int, batch: data.Batch, watch: bool) -> dict:
        """Dispatch one update, compiled where its phase is new; gives its metrics, still on the device."""
        arrays, mask = model.put(batch.arrays, self.mesh, batch.rows), model.Mask(**batch.mask)
        rates = {g: np.float32(self.course.rates[g][step]) for g in model.groups(self.shape)}
        key = (self.loader.phase_of(step), arrays["tokens"].shape, mask)
        if key not in self.compiled:
            self.out.sync()
            with blame():
                attention = model.choose(self.shape.attention, mask, key[1][1], self.shape.dtype)
            run = model.compile_step(self.config, self.shape, self.mesh, self.state, arrays, rates, mask,
                                     self.config.phases[key[0]].accumulate)
            if not self.compiled:
                load_file(ROOT / "tools/fit.py").banner(self, run, attention)
            self.compiled[key] = run
        before = jax.tree.map(jnp.copy, self.state.params) if watch else None
        self.state, metrics = self.compiled[key](self.state, arrays, rates)
        self.since = None if self.since is None else self.since + 1
        return metrics | (model.probe(before, self.state.params, self.shape) if watch else {})

    def spent(self, step: int) -> dict:
        """What every row says of the budget."""
        return {"train/tokens": int(self.course.tokens[step]), "train/flops": float(self.course.flops[step]),
                "phase": self.loader.phase_of(step)}

    def finish(self, step: int, metrics: dict, of_batch: dict) -> int:
        """Write a step's row, one step late so that no device waits; gives what was asked, see `phase`."""
        metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
        skipped, asked = int(metrics.pop("skipped")), int(metrics.pop("asked"))
        shape = self.course.models[self.loader.phase_of(step)]
        lr = float(max(r[step] for r in self.course.rates.values()))
        self.out.step({"step": step, **metrics, "train/lr": lr, **self.spent(step), **of_batch,
                       "model/params": model.count(shape), "train/skipped": skipped})
        if skipped >= self.config.max_skipped:
            self.out.sync()
            self.checkpoints.close()
            raise InputError(f"loss or gradient not finite at step {step} and {skipped - 1} before it; use a "
                             "lower schedule.peak or clip under another --name, or look at that data")
        return asked

    def evaluate(self, step: int):
        """A row of held-out figures, as tools/eval.py has them."""
        if self.shape not in self.compiled:
            self.compiled[self.shape] = model.evaluators(self.config, self.shape, self.mesh)
        if row := load_file(ROOT / "tools/eval.py").during(self, step, *self.compiled[self.shape]):
            self.out.row({"step": step, **row, **self.spent(step)})
            said = (f"{k.removeprefix('eval/')} {v:.4f}" for k, v in row.items())
            self.out.say(f"step {step}: {', '.join(said)}")
        load_file(ROOT / "tools/curves.py").follow(self)
        if (steered := self.stops.get(step)) is not None:
            self.loader.log[steered].append({name: row[f"eval/{name}/loss"] for name in self.caches})

    def save(self, step: int):
        """Begin a checkpoint, once every row up to it is on disk."""
        self.out.sync()
        begun, sealed = time.monotonic(), {name: cache.sealed for name, cache in self.caches.items()}
        self.checkpoints.save(step, self.state, {
            "step": step, "model": to_json(self.shape), **self.spent(step), "since_reset": self.since,
            "sealed": sealed, "fingerprints": self.fingerprints(sealed), "log": self.loader.log,
            "start": self.loader.start, "past": past(self.config, self.course, step),
            "positions": dict(zip(self.caches, self.loader.positions(step).tolist(), strict=True))})
        self.saved, self.newest = time.monotonic(), step
        self.out.stall = self.saved - begun

    def train(self) -> dict[str, Any] | None:
        """From the last checkpoint to the end; gives what summary.json holds, None after a signal to end."""
        self.directory.mkdir(parents=True, exist_ok=True)
        stop: list = []

        def halt(number: int, _):
            stop.append(signal.Signals(number).name)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C once more ends it at once
            for cache in self.caches.values() if jax.process_count() == 1 else ():
                cache.abandon()  # or this would wait for rows that may take an hour to come

        before = {number: signal.signal(number, halt) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with data.locked(self.directory / ".lock", f"run {self.directory}") if leads() else \
                    contextlib.nullcontext():
                self.newest = step = self.begin()
                self.saved = time.monotonic()
                for end in sorted(s for s in self.stops if s > step):
                    if not self.phase(step, end, stop):
                        return None
                    step = end
                self.checkpoints.close()
                return self.done or self.conclude()
        except InputError:  # of an edit, or of a source: what is being saved is not lost
            if jax.process_count() == 1 and hasattr(self, "checkpoints"):
                with contextlib.suppress(InputError):
                    self.checkpoints.close()
            raise
        finally:
            for pair in before.items():
                signal.signal(*pair)

    def phase(self, step: int, end: int, stop: list) -> bool:
        """The loop: for each step up to `end` the edits due before it, its update, and what is due after.

        Each step, processes ask for a checkpoint (1), or after a signal (in `stop`) to save and end (2); they
        hear of it, the same step everywhere, with the step's metrics. False if the run ends for that.
        """
        config, pending = self.config, None
        make = functools.partial(self.loader.batch, own=functools.partial(model.own_rows, self.mesh))
        with contextlib.closing(data.prefetch(make, range(step + 1, end + 1))) as batches:
            while step < end:
                begun = time.perf_counter()
                try:
                    batch = next(batches)
                except InputError:
                    if not stop or jax.process_count() > 1:
                        raise
                    return self.leave(step, stop, pending)  # nobody builds what this waited for any more
                self.out.waited += time.perf_counter() - begun
                if edits := model.due(config, self.course, step):
                    if pending:  # what is asked for there is asked for again
                        self.finish(*pending)
                    pending = None
                    self.edit(edits, step)
                step += 1
                watch = any(model.due(config, self.course, s) for s in range(max(0, step - 5), step))
                ask = 2 if stop else int(time.monotonic() - self.saved > 60 * config.save_minutes)
                metrics = self.update(step, batch, watch) | {"asked": model.largest(ask, self.mesh)}
                asked = max(self.finish(*pending) if pending else 0, ask * (jax.process_count() == 1))
                pending = step, metrics, batch.metrics
                saving = step == end or step % config.save_every == 0
                if asked or saving or step % config.eval_every == 0:
                    asked, pending = max(asked, self.finish(*pending)), None
                    if step == end or step % config.eval_every == 0:
                        self.evaluate(step)
                    if asked or saving:
                        self.save(step)
                    self.out.sync()
                if asked == 2:
                    return self.leave(step, stop)
        return True

    def leave(self, step: int, stop: list, pending: tuple | None = None) -> bool:
        """End after a signal, with the row that is `pending` written and all up to `step` saved; False."""
        if pending:
            self.finish(*pending)
        if step > self.newest:
            self.save(step)
        self.checkpoints.close()
        self.out.say(f"stopped by {[*stop, 'SIGTERM'][0]}; step {step} is saved, the same command resumes")
        return False

    def conclude(self) -> dict[str, Any]:
        """The last row, and what tools/eval.py and tools/summary.py make of the run."""
        found = {k: v for k, v in verb("eval", [str(self.directory)]).items() if ".test/" in k}
        self.out.row({"step": self.total, **found, **self.spent(self.total)})
        self.out.sync()
        return verb("summary", [str(self.directory)])


def find(run: str, step: int | None = None) -> tuple[Checkpoints, int, dict]:
    """A run's checkpoints, the step of one of them, and what is known of it.

    Without a step: the newest, or where an edit recurs (embeddings are being forgotten), the one longest
    after it.
    """
    directory = Path(run).expanduser()
    if not (directory / "config.json").is_file():
        raise InputError(f"{str(run)!r} is not a run directory: it has no config.json")
    checkpoints = Checkpoints(directory / "checkpoints")
    found = checkpoints.steps()
    if not found or (step is not None and step not in found):
        raise InputError(f"run {run} has no checkpoint{f' of step {step}' if step else ''}; it has {found}")
    metas = {s: checkpoints.meta(s) for s in (found if step is None else [step])}
    since = {s: math.inf if m["since_reset"] is None else m["since_reset"] for s, m in metas.items()}
    step = max(metas, key=lambda s: (since[s], s))
    return checkpoints, step, metas[step]


def load(run: str, step: int | None = None, mesh: dict[str, int] | None = None):
    """(params, config, tokenizer, apply) of a run's checkpoint: apply(params, ids [b t]) -> logits [b t v].

    `config.model` is the shape of that checkpoint; for the step see `find`. mesh: fields unlike the run's.
    """
    checkpoints, step, meta = find(run, step)
    directory = Path(run).expanduser()
    config = from_json(Config, json.loads((directory / "config.json").read_text()))
    config = replace(config, model=from_json(ModelConfig, meta["model"]))
    jax.config.update("jax_enable_x64", "float64" in (config.model.dtype, config.model.param_dtype))
    mesh = model.make_mesh(replace(config.mesh, **mesh or {})) if mesh or jax.process_count() > 1 else \
        model.make_mesh(MeshConfig(), jax.devices()[:1])
    params = checkpoints.params(step, model.state_like(config.model, config.optimizer, mesh))
    tokenizer = data.load_tokenizer(directory / "tokenizer.model")
    _, scores = model.evaluators(config, config.model, mesh)
    return params, config, tokenizer, lambda params, ids: scores(params, step, jnp.asarray(ids))


# ------------------------------------------------------------------------------------------- the command line

class Arguments(argparse.ArgumentParser):
    """The arguments of a verb, whose mistakes are InputErrors."""

    def __init__(self, verb: str, text: str):
        super().__init__(prog=f"python train.py {verb}", description=text, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        """Raise instead of printing the usage."""
        raise InputError(f"{self.prog.split()[-1]}: {message}; --help shows what is allowed")


def verb(name: str, arguments: list[str]):
    """Run tools/NAME.py."""
    return load_file(ROOT / "tools" / f"{name}.py").main(arguments)


def main(arguments: list[str]) -> int:
    """The command line; 2 for what the user can mend, said in one sentence on stderr."""
    load_file(ROOT / "tools/fit.py").tune_for_cpu()
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(data.cache_home() / "compiled"))
    try:
        with blame(OSError):  # a full disk, a directory that may not be written
            if arguments and (ROOT / "tools" / f"{arguments[0]}.py").is_file():
                result = verb(arguments[0], arguments[1:])
            elif "--debug" in arguments:
                result = verb("debug", [word for word in arguments if word != "--debug"])
            else:
                result = Run(*parse(arguments)).train()
            return result if isinstance(result, int) else 0  # of fit: 1 for what does not
    except InputError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")  # at once: threads may write too
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        return 130


if __name__ == "__main__":  # one module called `train`, for this process and for every config that imports it
    sys.path.insert(0, str(ROOT))
    import train
    # A failed save of Orbax's closes an event loop that its threads still call: the save's sentence says it.
    sys.unraisablehook = lambda it: str(it.exc_value) == "Event loop is closed" or sys.__unraisablehook__(it)
    sys.exit(train.main(sys.argv[1:]))

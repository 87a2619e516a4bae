"""One run: a config becomes phases, a schedule, an optimiser and a loop that can be killed at any moment.

    python train.py [CONFIG] [--path.to.field VALUE ...]   train, or resume; CONFIG: configs/quickstart.py
    python train.py VERB ...                               run tools/VERB.py: sample, eval, bench, corpus, ...

Steps count batches consumed, from 1. Checkpoint s is the state after s steps and before the edits due at s;
these are functions of (seed, step, index) and are applied again on resume.
"""
import contextlib
import functools
import importlib.util
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data import Batch, DataConfig, Loader, batch_lengths, causal, shuffled
from lib import config as config_files
from lib.banner import banner
from lib.checkpoint import Checkpoints, Damaged, find_checkpoint
from lib.config import ROOT, check_types, flatten, from_json, load_file, to_json
from lib.corpus import assemble
from lib.curves import follow
from lib.disk import cache_home, digest, locked, write
from lib.errors import InputError, user_errors
from lib.evaluate import evaluate_during, evaluators
from lib.hardware import tune_for_cpu
from lib.kernels import Mask, choose
from lib.log import Reporter
from lib.optim import (
    State,
    adamw,
    first_state,
    init_opt_state,
    map_like_params,
    places,
    state_like,
    update_ratios,
)
from lib.packing import concat_and_split
from lib.prefetch import prefetch
from lib.processes import all_gather, is_main_process
from lib.resume import resume_key, start_config, start_state
from lib.schedule import Schedule, edits_at, make_plan, schedules
from lib.sharding import MeshConfig, largest, make_mesh, own_rows, put, shardings
from lib.tokenizers import load_tokenizer
from lib.trackers import start_tracker
from model import (
    Context,
    Edited,
    Model,
    ModelConfig,
    count,
    cross_entropy,
    groups,
    losses,
    reparametrised,
    table,
    weighted_mean,
)


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
    packing: Callable = concat_and_split  # lengths, seq (, documents) -> plan
    order: Callable = shuffled  # draw, rows, progress, key -> place in the plan
    objective: Callable = causal  # row, rng -> row, mask
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
def load_config(path: str) -> Config:
    """The `config` of a config file or, of FILE:ARM, one of its `arms`."""
    return config_files.load_config(path, Config)


def parse(arguments: list[str]) -> tuple[Config, str]:
    """(config, its file) from the command line of a run."""
    return config_files.parse(arguments, Config)


POSITIVE = set("layers embed heads kv_heads head_dim mlp steps batch seq accumulate every peak keep "
               "eval_every eval_tokens save_every max_skipped sample_tokens shard_tokens window sample_mib "
               "logits_mib rope_theta save_minutes".split())
NOT_NEGATIVE = set("seed vocab unroll clip warmup final overlap until dev test sample_temperature steer "
                   "epochs cycle keep_every".split())


def check(config: Config) -> None:
    """Raise InputError for a wrong type or an impossible combination, before anything is built."""
    check_types(config, Config, "")
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
              for path, s in schedules(config).items()]
    for broken, sentence in rules:
        if broken:
            raise InputError(sentence)


class Run:
    """A run: all that is worked out for it in advance, and the state that its steps change."""

    def __init__(self, config: Config, file: str = ""):
        check(config)
        self.file, self.directory = file, Path(config.runs).expanduser() / config.name
        own = None
        if config.init_from:
            config, own = start_config(config, self.directory)
        jax.config.update("jax_enable_x64", "float64" in (config.model.dtype, config.model.param_dtype))
        with user_errors():
            self.mesh = make_mesh(config.mesh)
            rows = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        for i, phase in enumerate(config.phases):
            parts = rows * phase.accumulate
            if any(phase.batch * phase.seq // n % parts for n in batch_lengths(phase)[0]):
                raise InputError(f"phases.{i}.batch is {phase.batch}; allowed is a multiple of {parts}: "
                                 f"{rows} devices on the mesh axes data and fsdp, times accumulate")
        self.config, self.tokenizer, self.caches = assemble(config, own)
        jax.config.update("jax_enable_x64", "float64" in (config.model.dtype, config.model.param_dtype))
        self.loader = Loader(self.caches, config.phases, config.data, self.tokenizer, config.seed)
        self.context = Context(jax.random.key(0), 0, self.tokenizer,
                                     lambda n: [self.loader.batch(i + 1).arrays for i in range(n)], load)
        with user_errors():
            lengths = [batch_lengths(phase) for phase in config.phases]
            self.course = make_plan(self.config, self.context, lengths)
            for i, shape in enumerate(self.course.models):
                shardings(table(shape), self.mesh)
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
        self.state = first_state(self.shape, self.config.optimizer, self.mesh, self.key("init"))
        if self.config.init_from:
            start_state(self)

    def key(self, use: Literal["init", "edits"]) -> jax.Array:
        """A key of its own for each use of the seed; the order of data draws from the seed by numpy."""
        return jax.random.fold_in(jax.random.key(self.config.seed), ("init", "edits").index(use))

    def begin(self) -> int:
        """Restore the last checkpoint or draw the first state, and set the directory up; gives its step."""
        root = self.directory / "checkpoints"
        self.checkpoints = Checkpoints(root, self.config.keep, self.config.keep_every)
        found = [0, *self.checkpoints.steps()]
        if len(np.unique(all_gather(int(digest([to_json(self.config), found])[:7], 16)))) > 1:
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
                if is_main_process():
                    (root / str(start)).rename(root / f"{start}.damaged")
                all_gather(0)
                self.checkpoints.manager.reload()
        if not start:
            self.first()
        end = self.directory / "summary.json"
        self.done = json.loads(end.read_text()) if start == self.total and end.exists() else None
        if is_main_process():
            if not self.done:  # what an extended run left there is not its end any more
                end.unlink(missing_ok=True)
            (self.directory / "source").mkdir(exist_ok=True)
            for path in filter(None, [*ROOT.glob("*.py"), self.file.split(":")[0]]):
                shutil.copy(path, self.directory / "source")
            write(self.directory / "tokenizer.model", self.tokenizer.model)
            write(self.directory / "config.json", json.dumps(to_json(self.config), indent=1))
        self.out = Reporter(self.directory / "metrics.jsonl", start, self.course, bool(self.done))
        self.out.track = start_tracker(self, start)
        if start:
            self.out.say(f"resuming from step {start}" + (": this run is complete" if self.done else ""))
        return start

    def restore(self, step: int):
        """The state, shape and place in the data at a checkpoint, where this config leads there."""
        meta = self.checkpoints.meta(step)
        before, now = meta["past"], resume_key(self.config, self.course, step)
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
        like = state_like(self.shape, self.config.optimizer, self.mesh)
        self.state = self.checkpoints.state(step, like)

    def fingerprints(self, sealed: dict[str, int]) -> dict[str, str | None]:
        """Of each source's first so many shards."""
        return {n: c.facts(min(sealed[n], c.wait(sealed[n])) - 1)["fingerprint"]
                for n, c in self.caches.items()}

    def edit(self, edits: list[Callable], step: int):
        """Apply the edits due after a step."""
        context = self.context._replace(key=jax.random.fold_in(self.key("edits"), step), step=step)
        with user_errors():
            self.state, self.shape = apply_edits(edits, self.state, self.shape, self.config.optimizer,
                                                       self.mesh, context)
        self.since = 0 if step not in (0, *self.course.ends) else self.since  # a recurring edit: see `load`
        names = ", ".join(getattr(e, "func", e).__name__ for e in edits)
        size = f"{self.shape.layers} layers, {count(self.shape):,} parameters"
        self.out.recent.clear()
        self.out.say(f"step {step}: {names}; now {size}")

    def update(self, step: int, batch: Batch, watch: bool) -> dict:
        """Dispatch one update, compiled where its phase is new; gives its metrics, still on the device."""
        arrays, mask = put(batch.arrays, self.mesh, batch.rows), Mask(**batch.mask)
        rates = {g: np.float32(self.course.rates[g][step]) for g in groups(self.shape)}
        key = (self.loader.phase_of(step), arrays["tokens"].shape, mask)
        if key not in self.compiled:
            self.out.sync()
            with user_errors():
                attention = choose(self.shape.attention, mask, key[1][1], self.shape.dtype)
            run = compile_step(self.config, self.shape, self.mesh, self.state, arrays, rates, mask,
                                     self.config.phases[key[0]].accumulate)
            if not self.compiled:
                banner(self, run, attention)
            self.compiled[key] = run
        before = jax.tree.map(jnp.copy, self.state.params) if watch else None
        self.state, metrics = self.compiled[key](self.state, arrays, rates)
        self.since = None if self.since is None else self.since + 1
        return metrics | (update_ratios(before, self.state.params, self.shape) if watch else {})

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
                       "model/params": count(shape), "train/skipped": skipped})
        if skipped >= self.config.max_skipped:
            self.out.sync()
            self.checkpoints.close()
            raise InputError(f"loss or gradient not finite at step {step} and {skipped - 1} before it; use a "
                             "lower schedule.peak or clip under another --name, or look at that data")
        return asked

    def evaluate(self, step: int):
        """A row of held-out figures, as tools/eval.py has them."""
        if self.shape not in self.compiled:
            self.compiled[self.shape] = evaluators(self.config, self.shape, self.mesh)
        if row := evaluate_during(self, step, *self.compiled[self.shape]):
            self.out.row({"step": step, **row, **self.spent(step)})
            said = (f"{k.removeprefix('eval/')} {v:.4f}" for k, v in row.items())
            self.out.say(f"step {step}: {', '.join(said)}")
        if is_main_process():
            follow(self.directory, self.out.sync)
        if (steered := self.stops.get(step)) is not None:
            self.loader.log[steered].append({name: row[f"eval/{name}/loss"] for name in self.caches})

    def save(self, step: int):
        """Begin a checkpoint, once every row up to it is on disk."""
        self.out.sync()
        begun, sealed = time.monotonic(), {name: cache.sealed for name, cache in self.caches.items()}
        self.checkpoints.save(step, self.state, {
            "step": step, "model": to_json(self.shape), **self.spent(step), "since_reset": self.since,
            "sealed": sealed, "fingerprints": self.fingerprints(sealed), "log": self.loader.log,
            "start": self.loader.start, "past": resume_key(self.config, self.course, step),
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
            with locked(self.directory / ".lock", f"run {self.directory}") if is_main_process() else \
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
        make = functools.partial(self.loader.batch, own=functools.partial(own_rows, self.mesh))
        with contextlib.closing(prefetch(make, range(step + 1, end + 1))) as batches:
            while step < end:
                begun = time.perf_counter()
                try:
                    batch = next(batches)
                except InputError:
                    if not stop or jax.process_count() > 1:
                        raise
                    return self.leave(step, stop, pending)  # nobody builds what this waited for any more
                self.out.waited += time.perf_counter() - begun
                if edits := edits_at(config, self.course, step):
                    if pending:  # what is asked for there is asked for again
                        self.finish(*pending)
                    pending = None
                    self.edit(edits, step)
                step += 1
                watch = any(edits_at(config, self.course, s) for s in range(max(0, step - 5), step))
                ask = 2 if stop else int(time.monotonic() - self.saved > 60 * config.save_minutes)
                metrics = self.update(step, batch, watch) | {"asked": largest(ask, self.mesh)}
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


def load(run: str, step: int | None = None, mesh: dict[str, int] | None = None):
    """(params, config, tokenizer, apply) of a run's checkpoint: apply(params, ids [b t]) -> logits [b t v].

    `config.model` is the shape of that checkpoint; for the step see `find`. mesh: fields unlike the run's.
    """
    checkpoints, step, meta = find_checkpoint(run, step)
    directory = Path(run).expanduser()
    config = from_json(Config, json.loads((directory / "config.json").read_text()))
    config = replace(config, model=from_json(ModelConfig, meta["model"]))
    jax.config.update("jax_enable_x64", "float64" in (config.model.dtype, config.model.param_dtype))
    mesh = make_mesh(replace(config.mesh, **mesh or {})) if mesh or jax.process_count() > 1 else \
        make_mesh(MeshConfig(), jax.devices()[:1])
    params = checkpoints.params(step, state_like(config.model, config.optimizer, mesh))
    tokenizer = load_tokenizer(directory / "tokenizer.model")
    _, scores = evaluators(config, config.model, mesh)
    return params, config, tokenizer, lambda params, ids: scores(params, step, jnp.asarray(ids))


def verb(name: str, arguments: list[str]):
    """Run tools/NAME.py."""
    return load_file(ROOT / "tools" / f"{name}.py").main(arguments)


def main(arguments: list[str]) -> int:
    """The command line; 2 for what the user can mend, said in one sentence on stderr."""
    tune_for_cpu()
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_home() / "compiled"))
    try:
        with user_errors(OSError):  # a full disk, a directory that may not be written
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


def make_step(run, config: ModelConfig, accumulate: int = 1) -> Callable:
    """`step(state, batch, rates, mask) -> (state, metrics)`: pure, so it can be jitted, sharded and mapped.

    run: has optimizer, weights, token_loss, reduce and clip (a `train.Config`). rates: {group: float32}.
    accumulate: the batch is taken in so many parts in turn, whose numerators and denominators are summed.
    An update whose loss or gradient is not finite leaves parameters and optimiser as they were, and counts.
    """
    transforms, members = run.optimizer(table(config)), groups(config)

    def loss(params, batch, step, mask):
        used = reparametrised(run.weights, params, step, batch)
        each = losses(used, batch, mask, config, run.token_loss, {"step": step})
        (numerator, denominator), metrics = run.reduce(each, batch)
        return numerator, (denominator, metrics)

    def sums(params, batch, step, mask):
        """Sums over the batch: ((numerator, (denominator, metrics)), gradient of the numerator)."""
        def gradient(part):
            return jax.value_and_grad(loss, has_aux=True)(params, part, step, mask)

        if accumulate == 1:
            return gradient(batch)
        parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch)
        like = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(part)), None

        (values, grads), _ = lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), parts)
        numerator, (denominator, metrics) = values
        return (numerator, (denominator, jax.tree.map(lambda x: x / accumulate, metrics))), grads

    def step(state: State, batch, rates, mask: Mask):
        (numerator, (denominator, metrics)), grads = sums(state.params, batch, state.step, mask)
        share = 1 / jnp.maximum(denominator, 1e-9)
        value = numerator * share
        square = {g: sum(jnp.sum(jnp.square(grads[n]), dtype=value.dtype) for n in names) * share**2
                  for g, names in members.items()}
        norm = jnp.sqrt(sum(square.values()))
        scale = share * (jnp.minimum(1.0, run.clip / jnp.maximum(norm, 1e-9)) if run.clip else 1.0)
        params, opt = {}, {}
        for group, names in members.items():
            clipped = {n: grads[n] * scale for n in names}
            old = {n: state.params[n] for n in names}
            direction, opt[group] = transforms[group].update(clipped, state.opt[group], old)
            params |= {n: old[n] - (rates[group] * direction[n]).astype(old[n].dtype) for n in names}
            metrics[f"{group}/grad_norm"] = jnp.sqrt(square[group])
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        params, opt = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (params, opt),
                                   (state.params, state.opt))
        skipped = jnp.where(finite, 0, state.skipped + 1)
        metrics |= {"train/loss": value, "train/grad_norm": norm, "skipped": skipped}
        return State(params, opt, state.step + 1, skipped), metrics

    return step


def compile_step(run, config: ModelConfig, mesh: Mesh, state: State, batch, rates, mask: Mask,
                 accumulate: int = 1):
    """The step as an executable `(state, batch, rates) -> (state, metrics)` that reuses `state`'s memory."""
    out = places(state_like(config, run.optimizer, mesh)), NamedSharding(mesh, PartitionSpec())
    step = jax.jit(make_step(run, config, accumulate), static_argnames="mask", donate_argnums=0,
                   out_shardings=out)
    with jax.set_mesh(mesh):
        return step.lower(state, batch, rates, mask=mask).compile()


def transfer_opt_state(opt: dict, first: dict, edited: Edited, old: ModelConfig) -> dict:
    """The optimiser state {group: state} after an edit; `first` is a fresh one for the edited parameters.

    Raises ValueError where an edit's policy leaves a state that does not fit its parameters.
    """
    out, before = {}, groups(old)
    for group, fresh in first.items():
        policy = edited.policy.get(group, "keep") if group in before else "reset"
        if policy == "reset":
            out[group] = fresh
        else:
            out[group] = opt[group] if policy == "keep" else map_like_params(opt[group], before[group], policy)
        if jax.tree.map(jnp.shape, out[group]) != jax.tree.map(jnp.shape, fresh):
            raise ValueError(f"an edit's policy {policy!r} for the optimiser group {group!r} "
                             "does not fit its parameters")
    return out


def apply_edits(edits: list[Callable], state: State, config: ModelConfig, optimizer: Callable, mesh: Mesh,
                context: Context) -> tuple[State, ModelConfig]:
    """State and shape after edits in turn; each optimiser group kept, reset or mapped as its edit says."""
    for i, edit in enumerate(edits):
        edited = edit(Model(config, state.params), context._replace(key=jax.random.fold_in(context.key, i)))
        new, params = edited.model
        opt = transfer_opt_state(state.opt, init_opt_state(params, new, optimizer), edited, config)
        state, config = state.replace(params=params, opt=opt), new
        state = jax.device_put(state, places(state_like(config, optimizer, mesh)))
    return state, config

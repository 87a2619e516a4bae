"""One run: a config becomes phases, a schedule, an optimiser and a loop that can be killed at any
moment.

    python train.py [CONFIG] [--path.to.field VALUE ...]   train, or resume a run
    python train.py VERB ...                               run tools/VERB.py: sample, eval, ...

CONFIG is configs/quickstart.py where none is given. `--trust`, anywhere, lets the code of a run
that was made elsewhere run; see lib/trust.py.

Steps count batches consumed, from 1. Checkpoint s is the state after s steps and before the edits
due at s; these are functions of (seed, step, index) and are applied again on resume.
"""

import contextlib
import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data import Batch, DataConfig, Loader, batch_lengths, causal, reads_log, shuffled
from lib import command
from lib import config as config_files
from lib.banner import banner
from lib.bind import bind
from lib.cache import Cache
from lib.checkpoint import Checkpoints, Damaged, Loan, borrow, find_checkpoint, unchanged
from lib.config import ROOT, from_json, load_file, refuse_while_loading, to_json
from lib.continuations import continuations
from lib.corpus import assemble, open_held_out
from lib.curves import draw
from lib.disk import cache_home, content_hash, copy, digest, locked, read_object, user_path, write
from lib.errors import InputError, user_errors
from lib.evals import own_evals, sharded_apply
from lib.evaluate import Setting, dev_figures, evaluators, test_figures, write_figures
from lib.fields import (
    FROM_1,
    Count,
    ExitCode,
    NotNegative,
    Positive,
    Rules,
    Seed,
    Size,
    Whole,
    at_most,
    check_rules,
    check_value,
    join,
    require,
    strict,
)
from lib.hardware import tune_for_cpu, wait_on_cpu
from lib.kernels import Mask, choose, counts_segments, settled
from lib.length import asked, length_rules, with_steps
from lib.log import Log, say
from lib.memory import check_batch_memory, check_state, check_step
from lib.optim import (
    State,
    adamw,
    first_state,
    init_opt_state,
    map_like_params,
    places,
    state_like,
    trained_groups,
    transforms_of,
    update_ratios,
)
from lib.output import answered, forgiving
from lib.own_gradient import applies, summed_over_devices
from lib.own_loss import is_plain, own_losses, summing
from lib.packed import pack
from lib.packing import concat_and_split
from lib.prefetch import Prefetch
from lib.processes import all_gather, is_main_process
from lib.resume import (
    changed_fields,
    own_tokenizer,
    resume_key,
    rounding_key,
    start_config,
    start_from,
)
from lib.schedule import Plan, Schedule, check_declared, checked_edit, make_plan
from lib.seams import (
    EDIT,
    EVALS,
    GRADIENT,
    LENGTHS,
    MIXTURE,
    OBJECTIVE,
    OPTIMIZER,
    ORDER,
    PACKING,
    REDUCE,
    REPARAM,
    TOKEN_LOSS,
    is_number,
    require_gave,
)
from lib.sharding import MeshConfig, make_mesh, own_rows, put, shardings
from lib.sizes import sizes_of
from lib.stop import Stop
from lib.study import unmet_rules
from lib.summary import hint, write_summary
from lib.tokenizers import Tokenizer, class_of, load_tokenizer
from lib.trackers import start_tracker
from lib.trust import named_files, read_record, record, trust
from model import (
    Context,
    Edited,
    Model,
    ModelConfig,
    chunked_losses,
    count,
    cross_entropy,
    forward,
    groups,
    head_logits,
    llama,
    reparametrised,
    table,
    weighted_mean,
    weighted_sum,
)

MOST_STEPS = 100_000_000  # rates and budgets of each are worked out in advance
Objective = Annotated[Callable, OBJECTIVE]
CODE = ("train.py", "model.py", "data.py", "lib", "configs")  # what a run keeps a copy of


@strict
@dataclass(frozen=True)
class Edit:
    """An edit every so many steps of a phase, for one that keeps the shapes; see `model.Edited`."""

    apply: Annotated[Callable, EDIT]  # model, context -> Edited
    every: Count = 1_000  # due after each multiple of so many steps of the phase, but its last
    until: Whole = 0  # steps of the phase after which it stops; 0 is never
    forgets: bool = True  # then samples and final figures are of the checkpoint longest after it


@strict
@dataclass(frozen=True)
class Phase:
    """A stretch of a run with one model shape, batch shape, mixture and objective."""

    steps: Count = 100  # updates
    batch: Annotated[int, FROM_1, at_most(2**20)] = 16  # rows per update
    seq: Size = 256  # tokens per row
    accumulate: Count = 1  # parts that a batch is taken in, in turn; it must divide the batch
    # progress -> {row length: weight}; batch x seq stays
    lengths: Annotated[Callable, LENGTHS] | None = None
    # applied to the model on entering: model, context -> Edited
    edits: tuple[Annotated[Callable, EDIT], ...] = ()
    repeat: tuple[Edit, ...] = ()  # edits that recur within the phase
    # or progress, log -> it
    mixture: dict[str, NotNegative] | Annotated[Callable, MIXTURE] | None = None
    steer: Whole = 0  # steps between evaluations that go into that log; 0 is none
    packing: Annotated[Callable, PACKING] = concat_and_split  # lengths, seq (, documents) -> plan
    order: Annotated[Callable, ORDER] = shuffled  # draw, rows, progress, key -> place in the plan
    objective: Objective | dict[str, Objective] = causal  # row, rng -> row, mask; or by source
    schedule: Schedule | None = None  # over the phase's own budget, in place of the run's
    # of an optimiser group: a schedule of its own, or a factor on the phase's; 0 freezes it
    lr: dict[str, Schedule | NotNegative] = field(default_factory=dict)
    token_loss: Annotated[Callable, TOKEN_LOSS] | None = None  # in place of the run's
    reduce: Annotated[Callable, REDUCE] | None = None  # in place of the run's
    cost: Positive = 1.0  # FLOPs of its steps, as a multiple of what the model's `flops` says

    def rules(self, path: str) -> Rules:
        """What fields must be to one another."""
        size = self.batch * self.seq
        at = join(path, "lengths")
        said = f"{at} ends in {{reason}}; allowed is progress -> {{row length: weight}}"
        with user_errors(Exception, InputError, said):  # of the config
            lengths = list(self.lengths(0.0)) if self.lengths else [self.seq]
            odd = any(size % length for length in lengths)
        yield (odd, f"{at} gives {lengths}; allowed are divisors of batch x seq ({size})")


@strict
@dataclass(frozen=True)
class Config:
    """One experiment."""

    name: str = ""  # of the run; empty: the config file's stem
    runs: str = "runs"  # directory that runs live in
    seed: Seed = 0  # initialisation, data order and edits draw from seeds derived from it
    model: ModelConfig = ModelConfig()  # the model the run starts with
    # RUN, RUN@STEP, hf:DIRECTORY or hf:ORG/NAME to start from, where it has no checkpoint
    init_from: str = ""
    init_with: Literal["params", "all"] = "params"  # "all": optimiser and place in the data too
    data: DataConfig = field(default_factory=DataConfig)
    phases: tuple[Phase, ...] = (Phase(),)
    # One of these three may say how long the run is; the steps of its phases are then proportions.
    tokens: NotNegative = 0.0  # length in tokens, padding included; 0 is the phases' steps
    epochs: NotNegative = 0.0  # length in passes over the training documents of all sources
    tokens_per_param: NotNegative = 0.0  # length in tokens for each parameter of the last model
    schedule: Schedule = Schedule()
    # table -> {group: optax transformation of unscaled directions}
    optimizer: Annotated[Callable, OPTIMIZER] = adamw
    clip: NotNegative = 1.0  # global gradient norm; 0 is off
    max_skipped: Count = 10  # non-finite updates in a row after which the run stops
    mesh: MeshConfig = MeshConfig()
    # in jit: params, step, batch (, config) -> params used
    reparam: Annotated[Callable, REPARAM] | None = None
    # in jit: logits [b c v], batch, extras -> losses [b c]
    token_loss: Annotated[Callable, TOKEN_LOSS] = cross_entropy
    # in jit: losses [b t], batch (, extras) -> (numerator, denominator), metrics
    reduce: Annotated[Callable, REDUCE] = weighted_mean
    # in jit: gradient, params, batch, step -> what gradient(params, batch) gives, which is
    # ((numerator, (denominator, metrics)), gradient of the numerator); of each part of a batch
    gradient: Annotated[Callable, GRADIENT] | None = None
    # params, apply (, tokenizer, config, generate, held_out) -> {metric: value}, see lib/evals.py
    evals: tuple[Annotated[Callable, EVALS], ...] = ()
    eval_every: Count = 200  # steps between evaluations on dev; one ends each phase too
    eval_at: tuple[Whole, ...] = ()  # steps after which there is one besides; 0 is before the first
    eval_tokens: Count = 65_536  # of dev documents, per source, in an evaluation during the run
    overlap: Whole = 64  # positions that a window of a long held-out document shares with the last
    save_every: Count = 200  # steps between checkpoints; there is one at the end of each phase too
    save_minutes: Positive = 15.0  # from one checkpoint to the next at most
    keep: Count = 3  # checkpoints kept, the newest
    keep_every: Whole = 0  # and those of each multiple of so many steps; 0 is none
    stop_code: ExitCode = 0  # exit code of a run that a signal stopped, with all saved
    prompts: tuple[str, ...] = ("",)  # continued in samples.txt at the end
    sample_tokens: Count = 200  # of each continuation
    sample_temperature: NotNegative = 0.8  # 0 takes the likeliest token
    # gets the rows of metrics.jsonl too; a function is run, start -> (row -> None)
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] | Callable = "none"


def load_config(path: str, /, **given) -> Config:
    """The config of a file, FILE.py, FILE.py:ARM or a run's config.json; see lib/config.py."""
    return config_files.load_config(path, Config, **given)


def parse(arguments: list[str]) -> tuple[Config, str]:
    """(config, its file) from the command line of a run."""
    return command.parse(arguments, Config)


def check(config: Config) -> None:
    """Raise InputError for a wrong type or an impossible combination, before anything is built."""
    check_value(config, Config, "")
    check_rules(config)
    require(length_rules(config))
    require(name_rules(config))
    for rules in start_rules, evaluation_rules, mixture_rules, objective_rules, tracker_rules:
        require(rules(config))


def name_rules(config: Config) -> Rules:
    """What names of directories may be: none leads out of where it is put."""
    parts = Path(config.name).parts
    climbs = ".." in parts or config.name.startswith("/") or not config.name.isprintable()
    yield (
        climbs,
        f"name is {config.name!r}; allowed is a directory below {config.runs}, of printable "
        "characters",
    )
    data = {"sources": config.data.sources, "held_out": config.data.held_out}
    for field_name, sources in data.items():
        for name in sources:
            yield (
                "/" in name or not name.isprintable() or len(name) not in range(1, 101),
                f"data.{field_name} has the name {name!r}; allowed are 1 to 100 printable "
                "characters without a slash",
            )


def start_rules(config: Config) -> Rules:
    """What a run starts from."""
    yield (not config.phases, "phases is empty; allowed is one phase and more")
    total = sum(phase.steps for phase in config.phases)
    yield (
        total > MOST_STEPS,
        f"phases take {total:,} steps together; allowed are at most {MOST_STEPS:,}",
    )
    yield (
        config.init_with == "all" and config.init_from.startswith("hf:"),
        f'init_with is "all", but {config.init_from} has no optimiser state; allowed is "params"',
    )


def evaluation_rules(config: Config) -> Rules:
    """When a run is evaluated, and on what windows."""
    total = sum(phase.steps for phase in config.phases)
    yield (
        max(config.eval_at, default=0) > total and not asked(config),
        f"eval_at is {config.eval_at}; allowed are steps from 0, before the first, to {total}, "
        "the last",
    )
    for i, phase in enumerate(config.phases):
        yield (
            config.overlap >= phase.seq,
            f"overlap is {config.overlap}; allowed is less than phases.{i}.seq ({phase.seq})",
        )


def mixture_rules(config: Config) -> Rules:
    """What the mixtures of the phases ask of the sources."""
    sources = config.data.sources
    limited = any(source.epochs for source in sources.values())
    for i, phase in enumerate(config.phases):
        mixture = phase.mixture
        named = isinstance(mixture, dict)
        yield (
            named and (mixture.keys() - sources or not any(mixture.values())),
            f"phases.{i}.mixture is {mixture}; allowed are weights of 0 and more, not all 0, "
            f"for the sources {', '.join(sources)}",
        )
        yield (
            phase.steer and not (reads_log(phase) and may_steer(config)),
            f"phases.{i}.steer is {phase.steer}; allowed is 0, unless the mixture is a function, "
            "or order or objective ask for the log, and a dev split, held-out text or evals are "
            "there to steer by",
        )
        by_size = mixture is None and len(sources) > 1
        yield (
            config.data.stream and (by_size or limited),
            f"data.stream is true, but phases.{i}.mixture or a source's epochs ask how large a "
            "source is; allowed are weights, and epochs of 0",
        )


def may_steer(config: Config) -> bool:
    """Whether anything is measured that a mixture, an order or an objective could be steered by."""
    data = config.data
    return bool(data.dev or data.held_out or config.evals)


def objective_rules(config: Config) -> Rules:
    """Which sources the objectives of the phases may name."""
    sources = config.data.sources
    for i, phase in enumerate(config.phases):
        if callable(phase.objective):
            continue
        unknown = sorted(phase.objective.keys() - sources)
        yield (
            unknown,
            f"phases.{i}.objective names {', '.join(unknown)}; allowed are the sources "
            f"{', '.join(sources)}",
        )


def tracker_rules(config: Config) -> Rules:
    """Whether the tracker's package is here; a directory of its name does not count."""
    tracker = config.tracker
    if callable(tracker) or tracker == "none":
        return
    found = importlib.util.find_spec(tracker)
    yield (
        found is None or found.origin is None,
        f"tracker is {tracker!r}, which is not installed; pip install {tracker}",
    )


# ----------------------------------------------------------------------------------------- the step


class Loss(NamedTuple):
    """The loss of a phase: what a config says of it, and the model's shape."""

    model: ModelConfig
    reparam: Callable | None
    token_loss: Callable
    reduce: Callable
    change: Callable | None  # of the gradient, see `Config.gradient`

    @property
    def is_plain(self) -> bool:
        """Whether it is the weighted mean of the nats of each target."""
        said = self.model.outputs, self.token_loss, self.reduce
        return said == (head_logits, cross_entropy, weighted_mean)

    @property
    def adds_up(self) -> bool:
        """Whether a batch's sums and gradient are the sums of those of its rows, for certain."""
        alone = self.model.forward is llama and not self.reparam and not self.change
        return self.is_plain and alone

    def sums(self, trained: dict, frozen: dict, batch: dict, step, mask: Mask):
        """(numerator, (denominator, metrics)) of a batch; the gradient is that of `trained`."""
        model = self.model
        params = reparametrised(self.reparam, trained | frozen, step, batch, model)
        states, given = forward(params, batch, mask, model)
        if self.is_plain:
            numerator = weighted_sum(params, states, batch, model)
            return numerator, (jnp.sum(batch["weights"]), {})
        told = {"step": step}
        each = chunked_losses(params, states, given, batch, model, self.token_loss, told)
        extras = {"step": step, "params": params, "config": model, **given}
        found = bind(self.reduce, extras=extras)(each, batch)
        require_gave(is_reduced(found), REDUCE, self.reduce, found)
        (numerator, denominator), metrics = found
        return numerator, (denominator, metrics)

    def gradient(self, moving: dict, still: dict, step, mask: Mask) -> Callable:
        """part of a batch -> (sums of it, their gradient with respect to `moving`)."""

        def plain(params, part):
            value_and_grad = jax.value_and_grad(self.sums, has_aux=True)
            return value_and_grad(params, still, part, step, mask)

        if self.change is None:
            return functools.partial(plain, moving)

        def changed(part):
            found = self.change(plain, moving, part, step)
            require_gave(is_gradient(found, moving), GRADIENT, self.change, found)
            return found

        return changed


def is_reduced(found) -> bool:
    """Whether a value is ((numerator, denominator), {metric: value}), all of them numbers."""
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], dict):
        return False
    sums, metrics = found
    pair = isinstance(sums, tuple) and len(sums) == 2
    return pair and all(map(is_number, (*sums, *metrics.values())))


def is_gradient(found, params: dict) -> bool:
    """Whether a value is ((numerator, (denominator, metrics)), gradients shaped like `params`)."""
    try:
        (numerator, (denominator, metrics)), grads = found
        alike = jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    except (TypeError, ValueError):  # not of this form
        return False
    return alike and is_reduced(((numerator, denominator), metrics))


def loss_of(config: Config, model: ModelConfig, phase: Phase) -> Loss:
    """What a phase trains on: its own functions, or the run's."""
    token_loss = phase.token_loss or config.token_loss
    reduce = phase.reduce or config.reduce
    return Loss(model, config.reparam, token_loss, reduce, config.gradient)


def accumulated(gradient: Callable, batch: dict, parts: int):
    """gradient(batch), the batch taken in so many parts: sums are added up, metrics averaged."""
    if parts == 1:
        return gradient(batch)
    split = jax.tree.map(lambda x: in_parts(x, parts), batch)
    first = jax.tree.map(lambda x: x[0], split)
    like = jax.eval_shape(gradient, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def add(total, part):
        more = gradient(part)
        return jax.tree.map(jnp.add, total, more), None

    total, _ = lax.scan(add, zeros, split)
    (numerator, (denominator, metrics)), grads = total
    means = jax.tree.map(lambda x: x / parts, metrics)
    return (numerator, (denominator, means)), grads


def in_parts(x: jax.Array, parts: int) -> jax.Array:
    """Rows [b ...] as [parts, b / parts ...]: part p has the rows r for which r % parts is p.

    So each part has rows of every device.
    """
    dealt = x.reshape(-1, parts, *x.shape[1:])
    return jnp.moveaxis(dealt, 1, 0)


def summed(loss: Loss, moving: dict, still: dict, batch: dict, step, mask: Mask, parts: int):
    """(sums, gradient of `moving`) of a batch; each device makes its own where they add up."""

    def own(moving, still, batch):
        return accumulated(loss.gradient(moving, still, step, mask), batch, parts)

    if loss.adds_up and applies(len(batch["tokens"]), parts):
        return summed_over_devices(own, moving, still, batch, table(loss.model))
    return own(moving, still, batch)


def squared_norms(grads: dict, members: dict[str, list[str]], scale, dtype) -> dict[str, jax.Array]:
    """{optimiser group: the squared norm of its gradients times scale}."""

    def squared(names):
        return sum(jnp.sum(jnp.square(grads[name]), dtype=dtype) for name in names)

    return {group: squared(names) * scale**2 for group, names in members.items()}


def clipped(
    grads: dict, scale, squares: dict[str, jax.Array], clip: float
) -> tuple[dict, jax.Array]:
    """(gradients times scale, clipped; their norm before clipping). squares: see above."""
    norm = jnp.sqrt(sum(squares.values()))
    if clip:
        scale = scale * jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-9))
    return {name: grad * scale for name, grad in grads.items()}, norm


def descend(old: dict, directions: dict, lr) -> dict:
    """Parameters moved along descent directions, in their own dtypes."""
    return {name: x - (lr * directions[name]).astype(x.dtype) for name, x in old.items()}


def updated(
    state: State, grads: dict, optimizers: dict, members: dict[str, list[str]], lr: dict
) -> tuple[dict, dict]:
    """(parameters, optimiser state) after an update; groups that are no `members` stay."""
    params, opt = dict(state.params), dict(state.opt)
    for group, names in members.items():
        own, old = ({name: tree[name] for name in names} for tree in (grads, state.params))
        update = optimizers[group].update
        directions, opt[group] = update(own, state.opt[group], old, rate=lr[group])
        params |= descend(old, directions, lr[group])
    return params, opt


def keep_if(finite, new, old):
    """The new arrays where an update is finite, the old ones where it is not."""
    return jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)


def make_step(
    config: Config, model: ModelConfig, phase: Phase = Phase(), frozen: frozenset[str] = frozenset()
) -> Callable:
    """The pure function `step(state, batch, lr, mask) -> (state, metrics)`.

    lr: {optimiser group: float32}. frozen: groups without a gradient, whose state stays and which
    have no part in the clipped norm. So are groups that the optimiser leaves out. An update whose
    loss or gradient is not finite leaves parameters and optimiser as they were, and counts.
    """
    loss = loss_of(config, model, phase)
    transforms = transforms_of(config.optimizer, model).items()
    optimizers = {group: optax.with_extra_args_support(each) for group, each in transforms}
    members = trained_groups(model, config.optimizer, frozen)
    trained = {name for names in members.values() for name in names}

    def step(state: State, batch: dict, lr: dict, mask: Mask):
        moving = {name: x for name, x in state.params.items() if name in trained}
        still = {name: x for name, x in state.params.items() if name not in trained}
        parts = phase.accumulate
        sums, grads = summed(loss, moving, still, batch, state.step, mask, parts)
        numerator, (denominator, metrics) = sums
        scale = 1 / jnp.maximum(denominator, 1e-9)
        mean = numerator * scale
        squares = squared_norms(grads, members, scale, mean.dtype)
        grads, norm = clipped(grads, scale, squares, config.clip)
        new = updated(state, grads, optimizers, members, lr)
        old = state.params, state.opt
        for group, square in squares.items():
            metrics[f"{group}/grad_norm"] = jnp.sqrt(square)
        finite = jnp.isfinite(mean) & jnp.isfinite(norm)
        params, opt = keep_if(finite, new, old)
        skipped = jnp.where(finite, 0, state.skipped + 1)
        metrics |= {"train/loss": mean, "train/grad_norm": norm, "skipped": skipped}
        return State(params, opt, state.step + 1, skipped), metrics

    return step


def compile_step(
    config: Config,
    model: ModelConfig,
    mesh: Mesh,
    state: State,
    batch: dict,
    lr: dict,
    mask: Mask,
    phase: Phase = Phase(),
    frozen: frozenset[str] = frozenset(),
):
    """The step as an executable `(state, batch, lr) -> (state, lib.packed.Packed metrics)`.

    It reuses the memory of its state. lr: {optimiser group: rate}, or rates in the groups' order.
    """
    one = make_step(config, model, phase, frozen)

    def packed(state: State, batch: dict, lr, mask: Mask):
        if not isinstance(lr, dict):
            lr = dict(zip(groups(model), lr, strict=True))
        state, metrics = one(state, batch, lr, mask)
        return state, pack(metrics)

    out = places(state_like(model, config.optimizer, mesh)), NamedSharding(mesh, PartitionSpec())
    step = jax.jit(
        packed,
        static_argnames="mask",
        donate_argnums=0,
        out_shardings=out,
    )
    with jax.set_mesh(mesh):
        return step.lower(state, batch, lr, mask=mask).compile()


# ------------------------------------------------------------------------------------ edits applied


def transfer_opt_state(opt: dict, fresh: dict, edited: Edited, old: ModelConfig) -> dict:
    """The optimiser state {group: state} after an edit.

    fresh: a new one for the edited parameters. old: the shape before.
    Raises ValueError where an edit's policy leaves a state that does not fit its parameters.
    """
    before, rows, after = groups(old), table(old), {}
    for group, new in fresh.items():
        policy = edited.policy.get(group, "keep")
        if policy == "reset" or group not in opt:
            after[group] = new
        elif policy == "keep":
            after[group] = opt[group]
        else:
            members = {name: rows[name] for name in before[group]}
            after[group] = map_like_params(opt[group], members, policy)
        if jax.tree.map(jnp.shape, after[group]) != jax.tree.map(jnp.shape, new):
            raise ValueError(
                f"an edit's policy {policy!r} for the optimiser group {group!r} "
                "does not fit its parameters"
            )
    return after


def apply_edits(
    edits: list[Callable],
    state: State,
    model: ModelConfig,
    optimizer: Callable,
    mesh: Mesh,
    context: Context,
) -> tuple[State, ModelConfig, dict[str, str]]:
    """State and shape after edits in turn; their policies say what becomes of the optimiser.

    Gives what these edits have borrowed too, see `model.Edited`.
    """
    borrowed = {}
    for i, edit in enumerate(edits):
        own = context._replace(key=jax.random.fold_in(context.key, i))
        edited = checked_edit(edit, edit(Model(model, state.params), own))
        new, params = edited.model
        check_declared(params, new, getattr(edit, "func", edit).__name__)
        opt = transfer_opt_state(state.opt, init_opt_state(params, new, optimizer), edited, model)
        state = state.replace(params=params, opt=opt)
        state = jax.device_put(state, places(state_like(new, optimizer, mesh)))
        model = new
        borrowed |= edited.borrowed
    return state, model, borrowed


def edit_model(run: "Run", state: State, step: int) -> State:
    """The state after the edits that are due after `step` steps."""
    edits = run.plan.edits[step]
    key = jax.random.fold_in(run.key("edits"), step)
    context = run.context._replace(
        key=key, step=step, batches=functools.partial(next_batches, run.loader, step)
    )
    with user_errors():
        state, model, borrowed = apply_edits(
            edits, state, run.plan.model_after(step), run.config.optimizer, run.mesh, context
        )
    run.borrowed = unchanged(run.borrowed | borrow(borrowed), state.params)
    names = ", ".join(getattr(edit, "func", edit).__name__ for edit in edits)
    say(f"step {step}: {names}; now {model.layers} layers, {count(model):,} parameters")
    return state


# ------------------------------------------------------------------------------------------ the run


@dataclass
class Run:
    """What is worked out in advance for a run, and what it keeps open."""

    config: Config
    file: str  # the config file
    directory: Path
    mesh: Mesh
    tokenizer: Tokenizer
    caches: dict[str, Cache]  # by source
    held_out: dict[str, Cache]  # of `data.held_out`
    loader: Loader
    plan: Plan
    context: Context  # of edits
    compiler: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    programs: dict = field(default_factory=dict)  # steps being compiled, by what they depend on
    begun: set[int] = field(default_factory=set)  # phases that took a step in this process
    checkpoints: Checkpoints | None = None
    resumed: tuple[int, int | None] = (0, None)  # the step it goes on from; steps since a reset
    summary: dict[str, Any] | None = None  # of a run that has ended
    own_figures: tuple[int, dict] = (-1, {})  # of its own evals, and the step that they are of
    borrowed: dict[str, Loan] = field(default_factory=dict)  # parameters that are another run's

    @functools.cached_property
    def counted(self) -> set[int]:
        """Phases whose attention may depend on how many segments a row has."""
        found = set()
        for i, (model, phase) in enumerate(zip(self.plan.models, self.config.phases, strict=True)):
            if counts_segments(model.attention, phase.seq, model.head_dim, model.dtype):
                found.add(i)
        return found

    def key(self, use: Literal["init", "edits"]) -> jax.Array:
        """A key of its own for each use of the seed. (Data is drawn from the seed by numpy.)"""
        return jax.random.fold_in(jax.random.key(self.config.seed), ("init", "edits").index(use))

    def setting(self, config: Config, phase: Phase) -> Setting:
        """What an evaluation reads; config: with the shape that is evaluated as its `model`."""
        return Setting(config, phase, self.caches, self.tokenizer, self.mesh, self.held_out)

    def abandon(self):
        """End the processes that build token caches, and so all waiting for them."""
        for cache in self.caches.values():
            cache.abandon()


def enable_float64(config: Config):
    """Let JAX compute in float64 where a config asks for it."""
    model = config.model
    jax.config.update("jax_enable_x64", "float64" in (model.dtype, model.param_dtype))


def next_batches(loader: Loader, step: int, number: int) -> list[dict]:
    """The arrays of the `number` batches after `step`, for edits that look at data.

    Past the last step that is decided, that step's batch comes again.
    """
    last = loader.decided()
    return [loader.batch(min(step + i, last)).arrays for i in range(1, number + 1)]


def prepare(config: Config, file: str = "") -> Run:
    """Check a config, and work out all that its run needs before it holds a state."""
    check(config)
    require(unmet_rules(config, file))
    directory, own = user_path(config.runs) / config.name, None
    if config.init_from:
        config, own = start_config(config, directory)
        check(config)
    enable_float64(config)
    with user_errors():
        mesh = make_mesh(config.mesh)
    check_batches(config, mesh)
    check_batch_memory(config)
    config, tokenizer, caches = assemble(config, own)
    held_out = open_held_out(config, tokenizer, caches)
    loader, context, plan = planned(config, tokenizer, caches)
    longer = with_steps(config, loader, plan.models[-1])
    if longer != config:
        check(longer)
        config = longer
        loader, context, plan = planned(config, tokenizer, caches)
    with user_errors():
        for model in plan.models:
            shardings(table(model), mesh)
    for i, model in enumerate(plan.models):
        if model.vocab != tokenizer.vocab:
            raise InputError(
                f"phases.{i}: the model has {model.vocab} pieces, the tokenizer "
                f"{tokenizer.vocab}; use the same data.tokenizer, or an edit that swaps the "
                "vocabulary"
            )
    check_state(config, plan, mesh)
    of_data = tokenizer, caches, held_out
    return Run(config, file, directory, mesh, *of_data, loader, plan, context)


def planned(
    config: Config, tokenizer: Tokenizer, caches: dict[str, Cache]
) -> tuple[Loader, Context, Plan]:
    """The batches of a config, what its edits may read, and what each of its steps is to be."""
    loader = Loader(caches, config.phases, config.data, tokenizer, config.seed)
    batches = functools.partial(next_batches, loader, 0)
    context = Context(jax.random.key(0), 0, tokenizer, batches, load_beside)
    with user_errors():
        return loader, context, make_plan(config, context)


def check_batches(config: Config, mesh: Mesh):
    """Raise InputError for a batch that the devices and `accumulate` do not divide."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    for i, phase in enumerate(config.phases):
        parts = rows * phase.accumulate
        if any(phase.batch * phase.seq // n % parts for n in batch_lengths(phase)[0]):
            raise InputError(
                f"phases.{i}.batch is {phase.batch}; allowed is a multiple of {parts}: "
                f"{rows} devices on the mesh axes data and fsdp, times accumulate, which may be "
                "another one on resuming"
            )


def resume(run: Run) -> tuple[State, int]:
    """The state to go on from, and its step: of the newest whole checkpoint, or the first."""
    found = [0, *run.checkpoints.steps()]
    same = all_gather(int(digest([to_json(run.config), found])[:7], 16))
    if len(np.unique(same)) > 1:
        raise InputError(
            f"the processes of run {run.directory} have different configs or checkpoints; "
            "allowed is the same command everywhere, and a directory that all of them see"
        )
    state, step = newest(run, found)
    lay_out(run)
    if step:
        say(f"resuming from step {step}" + (": this run is complete" if run.summary else ""))
    return state, step


def newest(run: Run, found: list[int]) -> tuple[State, int]:
    """The state at the newest of the steps that is whole, and that step; at 0 the first state."""
    while found[-1]:
        step = found.pop()
        try:
            return restore(run, step), step
        except Damaged as error:
            if len(found) == 1:
                raise InputError(f"{error}, with none before it; delete it to begin anew") from None
            print(f"{error}; it is now {step}.damaged, and the run goes back to step {found[-1]}")
            run.checkpoints.put_aside(step)
    compile_first(run)
    return first(run), 0


def restore(run: Run, step: int) -> State:
    """The state at a checkpoint, where the run's config and text lead there.

    Tells the loader what was drawn before and decided since. Raises InputError where another config
    or other text led there.
    """
    read_record(run.directory)
    meta = run.checkpoints.meta(step)
    if "format" not in meta:
        raise InputError(
            f"run {run.directory} was begun by an older version of Coppice, whose checkpoints do "
            "not say what they depend on as they do now; go on in another run: "
            f"--init_from {run.directory}@{step} --init_with all --name NEW"
        )
    changed = changed_fields(meta["past"], resume_key(run.config, run.plan, step))
    if step > run.plan.total:
        changed.append(f"the phases end at step {run.plan.total}")
    if changed:
        raise InputError(
            f"run {run.directory} has taken {step} steps under another config: "
            f"{'; '.join(changed)}; change that back, or use another --name"
        )
    if fingerprints(run, meta["sealed"]) != meta["fingerprints"]:
        raise InputError(
            f"run {run.directory} was trained on other text than the sources give now "
            f"({', '.join(run.caches)}); put that back, or use another --name"
        )
    now = rounding_key(run.config, run.mesh.size)
    rounded = changed_fields(meta.get("rounding", now), now)
    if rounded:
        say(
            f"what changes rounding alone is another than at step {step}: {'; '.join(rounded)}; "
            "from here on figures are the same but for rounding"
        )
    like = state_like(from_json(ModelConfig, meta["model"]), run.config.optimizer, run.mesh)
    state = run.checkpoints.state(step, like)
    run.loader.restore(meta["start"], meta["log"])
    run.resumed = step, meta["since_reset"]
    run.borrowed = run.checkpoints.loans(step)
    return state


def first(run: Run) -> State:
    """The state before any step: drawn, or that of what `init_from` names."""
    model, optimizer = run.config.model, run.config.optimizer
    state = first_state(model, optimizer, run.mesh, run.key("init"))
    if not run.config.init_from:
        return state
    start = start_from(run.config, model, state, state_like(model, optimizer, run.mesh))
    run.resumed, run.borrowed = (0, start.since_reset), start.borrowed
    if start.positions:
        run.loader.restore([start.positions.get(name, 0) for name in run.caches], [])
    return start.state


def fingerprints(run: Run, sealed: dict[str, int]) -> dict[str, str]:
    """{source: what the text, tokens and settings of its first so many shards are known by}."""
    found = {}
    for name, cache in run.caches.items():
        last = min(sealed[name], cache.wait(sealed[name])) - 1
        found[name] = cache.facts(last)["fingerprint"]
    return found


def compiled(run: Run, phase: int, state: State, arrays: dict, mask: Mask) -> Future:
    """The step of a phase as it is being compiled, for a state and batches of these shapes.

    Phases have one step together where all that `make_step` reads of them is the same.
    """
    config, model, own = run.config, run.plan.models[phase], run.config.phases[phase]
    frozen = run.plan.frozen(phase)
    read = loss_of(config, model, own), own.accumulate, frozen
    shape = arrays["tokens"].shape
    asked = read, shape, mask
    if asked in run.programs:
        return run.programs[asked]
    with user_errors():
        mask = settled(model.attention, mask, shape[1], model.head_dim, model.dtype)
    key = read, shape, mask
    if key not in run.programs:
        everywhere = NamedSharding(run.mesh, PartitionSpec())
        lr = jax.ShapeDtypeStruct((len(groups(model)),), np.float32, sharding=everywhere)
        run.programs[key] = run.compiler.submit(
            compile_step, config, model, run.mesh, state, arrays, lr, mask, own, frozen
        )
    run.programs[asked] = run.programs[key]
    return run.programs[key]


def compile_next(run: Run, phase: int, arrays: dict, mask: Mask):
    """Begin to compile the phase after this one, where its batches are to be like these."""
    phases = run.config.phases
    if phase + 1 == len(phases):
        return
    now, then = phases[phase], phases[phase + 1]
    fields = "batch", "seq", "lengths", "objective"
    alike = all(getattr(now, name) == getattr(then, name) for name in fields)
    if alike and not now.lengths:
        compile_ahead(run, phase + 1, arrays, mask)


def compile_first(run: Run):
    """Begin to compile the first phase while the first state is drawn."""
    if run.config.data.stream or jax.process_count() > 1:  # a stream may have no batch yet
        return
    batch = run.loader.batch(1)
    arrays = put(batch.arrays, run.mesh, batch.rows)
    compile_ahead(run, 0, shapes_of(arrays), mask_of(batch, run.plan.models[0]))


def compile_ahead(run: Run, phase: int, arrays: dict, mask: Mask):
    """Begin to compile a phase's step; several processes compile in step with one another alone."""
    if jax.process_count() == 1:
        state = state_like(run.plan.models[phase], run.config.optimizer, run.mesh)
        compiled(run, phase, state, arrays, mask)


def mask_of(batch: Batch, model: ModelConfig) -> Mask:
    """The mask of a batch, for a model."""
    return bounded(Mask(**batch.mask), batch.segments, model)


def bounded(mask: Mask, segments: int, model: ModelConfig) -> Mask:
    """The mask with a bound on the segments of a row; a forward of its own may have others."""
    return replace(mask, segments=segments) if model.forward is llama else mask


def shapes_of(arrays: dict) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and places of arrays."""
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in arrays.items()
    }


class Given(NamedTuple):
    """What a step takes besides the state."""

    arrays: dict[str, jax.Array]  # of its batch, on the devices
    mask: Mask
    lr: np.ndarray  # float32, the rate of each optimiser group
    metrics: dict[str, float]  # of its batch


def given(run: Run, step: int) -> Given:
    """What a step takes, put onto the devices; made by a thread, ahead of the loop."""
    phase = run.plan.phase_of(step)
    own = functools.partial(own_rows, run.mesh)
    batch = run.loader.batch(step, own, counted=phase in run.counted)
    arrays = put(batch.arrays, run.mesh, batch.rows)
    mask = mask_of(batch, run.plan.models[phase])
    return Given(arrays, mask, run.plan.rates(step), batch.metrics)


def train_step(run: Run, state: State, batch: Given, step: int) -> tuple[State, Any]:
    """Dispatch one update; gives the state after it and its metrics, both still on the devices."""
    phase = run.plan.phase_of(step)
    model = run.plan.models[phase]
    arrays, mask = batch.arrays, batch.mask
    update = compiled(run, phase, state, arrays, mask).result()
    if phase not in run.begun:
        check_step(update, phase, run.mesh)
        if not run.begun:
            length = arrays["tokens"].shape[1]
            attention = choose(model.attention, mask, length, model.head_dim, model.dtype)
            banner(run, update, attention)
        run.begun.add(phase)
        compile_next(run, phase, shapes_of(arrays), mask)
    edited = any(step - n in run.plan.edits for n in range(1, 6))  # in the last five steps
    before = jax.tree.map(jnp.copy, state.params) if edited else None
    wait_on_cpu(state.step)  # which is there when all that the step before made is there
    state, metrics = update(state, arrays, batch.lr)
    if edited:
        metrics = dict(metrics) | update_ratios(before, state.params, model)
    return state, metrics


def evaluate(run: Run, state: State, step: int) -> dict[str, float]:
    """Held-out figures of a state; they decide a mixture that is steered."""
    losses, scores = held_out_programs(run, step)
    config = replace(run.config, model=run.plan.model_after(step))
    phase = config.phases[run.plan.phase_of(step)]
    setting = run.setting(config, phase)
    found = dev_figures(losses, state.params, state.step, setting)
    found |= trained_losses(run, state, step, setting)
    own = own_evals(scores, state.params, state.step, setting)
    run.own_figures = step, own
    found |= own
    if step in run.plan.steers:
        run.loader.decide(run.plan.steers[step], found)
    return found


def trained_losses(run: Run, state: State, step: int, setting: Setting) -> dict[str, float]:
    """What the phase trains on, measured on dev, where bits per byte do not say it already."""
    model, phase = setting.config.model, setting.phase
    loss = loss_of(run.config, model, phase)
    entered = model == run.plan.models[run.plan.phase_of(step)]  # else its edits are still to come
    if not entered or is_plain(loss, phase, run.caches):
        return {}
    sums = summing(loss, run.mesh)
    return own_losses(sums, state.params, state.step, step, setting, run.loader)


def held_out_programs(run: Run, step: int) -> tuple[Callable, Callable]:
    """`evaluators` of the model after a step."""
    return evaluators(run.config.reparam, run.plan.model_after(step), run.mesh)


def save(run: Run, state: State, step: int, log: Log):
    """Begin a checkpoint, once every row up to it is on disk."""
    log.sync()
    begun = time.monotonic()
    sealed = {name: cache.sealed for name, cache in run.caches.items()}
    positions = run.loader.positions(step).tolist()
    model = run.plan.model_after(step)
    trained = set().union(*trained_groups(model, run.config.optimizer).values())
    run.checkpoints.save(
        step,
        state,
        {
            "step": step,
            "model": to_json(model),
            **run.plan.spent(step),
            "since_reset": run.plan.since_reset(step, *run.resumed),
            "sealed": sealed,
            "fingerprints": fingerprints(run, sealed),
            "log": run.loader.log,
            "start": run.loader.start,
            "past": resume_key(run.config, run.plan, step),
            "rounding": rounding_key(run.config, run.mesh.size),
            "positions": dict(zip(run.caches, positions, strict=True)),
            "tokenizer": content_hash(run.tokenizer.model).hex(),
        },
        {name: loan for name, loan in run.borrowed.items() if name not in trained},
    )
    log.saved(time.monotonic() - begun)


def lay_out(run: Run):
    """Write what identifies a run into its directory, and read its summary if it has ended."""
    end = run.directory / "summary.json"
    if end.exists() and run.resumed[0] == run.plan.total:
        run.summary = read_object(end) or None
        if not run.summary:
            say(f"{end} is damaged; the run ends again")
    if not is_main_process():
        return
    if not run.summary:  # what a run left there that was made longer is not its end any more
        end.unlink(missing_ok=True)
    source = run.directory / "source"
    keep_source(source, run.file.split(":")[0])
    models = [to_json(model) for model in run.plan.models]
    names = named_files([to_json(run.config), models, class_of(run.tokenizer)])
    record(source, names)
    write(run.directory / "tokenizer.model", run.tokenizer.model)
    write(run.directory / "config.json", json.dumps(to_json(run.config), indent=1))


def keep_source(place: Path, config_file: str):
    """Copy the code of a run into its directory: its config file, and what of the house it uses."""
    if place.is_symlink():  # what is written must not land where somebody's link leads
        place.unlink()
    for inside in place.rglob("*"):
        if inside.is_symlink():
            inside.unlink()
    place.mkdir(exist_ok=True)
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    for file in map(Path, filter(None, files)):
        if file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] in CODE:
            kept = place / file.relative_to(ROOT)
            kept.parent.mkdir(parents=True, exist_ok=True)
            copy(file, kept)
    if config_file:
        copy(Path(config_file), place / Path(config_file).name)


@contextlib.contextmanager
def opened(run: Run):
    """Hold a run's directory, so that no other process trains it; at the end, wait for saves."""
    run.directory.mkdir(parents=True, exist_ok=True)
    lock = contextlib.nullcontext()
    if is_main_process():
        lock = locked(run.directory / ".lock", f"run {run.directory}")
    root, config = run.directory / "checkpoints", run.config
    try:
        with lock, Checkpoints(root, config.keep, config.keep_every) as run.checkpoints:
            yield run
    finally:
        run.compiler.shutdown(wait=False, cancel_futures=True)


def batches_after(run: Run, step: int, stop: Stop) -> Prefetch:
    """The batches of the steps after `step`, made ahead; a signal may end them early."""
    make = functools.partial(given, run)
    steps = range(step + 1, run.plan.total + 1)
    return Prefetch(make, steps, decided=run.loader.decided, stopped=lambda: stop.wants_exit)


def log_of(run: Run, step: int) -> Log:
    """What a run reports after `step`, its tracker told of what came before."""
    complete = run.summary is not None
    place, sizes = run.directory / "metrics.jsonl", sizes_of(run.plan, run.config.optimizer)
    log = Log(place, step, run.plan, run.config.max_skipped, complete, sizes)
    if not complete:
        log.tell(start_tracker(run, step))
    return log


def train(config: Config, file: str = "") -> dict[str, Any] | None:
    """Train from the last checkpoint, or from the start, to the end; None if a signal stopped it.

    Gives what summary.json holds. file: where the config comes from, to be kept with the run.
    """
    refuse_while_loading()
    listening = Stop(config.save_minutes, config.stop_code)
    with forgiving(), listening as stop, opened(prepare(config, file)) as run:
        state, step = resume(run)  # from its own checkpoint, another run, a directory, or a draw
        stop.begin(run.mesh, run.abandon)
        with log_of(run, step) as log, batches_after(run, step, stop) as batches:
            start = step + 1
            if step == 0 and run.plan.evaluates(0):
                log.evaluation(0, evaluate(run, state, 0))
            for step, batch in enumerate(batches, start):
                if step - 1 in run.plan.edits:  # growth and forgetting happen between batches
                    log.flush()
                    state = edit_model(run, state, step - 1)
                state, metrics = train_step(run, state, batch, step)
                log.step(step, metrics, batch.metrics, batches.waited)  # read one step late
                stop.listen()
                if run.plan.evaluates(step):
                    log.sync()
                    log.evaluation(step, evaluate(run, state, step))
                if run.plan.saves(step) or stop.wants_save:
                    save(run, state, step, log)
                    stop.restart_clock()
                if stop.wants_exit:
                    break
            if stop.wants_exit:
                return leave(run, state, step, log, stop)
            run.checkpoints.close()
            return run.summary or finish(run, log)


def leave(run: Run, state: State, step: int, log: Log, stop: Stop):
    """End after a signal, with all up to `step` saved."""
    run.checkpoints.wait()
    if step > max([0, *run.checkpoints.steps()]):
        save(run, state, step, log)
    run.checkpoints.close()
    say(f"stopped by {stop.reason()}; step {step} is saved, the same command resumes")


def finish(run: Run, log: Log) -> dict[str, Any]:
    """What a run ends with: figures of the test split, samples, curves and summary.json.

    They are of the newest checkpoint or, where embeddings are forgotten, of the one longest after
    that. Gives what summary.json holds, in the main process.
    """
    total, name = run.plan.total, str(run.directory)
    step = find_checkpoint(name)[1]
    params, config, tokenizer, _ = load(name, step)
    tests, own = final_figures(run, params, config, step)
    write_figures(run.directory, tests | own)
    tests = {name: value for name, value in tests.items() if name.startswith("eval/")}
    log.row({"step": total, "final": True, **tests, **run.plan.spent(total)})
    log.sync()
    samples = continuations(params, config, tokenizer, step, config.prompts)
    if not is_main_process():
        return {}
    say(samples)
    write(run.directory / "samples.txt", samples)
    draw(run.directory)
    summary = write_summary(run.directory)
    say(hint(run.directory, config.prompts))
    return summary


def final_figures(run: Run, params: dict, config: Config, step: int) -> tuple[dict, dict]:
    """(figures of the whole test split, those of the config's own evals, which run once)."""
    params = jax.device_put(params, shardings(table(config.model), run.mesh))
    losses, scores = held_out_programs(run, step)
    losses = functools.partial(losses, params, step)
    measured = run.caches, config, run.tokenizer, run.mesh, run.held_out
    found = test_figures(losses, *measured)
    evaluated, own = run.own_figures
    if step != evaluated:
        setting = run.setting(config, config.phases[-1])
        own = own_evals(scores, params, step, setting)
    return found, own


def load(
    run: str, step: int | None = None, mesh: dict[str, int] | None = None, trusted: bool = False
):
    """(params, config, tokenizer, apply) of a run's checkpoint.

    apply(params, ids [b t] or batch [, mask]) -> logits [b t v], see `sharded_apply`.
    `config.model` is the shape of that checkpoint. For the step see `find_checkpoint`.
    mesh: fields unlike those of the run's mesh; without them, one
    device where there is one process. trusted: code of a run made elsewhere may run, see
    lib/trust.py.
    """
    with trust(trusted):
        return load_run(run, step, mesh)


def load_run(run: str, step: int | None, mesh: dict[str, int] | None):
    """The same, of what may run now."""
    checkpoints, step, meta = find_checkpoint(run, step)
    directory = checkpoints.root.parent
    config = config_files.read_json(str(directory / "config.json"), Config)
    config = replace(config, model=from_json(ModelConfig, meta["model"]))
    enable_float64(config)
    if mesh or jax.process_count() > 1:
        devices = make_mesh(replace(config.mesh, **mesh or {}))
    else:
        devices = make_mesh(MeshConfig(), jax.devices()[:1])
    params = checkpoints.params(step, state_like(config.model, config.optimizer, devices))
    tokenizer = load_tokenizer(own_tokenizer(directory, meta))
    _, scores = evaluators(config.reparam, config.model, devices)
    return params, config, tokenizer, sharded_apply(scores, step, devices)


def load_beside(run: str, step: int | None = None):
    """`load` for an edit: the run that is trained goes on with float64, or without, as before."""
    wide = jax.config.jax_enable_x64
    found = load(run, step)
    jax.config.update("jax_enable_x64", wide)
    return found


# --------------------------------------------------------------------------------- the command line


def verb(name: str, arguments: list[str]):
    """Run tools/NAME.py."""
    return load_file(ROOT / "tools" / f"{name}.py").main(arguments)


def verb_of(arguments: list[str]) -> tuple[str, list[str]]:
    """(the verb that the command line asks for, its own words); "" where it asks for a run."""
    if arguments and arguments[0] in config_files.verbs():
        return arguments[0], arguments[1:]
    if "--debug" in arguments:
        return "debug", [word for word in arguments if word != "--debug"]
    return "", arguments


def main(arguments: list[str]) -> int:
    """The command line; 2 for what the user can mend, said in one sentence on stderr."""
    tune_for_cpu()
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_home() / "compiled"))
    name, words = verb_of([word for word in arguments if word != "--trust"])

    def work() -> int:
        if name:
            result = verb(name, words)
            return result if isinstance(result, int) else 0  # of fit: 1 for what does not fit
        config, file = parse(words)
        ended = train(config, file)
        return config.stop_code if ended is None else 0

    with trust("--trust" in arguments):
        return answered(work)


def quiet(problem):
    """Say nothing of the event loop that Orbax's threads call after a failed save closed it.

    The sentence of the failed save says what went wrong.
    """
    if str(problem.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(problem)


if __name__ == "__main__":  # one module called `train`, for every config that imports it
    sys.path.insert(0, str(ROOT))
    import train

    sys.unraisablehook = quiet
    sys.exit(train.main(sys.argv[1:]))

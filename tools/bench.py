"""Time the training step of a config on random rows; the last line is one JSON object.

Shapes may be given short: --layers --embed --heads --kv_heads --head_dim --mlp --vocab --dtype for
the model, --batch and --seq for its rows; every --path.to.field VALUE of a config works too. Where
--embed or --heads is given alone, heads are 64 wide (32 below 256), and key-value heads as many as
query heads.

--against COMMAND keeps this and COMMAND alive and measures them in turn, --seconds each, --rounds
times, the order turned round each time. It gives each round's ratio of tokens_per_s and their
median, the load of the machine before and after, and of both the time to compile and the most
memory held. COMMAND is another `bench`, or tests/peer_train.py, see lib/live.py; any other command
is run anew for each round, and its last line must be such an object as well. --compile gives
COMMAND that flag too.

--suite gpu measures a GPU: kernels, steps of the ready configs, a peer; see tools/suite.py.

--together N steps N runs of a small model as one program (`jax.vmap`), on one device: with --vary
rates the same rows, at rates of their own; with --vary seeds rows of their own too. tokens_per_s
counts all of them, so that --against the same command without --together compares this with N runs
in turn.

step_ms is the median of the steps' times and step_ms_quartiles the quarter and the three quarters
of them; host_stall the share of that time in which the host was busy with dispatching a step: the
device's idling is less. --profile DIR writes a trace of five more steps, for XProf or Perfetto
(ui.perfetto.dev opens the .json.gz). --apart adds what a step's time is made of, `apart_ms`: the
forward pass, the backward pass (the gradient's time less the forward's), the update (the step's
less the gradient's), and beside them `products`: all products of weights with activations in them,
each timed alone (gradients for --seconds, 3 at most; each product for a tenth of that).

--generate times tools/sample.py instead: sample_tokens after --batch random prompts of --seq
tokens, drawn at sample_temperature, the prompts' own pass included; with --init_from RUN by that
run's model.
"""
import collections
import dataclasses
import json
import math
import os
import shlex
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from lib import hardware
from lib.arguments import Arguments
from lib.errors import InputError
from lib.generate import Sampling, generate, prepare
from lib.kernels import Mask
from lib.live import LIVE, Bench, compared, in_turn, serve
from lib.optim import first_state
from lib.sharding import make_mesh, put
from lib.timing import WARM_UP, Times, median_ms, peak_gib, time_steps
from model import ModelConfig, count, groups, init, losses, table
from train import ROOT, Config, bounded, check, compile_step, load, make_step, parse, verb

SHORT = {f.name: f"model.{f.name}" for f in dataclasses.fields(ModelConfig)}
SHORT |= {"batch": "phases.0.batch", "seq": "phases.0.seq"}
BATCHES = 8  # different batches, used in turn
PROFILED = 5  # steps in a trace


# ---------------------------------------------------------------------------------------- training


def program(config: Config, mesh, state, batch, lr, together: int, vary: str):
    """(the step compiled, the state it begins with), for one run or for several as one program."""
    mask = mask_of_rows(config.model)
    if together == 1:
        return compile_step(config, config.model, mesh, state, batch, lr, mask), state
    one = make_step(config, config.model)
    rows = None if vary == "rates" else 0

    def masked(state, batch, lr):
        return one(state, batch, lr, mask)

    state = jax.tree.map(lambda x: jnp.stack([x] * together), state)
    step = jax.jit(jax.vmap(masked, in_axes=(0, rows, 0)), donate_argnums=0)
    return step.lower(state, batch, lr).compile(), state


def mask_of_rows(model: ModelConfig) -> Mask:
    """The mask of rows that are one segment each, as a run has it."""
    return bounded(Mask("causal", 0), 1, model)


def random_batches(config: Config, mesh, together: int, vary: str) -> list[dict]:
    """Batches of random tokens for the first phase, for each run its own where seeds vary."""
    phase = config.phases[0]
    rng = np.random.default_rng(0)
    size = (BATCHES, phase.batch, phase.seq + 1)
    tokens = rng.integers(0, config.model.vocab, size, dtype=np.int32)
    ones = np.ones((phase.batch, phase.seq), np.int32)
    same = {
        "segments": ones,
        "positions": np.cumsum(ones, 1) - 1,
        "weights": ones.astype(np.float32),
        "source": ones * 0,
    }
    batches = []
    for rows in tokens:
        own = {"tokens": rows[:, :-1], "targets": rows[:, 1:]}
        batches.append(put(own | same, mesh))
    if together == 1 or vary == "rates":
        return batches
    stacked = []
    for i in range(BATCHES):
        chosen = [batches[(i + j) % BATCHES] for j in range(together)]
        stacked.append(jax.tree.map(lambda *x: jnp.stack(x), *chosen))
    return stacked


def write_trace(directory: str, step, state, batches: list[dict], lr: dict):
    """Write a trace of a few more steps."""
    with jax.profiler.trace(directory, create_perfetto_trace=True):
        for batch in batches[:PROFILED]:
            state, _ = step(state, batch, lr)
        jax.block_until_ready(state)
    return state


class Measured:
    """A step of a config's first phase on random rows, compiled, to be timed again and again."""

    def __init__(self, config: Config, together: int = 1, vary: str = "seeds"):
        self.config, self.together = config, together
        self.mesh, shape = make_mesh(config.mesh), config.model
        self.batches = random_batches(config, self.mesh, together, vary)
        state = first_state(shape, config.optimizer, self.mesh, jax.random.key(config.seed))
        lr = np.float32(config.schedule.peak)
        if together > 1:
            lr = np.full(together, lr)
        self.lr = dict.fromkeys(groups(shape), lr)
        begun = time.perf_counter()
        self.step, self.state = program(
            config, self.mesh, state, self.batches[0], self.lr, together, vary
        )
        self.compile_s = round(time.perf_counter() - begun, 2)

    def ready(self) -> dict:
        """What is known before any step."""
        return {"compile_s": self.compile_s} | where_and_what(self.config.model)

    def times(self, seconds: float, warm_up: int = WARM_UP) -> Times:
        """Time steps for so long, from where the last ones ended."""
        given = self.step, self.state, self.batches, self.lr
        self.state, times = time_steps(*given, seconds, warm_up)
        return times

    def round(self, seconds: float) -> dict:
        """One round of a comparison."""
        times = self.times(seconds, 1)
        return speeds(self.config, times, self.together) | {"peak_gib": peak_gib()}


def measure(
    config: Config,
    seconds: float,
    together: int = 1,
    vary: str = "seeds",
    profile: str | None = None,
    taken_apart: bool = False,
) -> dict:
    """Time steps of the first phase for `seconds`, for the figures that this command prints."""
    it = Measured(config, together, vary)
    times = it.times(seconds)
    if profile:
        it.state = write_trace(profile, it.step, it.state, it.batches, it.lr)
    memory = it.step.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    row = speeds(config, times, together)
    row["compile_s"] = it.compile_s
    row["memory_gib"] = round(held / 2**30, 3)
    row["peak_gib"] = peak_gib()
    if taken_apart:
        ms = 1e3 * statistics.median(times.steps)
        row["apart_ms"] = apart(config, it.mesh, it.state, it.batches[0], ms, seconds)
    return row


def speeds(config: Config, times: Times, together: int) -> dict:
    """What follows from the times of steps of the first phase."""
    shape, phase = config.model, config.phases[0]
    quartiles = np.quantile(times.steps, (0.25, 0.5, 0.75))
    low, ms, high = (1e3 * float(q) for q in quartiles)
    tokens_per_s = together * phase.batch * phase.seq / ms * 1e3
    flops = tokens_per_s * shape.flops(shape, phase.seq)
    peak = hardware.peak()
    row = {
        "tokens_per_s": round(tokens_per_s),
        "step_ms": round(ms, 2),
        "step_ms_quartiles": [round(low, 2), round(high, 2)],
        "host_stall": round(times.busy, 4),
        "mfu": round(flops / peak, 4) if peak else None,
        "model_tflops": round(flops / 1e12, 4),
        "steps": len(times.steps),
        "loss": round(times.loss, 3),
        "together": together,
    }
    return row | where_and_what(shape)


def where_and_what(shape: ModelConfig) -> dict:
    """What each measurement says of model and machine."""
    return {
        "params": count(shape),
        "dtype": shape.dtype,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


# ------------------------------------------------------------------------------ a step taken apart


def product_sizes(shape: ModelConfig) -> collections.Counter:
    """{(width, the other width of a weight): how often} of the products in a forward pass."""
    sizes = collections.Counter()
    for p in table(shape).values():
        is_head = p.group == "head" or (p.group == "embed" and shape.tied)
        if p.group != "matrix" and not is_head:
            continue
        named = dict(zip(p.axes, p.shape, strict=True))
        times = named.pop("layers", 1)
        named.pop("embed", None)
        sizes[shape.embed, math.prod(named.values())] += times
    return sizes


def products_ms(shape: ModelConfig, rows: int, seconds: float) -> float:
    """Milliseconds of all products of weights with `rows` of activations, and of gradients."""
    total = 0.0
    for (i, o), times in product_sizes(shape).items():
        forward = (rows, i), (i, o)
        of_rows = (rows, o), (o, i)
        of_weights = (i, rows), (rows, o)
        for a, b in (forward, of_rows, of_weights):
            left, right = jnp.ones(a, shape.dtype), jnp.ones(b, shape.dtype)
            total += times * median_ms(seconds, jax.jit(jnp.matmul), left, right)
    return total


def apart(config: Config, mesh, state, batch, step_ms: float, seconds: float) -> dict[str, float]:
    """What `--apart` adds; forward, backward and update sum to `step_ms`."""
    seconds = min(3.0, seconds)
    shape = config.model

    def loss(params, batch):
        extras = {"step": 0}
        each = losses(params, batch, mask_of_rows(shape), shape, config.token_loss, extras)
        return jnp.mean(each)

    with jax.set_mesh(mesh):
        forward = median_ms(seconds, jax.jit(loss), state.params, batch)
        gradient = median_ms(seconds, jax.jit(jax.value_and_grad(loss)), state.params, batch)
        products = products_ms(shape, batch["tokens"].size, seconds / 10)
    parts = {
        "forward": forward,
        "backward": gradient - forward,
        "update": step_ms - gradient,
        "products": products,
    }
    return {name: round(ms, 2) for name, ms in parts.items()}


# -------------------------------------------------------------------------------------- generation


def generation(config: Config, seconds: float) -> dict:
    """Generate for `seconds`, again and again: tokens/s of all rows at the median time."""
    phase = config.phases[0]
    params = None
    if config.init_from:
        params, of_run, *_ = load(config.init_from)
        config = dataclasses.replace(config, model=of_run.model)
    shape, batch, tokens = config.model, phase.batch, config.sample_tokens
    if params is None:
        params = init(shape, jax.random.key(config.seed))
    weights = jax.jit(prepare, static_argnames="config")(params, config=shape)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, shape.vocab, (batch, phase.seq)).tolist()
    how = Sampling(np.float32(config.sample_temperature))
    times = []
    while len(times) < 4 or sum(times[1:]) < seconds:
        begun = time.perf_counter()
        generate(weights, prompts, tokens, [*range(batch)], how, -1, shape)
        times.append(time.perf_counter() - begun)
    compiled, *rest = times
    ms = 1e3 * statistics.median(rest)
    row = {
        "tokens_per_s": round(batch * tokens / ms * 1e3, 1),
        "ms": round(ms, 1),
        "first_s": round(compiled, 2),
        "runs": len(rest),
    }
    return row | where_and_what(shape)


# ------------------------------------------------------------------------------------- the command


def against(command: str, rounds: int, seconds: float, arguments: list[str]) -> dict:
    """This benchmark and a command, both alive, measured in turn for so many seconds each."""
    ours = [sys.executable, str(ROOT / "train.py"), "bench", *arguments]
    before = os.getloadavg()
    with Bench(ours) as mine, Bench(shlex.split(command)) as other:
        mine.start()  # one after the other: nothing compiles while something is timed
        other.start()
        row = compared(in_turn(mine.measure, other.measure, rounds, seconds))
        row["compile_s"] = mine.ready.get("compile_s")
        row["against_compile_s"] = other.ready.get("compile_s")
        row["alive"] = mine.alive and other.alive
    row["against"] = command
    row["load"] = [round(load[0], 2) for load in (before, os.getloadavg())]
    return row


def long_flags(words: list[str]) -> list[str]:
    """The flags of a config, of which some may be given short."""
    flags = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            word = f"--{SHORT.get(name, name)}{equals}{value}"
        flags.append(word)
    return flags


def with_heads(m: ModelConfig, given: set[str]) -> ModelConfig:
    """The shape with heads that fit its width, where only one of these two is given."""
    if not given & {"embed", "heads"}:
        return m
    heads = m.heads
    if "heads" not in given:
        width = 64 if m.embed >= 256 else 32
        heads = max(1, m.embed // width)
    head_dim = m.head_dim if "head_dim" in given else m.embed // heads
    kv_heads = m.kv_heads if "kv_heads" in given else heads
    return dataclasses.replace(m, heads=heads, head_dim=head_dim, kv_heads=kv_heads)


def make_parser() -> Arguments:
    """The arguments of this command."""
    parser = Arguments("bench", __doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=10.0, help="how long to measure")
    add("--against", metavar="COMMAND", help="another benchmark to alternate with")
    add("--rounds", type=int, default=5, help="times that each is measured, with --against")
    add("--compile", action="store_true", help="the other benchmark is to compile its model")
    add("--suite", help="gpu: many measurements, see tools/suite.py")
    add("--together", type=int, default=1, help="runs that are one program")
    add("--profile", metavar="DIR", help="write a trace there")
    add("--apart", action="store_true", help="take a step's time apart")
    add("--generate", action="store_true", help="time sampling, not training")
    add("--vary", choices=["seeds", "rates"], default="seeds", help="what these differ in")
    options = "[--batch N --seq N --layers N --path.to.field VALUE ...]"
    parser.usage = f"%(prog)s [CONFIG] [options] {options}"
    return parser


def bench_config(file: str, words: list[str]) -> Config:
    """The config to measure, from its file and flags."""
    flags = long_flags(words)
    config, _ = parse([file, *flags])
    given = {flag.split("=")[0].removeprefix("--model.") for flag in flags}
    config = dataclasses.replace(config, model=with_heads(config.model, given))
    check(config)
    if config.model.vocab < 1:
        raise InputError(
            "bench: model.vocab is 0; allowed is 1 and more, since there is no tokenizer to take "
            "it from"
        )
    return config


def check_arguments(a):
    """Raise InputError for options that do not go together."""
    if a.apart and a.together > 1:
        raise InputError("bench: --apart is for one run; allowed is --together 1")
    devices = jax.device_count()
    if a.together < 1 or (a.together > 1 and devices > 1):
        raise InputError(
            f"bench: --together is {a.together} on {devices} devices; allowed is 1 and more, and "
            "more than 1 on one device alone"
        )


def main(arguments: list[str]) -> dict | int:
    """Command line; returns what it prints last, or of a suite the exit code."""
    if "--suite" in arguments:
        place = arguments.index("--suite")
        kind = arguments[place + 1:place + 2]
        if kind != ["gpu"]:
            raise InputError(f"bench: --suite is {' '.join(kind)!r}; allowed is gpu")
        return verb("suite", arguments[:place] + arguments[place + 2:])
    file = str(ROOT / "configs/bench.py")
    if arguments and not arguments[0].startswith("-"):
        file, *arguments = arguments
    a, overrides = make_parser().parse_known_args(arguments)
    if a.compile and not a.against:
        raise InputError("bench: --compile is for the other benchmark; allowed with --against")
    if a.against:
        rest = [file, "--seconds", str(a.seconds), "--together", str(a.together), "--vary", a.vary]
        if a.generate:
            rest.append("--generate")
        command = f"{a.against} --compile" if a.compile else a.against
        result = against(command, a.rounds, a.seconds, rest + overrides)
    elif LIVE in os.environ and not a.generate:
        config = bench_config(file, overrides)
        check_arguments(a)
        it = Measured(config, a.together, a.vary)
        serve(it.ready(), it.round)
        return {}
    else:
        config = bench_config(file, overrides)
        check_arguments(a)
        if a.generate:
            result = generation(config, a.seconds)
        else:
            result = measure(config, a.seconds, a.together, a.vary, a.profile, a.apart)
    print(json.dumps(result))
    return result

"""Time the training step of a config on random rows; the last line is one JSON object.

Shapes may be given short: --layers --embed --heads --kv_heads --head_dim --mlp --vocab --dtype for
the model, --batch and --seq for its rows; every --path.to.field VALUE of a config works too. Where
--embed or --heads is given alone, heads are 64 wide (32 below 256), and key-value heads as many as
query heads. --against COMMAND runs this and COMMAND in turn, --rounds times each, and gives the
median of the ratios of their tokens_per_s (COMMAND's last line must be such an object as well).

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
import shlex
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lib import hardware
from lib.arguments import Arguments
from lib.errors import InputError
from lib.generate import Sampling, generate, prepare
from lib.kernels import Mask
from lib.optim import first_state
from lib.sharding import make_mesh, put
from model import ModelConfig, count, groups, init, losses, table
from train import ROOT, Config, check, compile_step, load, make_step, parse

SHORT = {f.name: f"model.{f.name}" for f in dataclasses.fields(ModelConfig)}
SHORT |= {"batch": "phases.0.batch", "seq": "phases.0.seq"}
BATCHES = 8  # different batches, used in turn
WARM_UP = 3  # steps before any is timed
PROFILED = 5  # steps in a trace


# ---------------------------------------------------------------------------------------- training


def program(config: Config, mesh, state, batch, lr, together: int, vary: str):
    """(the step compiled, the state it begins with), for one run or for several as one program."""
    mask = Mask("causal", 0)
    if together == 1:
        return compile_step(config, config.model, mesh, state, batch, lr, mask), state
    one = make_step(config, config.model)
    rows = None if vary == "rates" else 0

    def masked(state, batch, lr):
        return one(state, batch, lr, mask)

    state = jax.tree.map(lambda x: jnp.stack([x] * together), state)
    step = jax.jit(jax.vmap(masked, in_axes=(0, rows, 0)), donate_argnums=0)
    return step.lower(state, batch, lr).compile(), state


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


class Times(NamedTuple):
    """What timing the steps of a program gave."""

    steps: list[float]  # seconds of each
    busy: float  # the part of all that time in which the host was dispatching
    loss: float  # the mean over runs, at the end


def time_steps(step, state, batches: list[dict], lr: dict, seconds: float) -> tuple[Any, Times]:
    """(state, times) of steps for so many seconds, five at least.

    Each step is dispatched before the one before it has ended, as the loop of a run does it.
    """
    for _ in range(WARM_UP):
        state, metrics = step(state, batches[0], lr)
    jax.block_until_ready(state)
    times = []
    count = 0
    busy = 0.0
    last = None
    begun = now = time.perf_counter()
    while now - begun < seconds or len(times) < 5:
        called = time.perf_counter()
        state, metrics = step(state, batches[count % BATCHES], lr)
        busy += time.perf_counter() - called
        if last is not None:
            jax.block_until_ready(last)
            then, now = now, time.perf_counter()
            times.append(now - then)
        last = metrics
        count += 1
    loss = float(jnp.mean(last["train/loss"]))
    return state, Times(times, busy / (now - begun), loss)


def write_trace(directory: str, step, state, batches: list[dict], lr: dict):
    """Write a trace of a few more steps."""
    with jax.profiler.trace(directory, create_perfetto_trace=True):
        for batch in batches[:PROFILED]:
            state, _ = step(state, batch, lr)
        jax.block_until_ready(state)
    return state


def measure(
    config: Config,
    seconds: float,
    together: int = 1,
    vary: str = "seeds",
    profile: str | None = None,
    taken_apart: bool = False,
) -> dict:
    """Time steps of the first phase for `seconds`, for the figures that this command prints."""
    mesh, shape = make_mesh(config.mesh), config.model
    batches = random_batches(config, mesh, together, vary)
    state = first_state(shape, config.optimizer, mesh, jax.random.key(config.seed))
    lr = np.float32(config.schedule.peak)
    if together > 1:
        lr = np.full(together, lr)
    lr = dict.fromkeys(groups(shape), lr)
    begun = time.perf_counter()
    step, state = program(config, mesh, state, batches[0], lr, together, vary)
    compile_s = time.perf_counter() - begun
    state, times = time_steps(step, state, batches, lr, seconds)
    if profile:
        state = write_trace(profile, step, state, batches, lr)
    memory = step.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    row = speeds(config, times, together)
    row["compile_s"] = round(compile_s, 2)
    row["memory_gib"] = round(held / 2**30, 3)
    if taken_apart:
        ms = 1e3 * statistics.median(times.steps)
        row["apart_ms"] = apart(config, mesh, state, batches[0], ms, seconds)
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


def median_ms(seconds: float, function, *arguments) -> float:
    """Milliseconds that a call takes until its result is there: the median within `seconds`."""
    times = []
    jax.block_until_ready(function(*arguments))
    while len(times) < 5 or sum(times) < seconds:
        begun = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(times)


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
        each = losses(params, batch, Mask("causal", 0), shape, config.token_loss, extras)
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


def speed_of(line: list[str]) -> float:
    """The tokens_per_s that a benchmark's last line gives."""
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip()[-300:]
        raise InputError(f"bench: {shlex.join(line)} ended with {done.returncode}: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])["tokens_per_s"]


def against(command: str, rounds: int, arguments: list[str]) -> dict:
    """Run this benchmark and a command in turn, and compare."""
    ours = [sys.executable, str(ROOT / "train.py"), "bench", *arguments]
    theirs = shlex.split(command)
    rows = []
    for i in range(rounds):
        a, b = speed_of(ours), speed_of(theirs)
        rows.append((a, b))
        print(f"round {i + 1}: {a:,} against {b:,} tokens/s, ratio {a / b:.3f}", flush=True)
    return {
        "ratio": round(statistics.median(a / b for a, b in rows), 3),
        "tokens_per_s": statistics.median(a for a, _ in rows),
        "against_tokens_per_s": statistics.median(b for _, b in rows),
        "rounds": rounds,
    }


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
    add("--rounds", type=int, default=5, help="times that each is run, with --against")
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


def main(arguments: list[str]) -> dict:
    """Command line; returns what it prints last."""
    file = str(ROOT / "configs/bench.py")
    if arguments and not arguments[0].startswith("-"):
        file, *arguments = arguments
    a, overrides = make_parser().parse_known_args(arguments)
    if a.against:
        rest = [file, "--seconds", str(a.seconds), "--together", str(a.together), "--vary", a.vary]
        if a.generate:
            rest.append("--generate")
        result = against(a.against, a.rounds, rest + overrides)
    else:
        config = bench_config(file, overrides)
        check_arguments(a)
        if a.generate:
            result = generation(config, a.seconds)
        else:
            result = measure(config, a.seconds, a.together, a.vary, a.profile, a.apart)
    print(json.dumps(result))
    return result

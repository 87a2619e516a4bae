"""Time the training step of a config on random rows; the last line is one JSON object.

Shapes may be given short: --layers --embed --heads --kv_heads --head_dim --mlp --vocab --dtype for the model,
--batch and --seq for its rows; every --path.to.field VALUE of a config works too. Where --embed or --heads is
given alone, heads are 64 wide (32 below 256), and key-value heads as many as query heads. --against COMMAND
runs this and COMMAND in turn, --rounds times each, and gives the median of the ratios of their tokens_per_s
(COMMAND's last line must be such an object as well).

--together N steps N runs of a small model as one program (`jax.vmap`), on one device: with --vary rates the
same rows, at rates of their own; with --vary seeds rows of their own too. tokens_per_s counts all of them, so
that --against the same command without --together compares this with N runs in turn.

step_ms is the median of the steps' times and step_ms_quartiles the quarter and the three quarters of them;
host_stall the share of that time in which the host was busy with dispatching a step: the device's idling is
less. --profile DIR writes a trace of five more steps, for XProf or Perfetto (ui.perfetto.dev opens the
.json.gz). --apart adds what a step's time is made of, `apart_ms`: the forward pass, the backward pass (the
gradient's time less the forward's), the update (the step's less the gradient's), and beside them `products`:
all products of weights with activations in them, each timed alone (gradients for --seconds, 3 at most; each
product for a tenth of that).

--generate times tools/sample.py instead: sample_tokens after --batch random prompts of --seq tokens, drawn at
sample_temperature, the prompts' own pass included; with --init_from RUN by that run's model.
"""
import collections
import contextlib
import dataclasses
import json
import math
import shlex
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import model
from lib import hardware
from lib.arguments import Arguments
from lib.errors import InputError
from lib.generate import Sampling, generate, prepare
from lib.kernels import Mask
from lib.optim import first_state
from lib.sharding import make_mesh, put
from model import ModelConfig, count, flops_per_token, groups, init, losses, table
from train import ROOT, Config, check, compile_step, load, make_step, parse

SHORT = {f.name: f"model.{f.name}" for f in dataclasses.fields(ModelConfig)} | {
    "batch": "phases.0.batch", "seq": "phases.0.seq"}


def program(config: Config, mesh, state, batch, rates, together: int, vary: str):
    """(the step compiled, the state it begins with), for one run or for several as one program."""
    mask = Mask("causal", 0)
    if together == 1:
        return compile_step(config, config.model, mesh, state, batch, rates, mask), state
    one = make_step(config, config.model)
    state = jax.tree.map(lambda x: jnp.stack([x] * together), state)
    step = jax.vmap(lambda *a: one(*a, mask), in_axes=(0, None if vary == "rates" else 0, 0))
    return jax.jit(step, donate_argnums=0).lower(state, batch, rates).compile(), state


def measure(config: Config, seconds: float, together: int = 1, vary: str = "seeds",
            profile: str | None = None, taken_apart: bool = False) -> dict:
    """Steps of the first phase for `seconds`: rates, compile time in s, memory of the step in GiB."""
    mesh, shape, phase = make_mesh(config.mesh), config.model, config.phases[0]
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape.vocab, (8, phase.batch, phase.seq + 1), dtype=np.int32)
    ones = np.ones((phase.batch, phase.seq), np.int32)
    same = dict(segments=ones, positions=np.cumsum(ones, 1) - 1, weights=ones.astype(np.float32),
                source=ones * 0)
    batches = [put(dict(tokens=t[:, :-1], targets=t[:, 1:]) | same, mesh) for t in tokens]
    if together > 1 and vary == "seeds":
        batches = [jax.tree.map(lambda *x: jnp.stack(x), *(batches[(i + j) % 8] for j in range(together)))
                   for i in range(8)]
    state = first_state(shape, config.optimizer, mesh, jax.random.key(config.seed))
    peaks = np.float32(config.schedule.peak)
    rates = dict.fromkeys(groups(shape), np.full(together, peaks) if together > 1 else peaks)
    begun = time.perf_counter()
    step, state = program(config, mesh, state, batches[0], rates, together, vary)
    compile_s = time.perf_counter() - begun
    times, last, count, busy = [], None, 0, 0.0
    for _ in range(3):
        state, metrics = step(state, batches[0], rates)
    jax.block_until_ready(state)
    begun = now = time.perf_counter()
    while now - begun < seconds or len(times) < 5:
        called = time.perf_counter()
        state, metrics = step(state, batches[count % 8], rates)
        busy += time.perf_counter() - called
        if last is not None:
            jax.block_until_ready(last)  # the step before: the loop of a run waits for no more than that
            then, now = now, time.perf_counter()
            times.append(now - then)
        last, count = metrics, count + 1
    with jax.profiler.trace(profile, create_perfetto_trace=True) if profile else contextlib.nullcontext():
        for batch in batches[:5] if profile else ():
            state, metrics = step(state, batch, rates)
        jax.block_until_ready(state)
    stall = busy / (now - begun)
    low, middle, high = (1e3 * float(q) for q in np.quantile(times, (0.25, 0.5, 0.75)))
    ms, size = middle, together * phase.batch * phase.seq
    memory = step.memory_analysis()
    rate, peak = size / ms * 1e3, hardware.peak()
    flops = rate * flops_per_token(shape, phase.seq)
    more = dict(apart_ms=apart(config, mesh, state, batches[0], ms, seconds)) if taken_apart else {}
    return dict(tokens_per_s=round(rate), step_ms=round(ms, 2), compile_s=round(compile_s, 2),
                step_ms_quartiles=[round(low, 2), round(high, 2)],
                host_stall=round(stall, 4), mfu=round(flops / peak, 4) if peak else None,
                memory_gib=round((memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30, 3),
                params=model.count(shape), model_tflops=round(flops / 1e12, 4), steps=len(times),
                loss=round(float(jnp.mean(last["train/loss"])), 3), together=together, dtype=shape.dtype,
                device=jax.devices()[0].device_kind, jax=jax.__version__, **more)


def median_ms(seconds: float, function, *arguments) -> float:
    """Milliseconds that a call takes, its result waited for: the median of those within `seconds`."""
    times = []
    jax.block_until_ready(function(*arguments))
    while len(times) < 5 or sum(times) < seconds:
        begun = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(times)


def apart(config: Config, mesh, state, batch, step_ms: float, seconds: float) -> dict[str, float]:
    """What `--apart` adds; forward, backward and update sum to `step_ms`."""
    seconds = min(3.0, seconds)
    shape, mask = config.model, Mask("causal", 0)

    def loss(params, batch):
        return jnp.mean(losses(params, batch, mask, shape, config.token_loss, {"step": 0}))

    with jax.set_mesh(mesh):
        forward = median_ms(seconds, jax.jit(loss), state.params, batch)
        gradient = median_ms(seconds, jax.jit(jax.value_and_grad(loss)), state.params, batch)
        products, rows, sizes = 0.0, batch["tokens"].size, collections.Counter()
        for p in table(shape).values():
            if p.group in ("matrix", "head") or (p.group == "embed" and shape.tied):
                inside = [n for a, n in zip(p.axes, p.shape, strict=True) if a not in ("layers", "embed")]
                sizes[shape.embed, math.prod(inside)] += p.shape[0] if p.axes[0] == "layers" else 1
        for (i, o), times in sizes.items():  # [rows, i] x [i, o], and the two products of its gradient
            for a, b in (((rows, i), (i, o)), ((rows, o), (o, i)), ((i, rows), (rows, o))):
                a, b = jnp.ones(a, shape.dtype), jnp.ones(b, shape.dtype)
                products += times * median_ms(seconds / 10, jax.jit(jnp.matmul), a, b)
    parts = dict(forward=forward, backward=gradient - forward, update=step_ms - gradient, products=products)
    return {name: round(ms, 2) for name, ms in parts.items()}


def generation(config: Config, seconds: float) -> dict:
    """Generate anew for `seconds`: tokens/s of all rows at the median time, of which no row ends early."""
    phase, params = config.phases[0], None
    if config.init_from:
        params, of_run, *_ = load(config.init_from)
        config = dataclasses.replace(config, model=of_run.model)
    shape, batch = config.model, phase.batch
    params = params or init(shape, jax.random.key(config.seed))
    weights = jax.jit(prepare, static_argnames="config")(params, config=shape)
    prompts = np.random.default_rng(0).integers(0, shape.vocab, (batch, phase.seq)).tolist()
    how, times = Sampling(np.float32(config.sample_temperature)), []
    while len(times) < 4 or sum(times[1:]) < seconds:
        begun = time.perf_counter()
        generate(weights, prompts, config.sample_tokens, [*range(batch)], how, -1, shape)
        times.append(time.perf_counter() - begun)
    ms = 1e3 * statistics.median(times[1:])  # the first compiles
    return dict(tokens_per_s=round(batch * config.sample_tokens / ms * 1e3, 1), ms=round(ms, 1),
                first_s=round(times[0], 2), runs=len(times) - 1, params=count(shape), dtype=shape.dtype,
                device=jax.devices()[0].device_kind, jax=jax.__version__)


def against(command: str, rounds: int, arguments: list[str]) -> dict:
    """Run this benchmark and a command in turn, and compare."""
    ours = [sys.executable, str(ROOT / "train.py"), "bench", *arguments]
    rows = []
    for i in range(rounds):
        pair = []
        for line in (ours, shlex.split(command)):
            done = subprocess.run(line, capture_output=True, text=True)
            if done.returncode:
                raise InputError(f"bench: {shlex.join(line)} ended with {done.returncode}: "
                                       f"{done.stderr.strip()[-300:]}")
            pair.append(json.loads(done.stdout.strip().splitlines()[-1])["tokens_per_s"])
        rows.append(pair)
        a, b = pair
        print(f"round {i + 1}: {a:,} against {b:,} tokens/s, ratio {a / b:.3f}", flush=True)
    return dict(ratio=round(statistics.median(a / b for a, b in rows), 3),
                tokens_per_s=statistics.median(a for a, _ in rows),
                against_tokens_per_s=statistics.median(b for _, b in rows), rounds=rounds)


def main(arguments: list[str]) -> dict:
    """Command line; gives what it prints last."""
    parser = Arguments("bench", __doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to measure")
    parser.add_argument("--against", metavar="COMMAND", help="another benchmark to alternate with")
    parser.add_argument("--rounds", type=int, default=5, help="times that each is run, with --against")
    parser.add_argument("--together", type=int, default=1, help="runs that are one program")
    parser.add_argument("--profile", metavar="DIR", help="write a trace there")
    parser.add_argument("--apart", action="store_true", help="take a step's time apart")
    parser.add_argument("--generate", action="store_true", help="time sampling, not training")
    parser.add_argument("--vary", choices=["seeds", "rates"], default="seeds", help="what these differ in")
    parser.usage = "%(prog)s [CONFIG] [options] [--batch N --seq N --layers N --path.to.field VALUE ...]"
    first = arguments and not arguments[0].startswith("-")
    file = arguments[0] if first else str(ROOT / "configs/bench.py")
    a, overrides = parser.parse_known_args(arguments[1:] if first else arguments)
    if a.against:
        together = ["--together", str(a.together), "--vary", a.vary]
        rest = [file, "--seconds", str(a.seconds), *together, *["--generate"] * a.generate, *overrides]
        result = against(a.against, a.rounds, rest)
        print(json.dumps(result))
        return result
    flags = [f"--{SHORT.get(name, name)}{eq}{value}" if word.startswith("--") else word for word in overrides
             for name, eq, value in [word.removeprefix("--").partition("=")]]
    config, _ = parse([file, *flags])
    given = {f.split("=")[0].removeprefix("--model.") for f in flags}
    m = config.model
    if {"embed", "heads"} & given:
        heads = m.heads if "heads" in given else max(1, m.embed // (64 if m.embed >= 256 else 32))
        wide = m.head_dim if "head_dim" in given else m.embed // heads
        kv_heads = m.kv_heads if "kv_heads" in given else heads
        m = dataclasses.replace(m, heads=heads, head_dim=wide, kv_heads=kv_heads)
    config = dataclasses.replace(config, model=m)
    check(config)
    if m.vocab < 1:
        raise InputError("bench: model.vocab is 0; allowed is 1 and more, "
                               "since there is no tokenizer to take it from")
    if a.apart and a.together > 1:
        raise InputError("bench: --apart is for one run; allowed is --together 1")
    if a.together < 1 or (a.together > 1 and jax.device_count() > 1):
        raise InputError(f"bench: --together is {a.together} on {jax.device_count()} devices; allowed "
                               "is 1 and more, and more than 1 on one device alone")
    result = generation(config, a.seconds) if a.generate else \
        measure(config, a.seconds, a.together, a.vary, a.profile, a.apart)
    print(json.dumps(result))
    return result

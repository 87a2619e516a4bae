"""A GPU in some minutes: attention kernels, steps of the ready configs, a peer, one table.

    python train.py bench --suite gpu [--peer "python tests/peer_train.py FILE --compile"]
        [--minutes 8] [--out suite.json] [--stages kernels,steps] [--tiny]

1 kernels: outputs and gradients of each attention that can be had here against float32 at the
highest precision, for rows of documents, and how long they take. 2 steps: those of 124M, 350M and
1.3B by attention, remat, layers unrolled and room for logits, compiled in threads, then timed.
3 peer: the fastest of each in turn with a peer of the same shape, which is alive as lib/live.py
says; peers start, and compile, while our steps do. 4 trace: what the fastest step of each spends
its time on. 5 together: eight small runs as one program (`jax.vmap`) against one. 6 again: a small
run that is killed and goes on, against one that is not: are their parameters the same bytes?

Each result is written to --out as it comes, with device, versions, rows, documents and remat. The
table is printed at the end whatever happened, and the last line is the whole as one JSON object.
JAX takes memory as it is asked for here, 60 % of the device at most: peers live beside us.
Exit code 1: a kernel is off by 2e-2 or more, a step is below its target (40, 50 and 55 % MFU), the
peer is faster, or something failed. --tiny tries all of it out on a CPU, where there is no target.
It needs neither tyro, typeguard, tensorflow-datasets nor array_record.
"""
import collections
import contextlib
import glob
import gzip
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import SubprocessError
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data import DataConfig, Source, text
from lib import hardware
from lib.arguments import Arguments
from lib.checkpoint import find_checkpoint
from lib.config import ROOT, to_json
from lib.disk import write
from lib.errors import InputError
from lib.kernels import ATTENTION, attention, choose
from lib.live import SHARED, Bench, compared, in_turn
from lib.masks import Mask
from lib.optim import first_state, state_like
from lib.packing import bound_on_segments
from lib.sharding import MeshConfig, by_row, make_mesh, put
from lib.timing import median_ms, time_steps
from model import ModelConfig, count, groups
from train import Config, Phase, compile_step, load, load_config, make_step, train

TARGETS = {"124m": 0.40, "350m": 0.50, "1_3b": 0.55}  # model FLOPs of the peak
WRONG = 2e-2  # relative error of a kernel in bfloat16 that is too much
DOCUMENTS = 300  # tokens of one on average
NAMES = "jax", "jaxlib", "flax", "optax", "torch", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"
MEMORY = SHARED | {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".60"}
NO_TIME = "no time was left"
ATTENTIONS = [name for name in ATTENTION if name not in ("splash", "reference")]
THREADS = 6  # compile at once
TRACED = 3  # steps
KINDS = {  # by parts of names
    "attention": ("fmha", "sdpa", "flash", "attention", "dot_do_o", "convert_dq"),
    "product": ("gemm", "nvjet", "cutlass", "cublas", "wgmma", "xmma", "dot"),
    "copy": ("memcpy", "memset", "copy"),
    "fusion": ("fusion",),
}
# What a compiler, a kernel or a peer raises; the others are measured all the same.
FAILURES = (InputError, MemoryError, OSError, RuntimeError, TypeError, ValueError, LookupError,
            ArithmeticError, AssertionError, AttributeError, ImportError, SubprocessError)


class Rows(NamedTuple):
    """Rows to attend in."""

    rows: int
    length: int
    kv_heads: int
    group: int
    head_dim: int
    documents: int  # tokens of one on average; 0: a row is one document


KERNELS = (
    Rows(32, 1024, 12, 1, 64, 300),
    Rows(32, 1024, 12, 1, 64, 0),
    Rows(16, 1024, 16, 1, 128, 300),
    Rows(4, 1024, 4, 4, 64, 100),
)


class Trial(NamedTuple):
    """A step to time."""

    config: str  # of configs/baselines/llama_*.py
    attention: str
    remat: str
    rows: int
    unroll: int = 0
    logits_mib: int = 0
    documents: int = DOCUMENTS


TRIALS = (
    *(Trial("124m", kind, remat, 32)
      for kind in ("cudnn_packed", "cudnn", "xla") for remat in ("none", "elementwise")),
    Trial("124m", "cudnn_causal", "none", 32, documents=0),
    Trial("124m", "cudnn_packed", "none", 32, documents=100),
    Trial("124m", "cudnn_packed", "none", 32, unroll=1),
    Trial("124m", "cudnn_packed", "none", 32, logits_mib=256),
    Trial("124m", "cudnn_packed", "none", 32, logits_mib=4096),
    *(Trial("350m", kind, "elementwise", 16) for kind in ("cudnn_packed", "cudnn", "xla")),
    Trial("350m", "cudnn_packed", "none", 16),
    *(Trial("1_3b", "cudnn_packed", remat, 6, unroll=1) for remat in ("elementwise", "all")),
    Trial("1_3b", "xla", "elementwise", 6, unroll=1),
)
TINY_KERNELS = (Rows(2, 128, 2, 2, 8, 20),)
TINY_TRIALS = (Trial("124m", "xla", "none", 2), Trial("1_3b", "reference", "all", 2, unroll=1))
TINY = {"layers": 1, "embed": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "mlp": 64,
        "vocab": 128}


class Suite:
    """Results so far, and what time is left."""

    def __init__(self, out: Path, minutes: float, tiny: bool, peer: str):
        self.out, self.tiny, self.peer = out, tiny, peer
        self.versions = {"python": sys.version.split()[0]}
        for name in NAMES:
            with contextlib.suppress(PackageNotFoundError):
                self.versions[name] = version(name)
        self.begun = time.monotonic()
        self.end = self.begun + 60 * minutes
        self.seconds = 0.0 if tiny else 1.5  # of a measurement
        self.rows: list[dict] = []
        self.fastest: dict[str, tuple] = {}  # by config: (tokens/s, trial, its program)
        self.open = contextlib.ExitStack()  # what ends with the suite
        self.peers: dict[str, tuple[Bench, Future]] = {}  # by config, with its start

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def add(self, stage: str, **found):
        """Note a result, and write all."""
        self.rows.append({"stage": stage, **found})
        write(self.out, json.dumps(self.result(), indent=1))
        print(f"[{time.monotonic() - self.begun:4.0f} s] {line_of(self.rows[-1])}", flush=True)

    def result(self) -> dict:
        """All that is known."""
        device = jax.devices()[0]
        return {
            "device": device.device_kind,
            "platform": device.client.platform_version.splitlines(),
            "versions": self.versions,
            "load": [round(load, 2) for load in os.getloadavg()],
            "minutes": round((time.monotonic() - self.begun) / 60, 2),
            "tiny": self.tiny,
            "misses": misses(self.rows),
            "rows": self.rows,
        }


def misses(rows: list[dict]) -> list[str]:
    """What is below its target, wrong or failed, in words."""
    found = [f"{row['stage']} {row['what']}: {row['failed']}" for row in rows if "failed" in row]
    for row in rows:
        worst = max(row.get("errors", {}).values(), default=0.0)
        if not worst < WRONG:  # nor NaN
            found.append(f"{row['what']} is off by {worst:.3g}; allowed is less than {WRONG}")
        if row.get("ratio", 1.0) < 1:
            found.append(f"{row['what']} has {row['ratio']} of the peer's speed; wanted is 1")
    reached = collections.defaultdict(list)
    for row in rows:
        if row.get("mfu") is not None:
            reached[row["config"]].append(row["mfu"])
    for name, figures in reached.items():
        if max(figures) < TARGETS[name]:
            found.append(f"{name} reaches {max(figures):.1%} MFU; wanted is {TARGETS[name]:.0%}")
    return found


def line_of(row: dict) -> str:
    """A result on a line."""
    return " | ".join(f"{name} {value}" for name, value in row.items())


def documents(rows: int, length: int, mean: int, seed: int = 0) -> np.ndarray:
    """Segments [rows, length] of documents of so many tokens on average; 0: of one a row.

    A row has at most twice as many as rows have on average.
    """
    if not mean:
        return np.ones((rows, length), np.int32)
    rng = np.random.default_rng(seed)
    begins = rng.random((rows, length)) < 1 / mean
    segments = 1 + np.cumsum(begins, axis=1, dtype=np.int32)
    return np.minimum(segments, max(1, 2 * length // mean))


# ----------------------------------------------------------------------------------------- kernels


def both(name: str, mask: Mask, segments, q, k, v, d_out):
    """The output of an attention, and the gradients of q, k and v."""

    def attend(q, k, v):
        return attention(q, k, v, mask, segments, implementation=name)

    out, back = jax.vjp(attend, q, k, v)
    return out, *back(d_out)


def sizes_of(shape: Rows) -> list[tuple[int, ...]]:
    """The shapes of q, k, v and the gradient of the output."""
    b, t, kv, g, h, _ = shape
    return [(b, t, kv, g, h), (b, t, kv, h), (b, t, kv, h), (b, t, kv, g, h)]


def drawn(shape: Rows) -> list[jax.Array]:
    """Random q, k, v and gradient of the output, rounded to bfloat16."""
    keys = jax.random.split(jax.random.key(shape.rows + shape.head_dim), 4)
    return [jax.random.normal(key, size, jnp.bfloat16)
            for key, size in zip(keys, sizes_of(shape), strict=True)]


def segments_of(shape: Rows) -> tuple[np.ndarray, Mask]:
    """(segments [rows, length], the mask with its bound on them)."""
    segments = documents(shape.rows, shape.length, shape.documents)
    return segments, Mask("causal", 0, bound_on_segments(segments))


class Kernel(NamedTuple):
    """An attention of some rows, compiled."""

    forward: Callable
    both: Callable  # with gradients


def compiled_kernel(name: str, shape: Rows) -> Kernel:
    """The programs of an attention in ATTENTION; in bfloat16."""
    segments, mask = segments_of(shape)
    given = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes_of(shape)]
    forward = jax.jit(partial(attention, mask=mask, segments=segments, implementation=name))
    run = jax.jit(partial(both, name, mask, segments))
    return Kernel(forward.lower(*given[:3]).compile(), run.lower(*given).compile())


def kernels(suite: Suite):
    """Stage 1."""
    pool = ThreadPoolExecutor(THREADS)
    jobs = {}
    for shape in TINY_KERNELS if suite.tiny else KERNELS:
        mask = segments_of(shape)[1]
        for name in ("xla",) if suite.tiny else ATTENTIONS:
            if able(name, mask, shape):
                jobs[shape, name] = pool.submit(compiled_kernel, name, shape)
    wait(jobs.values(), timeout=suite.left / 4)  # nothing is timed while something compiles
    for (shape, name), job in jobs.items():
        found = {"what": f"{name} {'x'.join(map(str, shape[:5]))}", "rows": shape.rows,
                 "documents": shape.documents}
        try:
            suite.add("kernels", **found, **measured_kernel(finished(job), shape, suite.seconds))
        except FAILURES as error:  # whatever a kernel raises, the others are to be measured
            suite.add("kernels", **found, failed=repr(error)[:200])
    pool.shutdown(wait=False, cancel_futures=True)


def able(name: str, mask: Mask, shape: Rows) -> bool:
    """Whether an attention honours the mask here, and no other is taken in its place."""
    with contextlib.suppress(ValueError):  # nothing is able
        return name == choose(name, mask, shape.length, shape.head_dim, "bfloat16")
    return False


def finished(job: Future):
    """What a thread has made. Raises InputError where it is not done."""
    if not job.done():
        raise InputError("it was not compiled in time")
    return job.result()


def measured_kernel(kernel: Kernel, shape: Rows, seconds: float) -> dict:
    """The errors of an attention, of two rows, and its milliseconds."""
    given, few = drawn(shape), slice(0, 2)
    segments, mask = segments_of(shape)
    with jax.default_matmul_precision("highest"):
        reference = jax.jit(partial(both, "reference", mask, segments[few]))
        exact = reference(*[x[few].astype(jnp.float32) for x in given])
    errors = [relative(x[few], y) for x, y in zip(kernel.both(*given), exact, strict=True)]
    return {"errors": dict(zip(("out", "dq", "dk", "dv"), errors, strict=True)),
            "forward_ms": round(median_ms(seconds, kernel.forward, *given[:3]), 3),
            "both_ms": round(median_ms(seconds, kernel.both, *given), 3)}


def relative(found, exact) -> float:
    """The norm of the difference, as a share of that of what is exact."""
    found = found.astype(jnp.float32)
    return round(float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)), 5)


# ------------------------------------------------------------------------------------------- steps


def config_of(trial: Trial, tiny: bool) -> Config:
    """The ready config with what a trial changes."""
    config = load_config(f"configs/baselines/llama_{trial.config}.py")
    shape = replace(config.model, attention=trial.attention, remat=trial.remat,
                    unroll=trial.unroll, logits_mib=trial.logits_mib, **(TINY if tiny else {}))
    phase = replace(config.phases[0], batch=trial.rows, seq=32 if tiny else 1024, accumulate=1)
    return replace(config, model=shape, phases=(phase,), mesh=MeshConfig())


class Program:
    """The step of a trial, compiled; state and batch are made when it is timed, and not kept."""

    def __init__(self, trial: Trial, tiny: bool):
        self.trial, self.rows, self.config = trial, trial.rows, config_of(trial, tiny)
        shape, self.length = self.config.model, self.config.phases[0].seq
        self.mesh = make_mesh(self.config.mesh, jax.devices()[:1])
        self.lr = {group: np.float32(1e-4) for group in groups(shape)}
        batch = self.batch()
        mask = Mask("causal", 0, bound_on_segments(batch["segments"]))
        where = by_row(self.mesh, self.rows)
        arrays = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
                  for name, x in batch.items()}
        like = state_like(shape, self.config.optimizer, self.mesh)
        begun = time.perf_counter()
        self.step = compile_step(self.config, shape, self.mesh, like, arrays, self.lr, mask)
        self.compile_s = round(time.perf_counter() - begun, 1)
        self.state = None

    def batch(self) -> dict[str, np.ndarray]:
        """Rows of random tokens, in documents."""
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, self.config.model.vocab, (self.rows, self.length + 1), np.int32)
        segments = documents(self.rows, self.length, self.trial.documents)
        index = np.broadcast_to(np.arange(self.length, dtype=np.int32), segments.shape)
        begins = np.diff(segments, axis=1, prepend=0) > 0
        first = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
        return {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segments": segments,
            "positions": index - first,
            "weights": np.ones(segments.shape, np.float32),
            "source": np.zeros_like(segments),
        }

    def begin(self):
        """Make a state and a batch, unless they are there."""
        if self.state is None:
            optimizer, key = self.config.optimizer, jax.random.key(0)
            self.state = first_state(self.config.model, optimizer, self.mesh, key)
            self.arrays = put(self.batch(), self.mesh)

    def run(self, steps: int):
        """Take so many steps, and wait for them."""
        self.begin()
        for _ in range(steps):
            self.state, _ = self.step(self.state, self.arrays, self.lr)
        jax.block_until_ready(self.state)

    def measure(self, seconds: float) -> dict:
        """Time steps for so long, going on from the last ones."""
        self.begin()
        shape = self.config.model
        given = self.step, self.state, [self.arrays], self.lr
        self.state, times = time_steps(*given, seconds, 1)
        ms = 1e3 * statistics.median(times.steps)
        speed = self.rows * self.length / ms * 1e3
        peak = hardware.hardware(jax.devices()[0].device_kind).peak
        used = speed * shape.flops(shape, self.length) / peak if peak else None
        return {"tokens_per_s": round(speed), "step_ms": round(ms, 2), "loss": round(times.loss, 3),
                "mfu": used and round(used, 4)}

    def memory_gib(self) -> float:
        """What it holds of the device, by its compiler."""
        memory = self.step.memory_analysis()
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        return round(held / 2**30, 2)

    def forget(self):
        """Give state and batch back to the device."""
        self.state = self.arrays = None


def steps(suite: Suite):
    """Stage 2."""
    trials = TINY_TRIALS if suite.tiny else TRIALS
    pool = ThreadPoolExecutor(THREADS)
    begin_peers(suite, trials)
    jobs = {trial: pool.submit(Program, trial, suite.tiny) for trial in trials}
    starts = [start for _, start in suite.peers.values()]
    half = max(1.0, suite.left / 2)
    wait([*jobs.values(), *starts], timeout=half)  # nothing is timed while something compiles
    for trial, job in jobs.items():
        kept = trial._asdict() | {"what": f"{trial.config} {trial.attention} {trial.remat}"}
        if suite.left < 0:
            suite.add("steps", **kept, failed=NO_TIME)
            continue
        try:
            program = finished(job)
            found = measured(program, suite.seconds)
            suite.add("steps", **kept, **found)
        except FAILURES as error:  # out of memory, or not compiled in time: others are measured
            suite.add("steps", **kept, failed=repr(error)[:200])
            continue
        speed = found["tokens_per_s"]
        if speed > suite.fastest.get(trial.config, (0,))[0]:
            suite.fastest[trial.config] = speed, trial, program
    pool.shutdown(wait=False, cancel_futures=True)


def measured(program: Program, seconds: float) -> dict:
    """What is known of a trial's step in the end; its memory is given back, also where it fails."""
    try:
        found = program.measure(seconds)
    finally:
        program.forget()
    params = count(program.config.model)
    return found | {"compile_s": program.compile_s, "memory_gib": program.memory_gib(),
                    "params": params}


# -------------------------------------------------------------------------------- peer, trace, vmap


def begin_peers(suite: Suite, trials: Sequence[Trial]):
    """Start a peer of each config's shape and rows; it compiles while our steps do."""
    pool = ThreadPoolExecutor(len(TARGETS))
    for trial in trials:
        if suite.peer and trial.config not in suite.peers:
            other = suite.open.enter_context(Bench(peer_line(suite.peer, trial, suite.tiny)))
            suite.peers[trial.config] = other, pool.submit(other.start)
    pool.shutdown(wait=False)


def peer_line(command: str, trial: Trial, tiny: bool) -> list[str]:
    """A peer's command with the shape and the rows of a trial."""
    config = config_of(trial, tiny)
    shape = config.model
    given = {"layers": shape.layers, "dim": shape.embed, "heads": shape.heads,
             "kv-heads": shape.kv_heads, "mlp": shape.mlp, "vocab": shape.vocab,
             "seq": config.phases[0].seq, "batch": trial.rows, "dtype": shape.dtype}
    line = shlex.split(command)
    for flag, value in given.items():
        line += [f"--{flag}", str(value)]
    return [*line, "--tied"] if shape.tied else line


def peer(suite: Suite):
    """Stage 3."""
    for name, (_, trial, program) in suite.fastest.items():
        if name not in suite.peers:  # none was asked for
            continue
        what = {"what": f"{name} against a peer", "attention": trial.attention,
                "remat": trial.remat, "batch": trial.rows, "documents": trial.documents,
                "memory_gib": program.memory_gib()}
        other, start = suite.peers[name]
        try:
            if suite.left < 0:
                raise InputError(NO_TIME)
            finished(start)
            rounds = in_turn(program.measure, other.measure, 3, suite.seconds)
            suite.add("peer", **what, **compared(rounds),
                      against_compile_s=other.ready.get("compile_s"))
        except FAILURES as error:  # a peer that dies leaves the other stages
            suite.add("peer", **what, failed=repr(error)[:300])
        program.forget()
    for other, _ in suite.peers.values():  # those of no step too: they hold memory
        other.end()


def trace(suite: Suite):
    """Stage 4."""
    for name, (_, _, program) in suite.fastest.items():
        try:
            if suite.left < 0:
                raise InputError(NO_TIME)
            suite.add("trace", what=name, **spent(traced(program), TRACED))
        except FAILURES as error:
            suite.add("trace", what=name, failed=repr(error)[:200])
        program.forget()


def traced(program: Program) -> list[dict]:
    """The events of some steps."""
    program.run(2)
    with tempfile.TemporaryDirectory() as place:
        with jax.profiler.trace(place, create_perfetto_trace=True):
            program.run(TRACED)
        (file,) = glob.glob(f"{place}/**/perfetto_trace.json.gz", recursive=True)
        return json.loads(gzip.open(file).read())["traceEvents"]


def spent(events: list[dict], steps: int) -> dict:
    """What a step of a trace of so many spends its time on, in milliseconds; see `on_device`.

    busy_ms: all together. launches: how many. kinds: by what they seem to be. top_ms: what took
    longest, by name.
    """
    names, kinds = collections.Counter(), collections.Counter()
    launched = [*on_device(events)]
    for event in launched:
        ms = event["dur"] / 1e3 / steps
        names[event["name"][:80]] += ms
        kinds[kind_of(event["name"])] += ms
    return {"busy_ms": round(names.total(), 3), "launches": round(len(launched) / steps),
            "kinds": rounded(kinds.most_common()), "top_ms": rounded(names.most_common(15))}


def rounded(pairs: list[tuple[str, float]]) -> dict[str, float]:
    """Milliseconds by name."""
    return {name: round(ms, 3) for name, ms in pairs}


def kind_of(name: str) -> str:
    """What a kernel of this name does, as far as the name tells."""
    for kind, words in KINDS.items():
        if any(word in name.lower() for word in words):
            return kind
    return "other"


def on_device(events: list[dict]) -> Iterator[dict]:
    """What took time in a trace, Python's functions not among it; on a GPU of the streams alone."""
    names = {(e["pid"], e.get("tid")): e["args"].get("name", "")
             for e in events if e.get("name") == "thread_name"}
    on_gpu = any(name.startswith("Stream") for name in names.values())
    for event in events:
        thread = names.get((event.get("pid"), event.get("tid")), "")
        timed = event.get("ph") == "X" and not event["name"].startswith("$")
        if timed and (not on_gpu or thread.startswith("Stream")):
            yield event


def together(suite: Suite):
    """Stage 5."""
    for layers, embed in ((1, 32),) if suite.tiny else ((4, 128), (6, 384)):
        vocab = 64 if suite.tiny else 1024
        shape = ModelConfig(layers=layers, embed=embed, heads=embed // 32, kv_heads=embed // 32,
                            head_dim=32, mlp=8 * embed // 3, vocab=vocab, tied=False,
                            dtype="float32" if suite.tiny else "bfloat16")
        config = Config(model=shape, phases=(Phase(batch=4, seq=128),), overlap=0)
        speeds = {runs: of_runs(config, runs, suite.seconds) for runs in (1, 8)}
        suite.add("together", what=f"{layers} x {embed}", batch=4, one=round(speeds[1]),
                  eight=round(speeds[8]), gain=round(speeds[8] / speeds[1], 2))


def of_runs(config: Config, runs: int, seconds: float) -> float:
    """Tokens a second of so many runs as one program."""
    shape, phase = config.model, config.phases[0]
    one = partial(make_step(config, shape), mask=Mask("causal", 0, 1))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = first_state(shape, config.optimizer, mesh, jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape.vocab, (runs, phase.batch, phase.seq), np.int32)
    one_each = np.ones_like(tokens)
    batch = {"tokens": tokens, "targets": tokens, "segments": one_each,
             "positions": np.cumsum(one_each, 2, dtype=np.int32) - 1,
             "weights": one_each.astype(np.float32), "source": 0 * one_each}
    state = jax.tree.map(lambda x: jnp.stack([x] * runs), state)
    lr = {group: np.full(runs, 1e-3, np.float32) for group in groups(shape)}
    step = jax.jit(jax.vmap(one), donate_argnums=0)
    _, times = time_steps(step, state, [jax.device_put(batch)], lr, seconds)
    return runs * phase.batch * phase.seq / statistics.median(times.steps)


# --------------------------------------------------------------------------- the same bytes again


def dying(run, start: int, at: int = 0) -> Callable[[dict], None]:
    """A tracker under which a run is killed after the row of a step, unless it was resumed."""

    def send(row: dict):
        if row["step"] == at and not start:
            os.kill(os.getpid(), signal.SIGKILL)

    return send


def small_run(place: Path, at: int, tiny: bool) -> Config:
    """A run of seconds. It is killed after step `at`; 0: never."""
    words = place / "words.txt"
    words.write_text("".join(f"{i} {i * i}\n" for i in range(20_000)))
    width = 32 if tiny else 256
    shape = ModelConfig(layers=2, embed=width, heads=2, kv_heads=2, head_dim=width // 4, mlp=width,
                        dtype="float32" if tiny else "bfloat16")
    data = DataConfig(sources={"words": Source(partial(text, path=str(words), separator="\n"))},
                      tokenizer="bytes", dev=0.01, test=0.01)
    return Config(name=f"killed_at_{at}", runs=str(place), model=shape, data=data,
                  phases=(Phase(steps=40, batch=8, seq=64 if tiny else 256),), save_every=10,
                  eval_every=40, eval_tokens=500, overlap=0, prompts=(),
                  tracker=partial(dying, at=at))


def again(suite: Suite):
    """Stage 6."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        whole, killed = (small_run(place, at, suite.tiny) for at in (0, 25))
        train(whole)
        file = place / "killed.json"
        write(file, json.dumps(to_json(killed)))
        line = [sys.executable, "train.py", str(file), "--trust"]
        done = subprocess.run(line, cwd=ROOT, timeout=max(60, suite.left))
        if done.returncode != -signal.SIGKILL:
            raise InputError(f"a run that was to be killed ended with {done.returncode}")
        resumed_at = find_checkpoint(str(place / killed.name))[1]
        train(killed)
        one, other = (load(str(place / run.name))[0] for run in (whole, killed))
        differ = {name: float(jnp.max(jnp.abs(one[name] - other[name]))) for name in one}
    suite.add("again", what="a run that was killed, against one that was not",
              resumed_at=resumed_at, same_bytes=not any(differ.values()),
              largest_difference=max(differ.values()))


# ------------------------------------------------------------------------------------- the command


STAGES = {each.__name__: each for each in (kernels, steps, peer, trace, together, again)}


def attempt(suite: Suite, name: str):
    """A stage, where there is time; the table comes whatever happened."""
    if suite.left < 0:
        suite.add(name, what="a stage", failed=NO_TIME)
        return
    try:
        STAGES[name](suite)
    except FAILURES as error:
        suite.add(name, what="a stage", failed=repr(error)[:300])


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = Arguments("suite", __doc__)
    add = parser.add_argument
    add("--peer", default="", help="the command of a peer that is alive between rounds")
    add("--minutes", type=float, default=8.0, help="after which nothing new begins")
    add("--out", type=Path, default=Path("suite.json"), help="where results are written")
    add("--stages", default=",".join(STAGES), help="some of them")
    add("--tiny", action="store_true", help="try it out on a CPU")
    a = parser.parse_args(arguments)
    wanted = a.stages.split(",")
    unknown = [name for name in wanted if name not in STAGES]
    if unknown:
        parser.error(f"--stages has {', '.join(unknown)}; allowed are {', '.join(STAGES)}")
    if {"peer", "trace"} & {*wanted} and "steps" not in wanted:
        parser.error(f"--stages is {a.stages}; allowed are peer and trace with steps before them")
    for name, value in MEMORY.items():
        os.environ.setdefault(name, value)
    platform = jax.devices()[0].platform
    if platform != "gpu" and not a.tiny:
        raise InputError(f"bench: --suite gpu on a {platform}; allowed is a GPU, or --tiny")
    suite = Suite(a.out, a.minutes, a.tiny, a.peer)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so the table is printed
    try:
        with suite.open:
            for name in wanted:
                attempt(suite, name)
    finally:
        found = suite.result()
        write(a.out, json.dumps(found, indent=1))
        print(f"\n{found['device']}, {found['minutes']} minutes, {found['versions']}")
        for row in suite.rows:
            print(line_of(row))
        for miss in found["misses"]:
            print(f"MISSED  {miss}")
        print(json.dumps(found), flush=True)
    return 1 if found["misses"] else 0

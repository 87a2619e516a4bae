"""Whole runs by the command line: what they leave, how they die and resume, what they refuse; the tools."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pexpect
import pytest
from pexpect import fdpexpect

import model
import train
from lib import checkpoint
from lib.checkpoint import Checkpoints
from lib.config import from_json, load_file
from lib.errors import InputError
from lib.optim import adamw, first_state, state_like
from lib.sharding import MeshConfig, make_mesh
from lib.tokenizers import Bytes, load_tokenizer
from model import ModelConfig
from train import parse

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
TOTAL, BOUNDARY, EVERY = 60, 30, 5  # steps, the phase's end, and steps between checkpoints

CONFIG = '''"""A tiny run with hooks: HURT names the moment at which the process sends SIGNAL to itself."""
import os
import signal
import time
from functools import partial
from pathlib import Path

from data import DataConfig, Source, causal, text
from lib.edits import stack
from model import ModelConfig
from train import Config, Phase, Schedule

seen = {"evaluation": 0}


def hurt(moment):
    """Die here, if this is the moment."""
    if os.environ.get("HURT") == moment:
        os.kill(os.getpid(), signal.SIGKILL)


def lines(path):
    """Each line of the corpus as a document; to die while building, it waits until two shards are sealed."""
    cache = Path(os.environ["XDG_CACHE_HOME"], "coppice/tokens")
    for i, document in enumerate(text(path, separator="\\n")):
        while os.environ.get("HURT") == f"document {i}" and len(list(cache.glob("lines-*/00000[01]"))) < 2:
            time.sleep(0.001)
        hurt(f"document {i}")
        yield document


def slow(row, rng):
    """The plain objective, taking its time."""
    time.sleep(float(os.environ.get("SLOW", 0)))
    return causal(row, rng)


def grow(model, context):
    """A stack to twice the depth."""
    hurt(f"edit {context.step}")
    return stack(model, context)


def noticed(params, apply):
    """An evaluation of the config's own."""
    seen["evaluation"] += 1
    hurt(f"evaluation {seen['evaluation']}")
    return {"own/layers": float(params["q"].shape[0])}


config = Config(
    model=ModelConfig(layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=48),
    data=DataConfig(
        sources={"files": Source(partial(text, path="CORPUS")),
                 "lines": Source(partial(lines, path="CORPUS"))},
        tokenizer="bytes", dev=0.1, test=0.1, shard_tokens=4_000),
    phases=(
        Phase(steps=30, batch=4, seq=32, objective=slow),
        Phase(steps=30, batch=4, seq=32, objective=slow, edits=(grow,)),
    ),
    schedule=Schedule(shape="wsd", peak=1e-2, warmup=5, decay=0.4),
    overlap=8, eval_every=20, eval_tokens=500, save_every=5, sample_tokens=10, evals=(noticed,),
)
'''


@dataclass(frozen=True)
class Place:
    """Where the runs of these tests live."""

    root: Path
    config: Path

    def environment(self, **more: str) -> dict[str, str]:
        """This process's, with one device, a cache of these runs' own, and no width of a terminal."""
        kept = conftest.environment(XDG_CACHE_HOME=str(self.root / "cache"), **more)
        return {k: v for k, v in kept.items() if k != "COLUMNS"}

    def command(self, *arguments) -> list[str]:
        """A command line that trains this config; with a verb first, that verb."""
        return [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]

    def training(self, name: str, *arguments) -> list[str]:
        """A command line that trains this config as a run of its own."""
        return self.command(self.config, "--runs", self.root / "runs", "--name", name, *arguments)

    def go(self, *command: str, **more: str) -> subprocess.CompletedProcess:
        """Run a command to its end."""
        return subprocess.run(
            command, capture_output=True, text=True, env=self.environment(**more), cwd=self.root, timeout=300
        )

    def train(self, name: str, *arguments, **more: str) -> subprocess.CompletedProcess:
        """Train this config as a run of its own, its programs compiled as a user's are."""
        return self.go(*self.training(name, *arguments), **conftest.USERS | more)

    def start(self, name: str, **more: str) -> subprocess.Popen:
        """Begin to train."""
        return subprocess.Popen(
            self.training(name),
            env=self.environment(**conftest.USERS | more),
            cwd=self.root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, name: str) -> Path:
        """A run's directory."""
        return self.root / "runs" / name


@pytest.fixture(scope="session")
def place(tmp_path_factory, corpus) -> Place:
    """The config on the corpus, and a cache directory that all these runs share."""
    root = tmp_path_factory.mktemp("runs")
    (root / "tiny.py").write_text(CONFIG.replace("CORPUS", str(corpus)))
    return Place(root, root / "tiny.py")


@dataclass(frozen=True)
class Complete:
    """A run that nothing happened to, and what it printed."""

    directory: Path
    out: str
    err: str


@pytest.fixture(scope="session")
def complete(place) -> Complete:
    """The run never killed, that others are held against."""
    done = place.train("whole")
    assert done.returncode == 0, done.stderr
    return Complete(place.run("whole"), done.stdout, done.stderr)


def rows_of(run: Path) -> list[dict]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_of(run: Path) -> list[str]:
    """The text of every train/loss, in order."""
    return re.findall(r'"step": (\d+).*?"train/loss": ([^,}]+)', (run / "metrics.jsonl").read_text())


def timeless(rows: list[dict]) -> list[dict]:
    """Rows without what depends on the clock."""
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def tree_of(run: Path) -> dict[str, bytes]:
    """Every file of a run by path, but for its lock."""
    return {
        str(p.relative_to(run)): p.read_bytes()
        for p in sorted(run.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def checkpoints(run: Path) -> list[int]:
    """Steps with a complete checkpoint."""
    return sorted(int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit())


def assert_same(run: Path, whole: Path):
    """Losses byte for byte, rows but for timings, the last parameters bit for bit, and the samples."""
    assert losses_of(run) == losses_of(whole) and len(losses_of(run)) == TOTAL
    assert timeless(rows_of(run)) == timeless(rows_of(whole))
    assert checkpoints(run) == checkpoints(whole)
    ours, theirs = (train.load(str(r), TOTAL)[0] for r in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(np.asarray(ours[n]).tobytes() == np.asarray(theirs[n]).tobytes() for n in ours)
    assert (run / "samples.txt").read_bytes() == (whole / "samples.txt").read_bytes()


def resumed_from(out: str) -> int:
    """The step that a run said it goes on from; 0 if it began."""
    said = re.findall(r"^resuming from step (\d+)", out, flags=re.M)
    assert len(said) <= 1
    return int(said[0]) if said else 0


def on_disk(run: Path) -> int:
    """The last step whose row has been written out."""
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    return max((int(s) for s in re.findall(r'^{"step": (\d+)', text, flags=re.M)), default=0)


def assert_recent(out: str, reached: int):
    """A run that had written `reached` rows resumed at most one interval and the save in flight earlier.

    A save waits for the one before it, after its step's row is on disk: row 30 may stand while 25 is written.
    """
    assert resumed_from(out) >= (reached - 1) // EVERY * EVERY - EVERY


# --------------------------------------------------------------------------------------------- a complete run


def test_complete_run_leaves_every_file(complete):
    """All that the design names, each of its kind."""
    run = complete.directory
    files = "config.json metrics.jsonl curves.png samples.txt tokenizer.model summary.json eval.json"
    assert {p.name for p in run.iterdir()} - {".lock"} == {*files.split(), "source", "checkpoints"}
    names = {p.name for p in (run / "source").iterdir()}
    assert names == {"train.py", "model.py", "data.py", "lib", "tiny.py"}
    assert (run / "source/tiny.py").read_text().startswith('"""A tiny run with hooks')
    assert (run / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert isinstance(load_tokenizer(run / "tokenizer.model"), Bytes)
    assert checkpoints(run) == [50, 55, 60] and (run / "samples.txt").read_text("utf-8").strip()
    written = json.loads((run / "config.json").read_text())
    assert written["model"]["vocab"] == 258 and written["phases"][1]["edits"][0]["function"].endswith(
        "tiny.py:grow"
    )
    summary, held = (json.loads((run / f).read_text()) for f in ("summary.json", "eval.json"))
    assert {
        "versions",
        "commit",
        "host",
        "device",
        "train/loss",
        "train/flops",
        "train/tokens",
        "model/params",
        "model/trained",
        "model/opt_bytes",
    } <= summary.keys()
    assert {"jax", "python", "orbax-checkpoint"} <= summary["versions"].keys() and summary["step"] == TOTAL
    for found in (summary, held):
        assert found["gzip_bpb"] > 0 and found["xz_bpb"] > 0 and len(found["held_out_paths"]) > 5
        assert all(found[f"eval/{source}.test/bpb"] > 0 for source in ("files", "lines"))


def test_complete_run_says_what_it_does(complete):
    """The banner, plain lines without carriage returns when piped, held-out figures; nothing on stderr."""
    for word in (
        "parameters",
        "a parameter",
        "epochs",
        "FLOPs",
        "memory",
        "devices",
        "mesh",
        "attention",
        "expected",
        f"step {TOTAL}/{TOTAL}",
        "loss",
        "lr ",
        "grad ",
        "tok/s",
        "ETA",
        "gzip -9",
        "xz -9",
        "held-out files",
        "grow",
        "train.py sample",
    ):
        assert word in complete.out, word
    assert "\r" not in complete.out and "\x1b" not in complete.out and complete.err == ""


def test_rows_are_one_a_step_and_evaluations_apart(complete):
    """Steps 1 to N once each, evaluations without a loss, the test split's row last; parameters jump."""
    rows = rows_of(complete.directory)
    steps = [r for r in rows if "train/loss" in r]
    assert [r["step"] for r in steps] == list(range(1, TOTAL + 1))
    held = [r for r in rows if "train/loss" not in r]
    assert [r["step"] for r in held] == [20, 30, 40, 60, 60]
    assert all(r[f"eval/{s}/bpb"] > 0 for r in held[:-1] for s in ("files", "lines"))
    assert [r["own/layers"] for r in held[:-1]] == [2, 2, 4, 4]  # evaluation precedes the edits
    assert {"eval/files.test/bpb", "eval/lines.test/bpb"} <= rows[-1].keys()
    assert [r["phase"] for r in steps] == [0] * 30 + [1] * 30
    small, large = steps[BOUNDARY - 1]["model/params"], steps[BOUNDARY]["model/params"]
    assert {r["model/params"] for r in steps} == {small, large} and large - small == 2 * (
        32 * 64 + 32 * 32 + 3 * 32 * 48 + 64
    )
    assert steps[-1]["train/loss"] < steps[0]["train/loss"] - 1


def test_several_shards_were_read(place, complete):
    """The cache of the lines has more than one, so that what is killed below is really cut in the middle."""
    (cache,) = (place.root / "cache/coppice/tokens").glob("lines-*/complete")
    assert len(list(cache.parent.glob("0*/seal.json"))) > 2


def test_running_again_changes_nothing(place, complete):
    """It says where it is, exits 0, and leaves every file as it was."""
    before = tree_of(complete.directory)
    done = place.train("whole")
    assert done.returncode == 0 and done.stderr == "" and resumed_from(done.stdout) == TOTAL
    after = tree_of(complete.directory)
    assert before.keys() == after.keys() and [k for k in before if before[k] != after[k]] == []


# ---------------------------------------------------------------------------------------- killed, and resumed


def test_killed_while_the_cache_is_built_between_steps_and_at_the_phase_boundary(place, complete):
    """What is sealed is kept; then at an evaluation, and when the edit of the second phase is about to be
    applied, where the last checkpoint is then damaged and a write cut off besides. The cache and the run
    are those never killed.
    """
    tokens, kept, run = place.root / "cache/coppice/tokens", place.root / "kept", place.run("hurt-thrice")
    shutil.move(tokens, kept)
    killed = place.train(run.name, HURT="document 900")
    assert killed.returncode == -signal.SIGKILL
    sealed = {p: p.read_bytes() for p in tokens.glob("lines-*/00000[01]/*")}
    assert len({p.parent for p in sealed}) == 2 and not list(tokens.glob("lines-*/complete"))
    killed = place.train(run.name, HURT="evaluation 1")
    assert killed.returncode == -signal.SIGKILL and resumed_from(killed.stdout) == 0
    assert all(p.read_bytes() == content for p, content in sealed.items())
    ours, theirs = (
        {
            str(p.relative_to(d)): p.read_bytes()
            for p in d.rglob("*")
            if p.suffix in (".json", ".bin", ".jsonl")
        }
        for d in (tokens, kept)
    )
    assert ours == theirs
    reached = on_disk(run)
    assert 15 <= reached <= 20
    killed = place.train(run.name, HURT=f"edit {BOUNDARY}")
    assert killed.returncode == -signal.SIGKILL
    assert_recent(killed.stdout, reached)
    assert on_disk(run) == BOUNDARY
    *_, before, newest = checkpoints(run)
    assert newest >= BOUNDARY - EVERY
    saved = run / "checkpoints"
    halve(saved / f"{newest}/params")
    shutil.copytree(saved / str(before), saved / "65.orbax-checkpoint-tmp")
    shutil.rmtree(saved / "65.orbax-checkpoint-tmp/params")
    done = place.train(run.name)
    assert done.returncode == 0 and resumed_from(done.stdout) == before
    assert_same(run, complete.directory)


def kill_when(process: subprocess.Popen, moment: Callable[[], bool], number: int = signal.SIGKILL) -> str:
    """Send a signal as soon as `moment()` is true, if the process lives to see it; gives what it printed."""
    while process.poll() is None and not moment():
        time.sleep(0.0005)
    if process.poll() is None:
        process.send_signal(number)
    return process.communicate()[0]


def saving(run: Path, after: int) -> Callable[[], bool]:
    """Is a checkpoint beyond a step being written?"""

    def now() -> bool:
        names = os.listdir(run / "checkpoints") if (run / "checkpoints").is_dir() else []
        return any("orbax-checkpoint-tmp" in n and int(n.split(".")[0]) > after for n in names)

    return now


def test_killed_during_a_save_and_at_random(place, complete):
    """A checkpoint half written is no checkpoint: each time the run goes on from one that was whole."""
    run, rng, caught = place.run("saves"), random.Random(1), 0
    for attempt in range(4):
        reached, after = on_disk(run), (checkpoints(run) if run.exists() else [0])[-1] if attempt else 7
        out = kill_when(place.start("saves", SLOW="0.004"), saving(run, after + EVERY))
        assert_recent(out, reached)
        caught += any("orbax-checkpoint-tmp" in n for n in os.listdir(run / "checkpoints"))
        if caught and checkpoints(run):
            break
    assert caught, "no attempt caught a save in the middle"
    reached, delay, begun = on_disk(run), rng.uniform(0, 0.5), []

    def later() -> bool:
        if not begun and on_disk(run) > reached + 2:
            begun.append(time.monotonic())
        return bool(begun) and time.monotonic() > begun[0] + delay

    assert_recent(kill_when(place.start("saves", SLOW="0.004"), later), reached)
    reached = on_disk(run)
    done = place.train("saves")
    assert done.returncode == 0
    assert_recent(done.stdout, reached)
    assert_same(run, complete.directory)
    assert not [n for n in os.listdir(run / "checkpoints") if not n.isdigit()]


@pytest.mark.soak
def test_killed_fifty_times(place, complete, capsys):
    """At random moments after the start, through a whole run and, when that is done, another."""
    rng, number, kills, lost = random.Random(2), 0, 0, []
    while kills < 50:
        run = place.run(f"soak{number}")
        reached, until = on_disk(run), time.monotonic() + rng.uniform(1.0, 5.0)
        started = place.start(run.name, SLOW="0.01")
        out = kill_when(started, lambda until=until: time.monotonic() > until)
        kills += started.returncode == -signal.SIGKILL
        assert_recent(out, reached if "resuming" in out else 0)
        lost += [reached - resumed_from(out)] if "resuming" in out else []
        if (run / "summary.json").exists():
            assert_same(run, complete.directory)
            number += 1
    done = place.train(f"soak{number}")
    assert done.returncode == 0
    assert_same(place.run(f"soak{number}"), complete.directory)
    with capsys.disabled():
        print(f"\n{kills} kills, {len(lost)} resumes, steps lost: {sum(lost) / len(lost):.1f} in the mean, "
              f"{max(lost)} at most (a checkpoint every {EVERY}); {number + 1} runs of {TOTAL} steps, "
              "identical to the last byte")


STEERED = '''"""Streamed, ordered, of several row lengths, then steered; HURT names a moment to die."""
import os, signal, time
from functools import partial

import numpy as np

from data import DataConfig, Document, Source
from lib.edits import stack
from model import ModelConfig
from train import Config, Phase

seen = []


def letters(first, documents):
    """Short documents of twelve letters, with a pause after each shard."""
    for i in range(documents):
        time.sleep(0.1 if i % 256 == 0 else 0)
        rng = np.random.default_rng([first, i])
        drawn = 97 + (first + rng.integers(12, size=40)) % 26
        yield Document(f"{first}/{i}", bytes(drawn.tolist()).decode())


def moving(progress, log):
    """From the first source to the second."""
    return {"a": 1 - progress, "b": progress}


def steered(progress, log):
    """By the square of the last losses."""
    return {name: log[-1][name]**2 for name in "ab"} if log else {"a": 1, "b": 1}


def growing(progress):
    """Rows of 16 at first, of 64 in the end."""
    return {16: 1.2 - progress, 64: 0.2 + progress}


def easy(draw, rows, progress, key):
    """Rows of the easiest share alone."""
    return int(np.random.default_rng([*key, draw]).integers(max(1, int(rows * min(1, 0.3 + progress)))))


def noticed(params, apply):
    """Counts evaluations, and kills the process at the one that is named."""
    seen.append(1)
    if os.environ.get("HURT") == str(len(seen)):
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


config = Config(
    model=ModelConfig(layers=1, embed=32, heads=2, kv_heads=1, head_dim=16, mlp=48),
    data=DataConfig(sources={"a": Source(partial(letters, first=0, documents=4_000)),
                             "b": Source(partial(letters, first=13, documents=2_000))},
                    tokenizer="bytes", dev=0.1, test=0.1, shard_tokens=1, window=2, stream=True),
    phases=(Phase(steps=20, batch=4, seq=64, mixture=moving, lengths=growing, order=easy),
            Phase(steps=40, batch=4, seq=32, mixture=steered, steer=10, edits=(partial(stack, times=2),))),
    overlap=8, eval_every=100, eval_tokens=500, save_every=7, prompts=(), evals=(noticed,),
)
'''


def test_a_streamed_and_steered_run_is_the_same_under_kills(place):
    """Killed at decisions, while shards are built; from the finished cache the rows are the same.

    The log in the checkpoint holds the evaluation of each decision, with the dev loss of each source by
    its name, and the rows drawn follow it.
    """
    (place.root / "steered.py").write_text(STEERED)
    train_it = ["steered.py", "--runs", "runs"]
    kills = [place.go(*place.command(*train_it, "--name", "hurt"), HURT=str(n)) for n in (1, 3)]
    assert [k.returncode for k in kills] == [-signal.SIGKILL] * 2
    assert [resumed_from(k.stdout) for k in kills] in ([0, 14], [0, 7])
    done = [place.go(*place.command(*train_it, "--name", name)) for name in ("hurt", "unhurt")]
    assert [d.returncode for d in done] == [0, 0], [d.stderr for d in done]
    assert resumed_from(done[0].stdout) in (30, 35)  # the save in flight may be lost
    rows, other = (timeless(rows_of(place.run(name))) for name in ("hurt", "unhurt"))
    assert rows == other
    evaluated = {r["step"]: [r[f"eval/{s}/loss"] for s in "ab"] for r in rows if "eval/a/loss" in r}
    assert list(evaluated) == [20, 30, 40, 50, 60]
    steps = [r for r in rows if "train/loss" in r]
    assert {r["train/tokens"] for r in steps[:20]} == {256 * i for i in range(1, 21)}
    for first, losses in ((20, [1, 1]), *((s, evaluated[s]) for s in (30, 40, 50))):
        share = np.mean([r["data/a/rows"] for r in steps[first:first + 10]]) / 4
        assert share == pytest.approx(losses[0]**2 / (losses[0]**2 + losses[1]**2), abs=0.05)
    meta = Checkpoints(place.run("hurt") / "checkpoints").meta(60)
    logged = []
    for row in (r for r in rows if r["step"] in (30, 40, 50) and "eval/a/loss" in r):
        figures = {name: value for name, value in row.items() if name.startswith("eval/")}
        logged.append(figures | dict(zip("ab", evaluated[row["step"]], strict=True)))
    assert meta["log"] == [[], logged]


CHANGING = '''"""Grows in depth and then in width, forgetting all along; HURT names a moment to die."""
import os, signal
from functools import partial

from data import DataConfig, Source, text
from lib.edits import reset_embeddings
from lib.edits import stack
from model import ModelConfig
from lib.schedule import Schedule
from lib.config import ROOT, load_file
from train import Config, Edit, Phase

widen = load_file(ROOT / "lib/widen.py").widen


def forget(model, context):
    """A reset, unless this is where the process dies."""
    if os.environ.get("HURT") == str(context.step):
        os.kill(os.getpid(), signal.SIGKILL)
    return reset_embeddings(model, context)


phase = Phase(steps=16, batch=8, seq=32, repeat=(Edit(forget, every=5),),
              lr={"embed": Schedule(shape="linear", peak=1e-2, warmup=2, cycle=5)})
edits = (), (partial(stack, times=2, moments="map"),), (
    partial(widen, embed=64, kv_heads=2, mlp=64, split="uneven"), forget)
config = Config(
    model=ModelConfig(layers=1, embed=32, heads=2, kv_heads=1, head_dim=16, mlp=48, unroll=1),
    data=DataConfig(sources={"files": Source(partial(text, path="CORPUS"))}, tokenizer="bytes", dev=0.1,
                    test=0.1),
    phases=tuple(Phase(**vars(phase) | {"edits": e}) for e in edits),
    overlap=8, eval_every=100, eval_tokens=500, save_every=4, keep=100, sample_tokens=2,
)
'''


@pytest.mark.soak
def test_a_run_that_grows_twice_and_forgets_is_the_same_under_kills_and_on_another_mesh(place, corpus):
    """Killed at a reset and at the widening. Then from between two resets on eight devices:
    the draws of the resets to come are the same, and losses agree within the design's tolerance.
    """
    (place.root / "changing.py").write_text(CHANGING.replace("CORPUS", str(corpus)))
    train_it = ["changing.py", "--runs", "runs"]
    kills = [place.go(*place.command(*train_it, "--name", "grown-hurt"), HURT=at) for at in ("26", "32")]
    assert [k.returncode for k in kills] == [-signal.SIGKILL] * 2, kills
    done = [place.go(*place.command(*train_it, "--name", name)) for name in ("grown-hurt", "grown")]
    assert [d.returncode for d in done] == [0, 0], [d.stderr for d in done]
    runs = [place.run(name) for name in ("grown-hurt", "grown")]
    assert timeless(rows_of(runs[0])) == timeless(rows_of(runs[1])) and checkpoints(runs[0])[-1] == 48
    ends = [train.load(str(run), 48)[0] for run in runs]
    assert all(np.asarray(ends[0][n]).tobytes() == np.asarray(ends[1][n]).tobytes() for n in ends[0])
    said = [re.findall(r"^step (\d+): (.*); now", d.stdout, flags=re.M) for d in done]
    assert said[1] == [("5", "forget"), ("10", "forget"), ("15", "forget"), ("16", "stack"), ("21", "forget"),
                       ("26", "forget"), ("31", "forget"), ("32", "widen, forget"), ("37", "forget"),
                       ("42", "forget"), ("47", "forget")]
    other = place.run("meshed")
    shutil.copytree(runs[1], other)
    for step in filter(lambda s: s > 28, checkpoints(other)):
        shutil.rmtree(other / "checkpoints" / str(step))
    done = place.go(*place.command(*train_it, "--name", "meshed", "--mesh.fsdp", "2"),
                    XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert done.returncode == 0 and resumed_from(done.stdout) == 28, done.stderr
    losses = [np.array([float(x) for _, x in losses_of(run)]) for run in (other, runs[1])]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    drawn = [train.load(str(run), 32)[0]["embed"] for run in (other, runs[1])]  # at 31, and one update since
    np.testing.assert_allclose(*map(np.asarray, drawn), atol=1e-5)


def test_a_branch_starts_from_another_run_s_checkpoint(here, capsys):
    """With the optimiser and the place in the data, at the same rates, it is that run going on; with the
    parameters alone it begins at its data's start; its own checkpoint comes before the other's."""
    phase = ["--phases.0.steps", "10", "--phases.1.steps", "4", "--phases.1.edits", "()"]
    flat = ["--schedule.shape", "constant", "--schedule.warmup", "0", "--save_every", "10", "--prompts", "()",
            "--phases.0.mixture", "{'lines': 1.0}", "--phases.1.mixture", "{'lines': 1.0}"]
    longer = ["--phases.0.steps", "20", "--phases.1.steps", "1", "--phases.1.edits", "()"]
    ran(capsys, here.training("trunk", *longer, *flat))
    origin = ["--init_from", "runs/trunk@10", *phase, *flat]
    ran(capsys, here.training("on", *origin, "--init_with", "all"))
    ran(capsys, here.training("anew", *origin))
    old, on, anew = ([r["train/loss"] for r in rows_of(here.run(n)) if "train/loss" in r]
                     for n in ("trunk", "on", "anew"))
    assert on[:10] == old[10:20] and len(on) == 14
    assert anew[0] != on[0] and anew[0] < old[0] - 0.2
    meta = [Checkpoints(here.run(n) / "checkpoints").meta(10) for n in ("trunk", "on")]
    for source, drawn in meta[0]["positions"].items():
        assert meta[1]["positions"][source] == pytest.approx(2 * drawn, abs=64)
    assert resumed_from(ran(capsys, here.training("on", *origin, "--init_with", "all"))) == 14
    base = [here.config, "--runs", here.root / "runs", "--name", "none"]
    refused(capsys, [*base, "--init_from", "runs/trunk@7"], "trunk", "step 7", "10, 20, 21")
    refused(capsys, [*base, "--init_from", "runs/nowhere"], "nowhere", "config.json")


def test_on_a_terminal_sigterm_saves_and_a_second_process_is_refused(here, complete, capsys):
    """One line, rewritten in place: percent, loss, rate, gradient norm, tokens a second, time left. Meanwhile
    the directory is taken. Exit code 0 at a step that is saved; losses are the whole run's.
    """
    run, (ours, theirs) = here.run("stopped"), os.openpty()
    termios.tcsetwinsize(theirs, (24, 160))
    process = subprocess.Popen(here.training("stopped"), env=here.environment(SLOW="0.02", **conftest.USERS),
                               cwd=here.root, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    child = fdpexpect.fdspawn(ours, encoding="utf-8", timeout=120)
    for _ in range(3):
        child.expect(
            r"\r\x1b\[2K *\d+\.\d% \| step \d+/60 \| loss \d+\.\d+ \| lr \d\.\d+e-\d+ \| grad \d+\.\d+ \| "
            r"[\d,]+ tok/s \| ETA [\d:]+"
        )
    refused(capsys, here.training("stopped")[2:], "stopped", "another process")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    child.expect(r"stopped by SIGTERM; step (\d+) is saved")
    stopped = int(child.match[1])
    child.expect(pexpect.EOF)
    assert process.wait() == 0 and "Traceback" not in child.before
    child.close()
    assert checkpoints(run)[-1] == stopped < TOTAL and on_disk(run) == stopped
    done = here.train("stopped")
    assert done.returncode == 0 and resumed_from(done.stdout) == stopped and "| 0 tok/s" not in done.stdout
    assert losses_of(run) == losses_of(complete.directory)
    assert timeless(rows_of(run)) == timeless(rows_of(complete.directory))


HELD = '''"""A stream that stops giving while the file `held` is beside this one."""
import time
from pathlib import Path

from data import DataConfig, Document, Source
from model import ModelConfig
from train import Config, Phase


def verses():
    """Documents of 40 bytes; none after 512 while the file is there."""
    for i in range(1_024):
        while i >= 512 and Path("ROOT/held").exists():
            time.sleep(0.02)
        yield Document(str(i), f"{i:07d} " * 5)


config = Config(
    model=ModelConfig(layers=1, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=16),
    data=DataConfig(sources={"verses": Source(verses)}, tokenizer="bytes", dev=0.1, test=0.1,
                    shard_tokens=1, window=1, stream=True),
    phases=(Phase(steps=45, batch=8, seq=64),), overlap=8, eval_every=5, eval_tokens=500, save_every=100,
    prompts=())
'''


def alive(pid: int) -> bool:
    """Is there such a process, and does it still run?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes by /proc")
def test_a_run_that_waits_for_its_stream_is_stopped_by_a_signal_and_leaves_no_builder(place):
    """Ctrl-C saves the last step there were rows for and ends at once; after SIGKILL the builder ends by
    itself. Then the stream goes on, and so does the run.
    """
    (place.root / "held.py").write_text(HELD.replace("ROOT", str(place.root)))
    (place.root / "held").touch()
    run, line = place.run("held"), place.command("held.py", "--runs", "runs", "--name")

    def builders() -> list[int]:
        found = (place.root / "cache/coppice/tokens").glob("verses-*.json")
        lines = {p.parent.name: p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()}
        return [int(pid) for file in found for pid, said in lines.items()
                if str(file).encode() in said and alive(int(pid))]

    steps, out = [], place.root / "held.out"
    for number in (signal.SIGINT, signal.SIGKILL):
        with open(out, "w") as said:
            process = subprocess.Popen([*line, "held"], env=place.environment(), cwd=place.root, stdout=said,
                                       stderr=said)
        begun = since = time.monotonic()
        reached = 0
        while time.monotonic() < since + 2:  # rows were coming, and for two seconds none has
            assert process.poll() is None and time.monotonic() < begun + 120, out.read_text()
            if on_disk(run) != reached or not reached or (steps and "resuming" not in out.read_text()):
                reached, since = on_disk(run), time.monotonic()
            time.sleep(0.05)
        assert builders()
        process.send_signal(number)
        process.wait(20)
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 0 and "Traceback" not in out.read_text(), out.read_text()
            said = re.search(rf"stopped by {number.name}; step (\d+) is saved", out.read_text())
            steps.append(int(said[1]))
            assert checkpoints(run)[-1] == steps[-1] and steps[-1] > 0
        deadline = time.monotonic() + 10
        while builders():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    (place.root / "held").unlink()
    done = place.go(*line, "held")
    assert done.returncode == 0 and [resumed_from(done.stdout)] == steps, done.stderr
    assert [r["step"] for r in rows_of(run) if "train/loss" in r] == [*range(1, 46)]


# -------------------------------------------------------------------------------------------------- bad input


def one_sentence(err: str, *words: str) -> bool:
    """Is stderr one line that begins with `error:` and holds the words?"""
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert "Traceback" not in err and all(word in err for word in words), err
    return True


@pytest.fixture
def here(place, monkeypatch):
    """This process as the command line sees it: one device, and the runs' own cache."""
    whole = make_mesh
    monkeypatch.setattr(train, "make_mesh", lambda config, devices=None: whole(config, jax.devices()[:1]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.root / "cache"))
    monkeypatch.chdir(place.root)
    return place


def ran(capsys, command: list[str]) -> str:
    """What a command prints that is run in this process, and ends well."""
    capsys.readouterr()
    assert train.main(command[2:]) == 0
    return capsys.readouterr().out


def refused(capsys, arguments: list, *words: str):
    """Run the command line in this process: exit code 2 and one sentence with these words."""
    capsys.readouterr()
    code = train.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert code == 2 and one_sentence(err, *words) and "Traceback" not in out


def corpora(root: Path) -> dict[str, Path]:
    """Sources that nothing can be made of."""
    for name in ("empty", "undecodable", "blank"):
        (root / name).mkdir(exist_ok=True)
    (root / "undecodable/only.txt").write_bytes(b"caf\xe9 \xff\xfe")
    (root / "blank/only.txt").write_text("")
    return {name: root / name for name in ("empty", "undecodable", "blank", "missing")}


WRONG = {  # case: (arguments, words of the sentence); {..} is the path of a corpus
    "unknown field": (["--model.layrs", "3"], ["--model.layrs", "layers"]),
    "wrong type": (["--model.layers", "two"], ["model.layers", "'two'", "int"]),
    "heads": (["--model.heads", "3"], ["model.heads", "3", "model.kv_heads", "2"]),
    "odd head_dim": (["--model.head_dim", "7"], ["model.head_dim", "7", "even"]),
    "vocabulary": (
        ["--data.tokenizer", "bpe", "--model.vocab", "100000"],
        ["model.vocab", "100000", "at most"],
    ),
    "small vocabulary": (
        ["--data.tokenizer", "bpe", "--model.vocab", "100"],
        ["model.vocab", "100", "at least"],
    ),
    "vocabulary of bytes": (["--model.vocab", "300"], ["model.vocab", "300", "258"]),
    "no tokenizer": (["--data.tokenizer", "no/such.model"], ["data.tokenizer", "no/such.model"]),
    "not a tokenizer": (["--data.tokenizer", "{config}"], ["tiny.py", "SentencePiece"]),
    "empty corpus": (["--data.sources.files.documents.path", "{empty}"], ["files", "no document"]),
    "blank corpus": (["--data.sources.files.documents.path", "{blank}"], ["files", "no document", "empty"]),
    "undecodable": (
        ["--data.sources.files.documents.path", "{undecodable}"],
        ["files", "no document", "undecodable"],
    ),
    "missing path": (["--data.sources.files.documents.path", "{missing}"], ["missing", "does not exist"]),
    "one document": (
        ["--data.sources.files.documents.path", "{config}"],
        ["files", "1 documents", "none in"],
    ),
    "another seed": (["--seed", "1"], ["seed was 0 and is 1", "60 steps", "--name"]),
    "another width": (["--model.embed", "48"], ["model.embed was 32 and is 48"]),
    "another batch": (["--phases.0.batch", "8"], ["phases.0.batch was 4 and is 8"]),
    "another rate": (["--schedule.peak", "0.1"], ["schedule"]),
    "another end of a decay": (["--phases.1.steps", "40"], ["schedule", "60 steps"]),
    "fewer steps": (["--phases.1.steps", "20", "--schedule.shape", "wsd"], ["50", "60 steps"]),
    "mesh": (["--mesh.data", "3"], ["mesh", "3", "1 device"]),
    "batch of a mesh": (["--phases.0.batch", "0"], ["phases.0.batch", "0"]),
    "stray word": (["more"], ["'more'"]),
    "no value": (["--seed"], ["--seed needs a value"]),
}


@pytest.fixture(scope="module")
def victim(complete) -> Path:
    """A copy of the complete run."""
    shutil.copytree(complete.directory, complete.directory.parent / "victim")
    return complete.directory.parent / "victim"


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_in_one_sentence(case, here, victim, capsys):
    """Exit code 2, one line on stderr that names what is wrong, and not a byte of the run is changed."""
    arguments, words = WRONG[case]
    known = {k: str(v) for k, v in corpora(here.root).items()} | {"config": str(here.config)}
    before = tree_of(victim)
    train_arguments = [here.config, "--runs", here.root / "runs", "--name", "victim"]
    refused(capsys, [*train_arguments, *(a.format(**known) for a in arguments)], *words)
    assert tree_of(victim) == before


def test_wrong_config_files_are_refused(here, capsys, tmp_path):
    """Missing, with a syntax error, raising, without a config, with a lambda, or none at all."""
    files = {
        "syntax": "config = Config(",
        "raises": "x = 1\nraise RuntimeError('first\\nsecond')",
        "nothing": "x = 1",
        "unknown": "from train import Config\nconfig = Config(\n  sed=1)",
        "lambda": "from train import Config\nconfig = Config(reduce=lambda l, b: l)",
        "word": "config = 'Config'",
    }
    for name, content in files.items():
        (tmp_path / f"{name}.py").write_text(content)
    (tmp_path / "notes.txt").write_text("config")
    refused(capsys, [tmp_path / "syntax.py"], "syntax.py", "SyntaxError", "line 1")
    refused(capsys, [tmp_path / "raises.py"], "raises.py", "line 2", "RuntimeError", "first")
    refused(capsys, [tmp_path / "nothing.py"], "nothing.py", "config = Config")
    refused(capsys, [tmp_path / "word.py"], "word.py", "config = Config")
    refused(capsys, [tmp_path / "unknown.py"], "unknown.py", "line 2", "sed")
    refused(capsys, [tmp_path / "lambda.py"], "reduce", "lambda")
    refused(capsys, [tmp_path / "notes.txt"], "notes.txt")
    refused(capsys, [tmp_path / "missing.py"], "missing.py", "quickstart", "sample")
    refused(capsys, ["smaple", "runs/x"], "smaple", "sample", "quickstart")
    assert not (here.root / "runs/syntax").exists()


def test_refusal_of_a_whole_process(place, complete):
    """The exit code and the one line, as a shell sees them; nothing is changed."""
    before = tree_of(complete.directory)
    done = place.train("whole", "--phases.1.batch", "16")
    assert done.returncode == 2 and one_sentence(done.stderr, "phases.1.batch was 4 and is 16")
    done = place.train("whole", "--model.layers", "2.5")
    assert done.returncode == 2 and one_sentence(done.stderr, "model.layers", "2.5") and done.stdout == ""
    assert tree_of(complete.directory) == before


def test_horizon_of_a_constant_schedule_may_be_extended(here, capsys):
    """The run goes on from its end; its rows stay; the test split's figures come again, at the new end."""
    run = here.run("longer")
    line = here.training("longer", "--schedule.shape", "constant", "--prompts", "()", "--phases.0.steps", 6,
                         "--phases.1.steps")
    ran(capsys, [*line, "4"])
    before = [r for r in rows_of(run) if "train/loss" in r]
    assert resumed_from(ran(capsys, [*line, "8"])) == 10
    rows = rows_of(run)
    steps = [r for r in rows if "train/loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 15)) and steps[:10] == before
    assert [r["step"] for r in rows if any(".test/" in k for k in r)] == [14] == [rows[-1]["step"]]
    assert json.loads((run / "summary.json").read_text())["step"] == 14
    refused(capsys, [*line[2:], "6"], "14 steps", "12")


@pytest.mark.parametrize("file", ["tokens.bin", "index.npz", "seal.json", "documents.jsonl"])
def test_half_written_cache_is_refused(file, here, victim, capsys, monkeypatch, tmp_path):
    """The sentence says which directory to delete; without it the cache is built again, and is the same."""
    shutil.copytree(here.root / "cache/coppice/tokens", tmp_path / "coppice/tokens")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (cache,) = (tmp_path / "coppice/tokens").glob("lines-*/")
    hurt = cache / "000001" / file
    os.truncate(hurt, hurt.stat().st_size // 2)
    fingerprint = json.loads((victim / "checkpoints/60/meta/metadata").read_text())["fingerprints"]["lines"]
    refused(
        capsys,
        [here.config, "--runs", here.root / "runs", "--name", "victim"],
        str(cache),
        "damaged",
        "delete",
    )
    shutil.rmtree(cache)
    assert train.main(["corpus", "build", str(here.config)]) == 0
    assert fingerprint in capsys.readouterr().out


HALVED = {"params": "params", "opt": "opt", "meta": "meta", "everything": "."}


def halve(folder: Path):
    """Cut every file below a folder in the middle."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


@pytest.fixture
def begun(here, tmp_path, victim):
    """(run, function that begins it, giving the step that it goes on from): a copy of the victim."""
    run = tmp_path / "victim"
    shutil.copytree(victim, run)
    (run / "summary.json").unlink()
    config, file = parse([str(here.config), "--runs", str(tmp_path), "--name", "victim"])

    def begin() -> int:
        made = train.prepare(config, file)
        with train.opened(made):
            return train.resume(made)[1]

    return run, begin


@pytest.mark.parametrize("case", [*HALVED, "emptied", "no params"])
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_used(case, begun, capsys):
    """The sentence names it; readers of it are told which others there are."""
    run, begin = begun
    newest = run / "checkpoints/60"
    if case in HALVED:
        halve(newest / HALVED[case])
    elif case == "emptied":
        shutil.rmtree(newest)
        newest.mkdir()
    else:
        shutil.rmtree(newest / "params")
    if case != "opt":  # which no reader needs
        refused(capsys, ["sample", run, "--step", "60"], str(newest), "damaged", "[50, 55, 60]")
    assert begin() == 55 and checkpoints(run) == [50, 55] and newest.with_name("60.damaged").is_dir()
    out = capsys.readouterr().out
    assert "checkpoints/60 is damaged" in out and "60.damaged, and the run goes back to step 55" in out
    assert train.load(str(run), 55)[0]["q"].shape[0] == 4


def test_a_flipped_bit_is_noticed(begun, capsys):
    """Of parameters or moments, by the sums of their bits. With none intact the run is refused."""
    run, begin = begun
    whole, rng = Checkpoints(run / "checkpoints"), np.random.default_rng(0)
    for step, item in ((60, "params"), (55, "opt"), (50, "params")):
        meta = whole.meta(step)
        shape = from_json(ModelConfig, meta["model"])
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        state = whole.state(step, state_like(shape, adamw, mesh))
        part = state.params if item == "params" else state.opt["matrix"][0].mu
        name = sorted(part)[rng.integers(len(part))]
        bits = np.array(part[name])
        bits.reshape(-1).view(np.uint32)[rng.integers(bits.size)] ^= 1 << int(rng.integers(32))
        part[name] = jnp.asarray(bits)
        shutil.rmtree(run / "checkpoints" / str(step))
        kept, checksums = Checkpoints(run / "checkpoints", keep=9), checkpoint.checksums
        checkpoint.checksums = lambda state, meta=meta: meta["checksums"]  # as before the bit was flipped
        try:
            kept.save(step, state, meta)
            kept.close()
        finally:
            checkpoint.checksums = checksums
    with pytest.raises(InputError, match="checkpoints/50 is damaged .*with none before it"):
        begin()
    assert checkpoints(run) == [50] and capsys.readouterr().out.count("not as written: ") == 2


def test_other_text_under_a_run_is_refused(here, corpus, capsys):
    """A corpus that has changed since the run began: the fingerprint tells."""
    config, text = here.root / "changing.py", here.root / "text"
    shutil.copytree(corpus, text)
    config.write_text(here.config.read_text().replace(str(corpus), str(text)).replace("steps=30", "steps=2"))
    ran(capsys, here.command(config, "--runs", here.root / "runs", "--prompts", "()"))
    next(text.glob("*.txt")).write_text("something else\n" * 9)
    refused(capsys, [config, "--runs", here.root / "runs", "--prompts", "()"], "other text", "files")


# ------------------------------------------------------------------------------------------------------ tools


def test_load_gives_a_model_that_computes(complete):
    """(params, config, tokenizer, apply): logits of every position, which do not see what comes after."""
    params, config, tokenizer, apply = train.load(str(complete.directory))
    ids = np.array([tokenizer.encode("the tree is"), tokenizer.encode("the roots a")])
    out = np.asarray(apply(params, ids))
    assert out.shape == (2, 11, 258) and config.model.layers == 4 and np.isfinite(out).all()
    np.testing.assert_allclose(out[0, :4], out[1, :4], rtol=1e-4, atol=1e-5)
    assert np.abs(out[0, 4:] - out[1, 4:]).max() > 1e-3
    with pytest.raises(InputError, match="no checkpoint of step 7.*50, 55, 60"):
        train.load(str(complete.directory), 7)


def test_sample_draws_by_seed_and_temperature(here, complete, capsys):
    """The same seed gives the same text, another temperature or seed another; the prompt comes first."""

    def text(*arguments: str) -> str:
        assert (
            train.main(
                ["sample", str(complete.directory), "--prompt", "the tree", "--tokens", "30", *arguments]
            )
            == 0
        )
        return capsys.readouterr().out.split("\n", 1)[1]

    first = text("--seed", "1")
    assert first.startswith("the tree") and len(first) > 12
    assert text("--seed", "1") == first
    assert text("--seed", "2") != first and text("--seed", "1", "--temperature", "3.0") != first
    assert text("--temperature", "0") == text("--temperature", "0", "--seed", "5")
    refused(capsys, ["sample", complete.directory, "--tokens", "0"], "--tokens", "0")
    refused(capsys, ["sample", complete.directory, "--step", "1"], "1", "50, 55, 60")
    refused(capsys, ["sample", complete.directory, "--tempreature", "1"], "sample", "--tempreature")
    refused(capsys, ["sample", here.root], "config.json")
    refused(capsys, ["sample"], "run")


def test_eval_writes_what_the_run_wrote(here, victim, capsys):
    """The newest checkpoint's figures are those of the run's end; --step takes another's."""
    wrote = json.loads((victim / "eval.json").read_text())
    assert train.main(["eval", str(victim), "--step", "55"]) == 0
    other = json.loads((victim / "eval.json").read_text())
    assert other.keys() == wrote.keys() and other["eval/files.test/bpb"] != wrote["eval/files.test/bpb"]
    assert train.main(["eval", str(victim)]) == 0
    again = json.loads((victim / "eval.json").read_text())
    assert again["held_out_paths"] == wrote["held_out_paths"] and again["gzip_bpb"] == wrote["gzip_bpb"]
    assert again["eval/files.test/bpb"] == pytest.approx(wrote["eval/files.test/bpb"], rel=1e-5)
    assert "held-out files" in capsys.readouterr().out


def test_eval_prefers_the_likelier_of_minimal_pairs(here, victim, corpus, tmp_path, capsys):
    """Sentences of the corpus against noise are told apart; the other way round, they are not."""
    good = [
        line.strip()[:40]
        for p in sorted(corpus.glob("*.txt"))
        for line in p.read_text("utf-8").splitlines()
        if len(line.strip()) > 20 and line.isascii()
    ][:20]
    assert len(good) == 20
    pairs = [{"sentence_good": g, "sentence_bad": "\x01\x02ZQ" * (len(g) // 4 + 1)} for g in good]
    swapped = [dict(sentence_good=p["sentence_bad"], sentence_bad=p["sentence_good"]) for p in pairs]
    for name, content in (("easy", pairs), ("swapped", swapped)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in content))
    assert train.main(["eval", str(victim), "--blimp", str(tmp_path)]) == 0
    found = json.loads((victim / "eval.json").read_text())
    assert found["blimp/easy"] == 1.0 and found["blimp/swapped"] == 0.0 and found["blimp"] == 0.5
    assert found["blimp/easy_se"] == 0.0
    refused(capsys, ["eval", victim, "--blimp", tmp_path / "nowhere"], "nowhere", ".jsonl")


def test_eval_reads_blimp_itself(here, victim, tmp_path):
    """The first pairs of two of its paradigms."""
    files = sorted((SHARED / "data/blimp").glob("*.jsonl"))[:2]
    if not files:
        pytest.skip("../shared/data/blimp is not here")
    for file in files:
        (tmp_path / file.name).write_text("".join(file.read_text("utf-8").splitlines(keepends=True)[:16]))
    assert train.main(["eval", str(victim), "--blimp", str(tmp_path)]) == 0
    found = json.loads((victim / "eval.json").read_text())
    assert all(0 <= found[f"blimp/{file.stem}"] <= 1 for file in files)


def test_bench_ends_in_one_json_object(here, capsys):
    """With the promised keys; shapes may be given short; no run is left."""
    before = sorted({p.name for p in here.root.iterdir()} | {"cache"})
    arguments = [
        "bench",
        "--layers",
        "1",
        "--embed",
        "64",
        "--mlp",
        "64",
        "--vocab",
        "128",
        "--batch",
        "2",
        "--seq=32",
        "--dtype",
        "float32",
        "--seconds",
        "0.2",
    ]
    assert train.main([*arguments, "--apart"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    apart = found.pop("apart_ms")
    whole = sum(apart[k] for k in ("forward", "backward", "update"))
    assert whole == pytest.approx(found["step_ms"], abs=0.02)
    assert apart["forward"] > 0 and apart["products"] > 0 and 0 < found["host_stall"] < 1
    assert {"tokens_per_s", "step_ms", "mfu", "compile_s", "memory_gib", "params"} <= found.keys()
    assert found["tokens_per_s"] > 0 and found["params"] == 2 * 128 * 64 + 4 * 64 * 64 + 3 * 64 * 64 + 3 * 64
    assert sorted({p.name for p in here.root.iterdir()} | {"cache"}) == before
    refused(capsys, ["bench", "--layers", "0"], "model.layers", "0")
    refused(capsys, ["bench", "--lyers", "1"], "--lyers")
    refused(capsys, ["bench", *arguments[1:], "--together", "2"], "--together is 2 on 8 devices")
    refused(capsys, ["bench", *arguments[1:], "--together", "0"], "--together is 0")


@pytest.mark.parametrize("vary", ["seeds", "rates"])
def test_runs_together_are_the_runs_in_turn(vary):
    """The program that `bench --together` times computes what each run would alone."""
    bench = load_file(ROOT / "tools/bench.py")
    shape = model.ModelConfig(layers=1, embed=32, heads=2, kv_heads=2, head_dim=16, mlp=32, vocab=64)
    config, mesh = train.Config(model=shape), make_mesh(MeshConfig(), jax.devices()[:1])
    tokens = np.random.default_rng(0).integers(0, 64, (2, 2, 16), np.int32)
    ones = np.ones((2, 16), np.int32)
    same = dict(segments=ones, positions=np.cumsum(ones, 1) - 1, source=0 * ones,
                weights=ones.astype(np.float32))
    rows = [dict(tokens=t, targets=t[:, ::-1]) | same for t in tokens]
    rates = np.array([1e-2, 3e-2], np.float32)
    batch = jax.tree.map(lambda *x: np.stack(x), *rows) if vary == "seeds" else rows[0]
    state = first_state(shape, config.optimizer, mesh, jax.random.key(0))
    by_group = dict.fromkeys(model.groups(shape), rates)
    step, states = bench.program(config, mesh, state, batch, by_group, 2, vary)
    states, metrics = step(*step(states, batch, by_group)[:1], batch, by_group)
    for i in range(2):
        own, one = rows[i if vary == "seeds" else 0], dict.fromkeys(by_group, rates[i])
        alone = first_state(shape, config.optimizer, mesh, jax.random.key(0))
        run, alone = bench.program(config, mesh, alone, own, one, 1, vary)
        for _ in range(2):
            alone, last = run(alone, own, one)
        np.testing.assert_allclose(metrics["train/loss"][i], last["train/loss"], rtol=1e-5)
        np.testing.assert_allclose(states.params["down"][i], alone.params["down"], atol=1e-5)


def test_corpus_and_curves_work_alone(here, victim, capsys):
    """The cache is found and described; the picture is drawn again from the rows."""
    assert train.main(["corpus", "build", str(here.config)]) == 0
    out = capsys.readouterr().out
    assert "258 pieces" in out and re.search(r"lines: \d+ shards, .*fingerprint [0-9a-f]{20}", out)
    (victim / "curves.png").unlink()
    assert train.main(["curves", str(victim)]) == 0
    assert (victim / "curves.png").read_bytes()[:4] == b"\x89PNG"
    refused(capsys, ["curves", here.root], "metrics.jsonl")
    refused(capsys, ["corpus", "biuld", here.config], "biuld", "build")


def test_debug_learns_one_batch_or_says_why_not(here, capsys, tmp_path):
    """Without a run left behind; a rate too small is one sentence; a NaN names the operation."""
    small = ["--phases.0.batch", "1", "--phases.0.seq", "16", "--model.layers", "1"]
    base = [str(here.config), "--runs", str(tmp_path / "runs"), *small, "--debug"]
    assert train.main([*base, "--steps", "40"]) == 0
    out = capsys.readouterr().out
    said = [float(x) for x in re.findall(r"loss ([\d.]+), grad", out)]
    assert said[-1] < said[0] / 2 and len(said) > 1 and "one batch is learnt" in out
    assert not (tmp_path / "runs").exists()
    refused(capsys, [*base, "--steps", "2", "--schedule.peak", "1e-9"], "debug", "one batch", "schedule.peak")
    refused(capsys, [*base, "--schedule.peak", "1e38"], "debug", "NaN")


def test_corpus_inspect_shows_the_rows_of_a_batch(here, victim, corpus, capsys):
    """The text of each row, and how much of it counts."""
    assert train.main(["corpus", "inspect", str(here.config), "--step", "31", "--rows", "2"]) == 0
    out = capsys.readouterr().out
    heads = re.findall(r"row (\d) of step 31, source (files|lines): (\d+) segments, \d+ of 32 posi", out)
    assert [h[0] for h in heads] == ["0", "1"] and out.count("|") >= sum(int(h[2]) for h in heads) > 0
    texts = "".join(p.read_text("utf-8") for p in corpus.rglob("*.txt"))
    shown = out.split("with loss\n")[1].split("|")[0]
    assert shown and shown in texts and "data/waste" in out
    assert train.main(["corpus", "inspect", f"{victim}/config.json", "--step", "31", "--rows", "2"]) == 0
    assert capsys.readouterr().out == out  # of a run, as a spike's report has it
    refused(capsys, ["corpus", "inspect", here.config, "--step", "61"], "--step", "61", "1 to 60")


def test_help_lists_the_fields_with_their_comments(here, capsys, monkeypatch):
    """Every field of the model by its flag, and what its comment says."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        train.main([str(here.config), "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert ended.value.code in (0, None)
    for field in fields(model.ModelConfig):
        assert f"--model.{field.name}" in out, field.name
    for words in (
        "--schedule.peak",
        "--save_every",
        "--mesh.fsdp",
        "query heads",
        "rate after the warm-up",
        "checkpoints kept",
    ):
        assert words in out, words
    with pytest.raises(SystemExit) as ended:
        train.main(["sample", "--help"])
    assert ended.value.code == 0 and "--temperature" in capsys.readouterr().out

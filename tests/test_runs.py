"""Whole runs by the command line: what they leave, how they resume, what they refuse; the tools."""

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

from data import DataConfig, Loader, Source, text
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


def slow(self, *given, **named):
    """A batch that takes its time."""
    time.sleep(float(os.environ["SLOW"]))
    return at_once(self, *given, **named)


at_once = Loader.batch
if "SLOW" in os.environ:
    Loader.batch = slow


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
    model=ModelConfig(layers=1, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=48),
    data=DataConfig(
        sources={"files": Source(partial(text, path="CORPUS")),
                 "lines": Source(partial(lines, path="CORPUS"))},
        tokenizer="bytes", dev=0.1, test=0.1, shard_tokens=4_000),
    phases=(
        Phase(steps=30, batch=4, seq=32),
        Phase(steps=30, batch=4, seq=32, edits=(grow,)),
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
        """This process's, with one device, a cache of these runs, and no width of a terminal."""
        environment = conftest.environment(XDG_CACHE_HOME=str(self.root / "cache"), **more)
        environment.pop("COLUMNS", None)
        return environment

    def command(self, *arguments) -> list[str]:
        """A command line that trains this config; with a verb first, that verb."""
        return [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]

    def training(self, name: str, *arguments) -> list[str]:
        """A command line that trains this config as a run of its own."""
        return self.command(self.config, "--runs", self.root / "runs", "--name", name, *arguments)

    def go(self, *command: str, **more: str) -> subprocess.CompletedProcess:
        """Run a command to its end."""
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=self.environment(**more),
            cwd=self.root,
            timeout=300,
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
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps_of(run: Path) -> list[dict]:
    """The rows of metrics.jsonl that are of training steps."""
    return [row for row in rows_of(run) if "train/loss" in row]


def losses_of(run: Path) -> list[tuple[str, str]]:
    """(step, train/loss) of every step, in order, as they are written."""
    text = (run / "metrics.jsonl").read_text()
    return re.findall(r'"step": (\d+).*?"train/loss": ([^,}]+)', text)


def timeless(rows: list[dict]) -> list[dict]:
    """Rows without what depends on the clock."""
    kept = []
    for row in rows:
        names = [name for name in row if not name.startswith("perf/")]
        kept.append({name: row[name] for name in names})
    return kept


def tree_of(run: Path) -> dict[str, bytes]:
    """Every file of a run by path, but for its lock."""
    files = [path for path in sorted(run.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in files
        if path.name != ".lock"
    }


def checkpoints(run: Path) -> list[int]:
    """Steps with a complete checkpoint."""
    names = [path.name for path in (run / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def parameters_of(run: Path, step: int) -> dict[str, bytes]:
    """The bytes of every parameter of a checkpoint."""
    params = train.load(str(run), step)[0]
    return {name: np.asarray(x).tobytes() for name, x in params.items()}


def assert_same(run: Path, whole: Path):
    """Losses byte for byte, rows but for timings, the last parameters bit for bit, the samples."""
    assert losses_of(run) == losses_of(whole)
    assert len(losses_of(run)) == TOTAL
    assert timeless(rows_of(run)) == timeless(rows_of(whole))
    assert checkpoints(run) == checkpoints(whole)
    assert parameters_of(run, TOTAL) == parameters_of(whole, TOTAL)
    assert (run / "samples.txt").read_bytes() == (whole / "samples.txt").read_bytes()


def resumed_from(out: str) -> int:
    """The step that a run said it goes on from; 0 if it began."""
    said = re.findall(r"^resuming from step (\d+)", out, flags=re.M)
    assert len(said) <= 1
    return int(said[0]) if said else 0


def on_disk(run: Path) -> int:
    """The last step whose row has been written out."""
    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        return 0
    steps = re.findall(r'^{"step": (\d+)', metrics.read_text(), flags=re.M)
    return max(map(int, steps), default=0)


def assert_recent(out: str, reached: int):
    """A run with `reached` rows on disk resumed at most an interval and a save in flight earlier.

    A save waits for the one before it, after its step's row is on disk. So row 30 may stand while
    25 is written.
    """
    interval = (reached - 1) // EVERY * EVERY
    assert resumed_from(out) >= interval - EVERY


def was_killed(done) -> bool:
    """Whether a process ended by SIGKILL."""
    return done.returncode == -signal.SIGKILL


# ----------------------------------------------------------------------------------- a complete run


def test_complete_run_leaves_every_file(complete):
    """All that the design names, each of its kind."""
    run = complete.directory
    names = {path.name for path in run.iterdir()}
    assert names - {".lock"} == {
        "config.json",
        "metrics.jsonl",
        "curves.png",
        "samples.txt",
        "tokenizer.model",
        "summary.json",
        "eval.json",
        "source",
        "checkpoints",
    }
    names = {path.name for path in (run / "source").iterdir()}
    assert names == {"train.py", "model.py", "data.py", "lib", "tiny.py", "code.json"}
    assert (run / "source/tiny.py").read_text().startswith('"""A tiny run with hooks')
    assert (run / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert isinstance(load_tokenizer(run / "tokenizer.model"), Bytes)
    assert checkpoints(run) == [50, 55, 60]
    assert (run / "samples.txt").read_text("utf-8").strip()


def test_complete_run_writes_its_config_down(complete):
    written = json.loads((complete.directory / "config.json").read_text())
    edit = written["phases"][1]["edits"][0]
    assert written["model"]["vocab"] == 258
    assert edit["function"].endswith("tiny.py:grow")


def test_complete_run_has_a_summary(complete):
    summary = json.loads((complete.directory / "summary.json").read_text())
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
    assert {"jax", "python", "orbax-checkpoint"} <= summary["versions"].keys()
    assert summary["step"] == TOTAL


@pytest.mark.parametrize("file", ["summary.json", "eval.json"])
def test_complete_run_has_figures_of_its_test_documents(complete, file):
    found = json.loads((complete.directory / file).read_text())
    assert found["gzip_bpb"] > 0
    assert found["xz_bpb"] > 0
    assert len(found["held_out_paths"]) > 5
    for source in ("files", "lines"):
        assert found[f"eval/{source}.test/bpb"] > 0


def test_complete_run_says_what_it_does(complete):
    """The banner, plain lines when piped, held-out figures; nothing on stderr."""
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
    assert "\r" not in complete.out
    assert "\x1b" not in complete.out
    assert complete.err == ""


def test_rows_are_one_a_step_and_evaluations_apart(complete):
    """Steps 1 to N once each, evaluations without a loss, the test split's row last."""
    rows = rows_of(complete.directory)
    steps = steps_of(complete.directory)
    assert [row["step"] for row in steps] == list(range(1, TOTAL + 1))
    assert [row["phase"] for row in steps] == [0] * 30 + [1] * 30
    assert steps[-1]["train/loss"] < steps[0]["train/loss"] - 1

    *evaluations, test = [row for row in rows if "train/loss" not in row]
    assert [row["step"] for row in evaluations] == [20, 30, 40, 60]
    assert test["step"] == 60
    assert test == rows[-1]
    for row in evaluations:
        assert row["eval/files/bpb"] > 0
        assert row["eval/lines/bpb"] > 0
    layers = [row["own/layers"] for row in evaluations]
    assert layers == [1, 1, 2, 2]  # evaluation precedes the edits
    assert {"eval/files.test/bpb", "eval/lines.test/bpb"} <= test.keys()


def test_the_number_of_parameters_jumps_where_the_model_grows(complete):
    params = [row["model/params"] for row in steps_of(complete.directory)]
    small, large = params[BOUNDARY - 1], params[BOUNDARY]
    attention = 32 * 64 + 32 * 32
    mlp = 3 * 32 * 48
    gains = 64
    assert set(params) == {small, large}
    assert large - small == attention + mlp + gains


def test_several_shards_were_read(place, complete):
    """So that what is killed below is really cut in the middle."""
    (cache,) = (place.root / "cache/coppice/tokens").glob("lines-*/complete")
    assert len(list(cache.parent.glob("0*/seal.json"))) > 2


def test_running_again_changes_nothing(place, complete):
    """It says where it is, exits 0, and leaves every file as it was."""
    before = tree_of(complete.directory)
    done = place.train("whole")
    assert done.returncode == 0
    assert done.stderr == ""
    assert resumed_from(done.stdout) == TOTAL
    after = tree_of(complete.directory)
    assert before.keys() == after.keys()
    changed = [path for path in before if before[path] != after[path]]
    assert changed == []


# ------------------------------------------------------------------------------ killed, and resumed


def test_killed_while_the_cache_is_built_between_steps_and_at_the_phase_boundary(place, complete):
    """What is sealed is kept. The second kill is at an evaluation.

    The third is when the edit of the second phase is about to be applied. There the last checkpoint
    is damaged and a write cut off besides. The cache and the run are those never killed.
    """
    tokens = place.root / "cache/coppice/tokens"
    kept = place.root / "kept"
    run = place.run("hurt-thrice")
    shutil.move(tokens, kept)

    killed = place.train(run.name, HURT="document 900")
    assert was_killed(killed)
    sealed = {path: path.read_bytes() for path in tokens.glob("lines-*/00000[01]/*")}
    assert len({path.parent for path in sealed}) == 2
    assert not list(tokens.glob("lines-*/complete"))

    killed = place.train(run.name, HURT="evaluation 1")
    assert was_killed(killed)
    assert resumed_from(killed.stdout) == 0
    for path, content in sealed.items():
        assert path.read_bytes() == content
    assert cache_files(tokens) == cache_files(kept)
    reached = on_disk(run)
    assert 15 <= reached <= 20

    killed = place.train(run.name, HURT=f"edit {BOUNDARY}")
    assert was_killed(killed)
    assert_recent(killed.stdout, reached)
    assert on_disk(run) == BOUNDARY
    *_, before, newest = checkpoints(run)
    assert newest >= BOUNDARY - EVERY

    halve(run / f"checkpoints/{newest}/params")
    add_cut_off_write(run, before)
    done = place.train(run.name)
    assert done.returncode == 0
    assert resumed_from(done.stdout) == before
    assert_same(run, complete.directory)


def add_cut_off_write(run: Path, like: int):
    """Leave what a process leaves that dies in a save, made from another checkpoint."""
    cut_off = run / "checkpoints/65.orbax-checkpoint-tmp"
    shutil.copytree(run / f"checkpoints/{like}", cut_off)
    shutil.rmtree(cut_off / "params")


def cache_files(tokens: Path) -> dict[str, bytes]:
    """The files of token caches, by path."""
    files = [path for path in tokens.rglob("*") if path.suffix in (".json", ".bin", ".jsonl")]
    return {str(path.relative_to(tokens)): path.read_bytes() for path in files}


def kill_when(process: subprocess.Popen, moment: Callable[[], bool]) -> str:
    """Kill a process as soon as `moment()` is true; returns what it printed."""
    while process.poll() is None and not moment():
        time.sleep(0.0005)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    return process.communicate()[0]


def begun_saves(run: Path) -> list[int]:
    """Steps whose checkpoint is being written, or was when the process died."""
    directory = run / "checkpoints"
    if not directory.is_dir():
        return []
    names = [name for name in os.listdir(directory) if "orbax-checkpoint-tmp" in name]
    return [int(name.split(".")[0]) for name in names]


def saving(run: Path, after: int) -> Callable[[], bool]:
    """Is a checkpoint beyond a step being written?"""
    return lambda: any(step > after for step in begun_saves(run))


def kill_in_a_save(place: Place, run: Path) -> int:
    """Train and kill until a kill leaves a checkpoint half written; returns how often one did."""
    caught = 0
    for attempt in range(4):
        reached = on_disk(run)
        after = 7
        if attempt:
            after = max(checkpoints(run), default=0)
        out = kill_when(place.start(run.name, SLOW="0.016"), saving(run, after + EVERY))
        assert_recent(out, reached)
        caught += bool(begun_saves(run))
        if caught and checkpoints(run):
            break
    return caught


def test_killed_during_a_save_and_at_random(place, complete):
    """A checkpoint half written is none: each time the run goes on from one that was whole."""
    run = place.run("saves")
    assert kill_in_a_save(place, run), "no attempt caught a save in the middle"

    reached = on_disk(run)
    delay = random.Random(1).uniform(0, 0.5)
    begun = []

    def later() -> bool:
        if not begun and on_disk(run) > reached + 2:
            begun.append(time.monotonic())
        return bool(begun) and time.monotonic() > begun[0] + delay

    out = kill_when(place.start("saves", SLOW="0.016"), later)
    assert_recent(out, reached)

    reached = on_disk(run)
    done = place.train("saves")
    assert done.returncode == 0
    assert_recent(done.stdout, reached)
    assert_same(run, complete.directory)
    assert all(name.isdigit() for name in os.listdir(run / "checkpoints"))


@pytest.mark.soak
def test_killed_fifty_times(place, complete, capsys):
    """At random moments after the start, through a whole run and, when that is done, another."""
    rng = random.Random(2)
    number = 0
    kills = 0
    lost = []
    while kills < 50:
        run = place.run(f"soak{number}")
        reached = on_disk(run)
        until = time.monotonic() + rng.uniform(1.0, 5.0)
        started = place.start(run.name, SLOW="0.04")
        out = kill_when(started, lambda until=until: time.monotonic() > until)
        kills += was_killed(started)
        if "resuming" in out:
            assert_recent(out, reached)
            lost.append(reached - resumed_from(out))
        else:
            assert_recent(out, 0)
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
    """Killed at a decision, with shards built meanwhile; from the finished cache rows are the same.

    The log in the checkpoint holds the evaluation of each decision, with the dev loss of each source by
    its name, and the rows drawn follow it.
    """
    (place.root / "steered.py").write_text(STEERED)
    hurt = place.command("steered.py", "--runs", "runs", "--name", "hurt")
    unhurt = place.command("steered.py", "--runs", "runs", "--name", "unhurt")

    assert was_killed(place.go(*hurt, HURT="3"))

    done = place.go(*hurt)
    assert done.returncode == 0, done.stderr
    assert resumed_from(done.stdout) in (30, 35)  # the save in flight may be lost
    never_killed = place.go(*unhurt)
    assert never_killed.returncode == 0, never_killed.stderr
    run = place.run("hurt")
    assert timeless(rows_of(run)) == timeless(rows_of(place.run("unhurt")))

    steps = steps_of(run)
    tokens = {row["train/tokens"] for row in steps[:20]}
    assert tokens == {256 * i for i in range(1, 21)}
    evaluated = dev_losses(run)
    assert list(evaluated) == [20, 30, 40, 50, 60]
    followed = {20: dict(a=1, b=1)} | {step: evaluated[step] for step in (30, 40, 50)}
    for first, losses in followed.items():
        rows = [row["data/a/rows"] for row in steps[first:first + 10]]
        share = losses["a"]**2 / (losses["a"]**2 + losses["b"]**2)
        assert np.mean(rows) / 4 == pytest.approx(share, abs=0.05)
    meta = Checkpoints(run / "checkpoints").meta(60)
    assert meta["log"] == [[], [evaluations(run)[step] for step in (30, 40, 50)]]


def evaluations(run: Path) -> dict[int, dict[str, float]]:
    """{step: what the log holds of a steered run's evaluation, the dev losses by source too}."""
    losses, found = dev_losses(run), {}
    for row in rows_of(run):
        if "eval/a/loss" in row:
            figures = {name: value for name, value in row.items() if name.startswith("eval/")}
            found[row["step"]] = figures | losses[row["step"]]
    return found


def dev_losses(run: Path) -> dict[int, dict[str, float]]:
    """{step: {source: dev loss}} of a steered run."""
    losses = {}
    for row in rows_of(run):
        if "eval/a/loss" in row:
            losses[row["step"]] = dict(a=row["eval/a/loss"], b=row["eval/b/loss"])
    return losses


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
    train_it = place.command("changing.py", "--runs", "runs", "--name")
    hurt, grown, meshed = (place.run(name) for name in ("grown-hurt", "grown", "meshed"))

    for step in ("26", "32"):
        killed = place.go(*train_it, hurt.name, HURT=step)
        assert was_killed(killed), killed
    for run in (hurt, grown):
        done = place.go(*train_it, run.name)
        assert done.returncode == 0, done.stderr
    assert edits_said(done.stdout) == CHANGES
    assert timeless(rows_of(hurt)) == timeless(rows_of(grown))
    assert checkpoints(hurt)[-1] == 48
    assert parameters_of(hurt, 48) == parameters_of(grown, 48)

    shutil.copytree(grown, meshed)
    for step in checkpoints(meshed):
        if step > 28:
            shutil.rmtree(meshed / "checkpoints" / str(step))
    eight_devices = "--xla_force_host_platform_device_count=8"
    done = place.go(*train_it, meshed.name, "--mesh.fsdp", "2", XLA_FLAGS=eight_devices)
    assert done.returncode == 0, done.stderr
    assert resumed_from(done.stdout) == 28
    losses = [[float(loss) for _, loss in losses_of(run)] for run in (meshed, grown)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    # What the reset at step 31 drew, after one update.
    embeddings = [np.asarray(train.load(str(run), 32)[0]["embed"]) for run in (meshed, grown)]
    np.testing.assert_allclose(*embeddings, atol=1e-5)


CHANGES = {  # {step: the edits after it}
    5: "forget",
    10: "forget",
    15: "forget",
    16: "stack",
    21: "forget",
    26: "forget",
    31: "forget",
    32: "widen, forget",
    37: "forget",
    42: "forget",
    47: "forget",
}


def edits_said(out: str) -> dict[int, str]:
    """{step: the edits after it} that a run said it applied, each step once."""
    said = re.findall(r"^step (\d+): (.*); now", out, flags=re.M)
    edits = {int(step): names for step, names in said}
    assert len(edits) == len(said)
    return edits


def test_a_branch_starts_from_another_run_s_checkpoint(here, capsys):
    """With the optimiser and the place in the data, at the same rates, it is that run going on.

    With the parameters alone it begins at its data's start. Its own checkpoint comes before the
    other's.
    """
    phase = ["--phases.0.steps", "10", "--phases.1.steps", "4", "--phases.1.edits", "()"]
    flat = ["--schedule.shape", "constant", "--schedule.warmup", "0", "--save_every", "10", "--prompts", "()",
            "--phases.0.mixture", "{'lines': 1.0}", "--phases.1.mixture", "{'lines': 1.0}"]
    longer = ["--phases.0.steps", "20", "--phases.1.steps", "1", "--phases.1.edits", "()"]
    ran(capsys, here.training("trunk", *longer, *flat))
    origin = ["--init_from", "runs/trunk@10", *phase, *flat]
    ran(capsys, here.training("on", *origin, "--init_with", "all"))
    ran(capsys, here.training("anew", *origin))

    def losses(name: str) -> list[float]:
        return [row["train/loss"] for row in steps_of(here.run(name))]

    def positions(name: str) -> dict[str, int]:
        return Checkpoints(here.run(name) / "checkpoints").meta(10)["positions"]

    trunk, on, anew = losses("trunk"), losses("on"), losses("anew")
    assert len(on) == 14
    assert on[:10] == trunk[10:20]
    assert anew[0] != on[0]
    assert anew[0] < trunk[0] - 0.2
    after_ten_more = positions("on")
    for source, drawn in positions("trunk").items():
        assert after_ten_more[source] == pytest.approx(2 * drawn, abs=64)
    again = ran(capsys, here.training("on", *origin, "--init_with", "all"))
    assert resumed_from(again) == 14
    base = [here.config, "--runs", here.root / "runs", "--name", "none"]
    refused(capsys, [*base, "--init_from", "runs/trunk@7"], "trunk", "step 7", "10, 20, 21")
    refused(capsys, [*base, "--init_from", "runs/nowhere"], "nowhere", "config.json")


def test_on_a_terminal_sigterm_saves_and_a_second_process_is_refused(here, complete, capsys):
    """One line, rewritten in place: percent, loss, rate, gradient norm, tokens a second, time left.

    Meanwhile the directory is taken. Exit code 0 at a step that is saved; losses are the whole
    run's.
    """
    run = here.run("stopped")
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 160))
    process = subprocess.Popen(
        here.training("stopped"),
        env=here.environment(SLOW="0.08", **conftest.USERS),
        cwd=here.root,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
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
    assert process.wait() == 0
    assert "Traceback" not in child.before
    child.close()
    assert checkpoints(run)[-1] == stopped < TOTAL
    assert on_disk(run) == stopped

    done = here.train("stopped")
    assert done.returncode == 0
    assert resumed_from(done.stdout) == stopped
    assert "| 0 tok/s" not in done.stdout
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
    """Ctrl-C saves the last step there were rows for and ends at once. After SIGKILL the builder
    ends by itself. Then the stream goes on, and so does the run.
    """
    (place.root / "held.py").write_text(HELD.replace("ROOT", str(place.root)))
    held = place.root / "held"
    held.touch()
    run = HeldRun(place)

    run.start()
    run.wait_for_stream()
    assert run.builders()
    run.end(signal.SIGINT)
    assert run.process.returncode == 0, run.said()
    assert "Traceback" not in run.said(), run.said()
    step = int(re.search(r"stopped by SIGINT; step (\d+) is saved", run.said())[1])
    assert checkpoints(run.directory)[-1] == step > 0
    run.wait_for_builders_to_end()

    run.start()
    run.wait_for_stream(first="resuming")
    assert run.builders()
    run.end(signal.SIGKILL)
    assert was_killed(run.process)
    run.wait_for_builders_to_end()

    held.unlink()
    done = place.go(*run.command)
    assert done.returncode == 0, done.stderr
    assert resumed_from(done.stdout) == step
    steps = [row["step"] for row in steps_of(run.directory)]
    assert steps == [*range(1, 46)]


class HeldRun:
    """A run whose stream stops giving, as a process that is started and ended."""

    def __init__(self, place: Place):
        self.place = place
        self.directory = place.run("held")
        self.command = place.command("held.py", "--runs", "runs", "--name", "held")
        self.out = place.root / "held.out"

    def start(self):
        """Begin to train, or go on."""
        with open(self.out, "w") as out:
            self.process = subprocess.Popen(
                self.command,
                env=self.place.environment(),
                cwd=self.place.root,
                stdout=out,
                stderr=out,
            )

    def said(self) -> str:
        """What it has printed since it was started."""
        return self.out.read_text()

    def wait_for_stream(self, first: str = ""):
        """Wait until rows have come, and for two seconds none has.

        first: what it has to say before that.
        """
        begun = time.monotonic()
        since = begun
        reached = 0
        while time.monotonic() < since + 2:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < begun + 120, self.said()
            moved = on_disk(self.directory) != reached
            if moved or not reached or first not in self.said():
                reached = on_disk(self.directory)
                since = time.monotonic()
            time.sleep(0.05)

    def end(self, number: signal.Signals):
        """Send a signal and wait for the end."""
        self.process.send_signal(number)
        self.process.wait(20)

    def builders(self) -> list[int]:
        """The processes that build its cache."""
        caches = (self.place.root / "cache/coppice/tokens").glob("verses-*.json")
        names = [str(file).encode() for file in caches]
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            pid = int(path.parent.name)
            line = command_line(path)
            if any(name in line for name in names) and alive(pid):
                found.append(pid)
        return found

    def wait_for_builders_to_end(self):
        """They may take ten seconds."""
        deadline = time.monotonic() + 10
        while self.builders():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def command_line(path: Path) -> bytes:
    """The words of a process, by its file in /proc; nothing if it has ended."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


# ---------------------------------------------------------------------------------------- bad input


def one_sentence(err: str, *words: str) -> bool:
    """Is stderr one line that begins with `error:` and holds the words?"""
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert "Traceback" not in err, err
    assert all(word in err for word in words), err
    return True


@pytest.fixture
def here(place, monkeypatch):
    """This process as the command line sees it: one device, and the runs' own cache."""
    def mesh_of_one(config, devices=None):
        return make_mesh(config, jax.devices()[:1])

    monkeypatch.setattr(train, "make_mesh", mesh_of_one)
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
    code = train.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 2
    assert one_sentence(err, *words)
    assert "Traceback" not in out


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
    "no whole number": (["--model.layers", "2.5"], ["model.layers", "2.5"]),
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
    """Exit code 2, one line on stderr that names what is wrong; not a byte of the run changes."""
    arguments, words = WRONG[case]
    paths = corpora(here.root) | {"config": here.config}
    arguments = [argument.format(**paths) for argument in arguments]
    line = [here.config, "--runs", here.root / "runs", "--name", "victim"]
    before = tree_of(victim)
    refused(capsys, [*line, *arguments], *words)
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
    assert done.returncode == 2
    assert one_sentence(done.stderr, "phases.1.batch was 4 and is 16")

    assert tree_of(complete.directory) == before


def test_horizon_of_a_constant_schedule_may_be_extended(here, capsys):
    """The run goes on from its end; its rows stay; test figures come again, at the new end."""
    run = here.run("longer")
    line = here.training("longer", "--schedule.shape", "constant", "--prompts", "()", "--phases.0.steps", 6,
                         "--phases.1.steps")
    ran(capsys, [*line, "4"])
    before = steps_of(run)
    assert resumed_from(ran(capsys, [*line, "8"])) == 10

    steps = steps_of(run)
    assert [row["step"] for row in steps] == list(range(1, 15))
    assert steps[:10] == before
    rows = rows_of(run)
    tests = [row for row in rows if any(".test/" in name for name in row)]
    assert [row["step"] for row in tests] == [14]
    assert rows[-1]["step"] == 14
    assert json.loads((run / "summary.json").read_text())["step"] == 14
    refused(capsys, [*line[2:], "6"], "14 steps", "12")


@pytest.mark.parametrize("file", ["tokens.bin", "index.npz", "seal.json", "documents.jsonl"])
def test_half_written_cache_is_mended(file, here, victim, capsys, monkeypatch, tmp_path):
    """A sentence says so. Without the directory the same cache is built again."""
    shutil.copytree(here.root / "cache/coppice/tokens", tmp_path / "coppice/tokens")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (cache,) = (tmp_path / "coppice/tokens").glob("lines-*/")
    hurt = cache / "000001" / file
    os.truncate(hurt, hurt.stat().st_size // 2)
    meta = json.loads((victim / "checkpoints/60/meta/metadata").read_text())
    fingerprint = meta["fingerprints"]["lines"]
    line = [here.config, "--runs", here.root / "runs", "--name", "victim"]
    out = ran(capsys, here.command(*line))
    assert f"the token cache {cache}/000001 is damaged" in out and "built again" in out
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
    """(a copy of the victim, a function that begins it and returns the step it goes on from)."""
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
    assert begin() == 55
    assert checkpoints(run) == [50, 55]
    assert newest.with_name("60.damaged").is_dir()
    out = capsys.readouterr().out
    assert "checkpoints/60 is damaged" in out
    assert "60.damaged, and the run goes back to step 55" in out
    assert train.load(str(run), 55)[0]["q"].shape[0] == 2


def test_a_flipped_bit_is_noticed(begun, capsys):
    """Of parameters or moments, by the sums of their bits. With none intact the run is refused."""
    run, begin = begun
    rng = np.random.default_rng(0)
    saved = Checkpoints(run / "checkpoints")
    for step, item in ((60, "params"), (55, "opt"), (50, "params")):
        meta = saved.meta(step)
        shape = from_json(ModelConfig, meta["model"])
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        state = saved.state(step, state_like(shape, adamw, mesh))
        part = state.params if item == "params" else state.opt["matrix"][0].mu
        flip_a_bit(part, rng)
        replace_checkpoint(run, step, state, meta)

    with pytest.raises(InputError, match="checkpoints/50 is damaged .*with none before it"):
        begin()

    assert checkpoints(run) == [50]
    assert capsys.readouterr().out.count("not as written: ") == 2


def flip_a_bit(arrays: dict, rng: np.random.Generator):
    """Flip one bit of one of the arrays, all at random."""
    name = sorted(arrays)[rng.integers(len(arrays))]
    changed = np.array(arrays[name])
    words = changed.reshape(-1).view(np.uint32)
    words[rng.integers(words.size)] ^= 1 << int(rng.integers(32))
    arrays[name] = jnp.asarray(changed)


def replace_checkpoint(run: Path, step: int, state, meta: dict):
    """Write a checkpoint again with another state, and with the checksums that it had."""
    shutil.rmtree(run / "checkpoints" / str(step))
    saved = Checkpoints(run / "checkpoints", keep=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "checksums", lambda state: meta["checksums"])
        saved.save(step, state, meta)
        saved.close()


def test_other_text_under_a_run_is_refused(here, corpus, capsys):
    """A corpus that has changed since the run began: the fingerprint tells."""
    config = here.root / "changing.py"
    text = here.root / "text"
    shutil.copytree(corpus, text)
    content = here.config.read_text().replace(str(corpus), str(text))
    config.write_text(content.replace("steps=30", "steps=2"))
    line = [config, "--runs", here.root / "runs", "--prompts", "()"]
    ran(capsys, here.command(*line))

    next(text.glob("*.txt")).write_text("something else\n" * 9)

    refused(capsys, line, "other text", "files")


# -------------------------------------------------------------------------------------------- tools


def test_load_gives_a_model_that_computes(complete):
    """Logits of every position, which do not see what comes after."""
    params, config, tokenizer, apply = train.load(str(complete.directory))
    ids = np.array([tokenizer.encode("the tree is"), tokenizer.encode("the roots a")])
    out = np.asarray(apply(params, ids))
    assert config.model.layers == 2
    assert out.shape == (2, 11, 258)
    assert np.isfinite(out).all()
    one, other = out
    np.testing.assert_allclose(one[:4], other[:4], rtol=1e-4, atol=1e-5)
    assert np.abs(one[4:] - other[4:]).max() > 1e-3
    with pytest.raises(InputError, match="no checkpoint of step 7.*50, 55, 60"):
        train.load(str(complete.directory), 7)


def test_sample_draws_by_seed_and_temperature(here, complete, capsys):
    """The same seed gives the same text, another temperature or seed another."""

    def text(*arguments: str) -> str:
        line = ["sample", str(complete.directory), "--prompt", "the tree", "--tokens", "30"]
        assert train.main([*line, *arguments]) == 0
        _, drawn = capsys.readouterr().out.split("\n", 1)
        return drawn

    first = text("--seed", "1")
    assert first.startswith("the tree")
    assert len(first) > 12
    assert text("--seed", "1") == first
    assert text("--seed", "2") != first
    assert text("--seed", "1", "--temperature", "3.0") != first
    assert text("--temperature", "0") == text("--temperature", "0", "--seed", "5")
    refused(capsys, ["sample", complete.directory, "--tokens", "0"], "--tokens", "0")
    refused(capsys, ["sample", complete.directory, "--step", "1"], "1", "50, 55, 60")
    refused(capsys, ["sample", complete.directory, "--tempreature", "1"], "sample", "--tempreature")
    refused(capsys, ["sample", here.root], "config.json")
    refused(capsys, ["sample"], "run")


def test_eval_writes_what_the_run_wrote(here, victim, capsys):
    """The newest checkpoint's figures are those of the run's end; --step takes another's."""
    def figures():
        return json.loads((victim / "eval.json").read_text())

    bpb = "eval/files.test/bpb"
    wrote = figures()
    assert train.main(["eval", str(victim), "--step", "55"]) == 0
    other = figures()
    assert other.keys() == wrote.keys()
    assert other[bpb] != wrote[bpb]

    assert train.main(["eval", str(victim)]) == 0
    again = figures()
    assert again["held_out_paths"] == wrote["held_out_paths"]
    assert again["gzip_bpb"] == wrote["gzip_bpb"]
    assert again[bpb] == pytest.approx(wrote[bpb], rel=1e-5)
    assert "held-out files" in capsys.readouterr().out


def sentences(corpus: Path) -> list[str]:
    """The first twenty lines of the corpus that are long enough, in ASCII."""
    found = []
    for file in sorted(corpus.glob("*.txt")):
        lines = file.read_text("utf-8").splitlines()
        found += [line.strip()[:40] for line in lines if len(line.strip()) > 20 and line.isascii()]
    return found[:20]


def test_eval_prefers_the_likelier_of_minimal_pairs(here, victim, corpus, tmp_path, capsys):
    """Sentences of the corpus against noise are told apart; the other way round, they are not."""
    easy, swapped = [], []
    for sentence in sentences(corpus):
        noise = "\x01\x02ZQ" * (len(sentence) // 4 + 1)
        easy.append(dict(sentence_good=sentence, sentence_bad=noise))
        swapped.append(dict(sentence_good=noise, sentence_bad=sentence))
    assert len(easy) == 20
    for name, pairs in (("easy", easy), ("swapped", swapped)):
        lines = [json.dumps(pair) + "\n" for pair in pairs]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))

    assert train.main(["eval", str(victim), "--blimp", str(tmp_path)]) == 0

    found = json.loads((victim / "eval.json").read_text())
    assert found["blimp/easy"] == 1.0
    assert found["blimp/easy_se"] == 0.0
    assert found["blimp/swapped"] == 0.0
    assert found["blimp"] == 0.5
    refused(capsys, ["eval", victim, "--blimp", tmp_path / "nowhere"], "nowhere", ".jsonl")


def test_eval_reads_blimp_itself(here, victim, tmp_path):
    """The first pairs of two of its paradigms."""
    files = sorted((SHARED / "data/blimp").glob("*.jsonl"))[:2]
    if not files:
        pytest.skip("../shared/data/blimp is not here")
    for file in files:
        lines = file.read_text("utf-8").splitlines(keepends=True)
        (tmp_path / file.name).write_text("".join(lines[:16]))
    assert train.main(["eval", str(victim), "--blimp", str(tmp_path)]) == 0
    found = json.loads((victim / "eval.json").read_text())
    for file in files:
        assert 0 <= found[f"blimp/{file.stem}"] <= 1


def test_bench_ends_in_one_json_object(here, capsys):
    """With the promised keys; shapes may be given short; no run is left."""
    def names():
        return {path.name for path in here.root.iterdir()} | {"cache"}

    before = names()
    assert train.main([*BENCH, "--apart"]) == 0
    assert names() == before

    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    found = json.loads(last_line)
    apart = found.pop("apart_ms")
    whole = apart["forward"] + apart["backward"] + apart["update"]
    assert whole == pytest.approx(found["step_ms"], abs=0.02)
    assert apart["forward"] > 0
    assert apart["products"] > 0
    assert 0 < found["host_stall"] < 1
    assert {"tokens_per_s", "step_ms", "mfu", "compile_s", "memory_gib", "params"} <= found.keys()
    assert found["tokens_per_s"] > 0
    tables = 2 * 128 * 64
    attention = 4 * 64 * 64
    mlp = 3 * 64 * 64
    gains = 3 * 64
    assert found["params"] == tables + attention + mlp + gains


BENCH = ["bench", *"--layers 1 --embed 64 --mlp 64 --vocab 128 --batch 2 --seq=32".split(),
         "--dtype", "float32", "--seconds", "0.2"]


def test_bench_refuses_in_one_sentence(here, capsys):
    refused(capsys, ["bench", "--layers", "0"], "model.layers", "0")
    refused(capsys, ["bench", "--lyers", "1"], "--lyers")
    refused(capsys, [*BENCH, "--together", "2"], "--together is 2 on 8 devices")
    refused(capsys, [*BENCH, "--together", "0"], "--together is 0")


@pytest.mark.parametrize("vary", ["seeds", "rates"])
def test_runs_together_are_the_runs_in_turn(vary):
    """The program that `bench --together` times computes what each run would alone."""
    bench = load_file(ROOT / "tools/bench.py")
    shape = dict(layers=1, embed=32, heads=2, kv_heads=2, head_dim=16, mlp=32, vocab=64)
    config = train.Config(model=ModelConfig(**shape))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batches = two_batches()
    rates = np.array([1e-2, 3e-2], np.float32)

    def two_steps(batch, rate, runs: int):
        """(state, metrics) after two steps of so many runs together."""
        state = first_state(config.model, config.optimizer, mesh, jax.random.key(0))
        rates = dict.fromkeys(model.groups(config.model), rate)
        step, state = bench.program(config, mesh, state, batch, rates, runs, vary)
        for _ in range(2):
            state, metrics = step(state, batch, rates)
        return state, metrics

    if vary == "seeds":
        stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
        together, metrics = two_steps(stacked, rates, 2)
    else:
        together, metrics = two_steps(batches[0], rates, 2)
    for i in range(2):
        batch = batches[i] if vary == "seeds" else batches[0]
        alone, own = two_steps(batch, rates[i], 1)
        np.testing.assert_allclose(metrics["train/loss"][i], own["train/loss"], rtol=1e-5)
        np.testing.assert_allclose(together.params["down"][i], alone.params["down"], atol=1e-5)


def two_batches() -> list[dict]:
    """Two batches of random tokens."""
    one = np.ones((2, 16), np.int32)
    same = dict(
        segments=one,
        positions=np.cumsum(one, 1) - 1,
        source=0 * one,
        weights=one.astype(np.float32),
    )
    tokens = np.random.default_rng(0).integers(0, 64, (2, 2, 16), np.int32)
    return [same | dict(tokens=own, targets=own[:, ::-1]) for own in tokens]


def test_corpus_and_curves_work_alone(here, victim, capsys):
    """The cache is found and described; the picture is drawn again from the rows."""
    assert train.main(["corpus", "build", str(here.config)]) == 0
    out = capsys.readouterr().out
    assert "258 pieces" in out
    assert re.search(r"lines: \d+ shards, .*fingerprint [0-9a-f]{20}", out)
    (victim / "curves.png").unlink()
    assert train.main(["curves", str(victim)]) == 0
    assert (victim / "curves.png").read_bytes()[:4] == b"\x89PNG"
    refused(capsys, ["curves", here.root], "metrics.jsonl")
    refused(capsys, ["corpus", "biuld", here.config], "biuld", "build")


def test_debug_learns_one_batch_or_says_why_not(here, capsys, tmp_path):
    """Without a run left behind; a rate too small is one sentence; a NaN names the operation."""
    small = ["--phases.0.batch", "1", "--phases.0.seq", "16", "--model.layers", "1"]
    base = [str(here.config), "--runs", str(tmp_path / "runs"), *small, "--debug"]
    assert train.main([*base, "--steps", "40", "--schedule.peak", "3e-2"]) == 0
    out = capsys.readouterr().out
    said = [float(x) for x in re.findall(r"loss ([\d.]+), grad", out)]
    assert len(said) > 1
    assert said[-1] < said[0] / 2
    assert "one batch is learnt" in out
    assert not (tmp_path / "runs").exists()
    slow = [*base, "--steps", "2", "--schedule.peak", "1e-9"]
    refused(capsys, slow, "debug", "one batch", "schedule.peak")
    refused(capsys, [*base, "--schedule.peak", "1e38"], "debug", "NaN")


def test_corpus_inspect_shows_the_rows_of_a_batch(here, victim, corpus, capsys):
    """The text of each row, and how much of it counts."""
    def inspected(config) -> str:
        line = ["corpus", "inspect", str(config), "--step", "31", "--rows", "2"]
        assert train.main(line) == 0
        return capsys.readouterr().out

    out = inspected(here.config)
    head = r"row (\d) of step 31, source (files|lines): (\d+) segments, \d+ of 32 posi"
    found = re.findall(head, out)
    assert [row for row, _, _ in found] == ["0", "1"]
    segments = sum(int(number) for _, _, number in found)
    assert out.count("|") >= segments > 0
    texts = "".join(path.read_text("utf-8") for path in corpus.rglob("*.txt"))
    shown = out.split("with loss\n")[1].split("|")[0]
    assert shown
    assert shown in texts
    assert "of the positions are padding" in out and "pieces of: " in out
    of_a_run = inspected(victim / "config.json")  # as a spike's report has it
    assert of_a_run == out
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


def test_help_of_a_verb_lists_its_flags(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["sample", "--help"])
    assert ended.value.code == 0
    assert "--temperature" in capsys.readouterr().out

"""Several devices, several processes, hardware that is not here: meshes, launch, fit, kernels."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data
import model
import train
from lib.config import ROOT
from lib.flash import splash
from lib.kernels import Mask, attention, choose
from lib.sharding import MeshConfig, make_mesh, own_rows, put
from model import ModelConfig
from tools import fit

TOTAL, KEPT = 20, 10  # steps of a run, and the checkpoint that others go on from
# Relative, of figures after twenty steps of AdamW in float32 whose sums are in another order. Small
# gradients move as far as large ones, so rounding grows; in float64 it stays below 1e-9, see below.
NEAR = 1e-2
TINY = '''"""Packed rows, two resets and a growth in twenty steps."""
import time
from functools import partial

from lib.edits import reset_embeddings
from lib.edits import stack
from data import DataConfig, Source, shuffled, text
from model import ModelConfig
from lib.schedule import Schedule
from train import Config, Edit, Phase


def slow(draw, rows, progress, key, seconds=0.0):
    """The plain order, taking its time."""
    time.sleep(seconds)
    return shuffled(draw, rows, progress, key)


first = Phase(
    steps=12,
    batch=8,
    seq=32,
    repeat=(Edit(reset_embeddings, every=5),),
    order=partial(slow),
)
deeper = Phase(steps=8, batch=8, seq=32, edits=(partial(stack, times=2, moments="map"),))
config = Config(
    model=ModelConfig(
        layers=1,
        embed=96,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp=64,
        vocab=258,
        unroll=1,
    ),
    data=DataConfig(
        sources={"files": Source(partial(text, path="CORPUS"))},
        tokenizer="bytes",
        dev=0.1,
        test=0.1,
    ),
    phases=(first, deeper),
    schedule=Schedule(peak=1e-2, warmup=4),
    overlap=8,
    eval_every=8,
    eval_tokens=500,
    save_every=5,
    keep=9,
    prompts=(),
    sample_tokens=4,
)
'''


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Ended(NamedTuple):
    """A process that has ended."""

    code: int
    out: str
    err: str


class Place:
    """Runs of the tiny config, by the command line."""

    def __init__(self, root: Path, corpus: Path):
        self.root = root
        self.config = root / "tiny.py"
        self.config.write_text(TINY.replace("CORPUS", str(corpus)))

    def start(self, name: str, *arguments, devices: int = 1, processes: int = 1,
              before: tuple = ()) -> list[subprocess.Popen]:
        """Begin a run in so many processes of so many devices each.

        before: words that come before the command.
        """
        address = f"localhost:{free_port()}"
        environment = conftest.environment(devices, XDG_CACHE_HOME=str(self.root / "cache"))
        started = []
        for i in range(processes):
            command = [*before, sys.executable, ROOT / "train.py"]
            if processes > 1:
                command += ["launch", address, "--processes", processes, "--process", i]
            command += [self.config, "--runs", self.root, "--name", name, *arguments]
            process = subprocess.Popen(
                [*map(str, command)],
                env=environment,
                text=True,
                cwd=self.root,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            started.append(process)
        return started

    def train(self, name: str, *arguments, **how) -> list[Ended]:
        """Each process of a run, when all have ended."""
        started = self.start(name, *arguments, **how)
        said = [process.communicate(timeout=400) for process in started]
        codes = [process.returncode for process in started]
        return [Ended(code, out, err) for code, (out, err) in zip(codes, said, strict=True)]

    def metrics(self, name: str) -> list[dict]:
        """The rows of metrics.jsonl."""
        lines = (self.root / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def rows(self, name: str) -> list[dict]:
        """metrics.jsonl but for timings."""
        rows = []
        for row in self.metrics(name):
            names = [key for key in row if not key.startswith("perf/")]
            rows.append({key: row[key] for key in names})
        return rows

    def checkpoints(self, name: str) -> dict[int, Path]:
        """{step: checkpoint} of a run."""
        paths = (self.root / name / "checkpoints").iterdir()
        return {int(path.name): path for path in paths if path.name.isdigit()}

    def branch(self, name: str, of: str):
        """A copy of a run as if it had been killed after the checkpoint KEPT."""
        shutil.copytree(self.root / of, self.root / name)
        (self.root / name / "summary.json").unlink()
        for step, path in self.checkpoints(name).items():
            if step > KEPT:
                shutil.rmtree(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory, corpus) -> Place:
    return Place(tmp_path_factory.mktemp("scale"), corpus)


def check_near(ours: list[dict], theirs: list[dict], tolerance: float):
    """The same rows, whose figures differ by rounding alone.

    A process counts its own rows in data/*, so these are left out, and so are standard errors.
    """
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for key in one:
            if not key.startswith("data/") and not key.endswith("_se"):
                expected = pytest.approx(other[key], rel=tolerance)
                assert one[key] == expected, (one["step"], key)


@pytest.fixture(scope="module")
def whole(place) -> list[dict]:
    """A run on one device that nothing happened to."""
    done = place.train("whole")
    assert done[0].code == 0, done
    return place.rows("whole")


def check_good(done: list[Ended]):
    """Every process ended well, and only the first said anything."""
    assert [ended.code for ended in done] == [0] * len(done), done
    for ended in done[1:]:
        for word in ("run", "step", "loss", "parameters", "resuming", "checkpoint"):
            assert word not in ended.out  # Gloo says a little


def resumed_from(ended: Ended) -> int:
    """The step from which a run went on."""
    return int(re.search(r"resuming from step (\d+)\n", ended.out)[1])


# --------------------------------------------------------------------------- devices and processes


def test_a_mesh_and_processes_compute_what_one_device_does(place, whole):
    """To rounding, through resets and a growth.

    First data 2, fsdp 2 and tensor 2 on eight devices. From its checkpoint two processes of two
    devices each, in another layout, go on as it did; they print once.
    """
    check_good(place.train("meshed", "--mesh.fsdp", "2", "--mesh.tensor", "2", devices=8))
    check_near(place.rows("meshed"), whole, NEAR)

    place.branch("split", "meshed")
    prompts = ("--prompts", "('the',)")
    done = place.train("split", "--mesh.fsdp", "2", *prompts, devices=2, processes=2)
    check_good(done)
    assert resumed_from(done[0]) == KEPT
    assert "2 processes" in done[0].out
    check_near(place.rows("split"), whole, NEAR)
    assert (place.root / "split/samples.txt").read_text()


def seconds_a_row(seconds: float) -> tuple[str, str]:
    """Arguments of a run whose rows take their time."""
    return "--phases.0.order.seconds", str(seconds)


def test_sigterm_to_one_process_saves_all_at_one_step(place, whole):
    """The second of two is told to stop; both end well at a step that is saved. One goes on."""
    slow = seconds_a_row(0.02)
    started = place.start("stopped", *slow, processes=2)
    metrics = place.root / "stopped/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("train/loss") >= 3):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in started)
        time.sleep(0.05)

    started[1].send_signal(signal.SIGTERM)

    out, err = started[0].communicate(timeout=300)
    assert [process.wait(300) for process in started] == [0, 0], err
    step = int(re.search(r"stopped by SIGTERM; step (\d+) is saved", out)[1])
    assert 3 <= step < TOTAL
    assert (place.root / f"stopped/checkpoints/{step}").is_dir()

    done = place.train("stopped", *slow)
    check_good(done)
    assert resumed_from(done[0]) == step
    check_near(place.rows("stopped"), whole, NEAR)


MESHES = [  # (devices of a process, processes, sizes of data, fsdp and tensor)
    (8, 1, (8, 1, 1)),
    (8, 1, (2, 4, 1)),
    (8, 1, (1, 8, 1)),
    (8, 1, (2, 2, 2)),
    (8, 1, (4, 1, 2)),
    (2, 2, (2, 2, 1)),
    (1, 4, (1, 4, 1)),
    (1, 4, (2, 1, 2)),
]


@pytest.mark.soak
@pytest.mark.parametrize("dtype, tolerance", [("float32", NEAR), ("float64", 1e-9)])
def test_five_meshes_and_up_to_four_processes(place, dtype, tolerance):
    """From the start, and from a checkpoint of data 2 x fsdp 4 on other meshes."""
    kind = [f"--model.dtype={dtype}", f"--model.param_dtype={dtype}"]
    check_good(place.train(f"one-{dtype}", *kind))
    one = place.rows(f"one-{dtype}")

    for i, (devices, processes, (rows, fsdp, tensor)) in enumerate(MESHES):
        name = f"{dtype}-{i}"
        sizes = [f"--mesh.data={rows}", f"--mesh.fsdp={fsdp}", f"--mesh.tensor={tensor}"]
        check_good(place.train(name, *kind, *sizes, devices=devices, processes=processes))
        check_near(place.rows(name), one, tolerance)

    for start, how, sizes in (
        ("two", dict(devices=2), ["--mesh.fsdp=2"]),
        ("one", {}, []),
        ("split", dict(processes=2), ["--mesh.fsdp=2"]),
    ):
        name = f"{start}-of-{dtype}"
        place.branch(name, f"{dtype}-1")
        check_good(place.train(name, *kind, *sizes, **how))
        check_near(place.rows(name), one, tolerance)


@pytest.mark.soak
@pytest.mark.parametrize("victim", [1, 0])
def test_a_lost_process_ends_the_others_within_a_minute_and_the_run_resumes(place, whole, victim):
    """Whichever is killed. It costs at most an interval and the save in flight."""
    name = f"lost-{victim}"
    slow = seconds_a_row(0.05)
    started = place.start(name, *slow, processes=2)
    saved = place.root / name / "checkpoints/5"
    while not saved.exists():
        assert all(process.poll() is None for process in started)
        time.sleep(0.02)

    started[victim].kill()

    begun = time.monotonic()
    survivor = started[1 - victim]
    assert survivor.wait(120) != 0
    assert time.monotonic() - begun < 75
    for process in started:
        process.communicate()

    done = place.train(name, *slow, processes=2)
    check_good(done)
    assert resumed_from(done[0]) >= 5
    check_near(place.rows(name), whole, NEAR)


@pytest.mark.parametrize("arguments, words", [
    (["--helpme"], "unrecognized"),
    (["auto", "--process", "1"], "auto alone"),
    (["h:1", "--processes", "2"], "--process I"),
    (["h:1"], "HOST:PORT"),
])
def test_launch_s_mistakes_are_one_sentence(arguments, words):
    with pytest.raises(data.InputError, match=words):
        train.verb("launch", arguments)


CLUSTERS = ("SLURM", "OMPI", "PMI", "KUBERNETES", "TPU", "MEGASCALE", "CLOUD", "JAX_COORDINATOR")


def test_launch_auto_without_a_cluster_says_what_to_do_instead(tmp_path):
    """On a laptop: one sentence with the command that is meant."""
    environment = conftest.environment()
    plain = {name: environment[name] for name in environment if not name.startswith(CLUSTERS)}
    run = ["configs/quickstart.py", "--seed", "3"]
    command = [sys.executable, ROOT / "train.py", "launch", "auto", *run]

    done = subprocess.run(command, env=plain, capture_output=True, text=True, cwd=tmp_path)

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no cluster" in done.stderr
    line = " ".join(run)
    assert f"python train.py {line};" in done.stderr
    assert f"launch HOST:PORT --processes N --process I {line}" in done.stderr


# -------------------------------------------------------------------------------------- checkpoints


def test_a_disk_that_is_full_is_one_sentence_and_the_run_resumes_with_checkpoints_by_time(
        place, whole):
    """No file may grow beyond 60 KiB, as if the disk were full: exit code 2, one sentence, nothing
    lost. The copies in source/ are smaller; one array, the 97 KiB of embeddings, is larger in any
    file. Orbax may warn of what it gave up; its threads say nothing.

    Then there is room, and a checkpoint after each step, as the time between them is shorter. The
    newest two stay, and multiples of four.
    """
    fields = "--save_minutes 1e-9 --keep 2 --keep_every 4 --save_every 50".split()
    small_files = ("bash", "-c", 'ulimit -f 60; exec "$@"', "-")
    ((code, _, err),) = place.train("full", *fields, before=small_files)
    assert code == 2, err
    assert len(re.findall("error: ", err)) == 1, err
    assert "Traceback" not in err, err
    sentence = (
        "error: no checkpoint can be written to .*/full/checkpoints .*File too large.*; make "
        "room, and the same command resumes from step 0\n"
    )
    assert re.search(sentence, err), err

    check_good(place.train("full", *fields))
    # The last row tells of the checkpoint that is longest after a reset.
    assert place.rows("full")[:-1] == whole[:-1]
    assert sorted(place.checkpoints("full")) == [4, 8, 12, 16, 19, 20]
    saves = [row for row in place.metrics("full") if row.get("perf/save_s", 0) > 0]
    assert len(saves) > 5


# ---------------------------------------------------------------------------------------------- fit

HLO = '''HloModule step
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}
%cond (p: (s32[], f32[8])) -> pred[] {
  %n = s32[] constant(6)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = bf16[4,8]{1,0} all-gather(%w), replica_groups=[2,4]<=[8], dimensions={0}
  %r = (f32[8]{0}, /*index=1*/f32[2,2]) all-reduce(%x, %y), replica_groups={{0,1},{2,3}}, to_apply=%add
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  %v = (s32[], f32[8]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"2"}}
  %rs = f32[3]{0} reduce-scatter(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  %s = (f32[5], f32[20]) all-gather-start(%x), replica_groups={{0,1,2,3}}
  %d = f32[20] all-gather-done(%s)
  %p = f32[10] collective-permute(%x), source_target_pairs={{0,1}}
}
'''


def test_collectives_are_counted_as_often_as_loops_turn():
    """In closed form: by rings, of the larger of what goes in and what comes out."""
    loops = 6 + 2
    gathered = loops * 64 * 3 // 4 + 80 * 3 // 4
    assert fit.collectives(HLO, 8) == {
        "all-gather": [loops + 1, gathered],
        "all-reduce": [loops, loops * 48],
        "reduce-scatter": [1, 12 * 4 * 3 // 4],
        "collective-permute": [1, 40],
    }


def test_a_collective_that_is_fused_with_others_is_counted_once():
    """XLA's async fusions have its line at their start and at their end."""
    line = "  %{name} = f32[8]{{0}} all-gather(%x), channel_id={channel}, replica_groups={{{{0,1}}}}"
    computations = [
        f"%{name} (x: f32[4]) -> f32[8] {{\n{line.format(name=name, channel=channel)}\n}}"
        for name, channel in (("start", 7), ("end", 7), ("other", 8))
    ]
    calls = [f"  %c{name} = f32[8] fusion(%x), calls=%{name}" for name in ("start", "end", "other")]
    entry = ["ENTRY %main (x: f32[4]) -> f32[8] {", *calls, "}"]
    module = "\n".join([*computations, *entry])
    assert fit.collectives(module, 2) == {"all-gather": [2, 2 * 16]}


class Report(NamedTuple):
    """What `fit` says."""

    code: int
    out: str
    found: dict  # the JSON object of its last line


def report(*arguments) -> Report:
    """What `fit` says, in a process of its own."""
    users = {} if "--devices" in arguments else conftest.USERS
    command = [sys.executable, ROOT / "train.py", "fit", *arguments, "--json"]
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        env=conftest.environment(**users),
        timeout=400,
    )
    assert done.stdout, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    last_line = done.stdout.splitlines()[-1]
    return Report(done.returncode, done.stdout, json.loads(last_line))


def fsdp_on_eight(place) -> Report:
    """What fit says of the tiny config on eight devices with fsdp."""
    mesh = ["--devices", "8", "--mesh.data", "1", "--mesh.fsdp", "8"]
    sizes = ["--model.layers", "2", "--phases.0.batch", "64", "--phases.1.batch", "64"]
    return report(place.config, *mesh, *sizes)


def test_fit_says_what_a_device_holds_and_sends(place):
    """With fsdp each device has an eighth of the state.

    Weights are gathered for each product of the forward and the backward pass, and their gradients
    scattered as they are summed. Nothing of the size of activations is sent.
    """
    code, out, found = fsdp_on_eight(place)
    assert code == 0
    assert found["fits"]
    assert "does not fit" not in out.lower()
    assert found["mesh"] == dict(data=1, fsdp=8, tensor=1)

    shallow, deep = found["programs"]
    for program, layers in ((shallow, 2), (deep, 4)):
        shape = dict(embed=96, heads=4, kv_heads=2, head_dim=8, mlp=64, vocab=258)
        parameters = model.count(ModelConfig(layers=layers, **shape))
        state = 3 * 4 * parameters / 8  # parameters and two moments in float32
        assert program["parameters"] == parameters
        assert program["bytes"]["state"] == pytest.approx(state, rel=0.01)

    outside_blocks = 2 * 258 * 96 + 96
    layer_bytes = 4 * (shallow["parameters"] - outside_blocks) // 2
    once = 2 * layer_bytes * 7 / 8  # of two more layers
    for kind, times in ("all-gather", 2), ("reduce-scatter", 1):
        more = deep["collectives"][kind][1] - shallow["collectives"][kind][1]
        assert more == pytest.approx(times * once, rel=0.05)
    assert "all-to-all" not in deep["collectives"]


@pytest.mark.parametrize("arguments, words", [
    ("", "--topology KIND:AxB or --devices N"),
    ("--topology v5e:4x4 --devices 2", "either"),
    ("--topology v5e:4x4", "pip install --target .*libtpu"),
    ("--topology h100:1", "pip install --target .*jax-cuda13-plugin"),
    ("--topology h100:16", "h100:1 to h100:8 .* h100:4x8"),
    ("--topology h100:0x8", "h100:1 to h100:8 .* h100:4x8"),
    ("--topology rtx9:1", "'rtx9:1'; allowed kinds of devices are v4, v5e, v5p, v6e, tpu7x, a100.* rtx4090"),
    ("--devices 8 --mesh.fsdp 3", "mesh is data -1, fsdp 3"),
    ("--devices 8 --model.embed 36 --mesh.fsdp 8", "axis embed"),
    ("--devices 2 --model.vocab 0 --data.tokenizer bpe", "vocab"),
])
def test_fit_s_mistakes_are_one_sentence(place, monkeypatch, tmp_path, arguments, words):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("TPU_LIBRARY_PATH", "CUDA_PLUGIN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(data.InputError, match=words):
        train.verb("fit", [str(place.config), *arguments.split()])


@pytest.mark.parametrize("kind, gib", [
    ("NVIDIA H100 80GB HBM3", 60), ("Tesla T4", 12), ("TPU v5 lite", 16), ("TPU v9", 0),
])
def test_jax_takes_three_quarters_of_a_gpu_and_all_of_a_tpu(kind, gib, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert fit.memory_limit(kind) == gib * 2**30


CACHE = Path.home() / ".cache/coppice"
LIBTPU = Path(os.environ.get("TPU_LIBRARY_PATH") or CACHE / "libtpu/libtpu/libtpu.so")
PLUGIN = Path(os.environ.get("CUDA_PLUGIN_PATH") or CACHE / "cuda")
SHORT_ROWS = ["--phases.0.seq", "128", "--phases.1.seq", "128", "--model.dtype", "bfloat16"]


def batches(size: int) -> list[str]:
    """Arguments for batches of so many rows in both phases."""
    return ["--phases.0.batch", str(size), "--phases.1.batch", str(size)]


@pytest.mark.soak
@pytest.mark.skipif(not LIBTPU.exists(), reason=f"needs libtpu: {LIBTPU}")
def test_fit_compiles_for_tpus_and_says_what_does_not_fit(place, monkeypatch):
    """A small model fits sixteen chips; with rows for a hundred gigabytes it does not."""
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(LIBTPU))
    base = [place.config, "--topology", "v5e:4x4", *SHORT_ROWS]

    code, out, found = report(*base, *batches(16))
    assert code == 0
    assert found["fits"]
    assert (found["kind"], found["devices"]) == ("TPU v5 lite", 16)
    assert "roofline" in out
    assert 0 < found["programs"][0]["bytes"]["total"] < 2**30

    wide = "--model.embed 4096 --model.mlp 16384 --model.layers 4 --phases.1.edits ()".split()
    code, out, found = report(*base, *wide, *batches(4096))
    assert code == 1
    assert not found["fits"]
    assert "DOES NOT FIT" in out
    assert found["advice"]


@pytest.mark.soak
@pytest.mark.skipif(not (PLUGIN / "jax_plugins").exists(), reason=f"needs jax's plugin: {PLUGIN}")
def test_fit_compiles_for_gpus_that_are_not_here(place, monkeypatch):
    """With cuDNN's attention too; eight of them sum gradients, one sends nothing."""
    monkeypatch.setenv("CUDA_PLUGIN_PATH", str(PLUGIN))
    base = [place.config, *SHORT_ROWS, "--model.head_dim", "64"]

    for segments, chosen in ("1", "cudnn_causal"), ("8", "cudnn_packed"):
        code, _, one = report(*base, "--topology", "h100:1", "--segments", segments)
        assert code == 0
        assert one["fits"]
        assert one["kind"] == "NVIDIA H100"
        assert one["programs"][0]["attention"] == chosen
        assert not one["programs"][0]["collectives"]

    for topology, devices in ("a100:8", 8), ("h100:2x4", 8), ("rtx4090:2", 2):
        code, _, several = report(*base, "--topology", topology)
        assert code == 0
        assert several["devices"] == devices
        _, sent = several["programs"][0]["collectives"]["all-reduce"]
        assert sent > 0


# ------------------------------------------------------------------------------------------ kernels


@pytest.mark.parametrize("length, window", [(256, 0), (384, 70), (640, 70)])
def test_splash_equals_the_reference(length, window):
    """Outputs and gradients, in the interpreter: grouped queries, segments, padding, a window.

    In one block, in three, and in five, whose gradients are not made by one kernel.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, length, 2, 2, 32))
    k = jax.random.normal(keys[1], (2, length, 2, 32))
    v = jax.random.normal(keys[2], (2, length, 2, 32))
    segments = np.random.default_rng(0).integers(1, 4, (2, length))
    segments = np.sort(segments, 1).astype(np.int32)
    segments[1, 200:] = 0
    mask = Mask("causal", window)
    wave = jnp.cos(jnp.arange(32.0))
    real = (segments > 0)[..., None, None, None]

    def both(attend):
        def value(*qkv):
            return jnp.sum(attend(*qkv) * wave * real)

        return jax.value_and_grad(value, (0, 1, 2))(q, k, v)

    def by_splash(*qkv):
        return splash(*qkv, mask, jnp.asarray(segments), interpret=True)

    def by_reference(*qkv):
        return attention(*qkv, mask, segments, implementation="reference")

    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, both(by_splash), both(by_reference))


CAUSAL, PREFIX = Mask("causal", 0), Mask("prefix", 0)


@pytest.mark.parametrize("length, mask, chosen", [
    (256, CAUSAL, "splash"),
    (200, CAUSAL, "xla"),
    (256, PREFIX, "xla"),
])
def test_splash_is_chosen_on_tpus_where_it_can_do_what_is_asked(length, mask, chosen):
    assert choose("auto", mask, length, 64, "float32", ("tpu", (0, 0))) == chosen


@pytest.mark.parametrize("mask, platform", [(PREFIX, "tpu"), (CAUSAL, "cpu")])
def test_an_attention_that_cannot_do_what_is_asked_is_refused(mask, platform):
    with pytest.raises(ValueError, match="model.attention is splash; allowed for .* are auto, "):
        choose("splash", mask, 256, 64, "float32", (platform, (0, 0)))


# --------------------------------------------------------------------------------- rows of a batch


def test_one_process_has_all_rows_of_a_batch():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    np.testing.assert_array_equal(own_rows(mesh, 8), np.arange(8))


@pytest.mark.parametrize("rows, replicated", [(6, True), (8, False)])
def test_rows_that_no_mesh_divides_are_on_every_device(rows, replicated):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    batch = dict(tokens=np.ones((rows, 4), np.int32))
    placed = put(batch, mesh)["tokens"]
    assert placed.sharding.is_fully_replicated == replicated

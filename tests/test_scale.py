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

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data
import model
import train
from lib.config import ROOT
from lib.kernels import Mask, attention, choose, splash
from lib.sharding import MeshConfig, make_mesh, own_rows, put
from model import ModelConfig
from tools import fit

TOTAL, KEPT = 20, 10  # steps of a run, and the checkpoint that others go on from
TINY = '''"""Packed rows, two resets and a growth in twenty steps."""
import time
from functools import partial

from lib.edits import reset_embeddings
from lib.edits import stack
from data import DataConfig, Source, causal, text
from model import ModelConfig
from lib.schedule import Schedule
from train import Config, Edit, Phase


def slow(row, rng, seconds=0.0):
    """The plain objective, taking its time."""
    time.sleep(seconds)
    return causal(row, rng)


phase = Phase(steps=12, batch=8, seq=32, repeat=(Edit(reset_embeddings, every=5),), objective=partial(slow))
config = Config(
    model=ModelConfig(layers=1, embed=96, heads=4, kv_heads=2, head_dim=8, mlp=64, vocab=258, unroll=1),
    data=DataConfig(sources={"files": Source(partial(text, path="CORPUS"))}, tokenizer="bytes",
                    dev=0.1, test=0.1),
    phases=(phase, Phase(steps=8, batch=8, seq=32, edits=(partial(stack, times=2, moments="map"),))),
    schedule=Schedule(peak=1e-2, warmup=4), overlap=8, eval_every=8, eval_tokens=500, save_every=5, keep=9,
    prompts=(), sample_tokens=4,
)
'''


class Place:
    """Runs of the tiny config, by the command line."""

    def __init__(self, root: Path, corpus: Path):
        self.root, self.config = root, root / "tiny.py"
        self.config.write_text(TINY.replace("CORPUS", str(corpus)))

    def start(self, name: str, *arguments, devices: int = 1, processes: int = 1, before: tuple = ()) -> list:
        """Begin a run in so many processes of so many devices each; `before` comes before the command."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = conftest.environment(devices, XDG_CACHE_HOME=str(self.root / "cache"))
        started = []
        for i in range(processes):
            launch = ["launch", f"localhost:{port}", "--processes", str(processes), "--process", str(i)]
            command = [*before, sys.executable, ROOT / "train.py", *(launch if processes > 1 else ()),
                       self.config, "--runs", self.root, "--name", name, *arguments]
            started.append(subprocess.Popen([*map(str, command)], env=environment, text=True, cwd=self.root,
                                            stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return started

    def train(self, name: str, *arguments, **how) -> list[tuple[int, str, str]]:
        """(exit code, stdout, stderr) of each process of a run."""
        started = self.start(name, *arguments, **how)
        texts = [p.communicate(timeout=400) for p in started]
        return [(p.returncode, *said) for p, said in zip(started, texts, strict=True)]

    def rows(self, name: str) -> list[dict]:
        """metrics.jsonl but for timings."""
        rows = map(json.loads, (self.root / name / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]

    def branch(self, name: str, of: str, step: int = KEPT):
        """A copy of a run as if it had been killed after a checkpoint."""
        shutil.copytree(self.root / of, self.root / name)
        (self.root / name / "summary.json").unlink()
        for path in (self.root / name / "checkpoints").iterdir():
            if path.name.isdigit() and int(path.name) > step:
                shutil.rmtree(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory, corpus) -> Place:
    return Place(tmp_path_factory.mktemp("scale"), corpus)


def near(ours: list[dict], theirs: list[dict], tolerance: float):
    """The same rows, whose figures differ by rounding alone. Only own rows are counted for data/*."""
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for key in one.keys() - {k for k in one if k.startswith("data/") or k.endswith("_se")}:
            assert one[key] == pytest.approx(other[key], rel=tolerance), (one["step"], key)


@pytest.fixture(scope="module")
def whole(place) -> list[dict]:
    """A run on one device that nothing happened to."""
    done = place.train("whole")
    assert done[0][0] == 0, done
    return place.rows("whole")


def good(done):
    """Every process ended well, and only the first said anything."""
    assert [code for code, *_ in done] == [0] * len(done), done
    for word in ("run", "step", "loss", "parameters", "resuming", "checkpoint"):  # Gloo says a little
        assert not [out for _, out, _ in done[1:] if word in out]


def test_a_mesh_and_processes_compute_what_one_device_does(place, whole):
    """Through resets and a growth, to rounding: data 2, fsdp 2 and tensor 2 on eight devices. From its
    checkpoint, two processes of two devices each, in another layout, go on as it did; they print once.
    """
    good(place.train("meshed", "--mesh.fsdp", "2", "--mesh.tensor", "2", devices=8))
    near(place.rows("meshed"), whole, 1e-4)
    place.branch("split", "meshed")
    done = place.train("split", "--mesh.fsdp", "2", "--prompts", "('the',)", devices=2, processes=2)
    good(done)
    assert f"resuming from step {KEPT}\n" in done[0][1] and "2 processes" in done[0][1]
    near(place.rows("split"), whole, 1e-4)
    assert (place.root / "split/samples.txt").read_text()


def test_sigterm_to_one_process_saves_all_at_one_step(place, whole):
    """The second of two is told to stop; both end well at a step that is saved; then one process finishes."""
    started = place.start("stopped", "--phases.0.objective.seconds", "0.02", processes=2)
    metrics = place.root / "stopped/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("train/loss") >= 3):
        assert time.monotonic() < deadline and all(p.poll() is None for p in started)
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    out, err = started[0].communicate(timeout=300)
    assert [p.wait(300) for p in started] == [0, 0], err
    step = int(re.search(r"stopped by SIGTERM; step (\d+) is saved", out)[1])
    assert 3 <= step < TOTAL and (place.root / f"stopped/checkpoints/{step}").is_dir()
    done = place.train("stopped", "--phases.0.objective.seconds", "0.02")
    good(done)
    assert f"resuming from step {step}\n" in done[0][1]
    near(place.rows("stopped"), whole, 1e-4)


@pytest.mark.soak
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("float64", 1e-9)])
def test_five_meshes_and_up_to_four_processes(place, dtype, tolerance):
    """The design's promise: from the start, and from a checkpoint of data 2 x fsdp 4 on other meshes."""
    kind = [f"--model.{field}={dtype}" for field in ("dtype", "param_dtype")]
    good(place.train(f"one-{dtype}", *kind))
    one = place.rows(f"one-{dtype}")
    meshes = [(8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2)]
    ways = [(dict(devices=8), mesh) for mesh in meshes] + [
        (dict(devices=2, processes=2), (2, 2, 1)), (dict(devices=1, processes=4), (1, 4, 1)),
        (dict(devices=1, processes=4), (2, 1, 2))]
    for i, (how, mesh) in enumerate(ways):
        sizes = [f"--mesh.{axis}={n}" for axis, n in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
        good(place.train(f"{dtype}-{i}", *kind, *sizes, **how))
        near(place.rows(f"{dtype}-{i}"), one, tolerance)
    for name, how, sizes in (("two", dict(devices=2), ["--mesh.fsdp=2"]), ("one", {}, []),
                             ("split", dict(processes=2), ["--mesh.fsdp=2"])):
        place.branch(f"{name}-of-{dtype}", f"{dtype}-1")
        good(place.train(f"{name}-of-{dtype}", *kind, *sizes, **how))
        near(place.rows(f"{name}-of-{dtype}"), one, tolerance)


@pytest.mark.soak
def test_a_lost_process_ends_the_others_within_a_minute_and_the_run_resumes(place, whole):
    """Whichever is killed; what it costs is at most an interval and the save in flight."""
    for victim in (1, 0):
        name = f"lost-{victim}"
        started = place.start(name, "--phases.0.objective.seconds", "0.05", processes=2)
        saved = place.root / name / "checkpoints/5"
        while not saved.exists():
            assert all(p.poll() is None for p in started)
            time.sleep(0.02)
        started[victim].kill()
        begun = time.monotonic()
        assert started[1 - victim].wait(120) != 0 and time.monotonic() - begun < 75
        for process in started:
            process.communicate()
        done = place.train(name, "--phases.0.objective.seconds", "0.05", processes=2)
        good(done)
        assert int(re.search(r"resuming from step (\d+)", done[0][1])[1]) >= 5
        near(place.rows(name), whole, 1e-4)


def test_launch_s_mistakes_are_one_sentence():
    for arguments, words in ((["--helpme"], "unrecognized"), (["auto", "--process", "1"], "auto alone"),
                             (["h:1", "--processes", "2"], "--process I"), (["h:1"], "HOST:PORT")):
        with pytest.raises(data.InputError, match=words):
            train.verb("launch", arguments)


def test_launch_auto_without_a_cluster_says_what_to_do_instead(tmp_path):
    """On a laptop: one sentence with the command that is meant."""
    cluster = ("SLURM", "OMPI", "PMI", "KUBERNETES", "TPU", "MEGASCALE", "CLOUD", "JAX_COORDINATOR")
    plain = {name: value for name, value in conftest.environment().items() if not name.startswith(cluster)}
    command = [sys.executable, ROOT / "train.py", "launch", "auto", "configs/quickstart.py", "--seed", "3"]
    done = subprocess.run(command, env=plain, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no cluster" in done.stderr and "python train.py configs/quickstart.py --seed 3;" in done.stderr
    assert "launch HOST:PORT --processes N --process I configs/quickstart.py --seed 3" in done.stderr


# ------------------------------------------------------------------------------------------------ checkpoints

def test_a_disk_that_is_full_is_one_sentence_and_the_run_resumes_with_checkpoints_by_time(place, whole):
    """No file may grow beyond 60 KiB, as if the disk were full: exit code 2, one sentence, nothing lost.
    The copies in source/ are smaller; one array, the 97 KiB of embeddings, is larger in any file.
    Orbax may warn of what it gave up; its threads say nothing. Then, with room, a checkpoint after each step,
    where the time is shorter than that; the newest two stay, and multiples of four.
    """
    fields = "--save_minutes 1e-9 --keep 2 --keep_every 4 --save_every 50".split()
    ((code, out, err),) = place.train("full", *fields, before=("bash", "-c", 'ulimit -f 60; exec "$@"', "-"))
    assert code == 2 and len(re.findall("error: ", err)) == 1 and "Traceback" not in err, err
    assert re.search("error: no checkpoint can be written to .*/full/checkpoints .*File too large.*; make "
                     "room, and the same command resumes from step 0\n", err), err
    good(place.train("full", *fields))
    assert place.rows("full")[:-1] == whole[:-1]  # the last is of the checkpoint longest after a reset
    kept = sorted(int(p.name) for p in (place.root / "full/checkpoints").iterdir() if p.name.isdigit())
    assert kept == [4, 8, 12, 16, 19, 20]
    rows = map(json.loads, (place.root / "full/metrics.jsonl").read_text().splitlines())
    assert sum(row.get("perf/save_s", 0) > 0 for row in rows) > 5


# -------------------------------------------------------------------------------------------------------- fit

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
    assert fit.collectives(HLO, 8) == {
        "all-gather": [loops + 1, loops * 64 * 3 // 4 + 80 * 3 // 4],
        "all-reduce": [loops, loops * 48],
        "reduce-scatter": [1, 12 * 4 * 3 // 4],
        "collective-permute": [1, 40]}


def report(*arguments) -> tuple[int, str, dict]:
    """(exit code, what was printed, the JSON object) of fit. Its process prints for itself."""
    environment = conftest.environment(**{} if "--devices" in arguments else conftest.USERS)
    done = subprocess.run([sys.executable, ROOT / "train.py", "fit", *map(str, arguments), "--json"],
                          capture_output=True, text=True, env=environment, timeout=400)
    assert done.stdout and "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_fit_says_what_a_device_holds_and_sends(place):
    """On eight devices with fsdp: state over eight; weights are gathered for each product of the forward and
    the backward pass and their gradients summed, and nothing of the size of activations is sent.
    """
    code, out, found = report(place.config, "--devices", "8", "--mesh.data", "1", "--mesh.fsdp", "8",
                              "--model.layers", "2", "--phases.0.batch", "64", "--phases.1.batch", "64")
    assert code == 0 and found["fits"] and found["mesh"] == dict(data=1, fsdp=8, tensor=1)
    shallow, deep = found["programs"]
    for program, layers in ((shallow, 2), (deep, 4)):
        config = ModelConfig(layers=layers, embed=96, heads=4, kv_heads=2, head_dim=8, mlp=64, vocab=258)
        assert program["parameters"] == model.count(config)
        assert program["bytes"]["state"] == pytest.approx(3 * 4 * model.count(config) / 8, rel=0.01)
    block = 4 * (shallow["parameters"] - 258 * 96 - 96) // 2  # bytes of a layer
    more = {k: deep["collectives"][k][1] - shallow["collectives"][k][1] for k in ("all-gather", "all-reduce")}
    assert more["all-gather"] == pytest.approx(2 * 2 * block * 7 / 8, rel=0.05)
    assert more["all-reduce"] == pytest.approx(2 * 2 * block * 7 / 8, rel=0.05)
    assert "does not fit" not in out.lower()


def test_fit_s_mistakes_are_one_sentence(place, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("TPU_LIBRARY_PATH", "CUDA_PLUGIN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for arguments, words in (([], "--topology KIND:AxB or --devices N"),
                             (["--topology", "v5e:4x4", "--devices", "2"], "either"),
                             (["--topology", "v5e:4x4"], "pip install --target .*libtpu"),
                             (["--topology", "h100:1"], "pip install --target .*jax-cuda13-plugin"),
                             (["--topology", "h100:16"], "h100:1 to h100:8"),
                             (["--devices", "8", "--mesh.fsdp", "3"], "mesh is data -1, fsdp 3"),
                             (["--devices", "8", "--model.embed", "36", "--mesh.fsdp", "8"], "axis embed"),
                             (["--devices", "2", "--model.vocab", "0", "--data.tokenizer", "bpe"], "vocab")):
        with pytest.raises(data.InputError, match=words):
            train.verb("fit", [str(place.config), *arguments])


LIBTPU = Path(os.environ.get("TPU_LIBRARY_PATH") or Path.home() / ".cache/coppice/libtpu/libtpu/libtpu.so")


@pytest.mark.soak
@pytest.mark.skipif(not LIBTPU.exists(), reason=f"needs libtpu: {LIBTPU}")
def test_fit_compiles_for_tpus_and_says_what_does_not_fit(place, monkeypatch):
    """A small model fits sixteen chips; with rows for a hundred gigabytes it does not, and is told how to."""
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(LIBTPU))
    base = [place.config, "--topology", "v5e:4x4", "--phases.0.batch", "16", "--phases.1.batch", "16",
            "--phases.0.seq", "128", "--phases.1.seq", "128", "--model.dtype", "bfloat16"]
    code, out, found = report(*base)
    assert code == 0 and found["fits"] and found["kind"] == "TPU v5 lite" and found["devices"] == 16
    assert "roofline" in out and 0 < found["programs"][0]["bytes"]["total"] < 2**30
    wide = ["--model.embed", "4096", "--model.mlp", "16384", "--model.layers", "4", "--phases.1.edits", "()"]
    code, out, found = report(*base, *wide, "--phases.0.batch", "4096", "--phases.1.batch", "4096")
    assert code == 1 and not found["fits"] and "DOES NOT FIT" in out and found["advice"]


PLUGIN = Path(os.environ.get("CUDA_PLUGIN_PATH") or Path.home() / ".cache/coppice/cuda")


@pytest.mark.soak
@pytest.mark.skipif(not (PLUGIN / "jax_plugins").exists(), reason=f"needs jax's CUDA plugin: {PLUGIN}")
def test_fit_compiles_for_gpus_that_are_not_here(place, monkeypatch):
    """With cuDNN's attention too; eight of them sum gradients, one sends nothing."""
    monkeypatch.setenv("CUDA_PLUGIN_PATH", str(PLUGIN))
    base = [place.config, "--phases.0.seq", "128", "--phases.1.seq", "128", "--model.dtype", "bfloat16",
            "--model.head_dim", "64"]
    code, _, one = report(*base, "--topology", "h100:1", "--model.attention", "cudnn")
    assert code == 0 and one["fits"] and one["kind"] == "NVIDIA H100"
    assert not one["programs"][0]["collectives"]
    code, _, eight = report(*base, "--topology", "a100:8")
    assert code == 0 and eight["devices"] == 8 and eight["programs"][0]["collectives"]["all-reduce"][1] > 0


# ---------------------------------------------------------------------------------------------------- kernels

@pytest.mark.parametrize("window", [0, 70])
def test_splash_equals_the_reference(window):
    """Outputs and gradients, in the interpreter: grouped queries, segments, padding, a window."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 256, 2, 2, 32), (2, 256, 2, 32), (2, 256, 2, 32)
    qkv = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    segments = np.sort(np.random.default_rng(0).integers(1, 4, (2, 256)), 1).astype(np.int32)
    segments[1, 200:] = 0
    mask, wave = Mask("causal", window), jnp.cos(jnp.arange(32.0))

    def both(attend):
        def value(*x):
            return jnp.sum(attend(*x) * wave * (segments > 0)[..., None, None, None])
        return jax.value_and_grad(value, (0, 1, 2))(*qkv)

    ours = both(lambda *x: splash(*x, mask, jnp.asarray(segments), interpret=True))
    theirs = both(lambda *x: attention(*x, mask, segments, implementation="reference"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, theirs)


def test_the_choice_of_attention():
    """The fused one where it can do what is asked, by name alone if it can."""
    causal, prefix = Mask("causal", 0), Mask("prefix", 0)
    assert choose("auto", causal, 256, "float32", "cpu") == "xla"
    assert choose("auto", causal, 256, "bfloat16", "gpu") == "xla"
    assert choose("cudnn", causal, 256, "bfloat16", "gpu") == "cudnn"
    assert choose("auto", causal, 256, "float32", "gpu") == "xla"
    assert choose("auto", causal, 256, "float32", "tpu") == "splash"
    assert choose("auto", causal, 200, "float32", "tpu") == "xla" == choose(
        "auto", prefix, 256, "float32", "tpu")
    cases = ("splash", prefix, "tpu"), ("splash", causal, "cpu"), ("cudnn", causal, "gpu")
    for name, mask, platform in cases:
        with pytest.raises(ValueError, match=f"model.attention is {name}; allowed for .* are auto, "):
            choose(name, mask, 256, "float32", platform)


def test_own_rows_of_a_batch_and_rows_that_no_mesh_divides():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    np.testing.assert_array_equal(own_rows(mesh, 8), np.arange(8))  # one process has all
    ones = dict(tokens=np.ones((6, 4), np.int32))
    assert put(ones, mesh)["tokens"].sharding.is_fully_replicated
    assert not put(dict(tokens=np.ones((8, 4), np.int32)), mesh)["tokens"].sharding.is_fully_replicated

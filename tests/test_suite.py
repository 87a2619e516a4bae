"""`bench --suite gpu`: tried out on a CPU, without the packages that a GPU machine may lack."""
import json
import os
import subprocess
import sys
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import train
from lib.config import ROOT, load_file
from lib.errors import InputError
from lib.masks import Mask

suite = load_file(ROOT / "tools/suite.py")
LACKED = "tyro", "typeguard", "tensorflow_datasets", "array_record"
START = f"""
import sys
sys.modules.update(dict.fromkeys({LACKED}))  # so that importing one of them fails
import train
sys.exit(train.main(sys.argv[1:]))
"""
PEER = """
import json, sys
print(json.dumps({"compile_s": 1.0}), flush=True)
for line in sys.stdin:
    print(json.dumps({"tokens_per_s": 1, "peak_gib": 0.1}), flush=True)
"""


@pytest.mark.library  # CI runs these apart
def test_a_tiny_suite_measures_all_stages_and_records_what_it_measured(tmp_path):
    """Device, versions, rows, documents and remat among it; the peer is slower, so it ends well."""
    peer, out = tmp_path / "peer.py", tmp_path / "suite.json"
    peer.write_text(PEER)
    words = ["bench", "--suite", "gpu", "--tiny", "--peer", f"{sys.executable} {peer}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", START, *words, "--out", str(out)], text=True,
                          capture_output=True, env=environment, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == found
    assert found["device"] == "cpu"
    assert {"python", "jax", "jaxlib", "optax"} <= found["versions"].keys()
    assert found["misses"] == []

    def rows(stage):
        return [row for row in found["rows"] if row["stage"] == stage]

    (kernel,) = rows("kernels")
    assert kernel["errors"].keys() == {"out", "dq", "dk", "dv"}
    assert 0 < max(kernel["errors"].values()) < 0.02
    for row in rows("steps"):
        assert row.keys() >= {"rows", "documents", "remat", "tokens_per_s", "memory_gib", "compile_s"}
    assert [row["remat"] for row in rows("steps")] == ["none", "all"]
    assert all(row["ratio"] > 1 and row["rounds"] == 3 for row in rows("peer"))
    assert len(rows("peer")) == len(rows("trace")) == 2
    assert all(row["top_ms"] for row in rows("trace"))
    assert rows("together")[0]["gain"] > 0
    (again,) = rows("again")
    assert again["same_bytes"] and again["largest_difference"] == 0.0
    assert again["resumed_at"] in (10, 20)


@pytest.mark.parametrize("row, said", [
    (dict(stage="steps", what="a step", config="124m", mfu=0.39), "124m reaches 39.0% MFU; wanted is 40%"),
    (dict(stage="steps", what="a step", config="1_3b", mfu=0.56), None),
    (dict(stage="steps", what="a step", config="124m", mfu=None), None),
    (dict(stage="kernels", what="cudnn", errors={"out": 0.01, "dq": 0.03}), "cudnn is off by 0.03"),
    (dict(stage="kernels", what="cudnn", errors={"out": float("nan")}), "cudnn is off by nan"),
    (dict(stage="peer", what="124m against a peer", ratio=0.99), "0.99 of the peer's speed"),
    (dict(stage="peer", what="124m against a peer", ratio=1.0), None),
    (dict(stage="steps", what="a step", failed="out of memory"), "steps a step: out of memory"),
])
def test_what_is_below_its_target_is_said(row, said):
    found = suite.misses([row])
    assert len(found) == (said is not None)
    assert all(said in each for each in found)


def test_the_best_step_of_a_config_is_what_counts():
    rows = [dict(stage="steps", what="s", config="124m", mfu=mfu) for mfu in (0.2, 0.41, 0.3)]
    assert suite.misses(rows) == []


def test_a_suite_that_misses_a_target_or_breaks_ends_with_1(tmp_path, monkeypatch, capsys):
    """And the table comes all the same."""
    def breaks(suite):
        raise ValueError("no such kernel")

    monkeypatch.setitem(suite.STAGES, "kernels", breaks)
    monkeypatch.setattr(suite, "MEMORY", {})  # nor the signals of this process
    monkeypatch.setattr(suite.signal, "signal", lambda *_: None)
    out = tmp_path / "suite.json"
    assert suite.main(["--tiny", "--stages", "kernels", "--out", str(out)]) == 1
    assert "no such kernel" in json.loads(out.read_text())["misses"][0]
    assert "MISSED  kernels a stage" in capsys.readouterr().out
    assert suite.main(["--tiny", "--stages", "together", "--minutes", "-1", "--out", str(out)]) == 1
    assert "no time was left" in json.loads(out.read_text())["misses"][0]


@pytest.mark.parametrize("thread, found", [
    ("Stream #14", {"gemm": 1.5}),
    ("python", {"gemm": 1.5, "wait": 2.5}),
])
def test_a_trace_tells_of_what_the_device_did(thread, found):
    """A step, of the two that were traced; of a GPU's streams where there are any, and never of Python's
    functions.
    """
    names = [(1, thread), (2, "python")]
    events = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": tid, "args": {"name": name}}
        for tid, name in names
    ]
    for tid, name, dur in ((1, "gemm", 1e3), (1, "gemm", 2e3), (1, "$train.py:1 f", 9e3), (2, "wait", 5e3)):
        events.append({"ph": "X", "name": name, "pid": 0, "tid": tid, "dur": dur})
    said = suite.spent(events, 2)
    assert said["top_ms"] == found
    assert said["busy_ms"] == sum(found.values())
    assert said["kinds"]["product"] == 1.5
    assert said["launches"] == (1 if thread == "Stream #14" else 2)  # rounded from 1 and 1.5


@pytest.mark.parametrize("name, kind", [
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
    ("nvjet_hsh_128x256_64x4", "product"),
    ("MemcpyD2D", "copy"),
    ("loop_add_fusion_3", "fusion"),
    ("ncclDevKernel_AllReduce", "other"),
])
def test_kernels_are_told_apart_by_their_names(name, kind):
    assert suite.kind_of(name) == kind


def test_a_peer_is_started_once_for_each_config_with_its_shape(monkeypatch):
    started = []

    class Peer:
        def __init__(self, line):
            self.line = line

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def start(self):
            started.append(self.line)

    monkeypatch.setattr(suite, "Bench", Peer)
    it = suite.Suite(None, 1.0, False, "peer --compile")
    suite.begin_peers(it, suite.TRIALS)
    for _, start in it.peers.values():
        start.result(timeout=20)
    assert it.peers.keys() == {"124m", "350m", "1_3b"}
    assert len(started) == 3
    line = " ".join(it.peers["1_3b"][0].line)
    assert line.startswith("peer --compile --layers 24 --dim 2048 --heads 16 ")
    assert "--seq 1024 --batch 6 --dtype bfloat16" in line


def test_all_peers_end_with_their_stage_those_of_no_step_too():
    ended = []
    it = suite.Suite(None, 1.0, True, "peer")
    for name in "124m", "350m":
        it.peers[name] = SimpleNamespace(end=partial(ended.append, name)), Future()
    program = SimpleNamespace(forget=lambda: None, memory_gib=lambda: 0.0)
    it.fastest["124m"] = 1.0, suite.TINY_TRIALS[0], program
    it.add = lambda stage, **found: it.rows.append(found)
    suite.peer(it)
    assert ended == ["124m", "350m"]
    assert "not compiled in time" in it.rows[0]["failed"]


def test_memory_of_a_step_that_fails_is_given_back():
    def measure(seconds):
        raise RuntimeError("out of memory")

    forgotten = []
    program = SimpleNamespace(measure=measure, forget=lambda: forgotten.append(1))
    with pytest.raises(RuntimeError, match="out of memory"):
        suite.measured(program, 0.0)
    assert forgotten == [1]


def test_documents_are_of_about_the_length_that_is_asked_for():
    assert suite.documents(2, 64, 0).tolist() == [[1] * 64] * 2
    segments = suite.documents(64, 1024, 100)
    assert np.all(np.diff(segments, axis=1) >= 0)
    assert 80 < segments.size / np.sum(segments.max(axis=1)) < 120
    assert segments.max() <= 20
    assert suite.segments_of(suite.KERNELS[0])[1] == Mask("causal", 0, 8)
    assert suite.segments_of(suite.KERNELS[-1])[1] == Mask("causal", 0, 32)


@pytest.mark.parametrize("words, said", [
    ([], "--suite gpu on a cpu; allowed is a GPU, or --tiny"),
    (["--tiny", "--stages", "kernels,all"], "--stages has all; allowed are kernels, steps"),
    (["--tiny", "--stages", "peer"], "--stages is peer; allowed are peer and trace with steps before"),
])
def test_what_cannot_be_measured_is_refused_in_one_sentence(words, said):
    with pytest.raises(InputError, match=said):
        train.verb("bench", ["--suite", "gpu", *words])


def test_a_suite_that_is_none_is_refused():
    with pytest.raises(InputError, match="--suite is 'cpu'; allowed is gpu"):
        train.verb("bench", ["--suite", "cpu"])

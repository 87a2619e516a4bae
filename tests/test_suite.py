"""`bench --suite gpu`: tried out on a CPU, without the packages that a GPU machine may lack."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import train
from lib.config import ROOT, load_file
from lib.errors import InputError

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
    out = tmp_path / "suite.json"
    assert suite.main(["--tiny", "--stages", "kernels", "--out", str(out)]) == 1
    assert "no such kernel" in json.loads(out.read_text())["misses"][0]
    assert "MISSED  kernels a stage" in capsys.readouterr().out
    assert suite.main(["--tiny", "--stages", "together", "--minutes", "-1", "--out", str(out)]) == 1
    assert "no time was left" in json.loads(out.read_text())["misses"][0]


@pytest.mark.parametrize("thread, found", [
    ("Stream #14", {"gemm": 3.0}),
    ("python", {"gemm": 3.0, "wait": 5.0}),
])
def test_a_trace_tells_of_what_the_device_did(thread, found):
    """Of a GPU's streams where there are any, and never of Python's functions."""
    names = [(1, thread), (2, "python")]
    events = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": tid, "args": {"name": name}}
        for tid, name in names
    ]
    for tid, name, dur in ((1, "gemm", 1e3), (1, "gemm", 2e3), (1, "$train.py:1 f", 9e3), (2, "wait", 5e3)):
        events.append({"ph": "X", "name": name, "pid": 0, "tid": tid, "dur": dur})
    assert suite.longest(events) == found


def test_documents_are_of_about_the_length_that_is_asked_for():
    assert suite.documents(2, 64, 0).tolist() == [[1] * 64] * 2
    segments = suite.documents(64, 1024, 100)
    assert np.all(np.diff(segments, axis=1) >= 0)
    assert 80 < segments.size / np.sum(segments.max(axis=1)) < 120


@pytest.mark.parametrize("words, said", [
    ([], "--suite gpu on a cpu; allowed is a GPU, or --tiny"),
    (["--tiny", "--stages", "kernels,all"], "--stages has all; allowed are kernels, steps"),
])
def test_what_cannot_be_measured_is_refused_in_one_sentence(words, said):
    with pytest.raises(InputError, match=said):
        train.verb("bench", ["--suite", "gpu", *words])


def test_a_suite_that_is_none_is_refused():
    with pytest.raises(InputError, match="--suite is 'cpu'; allowed is gpu"):
        train.verb("bench", ["--suite", "cpu"])

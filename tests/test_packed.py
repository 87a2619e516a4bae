"""What the host does for a step: one transfer of metrics, rows written by a thread, rates as one."""
import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_cases
from train_cases import plan_of, short_phase, tiny_config

import train
from data import Batch
from lib import log
from lib.log import Log
from lib.packed import Packed, figures, pack

METRICS = {"train/loss": np.float32(2.5), "train/grad_norm": np.float32(1), "skipped": np.int32(0)}


def test_metrics_are_packed_as_one_array_and_read_by_name():
    packed = jax.jit(pack)({"b": jnp.int32(3), "a": jnp.float32(0.1), "c": jnp.ones((1,))})
    assert (packed.names, packed.values.shape, packed.values.dtype) == (("a", "b", "c"), (3,), "float32")
    assert float(packed["b"]) == 3
    assert figures(packed) == figures(dict(packed)) == {"a": float(np.float32(0.1)), "b": 3.0, "c": 1.0}


def test_metrics_of_float64_stay_so():
    with jax.enable_x64(True):
        assert figures(pack({"x": jnp.float64(0.1), "n": jnp.int32(1)})) == {"x": 0.1, "n": 1.0}


def test_metrics_of_several_runs_at_once_are_read_by_name():
    assert Packed(np.array([[1.0, 2.0], [3.0, 4.0]]), ("a", "b"))["b"].tolist() == [2.0, 4.0]


@pytest.fixture
def kept(tmp_path):
    """A log of ten steps."""
    with Log(tmp_path / "metrics.jsonl", 0, plan_of(tiny_config(phases=(short_phase(10),))), 10) as it:
        yield it


def test_a_row_takes_one_transfer_and_none_of_its_json_is_made_in_the_loop(kept, monkeypatch):
    transfers, writers = [], []
    get, dump = jax.device_get, json.dumps
    monkeypatch.setattr(jax, "device_get", lambda x: transfers.append(x) or get(x))
    monkeypatch.setattr(log.json, "dumps", lambda x: writers.append(threading.current_thread()) or dump(x))
    monkeypatch.setattr(log, "count", lambda model: pytest.fail("parameters are counted at each step"))
    for step in (1, 2, 3):
        kept.step(step, pack(METRICS), {}, 0.0)
    kept.sync()
    assert len(transfers) == len(writers) == 3
    assert all(isinstance(x, jax.Array) for x in transfers)
    assert threading.main_thread() not in writers
    rows = [json.loads(line) for line in kept.path.read_text().splitlines()]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 2.5), (2, 2.5), (3, 2.5)]


def test_what_fails_in_the_thread_is_raised_in_the_loop(kept):
    kept.track = lambda row: 1 / 0
    kept.step(1, METRICS, {}, 0.0)
    kept.step(2, METRICS, {}, 0.0)
    with pytest.raises(ZeroDivisionError):
        kept.step(3, METRICS, {}, 0.0)
    kept.track = kept.written = None


def test_host_stall_counts_the_loop_s_own_work_and_its_waiting(kept, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])

    def work(*_):
        now[0] += 0.25

    monkeypatch.setattr(Log, "show", work)
    kept.step(1, METRICS, {}, 0.0)
    kept.step(2, METRICS, {}, 0.0)  # row 1
    now[0] += 1.0
    kept.step(3, METRICS, {}, 0.5)  # row 2, after 1.25 s
    kept.sync()
    rows = map(json.loads, kept.path.read_text().splitlines())
    row = next(row for row in rows if "perf/host_stall" in row)
    assert row["perf/host_stall"] == pytest.approx((0.5 + 0.25) / 1.25)


def test_the_thread_that_makes_batches_puts_them_on_the_devices_and_says_the_rates():
    config = tiny_config()
    plan, mesh = plan_of(config), train_cases.single_mesh()
    batch = Batch(train_cases.random_batch(), {"kind": "causal", "window": 0}, {"own": 1.0}, 8, 8)
    asked = []
    loader = SimpleNamespace(batch=lambda step, own, counted: asked.append(counted) or batch)
    run = train.Run(config, "", None, mesh, None, {}, {}, loader, plan, None)
    given = train.given(run, 2)
    assert asked == [False]  # no kernel of a CPU asks for the number of segments
    assert all(isinstance(x, jax.Array) for x in given.arrays.values())
    assert (given.mask, given.metrics) == (train.Mask("causal", 0, 8), {"own": 1.0})
    expected = [plan.lr[group][2] for group in train.groups(plan.models[0])]
    np.testing.assert_array_equal(given.lr, np.array(expected, np.float32))


def test_a_program_is_asked_for_once_whatever_its_batches_segments_are(monkeypatch):
    """On a CPU they are no part of what is compiled; after that, only a look into a table."""
    asked, config = [], tiny_config()
    pool = SimpleNamespace(submit=lambda *given: asked.append(given) or "program")
    run = SimpleNamespace(programs={}, compiler=pool, config=config, plan=plan_of(config),
                          mesh=train_cases.single_mesh())
    for segments in (1, 8, 32, 8, 1):
        mask = replace(train_cases.CAUSAL, segments=segments)
        assert train.compiled(run, 0, None, train_cases.random_batch(), mask) == "program"
    assert len(asked) == 1
    monkeypatch.setattr(train, "settled", lambda *_: pytest.fail("it was known already"))
    train.compiled(run, 0, None, train_cases.random_batch(), mask)

"""lib/keys.py: a function's key follows all that it computes from."""
import inspect
import json
import os
import shutil
from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from corpora import MANY, many, with_many

import data
from data import Loader
from lib.cache import build
from lib.checkpoint import Checkpoints
from lib.keys import function_key, run_key, run_step
from lib.optim import State
from lib.packing import concat_and_split
from lib.tokenizers import Bytes


def train(run, checkpoints: dict[int, dict]):
    """Make a run directory anew, with {step: checksums}."""
    shutil.rmtree(run, ignore_errors=True)
    for step, sums in checkpoints.items():
        (run / "checkpoints" / str(step) / "meta").mkdir(parents=True)
        metadata = json.dumps(dict(step=step, checksums=sums))
        (run / "checkpoints" / str(step) / "meta" / "metadata").write_text(metadata)
    (run / "config.json").write_text("{}")


def by_run(document, tokens, run: str) -> float:
    """A score that a run makes."""
    return float(len(tokens))


def by_runs(document, tokens, runs: list) -> float:
    """A score that several runs make."""
    return float(len(tokens))


def plan_by_run(lengths, seq: int, run: str):
    """A packing that a run decides."""
    return concat_and_split(lengths, seq)


def test_a_score_by_a_run_is_made_anew_when_the_run_is(home, tmp_path):
    """Trained anew under the same name it has other checksums; trained alike it has the same."""
    config = with_many(score=partial(by_run, run=str(tmp_path / "run")))
    places = []
    for sums in (dict(embed=1), dict(embed=2), dict(embed=1)):
        train(tmp_path / "run", {10: dict(embed=0), 20: sums})
        places.append(build("many", config, Bytes(), 0).directory)
    assert places[0] == places[2] != places[1]


def test_a_plan_by_a_run_is_made_anew_when_the_run_is(home, tmp_path):
    cache = build("many", MANY, Bytes(), 0)
    phase = SimpleNamespace(steps=2, batch=2, seq=32, mixture=None, lengths=None, steer=0,
                            order=data.shuffled, objective=data.causal,
                            packing=partial(plan_by_run, run=str(tmp_path / "run")))
    for number, sums in enumerate((dict(embed=1), dict(embed=1), dict(embed=2))):
        train(tmp_path / "run", {10: sums})
        Loader({"many": cache}, [phase], MANY, Bytes(), 0)
        assert len(list((cache.directory / "plans").iterdir())) == (1, 1, 2)[number]


def test_the_key_of_a_run_follows_the_step_that_is_named(tmp_path):
    run = tmp_path / "run"
    def keys(sums):
        train(run, {10: dict(embed=0), 20: sums})
        named = [partial(by_run, run=f"{run}{step}") for step in ("", "@10", "@20", "@30")]
        return [function_key(f) for f in (*named, partial(by_runs, runs=[str(run), "other"]))]
    changed = [one != other for one, other in zip(keys(dict(embed=1)), keys(dict(embed=2)), strict=True)]
    assert changed == [True, False, True, False, True]
    assert run_step("a@b@3") == ("a@b", 3) and run_step("a@b") == ("a@b", None)


def test_the_key_of_a_run_without_checksums_follows_its_files(tmp_path):
    run = tmp_path / "run"
    train(run, {10: {}})
    metadata, keys = run / "checkpoints/10/meta/metadata", []
    for content, when in (("{}", 1), ("{}", 2), ("{ }", 2), ("damaged", 2)):
        metadata.write_text(content)
        os.utime(metadata, ns=(when, when))
        keys.append(run_key(str(run)))
    (run / "summary.json").write_text("{}")
    keys.append(run_key(str(run)))
    assert len({json.dumps(key) for key in keys}) == 5


def test_the_key_reads_the_checksums_of_real_checkpoints(tmp_path):
    """Where Orbax keeps the metadata is no promise of its: this test says if it moves it."""
    keys = []
    for value in (1.0, 1.0, 2.0):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        (run / "config.json").write_text("{}")
        checkpoints = Checkpoints(run / "checkpoints", keep=2)
        zero = jnp.zeros((), jnp.int32)
        checkpoints.save(3, State({"embed": jnp.full(4, value)}, {}, zero, zero), {})
        checkpoints.close()
        keys.append(run_key(str(run)))
    assert keys[0] == keys[1] != keys[2]
    (step, key), = keys[0]
    assert step == 3 and isinstance(key, str)  # a digest of checksums, not the files' times


@pytest.mark.parametrize("value", ["", "x" * 5_000, "no\x00file", 3, None, ["a", 2], {"a": 1}])
def test_arguments_that_name_no_file_are_no_error(value):
    key = function_key(partial(by_run, run=value))
    assert key["arguments"] == dict(run=value) and "by_run" in key["source"]
    assert json.dumps(key) and function_key(None) is None


def by_default(document, tokens, path: str = "one.txt", split: str = "train", run: str = "run") -> float:
    """A score that reads a file, and a run, of its own."""
    return float(len(tokens))


def test_a_key_follows_what_defaults_name_but_not_what_is_so_called_by_chance(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("tree")
    train(tmp_path / "run", {10: dict(embed=1)})
    first = function_key(by_default)
    assert first == function_key(partial(by_default, path="one.txt"))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a").write_text("tree")
    assert function_key(by_default) == first
    train(tmp_path / "run", {10: dict(embed=2)})
    other_run = function_key(by_default)
    (tmp_path / "one.txt").write_text("trees")
    assert first != other_run != function_key(by_default)


def test_a_key_follows_source_file_and_arguments():
    keys = [function_key(f) for f in (many, by_run, partial(by_run, run="a"), partial(by_run, run="b"))]
    assert len({json.dumps(key) for key in keys}) == 4
    assert keys[0]["source"] == inspect.getsource(many)
    assert function_key(data.text)["file"] == function_key(data.stdlib)["file"] != keys[1]["file"]

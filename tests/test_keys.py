"""lib/keys.py: a function's key follows all that it computes from."""
import importlib
import inspect
import json
import linecache
import os
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from corpora import MANY, many, with_many

import data
from data import Loader
from lib.cache import build
from lib.checkpoint import Checkpoints
from lib.config import ROOT, load_file
from lib.keys import function_key, run_key, run_step, source_above
from lib.optim import State
from lib.packing import concat_and_split
from lib.tokenizers import Bytes


def train(run, checkpoints: dict[int, dict]):
    """Make a run directory anew, with {step: checksums}."""
    shutil.rmtree(run, ignore_errors=True)
    for step, sums in checkpoints.items():
        meta = run / "checkpoints" / str(step) / "meta"
        meta.mkdir(parents=True)
        metadata = json.dumps(dict(step=step, checksums=sums))
        (meta / "metadata").write_text(metadata)
    (run / "config.json").write_text("{}")


@pytest.fixture
def run(tmp_path):
    """Where a run's directory is made."""
    return tmp_path / "run"


def by_run(document, tokens, run: str) -> float:
    """A score that a run makes."""
    return float(len(tokens))


def by_runs(document, tokens, runs: list) -> float:
    """A score that several runs make."""
    return float(len(tokens))


def plan_by_run(lengths, seq: int, run: str):
    """A packing that a run decides."""
    return concat_and_split(lengths, seq)


def different(keys) -> int:
    """How many different keys there are."""
    return len({json.dumps(key) for key in keys})


# ----------------------------------------------------------------------- what is made anew by a key


def test_a_score_by_a_run_is_made_anew_when_the_run_is(home, run):
    """Trained anew under the same name it has other checksums; trained alike it has the same."""
    config = with_many(score=partial(by_run, run=str(run)))

    def built_with(last_checkpoint):
        train(run, {10: dict(embed=0), 20: last_checkpoint})
        return build("many", config, Bytes(), 0).directory

    first = built_with(dict(embed=1))
    other = built_with(dict(embed=2))
    again = built_with(dict(embed=1))

    assert first != other
    assert first == again


def test_a_plan_by_a_run_is_made_anew_when_the_run_is(home, run):
    cache = build("many", MANY, Bytes(), 0)
    phase = SimpleNamespace(
        steps=2,
        batch=2,
        seq=32,
        mixture=None,
        lengths=None,
        steer=0,
        order=data.shuffled,
        objective=data.causal,
        packing=partial(plan_by_run, run=str(run)),
    )

    def plans_with(checkpoint) -> int:
        train(run, {10: checkpoint})
        Loader({"many": cache}, [phase], MANY, Bytes(), 0)
        plans = cache.directory / "plans"
        return len(list(plans.iterdir()))

    assert plans_with(dict(embed=1)) == 1
    assert plans_with(dict(embed=1)) == 1
    assert plans_with(dict(embed=2)) == 2


# ------------------------------------------------------------------------------------- keys of runs


@pytest.mark.parametrize("step, follows", [
    ("", True),
    ("@10", False),
    ("@20", True),
    ("@30", False),
])
def test_the_key_of_a_run_follows_the_step_that_is_named(run, step, follows):
    """The checkpoint of step 20 changes, that of step 10 does not; there is none of step 30."""
    function = partial(by_run, run=f"{run}{step}")

    train(run, {10: dict(embed=0), 20: dict(embed=1)})
    before = function_key(function)
    train(run, {10: dict(embed=0), 20: dict(embed=2)})

    assert (function_key(function) != before) == follows


def test_the_key_of_several_runs_follows_each(run):
    function = partial(by_runs, runs=[str(run), "other"])
    train(run, {10: dict(embed=0), 20: dict(embed=1)})
    before = function_key(function)
    train(run, {10: dict(embed=0), 20: dict(embed=2)})
    assert function_key(function) != before


@pytest.mark.parametrize("name, parts", [
    ("a@b@3", ("a@b", 3)),
    ("a@b", ("a@b", None)),
])
def test_a_step_is_a_number_after_the_last_at_sign(name, parts):
    assert run_step(name) == parts


def test_the_key_of_a_run_without_checksums_follows_its_files(run):
    """Their contents, their times, whether they can be read, and whether there is a summary."""
    train(run, {10: {}})
    metadata = run / "checkpoints/10/meta/metadata"
    keys = []
    for content, when in [("{}", 1), ("{}", 2), ("{ }", 2), ("damaged", 2)]:
        metadata.write_text(content)
        os.utime(metadata, ns=(when, when))
        keys.append(run_key(str(run)))
    (run / "summary.json").write_text("{}")
    keys.append(run_key(str(run)))

    assert different(keys) == 5


def key_of_saved(run, value: float):
    """The key of a run, made anew, whose checkpoint holds a value."""
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    (run / "config.json").write_text("{}")
    checkpoints = Checkpoints(run / "checkpoints", keep=2)
    zero = jnp.zeros((), jnp.int32)
    state = State({"embed": jnp.full(4, value)}, {}, zero, zero)
    checkpoints.save(3, state, {})
    checkpoints.close()
    return run_key(str(run))


def test_the_key_reads_the_checksums_of_real_checkpoints(run):
    """Where Orbax keeps the metadata is no promise of its: this test says if it moves it."""
    first = key_of_saved(run, 1.0)
    again = key_of_saved(run, 1.0)
    other = key_of_saved(run, 2.0)

    assert first == again
    assert first != other
    [(step, key)] = first
    assert step == 3
    assert isinstance(key, str)  # a digest of checksums, not the files' times


# -------------------------------------------------------------------------------- keys of functions


@pytest.mark.parametrize("value", ["", "x" * 5_000, "no\x00file", 3, None, ["a", 2], {"a": 1}])
def test_arguments_that_name_no_file_are_no_error(value):
    key = function_key(partial(by_run, run=value))
    assert key["arguments"] == dict(run=value)
    assert "by_run" in key["source"]
    assert json.loads(json.dumps(key)) == key


def test_no_function_has_no_key():
    assert function_key(None) is None


def by_default(
    document, tokens, path: str = "one.txt", split: str = "train", run: str = "run"
) -> float:
    """A score that reads a file, and a run, of its own."""
    return float(len(tokens))


@pytest.fixture
def defaults_there(tmp_path, run, monkeypatch):
    """A directory that holds the file and the run which `by_default` names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("tree")
    train(run, {10: dict(embed=1)})
    return tmp_path


def test_a_default_that_is_given_has_the_same_key(defaults_there):
    assert function_key(by_default) == function_key(partial(by_default, path="one.txt"))


def test_a_key_does_not_follow_a_file_that_is_called_like_a_default_by_chance(defaults_there):
    first = function_key(by_default)
    (defaults_there / "train").mkdir()
    (defaults_there / "train" / "a").write_text("tree")
    assert function_key(by_default) == first


def test_a_key_follows_the_file_and_the_run_that_defaults_name(defaults_there, run):
    first = function_key(by_default)
    train(run, {10: dict(embed=2)})
    other_run = function_key(by_default)
    (defaults_there / "one.txt").write_text("trees")
    other_file = function_key(by_default)

    assert first != other_run
    assert other_run != other_file


def test_a_key_follows_source_and_arguments():
    functions = [many, by_run, partial(by_run, run="a"), partial(by_run, run="b")]
    keys = [function_key(function) for function in functions]
    assert different(keys) == 4
    assert keys[0]["source"] == inspect.getsource(many)


def test_a_key_follows_the_file_that_a_function_stands_in():
    in_data = function_key(data.text)["file"]
    assert in_data == function_key(data.stdlib)["file"]
    assert in_data != function_key(by_run)["file"]


def test_a_key_follows_the_files_that_a_config_file_takes_names_from(tmp_path, monkeypatch):
    """Beside it, and theirs; the library's own files and what stands below a config do not count."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_tools.py").write_text("from own_parts import half\nimport lib.packing\n")
    (tmp_path / "own_idea.py").write_text(
        "import json\nimport own_tools\n\ndef idea(lengths, seq):\n    return own_tools.half(seq)\n")
    keys = []
    for text in ("def half(x):\n    return x // 2\n", "def half(x):\n    return x / 2\n",
                 "def half(x):\n    return x / 2\nconfig = 3\n"):
        (tmp_path / "own_parts.py").write_text(text)
        for name in ("own_idea", "own_tools", "own_parts"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        linecache.clearcache()
        keys.append(function_key(importlib.import_module("own_idea").idea))
    for name in ("own_idea", "own_tools", "own_parts"):
        del sys.modules[name]
    assert keys[0]["source"] == keys[1]["source"]
    assert different(keys) == 2 and keys[0] != keys[1]


def test_a_key_follows_another_paper_s_function():
    """ingenious.py embeds documents by d4.py, which packs them by qurating.py."""
    text = source_above(load_file(ROOT / "configs/selection/ingenious.py").facility)
    for function in ("facility", "embed", "pack"):
        assert text.count(f"\ndef {function}(") == 1, function
    assert "def small" not in text and "study = Study(" not in text

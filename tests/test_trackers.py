"""Trackers that are functions: a config's own, Trackio's, and what a study tells its runs."""
import importlib
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from study_cases import Trainer, call, change, study, write_file
from train_cases import plan_of, short_phase, tiny_config

import train
from lib.errors import InputError
from lib.trackers import start_tracker, trackio

# In place of the package, which is not installed: what lib/trackers.py uses of it.
FAKE = '''
import os

kept = {}  # {identity: a run}


class Run:
    def __init__(self, project, name, group):
        self.project, self.name, self.group = project, name, group
        self.id = f"{name}-{len(kept)}-{os.urandom(2).hex()}"
        self.rows = []

    def log(self, metrics, step=None):
        self.rows.append((step, metrics))

    def delete(self):
        del kept[self.id]


def init(project, name=None, group=None, config=None, resume="never", embed=True):
    if not project:
        raise ValueError("Project name must not be empty")
    run = Run(project, name, group)
    kept[run.id] = run
    return run


class Api:
    def runs(self, project):
        found = [run for run in kept.values() if run.project == project]
        if not found:
            raise ValueError(f"Project '{project}' does not exist")
        return found
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package called trackio, as far as it is used, that keeps runs in memory."""
    (tmp_path / "trackio.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    return importlib.import_module("trackio")


def row(step: int, loss: float) -> dict:
    """A row of metrics.jsonl."""
    return {"step": step, "train/loss": loss, "perf/mfu": None}


def a_run(directory: Path, rows: list[dict], tracker) -> SimpleNamespace:
    """What a tracker is told of a run."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(text)
    config = train.Config(name="tall", tracker=tracker)
    return SimpleNamespace(config=config, directory=directory, file="idea.py")


@pytest.mark.parametrize("tracker", ["trackio", partial(trackio, project="coppice")])
def test_trackio_has_each_step_once_after_a_kill(package, tmp_path, tracker, monkeypatch):
    """Killed after step 3, the run goes on from its checkpoint of step 2; another run stays."""
    monkeypatch.setenv("WANDB_RUN_GROUP", "tiny")
    other = package.init("coppice", "tall")
    rows = [row(step, 1 / step) for step in (1, 2, 3, 4)]
    send = start_tracker(a_run(tmp_path, [], tracker), 0)
    for one in rows[:3]:
        send(one)

    send = start_tracker(a_run(tmp_path, rows[:2], tracker), 2)
    for one in rows[2:]:
        send(one)

    first, again = package.kept.values()
    assert first is other
    assert (again.name, again.group) == ("tall", "tiny")
    assert again.rows == [(step, {"train/loss": 1 / step}) for step in (1, 2, 3, 4)]


def test_trackio_goes_on_where_its_project_is_gone(package, tmp_path):
    start_tracker(a_run(tmp_path, [], "trackio"), 0)
    package.kept.clear()
    start_tracker(a_run(tmp_path, [row(1, 1.0)], "trackio"), 1)
    [run] = package.kept.values()
    assert [step for step, _ in run.rows] == [1]


def noted(run, start: int, file: str = "noted.jsonl"):
    """Writes which run it is and where it begins, then each row."""
    place = open(run.directory / file, "a")

    def send(row: dict):
        place.write(json.dumps(row) + "\n")
        place.flush()

    send({"start": start, "name": run.config.name, "file": run.file})
    return send


def test_a_function_of_a_config_gets_the_rows_of_a_run(tmp_path):
    """Those of metrics.jsonl, as they are written."""
    run = a_run(tmp_path, [], partial(noted, file="rows.jsonl"))
    run.plan = plan_of(tiny_config(phases=(short_phase(2),)))
    run.summary = None
    train.check(run.config)
    with train.log_of(run, 0) as log:
        log.row(row(1, 2.0))
        log.row(row(2, float("nan")))
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    begun, *rows = [json.loads(line) for line in lines]
    assert begun == {"start": 0, "name": "tall", "file": "idea.py"}
    written = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert rows == [json.loads(line) for line in written]
    assert [one["train/loss"] for one in rows] == [2.0, None]
    assert train.to_json(run.config)["tracker"]["arguments"] == {"file": "rows.jsonl"}


def nothing(run, start):
    """Gives nothing to call."""


def test_a_function_that_gives_nothing_to_call_is_one_sentence(tmp_path):
    sentence = "tracker is nothing, which gives None; allowed is a function that takes a row"
    with pytest.raises(InputError, match=sentence):
        start_tracker(a_run(tmp_path, [], nothing), 0)


def test_what_trackio_refuses_is_one_sentence(package, tmp_path):
    sentence = "tracker is 'trackio', but ValueError: Project name must not be empty"
    with pytest.raises(InputError, match=sentence):
        start_tracker(a_run(tmp_path, [], partial(trackio, project="")), 0)


def test_a_tracker_that_no_file_names_is_one_sentence():
    with pytest.raises(InputError, match="tracker is .*<lambda>.*; allowed is a top-level function"):
        train.check(train.Config(name="x", tracker=lambda run, start: print))


NAMES = "'none' or 'tensorboard' or 'wandb' or 'trackio' or a function"


@pytest.mark.parametrize("words, sentence", [
    (["--tracker", "wanb"], f"tracker is 'wanb' (str); allowed is {NAMES}"),
    (["--tracker", "trackio"], "tracker is 'trackio', which is not installed; pip install trackio"),
    (["--tracker.project", "x"], "unknown field --tracker.project: tracker is 'none', which has no "
                                 "'project'; only a config file changes that"),
    (["--report_to", "trackio"], "unknown field --report_to: a tracker is named: --tracker wandb, "
                                 "--tracker tensorboard or --tracker trackio"),
    (["study", "configs/context/best_fit.py", "--tracker", "wanb"],
     f"tracker is 'wanb' (str); allowed is {NAMES}"),
])
def test_a_tracker_that_is_not_there_is_one_sentence(words, sentence, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "trackio" else find_spec(name)
    )
    monkeypatch.chdir(train.ROOT)
    assert train.main(words) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


class Environments(Trainer):
    """Makes runs up, and notes what is said to their trackers."""

    def __init__(self):
        super().__init__()
        self.told = {}  # {run: (tracker, group, tags)}

    def __call__(self, line, stdout, stderr, env):
        config, _ = train.parse([str(word) for word in line[2:]])
        self.told[config.name] = config.tracker, env["WANDB_RUN_GROUP"], env["WANDB_TAGS"]
        return super().__call__(line, stdout, stderr, env)


def test_a_study_s_runs_are_grouped_and_tagged(package, tmp_path, corpus, monkeypatch):
    """And a run that another study made without a tracker is an equal one."""
    trainer = Environments()
    monkeypatch.setattr(study.subprocess, "Popen", trainer)
    monkeypatch.setattr(study, "gpus", list)
    monkeypatch.setenv("WANDB_TAGS", "mine")
    file = write_file(tmp_path / "tiny.py", corpus)
    change(file, "peak_lrs=(1e-2, 2e-2, 4e-2)", "peak_lrs=()")
    call(file, "--seeds", "1", "--arms", "deep", "--tracker", "trackio")
    assert trainer.told["deep-own-s1"] == ("trackio", "tiny", "mine")

    monkeypatch.delenv("WANDB_TAGS")
    call(file, "--quick", "--seeds", "1", "--arms", "deep")
    assert trainer.told["deep-own-s1"] == ("none", "tiny-quick", "deep,peak own,seed 1")


def test_a_study_s_tracker_is_no_part_of_what_an_equal_run_is(package):
    plain = train.Config()
    key = study.equal.key_of
    assert key(plain, "cpu") == key(replace(plain, tracker="trackio"), "cpu")

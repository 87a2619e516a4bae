"""Runs that were stopped, killed or made longer: the same command goes on, and nothing is lost."""
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from train_cases import evaluation_rows, rows_of, short_phase, step_rows, tiny_config

import train
from data import InputError
from lib.checkpoint import Checkpoints
from lib.edits import reset_embeddings
from lib.schedule import Schedule
from train import Config, Edit


def stop_now(params, apply):
    """An `evals` that sends SIGTERM, as a scheduler might in the middle of an evaluation."""
    os.kill(os.getpid(), signal.SIGTERM)
    return {"own/stopped": 1.0}


def test_a_run_that_lost_its_config_is_resumed_by_what_its_checkpoint_says(tmp_path, one_device):
    """Another schedule is refused, more steps are not."""
    schedule = Schedule(shape="constant", peak=5e-3, warmup=2)
    config = tiny_config(tmp_path, phases=(short_phase(4),), save_every=2, schedule=schedule)
    train.train(config, __file__)
    (tmp_path / "tiny/config.json").unlink()

    longer = replace(config, phases=(short_phase(6),))
    slower = replace(longer, schedule=replace(schedule, peak=1e-3))
    with pytest.raises(InputError, match="taken 4 steps under another config: schedule"):
        train.train(slower, __file__)
    train.train(longer, __file__)
    losses = [row["train/loss"] for row in step_rows(tmp_path / "tiny")]
    assert len(losses) == 6
    assert losses[4] < losses[0]
    assert (tmp_path / "tiny/config.json").exists()


def test_a_signal_during_an_evaluation_loses_no_step(tmp_path, one_device, capsys):
    """What the message says is saved is saved; the run goes on from there, with all its rows."""
    config = tiny_config(tmp_path, eval_every=2, evals=(stop_now,))
    assert train.train(config, __file__) is None
    said = re.search(r"step (\d+) is saved", capsys.readouterr().out)
    stopped = int(said[1])
    assert 2 <= stopped <= 3
    params, *_ = train.load(str(tmp_path / "tiny"), stopped)
    assert params["q"].shape[0] == 2

    summary = train.train(replace(config, evals=()), __file__)
    assert summary["step"] == 8
    assert f"resuming from step {stopped}\n" in capsys.readouterr().out
    steps = [row["step"] for row in step_rows(tmp_path / "tiny")]
    assert steps == list(range(1, 9))
    evaluations = [row for row in rows_of(tmp_path / "tiny") if "eval/verse/bpb" in row]
    assert [row["step"] for row in evaluations] == [2, 4, 6, 8]


def forgetting(runs: Path, name: str) -> Config:
    """A run whose embeddings are drawn anew after its step 4."""
    reset = Edit(reset_embeddings, every=4, until=4)
    phase = short_phase(12, repeat=(reset,))
    return tiny_config(runs, name=name, save_every=2, eval_every=5, phases=(phase,))


def since_reset(run: Path) -> dict[int, int | None]:
    """{step of a checkpoint: the steps since a reset, as it says}."""
    checkpoints = Checkpoints(run / "checkpoints")
    return {step: checkpoints.meta(step)["since_reset"] for step in checkpoints.steps()}


def computed_rows(run: Path) -> list[dict]:
    """The rows of steps without what depends on the machine's speed."""
    found = []
    for row in step_rows(run):
        found.append({name: x for name, x in row.items() if not name.startswith("perf/")})
    return found


def test_a_run_that_was_stopped_between_resets_is_as_one_that_was_not(tmp_path, one_device):
    """Its checkpoints say the same of the steps since a reset, and its rows are equal."""
    broken = forgetting(tmp_path, "broken")
    assert train.train(replace(broken, evals=(stop_now,)), __file__) is None
    train.train(broken, __file__)
    train.train(forgetting(tmp_path, "whole"), __file__)

    whole = since_reset(tmp_path / "whole")
    assert whole == {2: None, 4: None, 6: 2, 8: 4, 10: 6, 12: 8}
    assert since_reset(tmp_path / "broken").items() >= whole.items()
    rows = computed_rows(tmp_path / "broken")
    assert rows == computed_rows(tmp_path / "whole")
    assert "matrix/update_ratio" in rows[7]  # the stop fell between the reset and this step


def killed(run, log):
    """In place of `train.finish`: the run is killed at its very end."""
    raise ZeroDivisionError


def test_a_longer_run_that_is_killed_at_its_end_is_concluded(tmp_path, one_device, monkeypatch):
    """A summary of the shorter run is not taken for one of the longer."""
    schedule = Schedule(shape="constant", warmup=2)
    short = tiny_config(tmp_path, schedule=schedule, phases=(short_phase(4),))
    longer = replace(short, phases=(short_phase(6),))
    assert train.train(short, __file__)["step"] == 4
    with monkeypatch.context() as patch:
        patch.setattr(train, "finish", killed)
        with pytest.raises(ZeroDivisionError):
            train.train(longer, __file__)

    assert train.train(longer, __file__)["step"] == 6
    last = evaluation_rows(tmp_path / "tiny")[-1]
    assert last == rows_of(tmp_path / "tiny")[-1]
    assert last["step"] == 6
    assert "eval/verse.test/bpb" in last

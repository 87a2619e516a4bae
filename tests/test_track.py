"""Trackers: files of TensorBoard and of W&B hold each step once, after a kill too."""
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lib.corpus
import train
from lib.schedule import Schedule
from model import ModelConfig
from train import Config, Phase

STEPS = 12


@pytest.fixture
def config(tmp_path, data_config) -> Config:
    """A run of some steps with three evaluations, on one device."""
    return Config(
        name="run",
        runs=str(tmp_path),
        model=ModelConfig(layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16),
        data=data_config,
        overlap=8,
        prompts=(),
        phases=(Phase(steps=STEPS, batch=8, seq=32),),
        schedule=Schedule(peak=1e-2),
        eval_every=4,
        eval_tokens=256,
        save_every=4,
        save_minutes=60.0,
    )


class Killed(Exception):
    """A process that ended between two steps."""


def train_until_killed(config: Config, step: int):
    """Run until a step is done, and no further: neither saved nor said that this is the end."""
    with pytest.MonkeyPatch.context() as patch:
        update = train.train_step

        def stopped(run, state, batch, now):
            if now > step:
                run.checkpoints.wait()
                raise Killed
            return update(run, state, batch, now)

        patch.setattr(train, "train_step", stopped)
        with pytest.raises(Killed):
            train.train(config)


def logged(run: Path) -> dict[str, dict[int, float]]:
    """{metric: {step: value}} of metrics.jsonl."""
    metrics: dict = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        step = row.pop("step")
        row.pop("final", None)  # which marks the last row, and is no figure
        for name, value in row.items():
            if value is not None:
                metrics.setdefault(name, {})[step] = value
    return metrics


def check_track(track: dict[str, list], run: Path):
    """A track, {metric: [(step, value)]}, has all of metrics.jsonl to float32, each step once."""
    expected = logged(run)
    assert track.keys() == expected.keys()
    assert {"train/loss", "eval/corpus/bpb"} <= expected.keys()
    for name, points in track.items():
        steps = [step for step, _ in points]
        values = [value for _, value in points]
        assert steps == [*expected[name]], name
        np.testing.assert_allclose(values, [*expected[name].values()], rtol=1e-6)


def has(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


@pytest.mark.skipif(not has("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_has_each_step_once_after_a_kill(config):
    """Followed from step 5 on, with its past. Killed at 10, the run goes on from checkpoint 8 and
    has steps 9 and 10 again.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = Path(config.runs) / "run"
    followed = replace(config, tracker="tensorboard")
    train_until_killed(config, 5)
    train_until_killed(followed, 10)
    train.train(followed)

    files = sorted(run.glob("tensorboard/*"))
    assert len(files) == 2
    everything = {"scalars": 0}
    track = EventAccumulator(str(run / "tensorboard"), size_guidance=everything).Reload()
    found = {}
    for name in track.Tags()["scalars"]:
        points = [(event.step, event.value) for event in track.Scalars(name)]
        if points:
            found[name] = points
    check_track(found, run)
    assert len(found["eval/corpus.test/bpb"]) == 1

    train.train(followed)  # complete: nothing to follow
    assert sorted(run.glob("tensorboard/*")) == files


BLOCK = 32_768  # bytes of a block of LevelDB's log
HEADER = 7  # bytes of a record's header: a checksum, the size, the kind
WHOLE, LAST = 1, 4  # kinds of records: a whole one, and the last part of one


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log behind seven bytes."""
    at = 7
    record = b""
    while at + HEADER <= len(content):
        left = BLOCK - at % BLOCK
        if left < HEADER:  # no header fits into this block any more
            at += left
            continue
        size = int.from_bytes(content[at + 4:at + 6], "little")
        kind = content[at + 6]
        at += HEADER
        record += content[at:at + size]
        at += size
        if kind in (WHOLE, LAST):
            yield record
            record = b""


def wandb_track(file: Path) -> dict[str, list[tuple[int, float]]]:
    """{metric: [(step, value)]} of a .wandb file, whose records are protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record
    found: dict = {}
    for content in leveldb_records(file.read_bytes()):
        row = {}
        for item in Record.FromString(content).history.item:
            name = item.key or item.nested_key[0]
            row[name] = json.loads(item.value_json)
        for name, value in row.items():
            if not name.startswith("_"):
                found.setdefault(name, []).append((row["_step"], value))
    return found


@pytest.mark.skipif(not has("wandb"), reason="wandb is not installed")
def test_wandb_offline_has_each_step_once_after_a_kill(config, monkeypatch):
    """The directory of the resumed run holds the whole track, once, under the same id."""
    import wandb
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(train, "finish", lambda run, log: log.sync())
    run = Path(config.runs) / "run"
    followed = replace(config, tracker="wandb")

    train_until_killed(followed, 6)
    identity = (run / "wandb/id").read_text()
    train.train(followed)
    wandb.teardown()  # its own process writes the file, and may do so after `finish` returns

    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    assert file.name == f"run-{identity}.wandb"
    check_track(wandb_track(file), run)


def test_what_is_not_installed_is_said_before_anything_is_built(config, monkeypatch, capsys):
    """In one sentence with what to install; a tracker that is not chosen is not imported either."""
    find_spec = importlib.util.find_spec

    def without_wandb(name):
        return None if name == "wandb" else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", without_wandb)
    monkeypatch.setattr(lib.corpus, "build", None)

    code = train.main(["--tracker", "wandb", "--runs", config.runs])

    assert code == 2
    said = capsys.readouterr().err
    assert said == "error: tracker is 'wandb', which is not installed; pip install wandb\n"

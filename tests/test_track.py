"""Trackers: TensorBoard's event files and W&B's offline ones hold each step once, after a kill too."""
import importlib.util
import json
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
    shape = ModelConfig(layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16)
    return Config(name="run", runs=str(tmp_path), model=shape, data=data_config, overlap=8, prompts=(),
                  phases=(Phase(steps=STEPS, batch=8, seq=32),), schedule=Schedule(peak=1e-2), eval_every=4,
                  eval_tokens=256, save_every=4, save_minutes=60.0)


class Killed(Exception):
    """A process that ended between two steps."""


def killed(config: Config, step: int):
    """Run until a step is done, and no further: neither saved nor said anywhere that this is the end."""
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


def same(track: dict[str, list], run: Path):
    """A track, {metric: [(step, value)]}, has all that metrics.jsonl says, to float32, and each step once."""
    rows: dict = {}
    for row in map(json.loads, open(run / "metrics.jsonl")):
        for name in (n for n in row if n != "step" and row[n] is not None):
            rows.setdefault(name, {})[row["step"]] = row[name]
    assert track.keys() == rows.keys() and {"train/loss", "eval/corpus/bpb"} <= rows.keys()
    for name in rows:
        assert [s for s, _ in track[name]] == [*rows[name]], name
        np.testing.assert_allclose([v for _, v in track[name]], [*rows[name].values()], rtol=1e-6)


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_has_each_step_once_after_a_kill(config):
    """Followed from step 5 on, with its past; killed at 10, it has 9 and 10 again after the checkpoint 8."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    config, run = replace(config, tracker="tensorboard"), Path(config.runs) / "run"
    killed(replace(config, tracker="none"), 5)
    killed(config, 10)
    train.train(config)
    assert len([*run.glob("tensorboard/*")]) == 2
    track = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found = {n: [(e.step, e.value) for e in track.Scalars(n)] for n in track.Tags()["scalars"]}
    same({n: points for n, points in found.items() if points}, run)
    assert len(found["eval/corpus.test/bpb"]) == 1
    train.train(config)  # complete: nothing to follow
    assert len([*run.glob("tensorboard/*")]) == 2


def offline(file: Path) -> dict[str, list[tuple[int, float]]]:
    """{metric: (step, value)} of a .wandb file: LevelDB's log of protocol buffers, behind seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record
    content, at, whole, found = file.read_bytes(), 7, b"", {}
    while at + 7 <= len(content):
        if 32_768 - at % 32_768 < 7:  # no header fits into this block any more
            at += 32_768 - at % 32_768
            continue
        size, kind = int.from_bytes(content[at + 4:at + 6], "little"), content[at + 6]  # after a checksum
        whole, at = whole + content[at + 7:at + 7 + size], at + 7 + size
        if kind not in (1, 4):  # neither a whole record nor the last part of one
            continue
        record, whole = Record.FromString(whole), b""
        items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
        for name in (n for n in items if not n.startswith("_")):
            found.setdefault(name, []).append((items["_step"], items[name]))
    return found


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed")
def test_wandb_offline_has_each_step_once_after_a_kill(config, monkeypatch):
    """The directory of the resumed run holds the whole track, once, under the same id."""
    import wandb
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(train, "finish", lambda run, log: log.sync())
    config, run = replace(config, tracker="wandb"), Path(config.runs) / "run"
    killed(config, 6)
    identity = (run / "wandb/id").read_text()
    train.train(config)
    wandb.teardown()  # its own process writes the file, and may do so after `finish` returns
    file, = run.glob("wandb/offline-run-*/*.wandb")
    assert file.name == f"run-{identity}.wandb"
    same(offline(file), run)


def test_what_is_not_installed_is_said_before_anything_is_built(config, monkeypatch, capsys):
    """In one sentence with what to install; a tracker that is not chosen is not imported either."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    monkeypatch.setattr(lib.corpus, "build", None)
    assert train.main(["--tracker", "wandb", "--runs", config.runs]) == 2
    assert capsys.readouterr().err == "error: tracker is 'wandb', which is not installed; pip install wandb\n"

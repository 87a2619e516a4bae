"""Trackers: TensorBoard's event files and W&B's offline ones hold each step once, however a run was stopped."""
import importlib.util
import json
import os
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest

import data
import train
from model import ModelConfig, Schedule
from train import Config, Phase

pytestmark = pytest.mark.usefixtures("hasty")
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
        update = train.Run.update

        def stopped(run, now, *rest):
            if now > step:
                run.checkpoints.wait()
                raise Killed
            return update(run, now, *rest)

        patch.setattr(train.Run, "update", stopped)
        with pytest.raises(Killed):
            train.Run(config).train()


def rows_of(config: Config) -> dict[str, list[tuple[int, float]]]:
    """{metric: (step, value)} of metrics.jsonl."""
    found: dict = {}
    for line in open(os.path.join(config.runs, config.name, "metrics.jsonl")):
        row = json.loads(line)
        for name, value in row.items():
            if name != "step" and value is not None:
                found.setdefault(name, []).append((row["step"], value))
    return found


def same(track: dict, rows: dict):
    """Each metric at each step once, with its value to float32."""
    assert track.keys() == rows.keys()
    for name in rows:
        assert [s for s, _ in track[name]] == [s for s, _ in rows[name]], name
        np.testing.assert_allclose([v for _, v in track[name]], [v for _, v in rows[name]], rtol=1e-6)


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard is not installed")
@pytest.mark.parametrize("before", ["tensorboard", "none"])
def test_tensorboard_has_each_step_once_after_a_kill(config, before):
    """Killed at 7 of 12, resumed from 4: 5 to 7 come again, and count once; or followed from there on only."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    killed(replace(config, tracker=before), 7)
    train.Run(config := replace(config, tracker="tensorboard")).train()
    folder = os.path.join(config.runs, "run", "tensorboard")
    assert len(os.listdir(folder)) == (2 if before == "tensorboard" else 1)
    track = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    same({n: [(e.step, e.value) for e in track.Scalars(n)] for n in track.Tags()["scalars"]}, rows_of(config))
    train.Run(config).train()  # complete: nothing is told again
    assert len(os.listdir(folder)) == (2 if before == "tensorboard" else 1)


def offline(file) -> dict[str, list[tuple[int, float]]]:
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
    config = replace(config, tracker="wandb")
    killed(config, 7)
    folder = train.Path(config.runs) / "run" / "wandb"
    identity = (folder / "id").read_text()
    train.Run(config).train()
    wandb.finish()
    file, = folder.glob("offline-run-*/*.wandb")
    assert file.name == f"run-{identity}.wandb" and (folder / "id").read_text() == identity
    same(offline(file), rows_of(config))


def test_what_is_not_installed_is_said_before_anything_is_built(config, monkeypatch, capsys):
    """In one sentence with what to install; a tracker that is not chosen is not imported either."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    monkeypatch.setattr(data, "build", None)
    assert train.main(["--tracker", "wandb", "--runs", config.runs]) == 2
    assert capsys.readouterr().err == "error: tracker is 'wandb', which is not installed; pip install wandb\n"

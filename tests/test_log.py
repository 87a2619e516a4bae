"""lib/log.py: what a run says on the terminal: a spike, and the time that is left."""
import math
from dataclasses import replace

import numpy as np
from train_cases import plan_of, short_phase, tiny_config

from lib.log import Log


def metrics_of(loss: float) -> dict:
    """What a step gives of which the loss matters here."""
    return {"train/loss": loss, "train/grad_norm": 1.0, "skipped": 0}


def test_a_spike_is_reported_with_the_command_that_shows_its_rows(tmp_path, capsys):
    """Above the last hundred by more than six of their deviations.

    None are a fall, a NaN, a slow rise, and a leap while there are few losses to compare with.
    """
    plan = replace(plan_of(tiny_config(phases=(short_phase(40),))), ends=np.array([1_000]))
    steps = np.arange(150)
    losses = 3 + 0.1 * np.sin(steps) + 0.001 * steps
    losses[20] = 9
    losses[110] = math.nan
    losses[120] = 2
    losses[130] = 4.5
    with Log(tmp_path / "metrics.jsonl", 0, plan, 10) as log:
        for i, loss in enumerate(losses):
            log.step(1, metrics_of(loss), {"i": i}, 0.0)

    lines = capsys.readouterr().out.splitlines()
    (said,) = [line for line in lines if "deviations above" in line]
    assert "loss 4.500" in said
    config = tmp_path / "config.json"
    assert said.endswith(f"python train.py corpus inspect {config} --step 1")


def test_the_time_that_is_left_leaves_compilation_out(tmp_path, capsys, monkeypatch):
    """The first line has none; the second counts from the first row on, however late that came."""
    now = [100.0]
    monkeypatch.setattr("lib.log.time.perf_counter", lambda: now[0])
    plan = plan_of(tiny_config(phases=(short_phase(10),)))
    with Log(tmp_path / "metrics.jsonl", 0, plan, 10) as log:
        for step, seconds in ((1, 60.0), (2, 5.0), (3, 5.0)):
            now[0] += seconds
            log.step(step, metrics_of(1.0), {}, 0.0)
        now[0] += 5.0

    lines = [line for line in capsys.readouterr().out.splitlines() if "step" in line]
    assert "ETA" not in lines[0]
    assert lines[-1].endswith("ETA 0:00:35")

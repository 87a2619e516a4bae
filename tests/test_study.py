"""tools/study.py: intervals, speed-ups, verdicts, rates; studies made up and trained; configs/stacking.py."""
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import course_of

import data
import model
import train
from lib.config import ROOT, load_file, to_json
from lib.disk import write
from train import parse

study = load_file(ROOT / "tools/study.py")
stacking = load_file(ROOT / "configs/stacking.py")

FILE = '''"""Two arms on lines of text."""
from dataclasses import replace
from functools import partial

from data import DataConfig, Source, text
from lib.edits import stack
from model import ModelConfig
from train import Config, Phase, Schedule

deep = Config(
    model=ModelConfig(layers=2, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=16),
    data=DataConfig(sources={"a": Source(partial(text, path="PATH"))}, tokenizer="bytes", dev=0.1, test=0.1),
    phases=(Phase(steps=400, batch=4, seq=32),), schedule=Schedule(peak=1e-2, warmup=2),
    overlap=8, eval_every=2, eval_tokens=500, prompts=(),
)
grown = replace(deep, model=replace(deep.model, layers=1), phases=(
    replace(deep.phases[0], schedule=Schedule(shape="constant", peak=2e-2, warmup=2)),
    replace(deep.phases[0], edits=(partial(stack, times=2),))))
arms = {"deep": deep, "grown": grown, "third": deep}
default_arms = "deep", "grown"
rates = 1e-2, 2e-2, 4e-2
quick = {"phases.*.steps": 4}
teacher_flops = {"grown": 1e6}
claims = (dict(says="it helps", arm="grown", below=10.0),
          dict(says="it learns", arm="grown", measure="train/loss", above=10.0),
          dict(says="of another arm", arm="third", below=0.0))
'''


@pytest.fixture
def file(tmp_path, corpus) -> Path:
    """A study's file."""
    path = tmp_path / "tiny.py"
    path.write_text(FILE.replace("PATH", str(corpus)))
    return path


def call(file: Path, *arguments: str) -> dict:
    """The study by the tool's own `main`."""
    return study.main([str(file), "--runs", str(file.parent / "runs"), *arguments])


# -------------------------------------------------------------------------------------------- pure functions


def test_interval_is_student_s():
    # by hand: mean 3, sd sqrt(2.5), t(4; 0.975) = 2.7764, half = 2.7764 sqrt(2.5 / 5)
    mean, half = study.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(1.96324, abs=1e-5)
    assert study.interval([0.0, 1.0])[1] == pytest.approx(12.7062 / 2, abs=1e-4)  # t(1) is 12.7062
    assert study.interval([2.0]) == (2.0, None)


def test_reach_interpolates_between_evaluations():
    budget, losses = [10, 20, 30], [4.0, 3.0, 2.0]
    assert study.reach(budget, losses, 2.5) == 25 and study.reach(budget, losses, 3.0) == 20
    assert study.reach(budget, losses, 5.0) == 10 and study.reach(budget, losses, 2.0) == 30
    assert study.reach(budget, losses, 1.9) == math.inf
    assert study.reach(budget, [4.0, 2.0, 3.0], 3.0) == 15  # the first time


def test_speed_up_is_at_the_worse_end_and_the_same_from_both_sides():
    def run(*dev, scale=1):
        flops = [scale * n for n in (1, 2, 3, 4)]
        return dict(dev=dev[-1], curve=dict(tokens=[1, 2, 3, 4], flops=flops, dev=[*dev]))

    fast, slow = run(4.0, 3.0, 2.0, 1.5), run(5.0, 4.0, 3.0, 2.0)
    assert study.speed_up(fast, slow, "tokens") == pytest.approx(4 / 3 - 1)
    assert study.speed_up(slow, fast, "tokens") == pytest.approx(3 / 4 - 1)
    assert study.speed_up(run(4.0, 3.0, 2.0, 1.5, scale=0.5), slow, "flops") == pytest.approx(8 / 3 - 1)
    assert study.speed_up(slow, slow, "flops") == 0


@pytest.mark.parametrize("mean, half, claim, expected", [
    (-0.03, 0.02, dict(below=0.0), "confirmed"), (-0.03, 0.04, dict(below=0.0), "undecided"),
    (0.03, 0.02, dict(below=0.0), "reversed"), (-0.03, 0.02, dict(below=-0.02), "undecided"),
    (0.5, 0.1, dict(above=0.3), "confirmed"), (0.5, 0.1, dict(above=0.7), "reversed"),
    (0.5, 0.3, dict(above=0.3), "undecided"), (-9.0, None, dict(below=0.0), "undecided"),
    (None, None, dict(below=0.0), "undecided"),
])
def test_verdict(mean, half, claim, expected):
    assert study.verdict(mean, half, claim) == expected


def test_a_grid_is_extended_by_its_own_ratio_until_it_brackets_the_best_or_twice():
    grid = [1.0, 2.0, 4.0]
    assert study.best({1.0: 3.0, 2.0: 1.0, 4.0: 2.0}) == (2.0, True)
    assert study.extension({1.0: 3.0, 2.0: 1.0, 4.0: 2.0}, grid) is None
    assert study.extension({1.0: 3.0, 2.0: 2.0, 4.0: 1.0}, grid) == 8.0
    assert study.extension({1.0: 1.0, 2.0: 2.0, 4.0: 3.0}, grid) == 0.5
    assert study.extension({1.0: 3.0, 2.0: 2.0, 4.0: 1.0, 8.0: math.inf}, grid) is None  # 8 diverged
    rising = {1.0: 5.0, 2.0: 4.0, 4.0: 3.0, 8.0: 2.0, 16.0: 1.0}
    assert study.extension(rising, grid) is None and study.best(rising) == (16.0, False)


# ------------------------------------------------------------------------------- whole studies, made-up runs


class Trainer:
    """In place of the subprocesses: runs whose dev loss is a parabola in the log of the rate."""

    def __init__(self, optimum: dict[str, float], offset: dict[str, float]):
        self.optimum, self.offset, self.made, self.fail, self.pid = optimum, offset, [], {}, 1

    def __call__(self, line, stdout, stderr, env):
        config, arm = parse([str(word) for word in line[2:]])[0], line[2].split(":")[-1]
        self.made.append(config.name)
        self.code = self.fail.get(config.name, 0)
        if self.code:
            stdout.write(b"Traceback\nerror: boom\n")
            return self
        end = self.offset[arm] + 0.1 * config.seed + math.log2(config.schedule.peak / self.optimum[arm]) ** 2
        rows = [{"train/tokens": 100 * i, "train/flops": 1e6 * i, "eval/a/bpb": end + 4 - i}
                for i in range(1, 5)]
        rows += [rows[-1] | {"eval/a.test/bpb": end + 1, "train/loss": 2 * end}]
        del rows[-1]["eval/a/bpb"]
        run = Path(config.runs) / config.name
        write(run / "metrics.jsonl", "\n".join(map(json.dumps, rows)))
        write(run / "config.json", json.dumps(to_json(config)))
        made_by = dict.fromkeys("versions commit host device devices".split())
        write(run / "summary.json", json.dumps(made_by))
        return self

    def wait(self):
        """The exit code."""
        return self.code


@pytest.fixture
def trainer(monkeypatch) -> Trainer:
    """Runs that are made up: `grown` is 0.2 better, and its best rate lies above the grid."""
    fake = Trainer(dict(deep=2e-2, grown=8e-2, third=2e-2), dict(deep=1.0, grown=0.8, third=1.0))
    monkeypatch.setattr(study.subprocess, "Popen", fake)
    monkeypatch.setattr(study, "gpus", list)
    return fake


def test_a_study_tunes_each_arm_pairs_seeds_and_judges_claims(file, trainer, capsys):
    result = call(file, "--seeds", "3")
    tuned = {f"{arm}-{r}-s0" for arm in ("deep", "grown") for r in ("0.01", "0.02", "0.04")}
    tuned |= {"grown-0.08-s0", "grown-0.16-s0"}
    pairs = {f"{arm}-s{seed}" for arm in ("deep-0.02", "grown-0.08") for seed in (1, 2, 3)}
    assert len(trainer.made) == len(set(trainer.made)) and set(trainer.made) == tuned | pairs
    grown, deep = result["arms"]["grown"], result["arms"]["deep"]
    assert (grown["rate"], grown["bracketed"], deep["rate"], deep["bracketed"]) == (0.08, True, 0.02, True)
    gap = grown["less_control"]["bpb"]
    assert [*gap["values"]] == [1, 2, 3] and gap["mean"] == pytest.approx(-0.2) and gap["half"] < 1e-9
    # deep ends at 1 + 0.1 seed, after 4 evaluations; grown was there at 3.8, its teacher took 1 more
    assert grown["less_control"]["speed_up_tokens"]["mean"] == pytest.approx(4 / 3.8 - 1)
    assert grown["less_control"]["speed_up_flops"]["mean"] == pytest.approx(4 / 4.8 - 1)
    assert [c["verdict"] for c in result["claims"]] == ["confirmed", "reversed"]  # no third arm
    assert result["claims"][1]["mean"] == pytest.approx(-0.4)
    assert result["cost"]["tuning_tokens"] == 8 * 400 and result["cost"]["tokens"] == 6 * 400
    directory = file.parent / "runs/tiny"
    assert json.loads((directory / "study.json").read_text())["control"] == "deep"
    assert (directory / "study.png").read_bytes()[1:4] == b"PNG"
    assert "| grown | 0.08 | 400 |" in capsys.readouterr().out
    made = len(trainer.made)
    assert call(file, "--seeds", "3")["arms"].keys() == result["arms"].keys() and len(trainer.made) == made
    call(file, "--seeds", "4")
    assert trainer.made[made:] == ["deep-0.02-s4", "grown-0.08-s4"]


def test_a_phase_s_own_schedule_keeps_its_ratio_to_the_run_s(file, trainer):
    call(file, "--seeds", "1")
    grown = json.loads((file.parent / "runs/tiny/grown-0.04-s0/config.json").read_text())
    assert grown["schedule"]["peak"] == 0.04 and grown["phases"][0]["schedule"]["peak"] == 0.08
    assert grown["phases"][1]["schedule"] is None


def test_every_schedule_of_a_run_keeps_its_ratio_too(file, trainer):
    own = "steps=400, lr=dict(embed=Schedule(peak=3e-2)),"
    file.write_text(file.read_text().replace("steps=400,", own))
    call(file, "--seeds", "1")
    deep = json.loads((file.parent / "runs/tiny/deep-0.04-s0/config.json").read_text())
    assert deep["schedule"]["peak"] == 0.04 and deep["phases"][0]["lr"]["embed"]["peak"] == 0.12


OWN = """
def least(rows):
    return -min(row["eval/a/bpb"] for row in rows if "eval/a/bpb" in row)

measures, tuned_by = {"own": least}, "own"
claims = (dict(says="more of it", arm="grown", measure="own", above=0.1),)
"""


def test_a_measure_of_the_file_s_own_is_tuned_by_claimed_of_and_shown(file, trainer, capsys):
    """The made-up trainer's parabola upside down: the worst rates win, as the ends of the grid."""
    file.write_text(file.read_text() + OWN)
    result = call(file, "--seeds", "2")
    assert [result["arms"][arm]["rate"] for arm in ("deep", "grown")] == [0.0025, 0.0025]
    own = result["measures"]["own"]
    deep, grown = (1 + math.log2(0.0025 / 2e-2) ** 2, 0.8 + math.log2(0.0025 / 8e-2) ** 2)
    assert own["deep"]["own"][0] == pytest.approx(-deep - 0.15) and own["deep"]["mean"] == 0
    assert own["grown"]["mean"] == pytest.approx(deep - grown)
    claim, = result["claims"]
    assert claim["mean"] == own["grown"]["mean"] and claim["verdict"] == "reversed"
    assert f"| own | {-deep - 0.15:.4f} ± " in capsys.readouterr().out
    other = file.with_name("other.py")
    other.write_text(file.read_text().replace('"own"\n', '"won"\n'))
    with pytest.raises(data.InputError, match="tuned_by is 'won'; allowed is one of its `measures`: own"):
        call(other)


def test_runs_side_by_side_have_their_share_of_the_cores_each(file, trainer, monkeypatch):
    pinned = []
    monkeypatch.setattr(study.os, "sched_getaffinity", lambda pid: {4, 5, 6, 7, 8}, raising=False)
    monkeypatch.setattr(study.os, "sched_setaffinity", lambda *to: pinned.append(to), raising=False)
    monkeypatch.setattr(study.os, "cpu_count", lambda: 5)
    call(file, "--seeds", "1")
    assert not pinned  # one at a time has them all
    call(file, "--seeds", "6", "--jobs", "2")
    assert len(pinned) == 10 and {(pid, tuple(to)) for pid, to in pinned} == {(1, (4, 6, 8)), (1, (5, 7))}
    with pytest.raises(data.InputError, match="--jobs is 6; allowed is 1 to 5"):
        call(file, "--jobs", "6")


def test_a_run_that_fails_is_left_out_with_its_pair_and_reported(file, trainer, capsys):
    trainer.fail = {"grown-0.08-s2": 1}
    result = call(file, "--seeds", "3")
    assert [*result["arms"]["grown"]["less_control"]["bpb"]["values"]] == [1, 3]
    assert "grown-0.08-s2 failed, exit code 1: error: boom" in capsys.readouterr().out


def test_an_optimum_that_is_not_bracketed_is_reported(file, trainer, capsys):
    trainer.optimum["grown"] = 10.0
    assert call(file, "--seeds", "1")["arms"]["grown"]["bracketed"] is False
    out = capsys.readouterr().out
    assert "| grown | 0.16 (!) |" in out and "(!) grown: its best rate is an end of those tried" in out


def test_one_seed_gives_figures_without_intervals(file, trainer, capsys):
    result = call(file, "--seeds", "1")
    assert result["arms"]["grown"]["less_control"]["bpb"]["half"] is None
    assert {c["verdict"] for c in result["claims"]} == {"undecided"}
    assert "one seed: no intervals" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, sentence", [
    (["--arms", "grown,thrid"], "defines no arm 'thrid'; its arms: deep, grown, third"),
    (["--seeds", "0"], "--seeds is 0; allowed is 1 or more"),
    (["--sedes", "2"], "unrecognized arguments"),
    (["--jobs", "0"], "--jobs is 0; allowed is 1 to"),
])
def test_mistakes_are_one_sentence(file, trainer, arguments, sentence):
    with pytest.raises(data.InputError, match=sentence):
        call(file, *arguments)
    assert not trainer.made


def test_mistakes_of_the_file(file, trainer):
    with pytest.raises(data.InputError, match="neither a config file"):
        call(file.with_name("tyni.py"))
    mistakes = [("quick = {", 'quick = {"phases.*.stesp": 1, ', "field --phases.0.stesp"),
                ("claims = (", "1 / 0\nclaims = (", "line 24: ZeroDivisionError"),
                ("quick = {", "slow = {", "defines no `quick`"),
                ("dev=0.1", "dev=0.0", "data.dev is 0")]
    for n, (old, new, sentence) in enumerate(mistakes):
        other = file.with_name(f"mistake{n}.py")
        other.write_text(file.read_text().replace(old, new))
        with pytest.raises(data.InputError, match=sentence):
            call(other, *(["--quick"] if "quick" in old else []))


def test_a_run_made_by_another_config_is_not_taken_for_this_one_s(file, trainer):
    call(file, "--seeds", "1")
    other = file.parent / "other" / file.name
    other.parent.mkdir()
    other.write_text(file.read_text().replace("mlp=16", "mlp=24"))
    with pytest.raises(data.InputError, match="another config .model.mlp.*delete it"):
        study.main([str(other), "--runs", str(file.parent / "runs"), "--seeds", "1"])


def test_the_shape_and_tokenizer_of_a_run_to_start_from_are_no_change(file, trainer):
    file.write_text(file.read_text().replace("deep = Config(", 'deep = Config(init_from="base",'))
    call(file, "--seeds", "1")
    place = file.parent / "runs/tiny/deep-0.02-s1/config.json"
    config = json.loads(place.read_text())
    config["model"]["mlp"], config["data"]["tokenizer"] = 64, "base/tokenizer.model"
    place.write_text(json.dumps(config))
    call(file, "--seeds", "1")
    place.write_text(json.dumps(config | {"clip": 2.0}))
    with pytest.raises(data.InputError, match="another config .clip"):
        call(file, "--seeds", "1")


# ------------------------------------------------------------------------------------- whole studies, trained


def test_a_quick_study_end_to_end_by_the_command_line_and_again(file):
    line = [sys.executable, ROOT / "train.py", "study", file, "--quick", "--runs", file.parent / "runs"]

    def go() -> str:
        done = subprocess.run(line, capture_output=True, text=True, env=conftest.environment())
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    out, directory = go(), file.parent / "runs/tiny-quick"
    runs = {run.name: run.stat().st_mtime_ns for run in directory.iterdir() if run.is_dir()}
    assert runs.keys() == {f"{arm}-0.02-s{seed}" for arm in ("deep", "grown") for seed in (1, 2)}
    result = json.loads((directory / "study.json").read_text())
    grown = result["arms"]["grown"]
    assert grown["tokens"] == 8 * 128 and [*grown["less_control"]["bpb"]["values"]] == ["1", "2"]
    per_token = [model.flops_per_token(model.ModelConfig(
        layers=n, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=16, vocab=258), 32) for n in (1, 2)]
    assert grown["flops"] == 4 * 128 * sum(per_token) + 1e6
    for seed in "12":
        ends = [json.loads((directory / f"{arm}-0.02-s{seed}/summary.json").read_text())["eval/a.test/bpb"]
                for arm in ("grown", "deep")]
        assert grown["less_control"]["bpb"]["values"][seed] == ends[0] - ends[1]
    assert out.splitlines()[-1].endswith("has study.json and study.png") and "confirmed: it helps" in out
    before = {p: p.stat().st_mtime_ns for p in directory.glob("*/metrics.jsonl")}
    assert go().count("| deep |") == 1
    assert before == {p: p.stat().st_mtime_ns for p in directory.glob("*/metrics.jsonl")}


def test_sigterm_saves_the_run_in_flight_and_ends_the_study(file):
    line = [sys.executable, ROOT / "train.py", "study", file, "--seeds", "1", "--runs", file.parent]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=conftest.environment()) as process:
        metrics, limit = file.parent / "tiny/deep-0.01-s0/metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < limit:
            time.sleep(0.05)
        process.terminate()
        assert process.wait() == 0
        assert process.stdout.read() == "deep-0.01-s0 was stopped; the same command resumes the study\n"
    log = file.parent / "tiny/deep-0.01-s0.log"
    assert "stopped by SIGTERM" in log.read_text()
    assert [p.name for p in (file.parent / "tiny").iterdir() if p.is_dir()] == ["deep-0.01-s0"]


# ----------------------------------------------------------------------------------------------- stacking.py


CONTEXT = model.Context(jax.random.key(0), 0, None, None, None)


def flops_of(arm: train.Config) -> tuple[float, list[int]]:
    """(training FLOPs of an arm, the depth of each of its phases)."""
    course = course_of(arm, CONTEXT)
    return course.flops[-1], [m.layers for m in course.models]


def test_the_arms_of_stacking_cost_the_same():
    total, depths = flops_of(stacking.arms["scratch"])
    assert depths == [8]
    for arm in "stack identity random_on_top stack_g2 stack_g8 stack_early stack_late annealed".split():
        flops, depths = flops_of(stacking.arms[arm])
        assert flops == pytest.approx(total, rel=0.01) and depths[1] == 8
    assert flops_of(stacking.arms["stack_g8"])[1] == [1, 8]
    for arm in "gradual", "middle":
        assert flops_of(stacking.arms[arm])[1] == [2, 4, 6, 8]
        assert flops_of(stacking.arms[arm])[0] == pytest.approx(total, rel=1e-3)
        steps = np.array([p.steps for p in stacking.arms[arm].phases])
        np.testing.assert_allclose(steps, steps.sum() * np.array([.1, .2, .3, .4]), atol=1.5)
    assert stacking.middle(4, 1) == (0, 1, 1, 2, 3) and stacking.middle(6, 2) == (0, 1, 2, 3, 2, 3, 4, 5)
    assert stacking.middle(2, 2) == (0, 1, 0, 1) and stacking.top(4, 2) == (0, 1, 2, 3, 2, 3)
    for arm in "scratch_4x", "stack_4x":
        assert flops_of(stacking.arms[arm])[0] == pytest.approx(4 * total, rel=0.01)
    base, deep = stacking.arms["stack"].phases
    short, tokens = (stacking.arms[arm].phases[0] for arm in ("short", "scratch_tokens"))
    assert short.steps == deep.steps and tokens.steps == base.steps + deep.steps
    assert flops_of(stacking.arms["short"])[0] == pytest.approx(7 / 8 * total, rel=0.01)


def test_the_arms_of_stacking_decay_over_the_same_last_flops_and_end_at_the_same_rate():
    for arm in "scratch", "stack", "stack_late":
        course = course_of(stacking.arms[arm], CONTEXT)
        rate, share = course.rates["matrix"], course.flops / course.flops[-1]
        assert rate[-1] == pytest.approx(0.05 * 8e-3)
        assert share[(share > 0.5) & (rate < 0.999 * 8e-3)][0] == pytest.approx(0.6, abs=0.005)


def test_every_arm_of_stacking_is_a_config_that_is_accepted():
    for arm in stacking.arms.values():
        train.check(replace(arm, name="x"))


def small(arm: str) -> tuple[model.ModelConfig, dict, dict]:
    """(shape after the growth, parameters before and after it) of an arm of stacking.py, narrower."""
    config = replace(stacking.arms[arm].model, embed=32, mlp=48, heads=2, kv_heads=2, head_dim=8, vocab=50,
                     unroll=1)
    shapes = []

    @jax.jit
    def made():
        before = after = model.Model(config, model.init(config, jax.random.key(0)))
        for edit in stacking.arms[arm].phases[1].edits:
            after = edit(after, model.Context(jax.random.key(1), 0, None, None, None)).model
        shapes.append(after.config)
        return before.params, after.params

    before, after = made()
    return shapes[0], before, after


scores_of = jax.jit(model.apply, static_argnums=2)


def test_copies_that_are_silenced_keep_the_function_and_learn_from_there():
    """G_zero: logits as before within 1e-5; the copies' other weights are the layer's, and they learn."""
    config, before, after = small("identity")
    ids = jnp.arange(24).reshape(2, 12)
    one = replace(config, layers=2)
    np.testing.assert_allclose(scores_of(after, ids, config), scores_of(before, ids, one), atol=1e-5)
    np.testing.assert_array_equal(after["q"], before["q"][np.array([0, 0, 0, 0, 1, 1, 1, 1])])
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model.apply(p, ids, config)))))(after)
    assert (np.abs(grads["down"]).max((1, 2)) > 0).all() and (np.abs(grads["o"]).max((1, 2, 3, 4)) > 0).all()


def test_what_is_annealed_is_the_shallow_function_at_first_and_the_deep_one_in_the_end():
    config, before, after = small("annealed")
    weights, ids = stacking.arms["annealed"].reparam, jnp.arange(24).reshape(2, 12)
    start = stacking.arms["annealed"].phases[0].steps
    assert set(weights.keywords) == {"layers", "start", "steps"} and weights.keywords["start"] == start

    @jax.jit
    def scores(step):
        return model.apply(weights(after, step, None), ids, config)

    np.testing.assert_allclose(scores(start), scores_of(before, ids, replace(config, layers=2)), atol=1e-5)
    np.testing.assert_allclose(scores(start + 100), scores_of(after, ids, config), atol=1e-6)
    for end in start, start + 100:
        assert np.abs(scores(start + 50) - scores(end)).max() > 1e-4
    np.testing.assert_array_equal(weights(before, 3, None)["o"], before["o"])  # nothing is new in the base

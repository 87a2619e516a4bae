"""tools/study.py: typed studies, intervals, verdicts, rates, records; studies made up and trained."""
import json
import math
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import conftest
import pytest

import model
import train
from lib import statistics
from lib.config import ROOT, load_file, to_json
from lib.disk import write
from lib.errors import InputError
from lib.study import PAIRED, Claim, metrics_of
from train import parse

study = load_file(ROOT / "tools/study.py")
papers = load_file(ROOT / "tools/papers.py")

FILE = '''"""Two arms on lines of text."""
from dataclasses import replace
from functools import partial

from data import DataConfig, Source, text
from lib.edits import stack
from lib.study import Claim, Paper, Study
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
study = Study(
    paper=Paper(title="On Tiny Things", authors="Small et al.", year=2024, seeds=("001:39",)),
    question="Is it better to grow?",
    arms={"deep": deep, "grown": grown, "third": deep},
    default_arms=("deep", "grown"),
    peak_lrs=(1e-2, 2e-2, 4e-2),
    quick={"phases.*.steps": 4},
    teacher_flops={"grown": 1e6},
    claims=(
        Claim(says="it helps", arm="grown", below=10.0),
        Claim(says="it learns", arm="grown", measure="train/loss", above=10.0),
        Claim(says="of another arm", arm="third", below=0.0),
    ),
)
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
    mean, half = statistics.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(1.96324, abs=1e-5)
    assert statistics.interval([0.0, 1.0])[1] == pytest.approx(12.7062 / 2, abs=1e-4)  # t(1) is 12.7062
    assert statistics.interval([2.0]) == (2.0, None)


def test_reach_interpolates_between_evaluations():
    budget, losses = [10, 20, 30], [4.0, 3.0, 2.0]
    assert statistics.reach(budget, losses, 2.5) == 25 and statistics.reach(budget, losses, 3.0) == 20
    assert statistics.reach(budget, losses, 5.0) == 10 and statistics.reach(budget, losses, 2.0) == 30
    assert statistics.reach(budget, losses, 1.9) == math.inf
    assert statistics.reach(budget, [4.0, 2.0, 3.0], 3.0) == 15  # the first time


def test_speed_up_is_at_the_worse_end_and_the_same_from_both_sides():
    def run(*dev, scale=1):
        flops = [scale * n for n in (1, 2, 3, 4)]
        return dict(dev=dev[-1], curve=dict(tokens=[1, 2, 3, 4], flops=flops, dev=[*dev]))

    fast, slow = run(4.0, 3.0, 2.0, 1.5), run(5.0, 4.0, 3.0, 2.0)
    assert statistics.speed_up(fast, slow, "tokens") == pytest.approx(4 / 3 - 1)
    assert statistics.speed_up(slow, fast, "tokens") == pytest.approx(3 / 4 - 1)
    assert statistics.speed_up(run(4.0, 3.0, 2.0, 1.5, scale=0.5), slow, "flops") == pytest.approx(8 / 3 - 1)
    assert statistics.speed_up(slow, slow, "flops") == 0


@pytest.mark.parametrize("mean, half, claim, expected", [
    (-0.03, 0.02, dict(below=0.0), "confirmed"), (-0.03, 0.04, dict(below=0.0), "undecided"),
    (0.03, 0.02, dict(below=0.0), "reversed"), (-0.03, 0.02, dict(below=-0.02), "undecided"),
    (0.5, 0.1, dict(above=0.3), "confirmed"), (0.5, 0.1, dict(above=0.7), "reversed"),
    (0.5, 0.3, dict(above=0.3), "undecided"), (-9.0, None, dict(below=0.0), "undecided"),
    (None, None, dict(below=0.0), "undecided"),
])
def test_verdict(mean, half, claim, expected):
    assert statistics.verdict(mean, half, Claim(says="x", arm="x", **claim)) == expected


def test_a_grid_is_extended_by_its_own_ratio_until_it_brackets_the_best_or_twice():
    grid = [1.0, 2.0, 4.0]
    assert statistics.best_rate({1.0: 3.0, 2.0: 1.0, 4.0: 2.0}) == (2.0, True)
    assert statistics.next_rate({1.0: 3.0, 2.0: 1.0, 4.0: 2.0}, grid) is None
    assert statistics.next_rate({1.0: 3.0, 2.0: 2.0, 4.0: 1.0}, grid) == 8.0
    assert statistics.next_rate({1.0: 1.0, 2.0: 2.0, 4.0: 3.0}, grid) == 0.5
    assert statistics.next_rate({1.0: 3.0, 2.0: 2.0, 4.0: 1.0, 8.0: math.inf}, grid) is None  # 8 diverged
    rising = {1.0: 5.0, 2.0: 4.0, 4.0: 3.0, 8.0: 2.0, 16.0: 1.0}
    assert statistics.next_rate(rising, grid) is None and statistics.best_rate(rising) == (16.0, False)


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


def test_a_quick_study_gives_no_verdict(file, trainer, capsys):
    result = call(file, "--quick", "--json")
    assert [claim["verdict"] for claim in result["claims"]] == ["not judged"] * 2
    lines = capsys.readouterr().out.splitlines()
    assert "--quick: too short to say anything of the question" in lines
    assert sum(line.startswith("not judged: ") for line in lines) == 2
    assert json.loads(lines[-1])["quick"] and "confirmed" not in "".join(lines)
    assert not (file.parent / "results").exists()


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

study = replace(study, measures={"own": least}, tuned_by="own", claims=[
    Claim(says="more of it", arm="grown", measure="own", above=0.1)])
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


def test_runs_side_by_side_have_their_share_of_the_cores_each(file, trainer, monkeypatch):
    pinned = []
    monkeypatch.setattr(study.os, "sched_getaffinity", lambda pid: {4, 5, 6, 7, 8}, raising=False)
    monkeypatch.setattr(study.os, "sched_setaffinity", lambda *to: pinned.append(to), raising=False)
    monkeypatch.setattr(study.os, "cpu_count", lambda: 5)
    call(file, "--seeds", "1")
    assert not pinned  # one at a time has them all
    call(file, "--seeds", "6", "--jobs", "2")
    assert len(pinned) == 10 and {(pid, tuple(to)) for pid, to in pinned} == {(1, (4, 6, 8)), (1, (5, 7))}
    with pytest.raises(InputError, match="--jobs is 6; allowed is 1 to 5"):
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
    (["--arms", "grown,thrid"], "defines no arm 'thrid'; did you mean 'third'?"),
    (["--arms", "grown,x"], "defines no arm 'x'; allowed are: deep, grown, third"),
    (["--seeds", "0"], "--seeds is 0; allowed is 1 or more"),
    (["--sedes", "2"], "unrecognized arguments"),
    (["--jobs", "0"], "--jobs is 0; allowed is 1 to"),
])
def test_mistakes_are_one_sentence(file, trainer, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        call(file, *arguments)
    assert not trainer.made


def test_mistakes_of_the_file(file, trainer):
    with pytest.raises(InputError, match="neither a config file"):
        call(file.with_name("tyni.py"))
    mistakes = [("study = Study(", "1 / 0\nstudy = Study(", "line 20: ZeroDivisionError"),
                ('quick={"phases.*.steps": 4}', "quick={}", "has no `quick` in its study")]
    for n, (old, new, sentence) in enumerate(mistakes):
        other = file.with_name(f"mistake{n}.py")
        other.write_text(file.read_text().replace(old, new))
        with pytest.raises(InputError, match=sentence):
            call(other, "--quick")


REFUSED = [
    # what a study has misspelt or wrong: (text of the file, what is in its place, the sentence)
    ("peak_lrs=", "rates=", "Study has no field 'rates'; allowed are: question, arms, paper"),
    ("peak_lrs=", "peak_lr=", "Study has no field 'peak_lr'; did you mean 'peak_lrs'?"),
    ('question="Is it better to grow?",', "", "Study lacks its field 'question'; it needs: question, arms"),
    ('question="Is it better to grow?"', 'question=""', "question is ''.*; allowed is a text"),
    ("below=10.0", "bellow=10.0", "Claim has no field 'bellow'; did you mean 'below'?"),
    ("year=2024", "yaer=2024", "Paper has no field 'yaer'; did you mean 'year'?"),
    ("year=2024", 'year="2024"', "paper.year is '2024' .str.; allowed is an integer, 1 or more"),
    ('seeds=("001:39",)', 'seeds="001:39"', "paper.seeds is '001:39' .str.; allowed is a tuple"),
    ('seeds=("001:39",)', 'seeds=("1:39",)', "paper.seeds.0 is '1:39'; allowed is a text, such as"),
    ('paper=Paper(title="On Tiny Things", authors="Small et al.", year=2024, seeds=("001:39",))',
     'paper="On Tiny Things"', "paper is 'On Tiny Things' .str.; allowed is a tuple"),
    ("peak_lrs=", 'control="depe", peak_lrs=', "control is 'depe'; did you mean 'deep'?"),
    ('("deep", "grown")', '("deep", "wide")', "default_arms.1 is 'wide'; allowed are: deep, grown, third"),
    ('"third": deep', '"third": deep.model', "arms.third is ModelConfig.*; allowed is a Config"),
    ('"third": deep', '"third": 3', "arms.third is 3; allowed is a Config"),
    ('arms={"deep": deep, "grown": grown, "third": deep}', "arms={}", "arms is {}.*; allowed is one arm"),
    ('arm="third"', 'arm="thrid"', "claims.2.arm is 'thrid'; did you mean 'third'?"),
    ('arm="third"', 'arm="third", control="depe"', "claims.2.control is 'depe'; did you mean 'deep'?"),
    ('arm="third"', 'arm="deep"', "claims.2.arm is 'deep'.*; allowed is another arm than its control"),
    ("below=10.0", "below=10.0, above=1.0", "the claim 'it helps' has below=10.0 and above=1.0; allowed is"),
    (", below=10.0", "", "the claim 'it helps' has below=None and above=None; allowed is one of the two"),
    ("below=10.0", 'below="10"', "claim.below is '10' .str.; allowed is a finite number or None"),
    ('Claim(says="of another arm", arm="third", below=0.0)', 'dict(says="of another arm")',
     "claims.2 is .* .dict.; allowed is Claim"),
    ('"train/loss"', '"train/los"', "claims.1.measure is 'train/los', which a run of the arm 'grown' does "
     "not have; did you mean 'train/loss'?"),
    ('"train/loss"', '"eval/b/bpb"', "claims.1.measure is 'eval/b/bpb'.*; did you mean 'eval/a/bpb'?"),
    ('"train/loss"', '"speedup_flops"', "claims.1.measure is.*; did you mean 'speed_up_flops'?"),
    ('"train/loss"', '"x"', "claims.1.measure is 'x'.*; allowed are: bpb, speed_up_flops, .*model/params"),
    ("test=0.1", "test=0.0", "claims.0.measure is 'bpb', which a run of the arm 'grown' does not have"),
    ("peak_lrs=", 'tuned_by="own", peak_lrs=', "tuned_by is 'own'; allowed are: none"),
    ("peak_lrs=", 'tuned_by="won", measures={"own": sum}, peak_lrs=', "tuned_by is 'won'; did you mean"),
    ("peak_lrs=", 'measures={"own": 3}, peak_lrs=', "measures.own is 3; allowed is a function of rows"),
    ("peak_lrs=", 'measures={"bpb": sum}, peak_lrs=', "a name in measures is 'bpb'.*; allowed is a name"),
    ("(1e-2, 2e-2, 4e-2)", "(1e-2, 4e-2, 2e-2)", "peak_lrs is .*; allowed is learning rates above 0, asc"),
    ("(1e-2, 2e-2, 4e-2)", "(0.0, 2e-2)", "peak_lrs.0 is 0.0; allowed is a finite number, more than 0"),
    ("(1e-2, 2e-2, 4e-2)", "4e-2", "peak_lrs is 0.04 .float.; allowed is a tuple"),
    ("dev=0.1", "dev=0.0", "data.dev of the arm 'deep' is 0.0.*; allowed is a share to tune its rate on"),
    ("phases.*.steps", "phases.*.stesp", "quick has 'phases.*.stesp', but the arm 'deep' has no field "
     "'phases.0.stesp'; did you mean 'steps'?"),
    ("phases.*.steps", "phases.1.steps", "quick has 'phases.1.steps', but the arm 'deep' has no field "
     "'phases.1.steps'; allowed are: 0"),
    ("phases.*.steps", "phase.*.steps", "but the arm 'deep' has no field .*; did you mean 'phases'?"),
    ('{"grown": 1e6}', '{"gown": 1e6}', "a name in teacher_flops is 'gown'; did you mean 'grown'?"),
    ('{"grown": 1e6}', '{"grown": -1}', "teacher_flops.grown is -1; allowed is a finite number, 0 or more"),
    ("peak_lrs=", "seeds=0, peak_lrs=", "seeds is 0; allowed is an integer, 1 or more"),
]


@pytest.mark.parametrize("old, new, sentence", REFUSED, ids=[f"{new or old} {i}" for i, (old, new, _) in
                                                             enumerate(REFUSED)])
def test_a_study_s_mistakes_are_refused_when_its_file_is_loaded(file, old, new, sentence):
    """Whoever loads it: the study command, or a run of one of its arms; the sentence names the file."""
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    for load in (study.load_study, lambda path: train.load_config(f"{path}:deep")):
        with pytest.raises(InputError, match=re.escape(f"config file {file}, line ")) as caught:
            load(str(file))
        assert re.search(sentence.replace("*.s", "[*].s"), str(caught.value)), caught.value


def test_a_study_has_defaults_and_one_paper_or_several(file):
    plain = study.load_study(str(file))
    assert (plain.first, plain.seeds, plain.tuned_by, plain.measures) == ("deep", 5, "", {})
    paper, = plain.papers
    assert (paper.title, paper.year, paper.seeds) == ("On Tiny Things", 2024, ("001:39",))
    assert replace(plain, paper=(paper, paper)).papers == (paper, paper)
    assert replace(plain, paper=()).papers == ()
    assert plain.control_of(plain.claims[0]) == "deep"
    assert replace(plain, control="third", claims=()).control_of(plain.claims[0]) == "third"
    assert [claim.bound for claim in plain.claims] == [{"below": 10.0}, {"above": 10.0}, {"below": 0.0}]


def test_a_claim_may_be_by_any_metric_that_a_run_of_its_arms_can_write(file):
    plain = study.load_study(str(file))

    def claimed(measure: str, arms: dict) -> bool:
        try:
            claim = Claim(says="x", arm="grown", below=0.0, measure=measure)
            return bool(replace(plain, arms=arms, claims=[claim]))
        except InputError:
            return False

    every = ("bpb speed_up_flops speed_up_tokens eval/a/loss eval/a/bpb eval/a.test/bpb eval/a.test/loss "
             "train/loss train/grad_norm data/waste data/truncated model/params perf/tokens_per_s").split()
    assert all(claimed(measure, plain.arms) for measure in every)
    for measure in ("own/x", "data/a/rows", "head/grad_norm", "matrix/update_ratio"):  # nothing edits deep
        assert not claimed(measure, plain.arms)
    edited = plain.arms | {"deep": plain.arms["grown"]}
    assert claimed("matrix/update_ratio", edited) and not claimed("matrix/update", edited)
    measured = {name: replace(arm, evals=(len,)) for name, arm in plain.arms.items()}
    for measure in ("own/x", "blimp", "eval/whole/loss"):
        assert claimed(measure, measured)
        assert not claimed(measure, measured | {"deep": plain.arms["deep"]})  # the control has to as well
    for measure in ("train/los", "eval/a/bbp", "speed_up_flop", "eval/a.test/x", "data/wast"):
        assert not claimed(measure, measured)


def test_a_metric_that_a_run_turns_out_not_to_have_is_refused_after_the_first_run(file, trainer):
    text = file.read_text().replace("prompts=(),", "prompts=(), evals=(own,),")
    own = 'def own(params, apply):\n    return {"own/x": 1.0}\n'
    text = text.replace("deep = Config(", f"{own}\n\ndeep = Config(")
    file.write_text(text.replace('"train/loss"', '"own/y"'))
    with pytest.raises(InputError, match="the claim 'it learns' has the measure 'own/y', which run "
                                              "deep-0.01-s0 does not have; allowed are: train/tokens"):
        call(file)
    assert trainer.made == ["deep-0.01-s0"]


NO_STUDY = [("config = deep", "but one config, which `python train.py .*tiny.py` trains; configs/README.md"),
            ('arms = {"a": deep}', "defines no `study = Study(...)`; configs/README.md lists"),
            ("study = 3", "defines no `study = Study(...)`; configs/README.md lists")]


@pytest.mark.parametrize("line, sentence", NO_STUDY)
def test_what_is_no_study_s_file_is_one_helpful_sentence(file, line, sentence):
    text = file.read_text()
    file.write_text(f"{text[:text.index('study = Study(')]}{line}\n")
    with pytest.raises(InputError, match=sentence.replace("(...)", "[(][.]{3}[)]")):
        call(file)
    if "arms" in line:  # the run command knows them all the same
        assert train.load_config(f"{file}:a").overlap == 8


def test_the_directory_of_a_run_or_a_study_and_an_arm_are_one_helpful_sentence(file, trainer):
    call(file, "--seeds", "1")
    for path, sentence in [(file.parent / "runs/tiny", "is the directory of a study; allowed is the study's"),
                           (file.parent / "runs/tiny/deep-0.02-s1", "is the directory of a run; allowed is"),
                           (f"{file}:deep", "names an arm; allowed is the file, with --arms deep"),
                           (ROOT / "configs/quickstart.py", "which `python train.py .*quickstart.py`")]:
        with pytest.raises(InputError, match=sentence):
            study.main([str(path)])
    config, found = parse([str(file)])  # the control
    assert found == f"{file}:deep" and config == parse([f"{file}:deep"])[0]
    with pytest.raises(InputError, match="defines no arm 'x'; its arms: deep, grown, third"):
        train.load_config(f"{file}:x")


def test_a_run_made_by_another_config_is_not_taken_for_this_one_s(file, trainer):
    call(file, "--seeds", "1")
    other = file.parent / "other" / file.name
    other.parent.mkdir()
    other.write_text(file.read_text().replace("mlp=16", "mlp=24"))
    with pytest.raises(InputError, match="another config .model.mlp.*delete it"):
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
    with pytest.raises(InputError, match="another config .clip"):
        call(file, "--seeds", "1")


# ------------------------------------------------------------------------------- records, and pages of them


@pytest.fixture
def house(tmp_path, corpus, monkeypatch) -> Path:
    """A house with a chapter of one study, one of a file that has a Paper and no study, and a README."""
    root = tmp_path / "house"
    for place, text in {
            "configs/growth/tiny.py": FILE.replace("PATH", str(corpus)),
            "configs/context/meco.py": '''"""Addresses before the text.

Paper: Metadata Conditioning, Gao et al.
    2025 (002:7)
Method: none
"""
''',
            "configs/quickstart.py": '"""A first run."""\n',
            "README.md": "# A door\n\n<!-- results -->\nold rows\n<!-- /results -->\n\nthe end\n"}.items():
        write(root / place, text)
    monkeypatch.setattr(study, "ROOT", root)
    monkeypatch.setattr(papers, "ROOT", root)
    return root


def record(house: Path, *arguments: str) -> dict:
    """The record of the house's study, made by the tool's own `main`."""
    study.main([str(house / "configs/growth/tiny.py"), "--runs", str(house / "runs"), "--record", *arguments])
    return json.loads((house / "results/growth/tiny.json").read_text())


def test_a_record_has_every_figure_and_no_curves(house, trainer, capsys):
    trainer.fail = {"deep-0.02-s3": 1}
    found = record(house, "--seeds", "3", "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert (found["file"], found["question"]) == ("configs/growth/tiny.py", "Is it better to grow?")
    paper, = found["papers"]
    assert paper == dict(title="On Tiny Things", authors="Small et al.", year=2024, seeds=["001:39"])
    assert found["command"] == "python train.py study configs/growth/tiny.py --seeds 3 --record"
    assert found["seeds"] == 3 and found["quick"] is False and "deep-0.02-s3" in found["failed"]
    deep, grown = (found["arms"][arm] for arm in ("deep", "grown"))
    assert (grown["peak_lr"], grown["bracketed"], len(grown["tuning"])) == (0.08, True, 5)
    assert deep["bpb"]["by_seed"] == pytest.approx({"1": 2.1, "2": 2.2})
    assert grown["bpb"]["mean"] == pytest.approx(2.0)
    assert grown["bpb"]["half"] == pytest.approx(0.248, abs=1e-3)
    assert "less_control" not in deep
    less = grown["less_control"]
    assert [*less] == ["bpb", "speed_up_flops", "speed_up_tokens"]
    assert less["bpb"]["mean"] == pytest.approx(-0.2) and [*less["bpb"]["by_seed"]] == ["1", "2"]
    assert [claim["verdict"] for claim in found["claims"]] == ["confirmed", "reversed", "not run"]
    assert found["claims"][0]["below"] == 10 and found["claims"][1]["above"] == 10
    assert found["claims"][2]["mean"] is None
    cost = found["cost"]
    assert (cost["tokens"], cost["tuning_tokens"]) == (5 * 400, 8 * 400) and cost["flops"] == 5 * 4e6 + 3e6
    assert cost["seconds"] > 0 and set(found["made_by"][0]) == {"commit", "versions", "device", "devices"}
    assert "curve" not in json.dumps(found) and "tracker" not in json.dumps(found)


def test_a_record_has_the_study_s_own_measures_and_the_command_that_made_it(house, trainer):
    place = house / "configs/growth/tiny.py"
    place.write_text(place.read_text() + OWN)
    found = record(house, "--arms", "third,grown,deep")
    assert found["command"] == "python train.py study configs/growth/tiny.py --arms deep,third,grown --record"
    own = found["arms"]["grown"]["measures"]["own"]
    assert own["mean"] == pytest.approx(-(0.8 + 25 + 0.3)) and [*own["by_seed"]] == list("12345")
    assert own["less_control"]["half"] < 1e-9
    assert "less_control" not in found["arms"]["deep"]["measures"]["own"]


@pytest.mark.parametrize("arguments, sentence", [
    (["--quick"], "--record is given with --quick, which gives no verdict"),
    (["--seeds", "1"], "--record is given with one seed, which has no interval; allowed is --seeds 2"),
    (["--arms", "third"], "--arms leaves out grown; allowed are the arms that run without --arms .deep, "),
])
def test_what_may_not_be_recorded_is_one_sentence(house, trainer, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        record(house, *arguments)
    assert not trainer.made and not (house / "results").exists()


def test_a_file_outside_the_chapters_is_not_recorded(file, house, trainer):
    with pytest.raises(InputError, match="tiny.py cannot be recorded; allowed is a file configs/CHA"):
        call(file, "--record")
    place = house / "configs/tiny.py"
    place.write_text(file.read_text())
    with pytest.raises(InputError, match="tiny.py cannot be recorded"):
        call(place, "--record")
    assert not trainer.made


def test_the_pages_show_what_is_recorded(house, trainer):
    before = papers.pages(house)
    lines = len((house / "configs/growth/tiny.py").read_text("utf-8").splitlines())
    claims = len(load_file(house / "configs/growth/tiny.py").study.claims)
    assert "| [tiny](growth/tiny.py) | On Tiny Things (Small et al. 2024) | 001:39 | Is it better to grow? " \
        f"| {lines} | {claims} | not recorded yet | – |" in before[house / "configs/README.md"]
    assert "Not recorded yet: tiny." in before[house / "results/README.md"]
    assert before[house / "README.md"].splitlines()[3] == "No study is recorded yet."
    record(house, "--seeds", "2")
    after = papers.pages(house)
    index = after[house / "configs/README.md"]
    flops = 4 * 4e6 + 8 * 4e6 + 7e6  # grown has a teacher
    assert f"| 1 confirmed, 1 reversed, 1 not run | {flops:.2g} FLOPs, 0 min, None |" in index
    assert "| [quickstart.py](quickstart.py) | A first run. |" in index
    assert index.index("## growth") < index.index("## context")
    assert "| [meco](context/meco.py) | Metadata Conditioning, Gao et al. 2025 (002:7) | 002:7 " in index
    ledger = after[house / "results/README.md"]
    assert "## growth" in ledger and "± is half a 95 % interval" in ledger
    assert "Not recorded yet: none." in ledger
    half = json.loads((house / "results/growth/tiny.json").read_text())["claims"][0]["half"]
    assert ("| [tiny](../configs/growth/tiny.py) | it helps | bpb: grown less deep | "
            f"-0.2000 ± {half:.4f} | below 10 | confirmed | "
            "`python train.py study configs/growth/tiny.py --seeds 2 --record` |") in ledger
    assert "| – | below 0 | not run |" in ledger
    door = after[house / "README.md"]
    assert "| [tiny](configs/growth/tiny.py) | Is it better to grow? | it helps | -0.2000 ± " in door
    assert door.startswith("# A door\n") and door.endswith("<!-- /results -->\n\nthe end\n")
    assert "old rows" not in door


def test_the_pages_are_written_and_are_found_stale_where_a_record_has_changed(house, trainer, capsys):
    record(house, "--seeds", "2")
    papers.main(["--write"])
    assert "README.md is written" in capsys.readouterr().out
    assert {place: place.read_text() for place in papers.pages(house)} == papers.pages(house)
    place = house / "results/growth/tiny.json"
    place.write_text(place.read_text().replace('"confirmed"', '"undecided"'))
    assert all(place.read_text() != text for place, text in papers.pages(house).items())


def test_records_and_marks_that_do_not_fit_the_files_are_refused(house, trainer):
    record(house, "--seeds", "2")
    place, source = house / "results/growth/tiny.json", house / "configs/growth/tiny.py"
    kept, text = place.read_text(), source.read_text()

    def refused(sentence: str):
        with pytest.raises(InputError, match=sentence):
            papers.pages(house)

    place.write_text(kept.replace('"below": 10.0', '"below": 9.0'))
    refused("the record of configs/growth/tiny.py is of other claims .* record it again: python train.py")
    place.write_text(kept.replace('"it helps"', '"it does help"'))  # words are those of the file
    assert "| it helps |" in papers.pages(house)[house / "results/README.md"]
    place.write_text("{")
    refused("tiny.json is no JSON")
    place.write_text(kept)
    source.rename(source.with_name("small.py"))
    refused("tiny.json belongs to no file in configs/")
    write(source, text)
    source.with_name("small.py").write_text('"""Broken.""" +')
    refused("small.py, line 1: invalid syntax")
    source.with_name("small.py").unlink()
    (house / "README.md").write_text("nothing")
    refused("README.md lacks the lines <!-- results --> and <!-- /results -->")


def test_the_readme_shows_five_studies_at_most_one_of_each_chapter_first(house, trainer):
    record(house, "--seeds", "2")
    kept, source = (house / place for place in ("results/growth/tiny.json", "configs/growth/tiny.py"))
    for name in ("growth/a", "growth/b", "forgetting/c", "baselines/d", "own/e"):
        write(house / f"results/{name}.json", kept.read_text())
        write(house / f"configs/{name}.py", source.read_text())
    entries = papers.library(house)
    assert [entry.method for entry in entries] == ["a", "b", "tiny", "c", "meco", "d", "e"]
    assert [entry.method for entry in papers.chosen(entries)] == ["a", "c", "d", "e", "b"]


def test_the_pages_of_this_house_are_as_its_files_and_records_say():
    for place, text in papers.pages(ROOT).items():
        assert place.is_file(), place
        assert place.read_text("utf-8") == text, f"{place}: python train.py papers --write"


@pytest.mark.parametrize("words", ["tiny", "THINGS small", "2024", "001:39", "growth", "on tiny things", ""])
def test_papers_finds_a_file_by_all_words(house, capsys, words):
    papers.main(words.split())
    out = capsys.readouterr().out
    assert out.startswith("001:39 configs/growth/tiny.py\n    On Tiny Things (Small et al. 2024)\n"
                          "    Is it better to grow?\n    not recorded yet\n")
    assert ("002:7 configs/context/meco.py" in out) == (words == "")


def test_papers_finds_a_file_that_is_no_study_and_shows_verdicts(house, trainer, capsys):
    papers.main(["metadata", "GAO"])
    assert "002:7 configs/context/meco.py\n" in capsys.readouterr().out
    record(house, "--seeds", "2")
    capsys.readouterr()
    papers.main(["001:39"])
    assert "    confirmed: it helps (-0.2000 ± " in capsys.readouterr().out


@pytest.mark.parametrize("words, sentence", [
    ("tinny", "no file of the library has all of: tinny; the nearest are: tiny .On Tiny Things"),
    ("small metadata", "no file of the library has all of: small metadata; the nearest are: "),
    ("001:3", "no file of the library has all of: 001:3; "), ("zzz", "without words, all are listed"),
])
def test_papers_that_finds_nothing_says_what_is_near(house, words, sentence):
    with pytest.raises(InputError, match=sentence):
        papers.main(words.split())


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
    config = study.load_study(str(file)).arms["grown"]
    lines = (directory / "grown-0.02-s1/metrics.jsonl").read_text().splitlines()
    written = {name for line in lines for name in json.loads(line)}
    assert written <= {*metrics_of(config), "step", "phase"}
    assert {*metrics_of(config)} - written <= {*PAIRED, "perf/mfu", "perf/save_s"}
    grown = result["arms"]["grown"]
    assert grown["tokens"] == 8 * 128 and [*grown["less_control"]["bpb"]["values"]] == ["1", "2"]
    per_token = [model.flops_per_token(model.ModelConfig(
        layers=n, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=16, vocab=258), 32) for n in (1, 2)]
    assert grown["flops"] == 4 * 128 * sum(per_token) + 1e6
    for seed in "12":
        ends = [json.loads((directory / f"{arm}-0.02-s{seed}/summary.json").read_text())["eval/a.test/bpb"]
                for arm in ("grown", "deep")]
        assert grown["less_control"]["bpb"]["values"][seed] == ends[0] - ends[1]
    assert out.splitlines()[-1].endswith("has study.json and study.png")
    assert {claim["verdict"] for claim in result["claims"]} == {"not judged"}
    assert "not judged: it helps" in out and "confirmed" not in out
    before = {p: p.stat().st_mtime_ns for p in directory.glob("*/metrics.jsonl")}
    assert go().count("| deep |") == 1
    assert before == {p: p.stat().st_mtime_ns for p in directory.glob("*/metrics.jsonl")}


def test_a_study_is_recorded_and_shown_by_the_real_commands(corpus, tmp_path):
    """In a house of its own, which is this one's code and one chapter of one small study."""
    root = tmp_path / "house"
    root.mkdir()
    for name in ("train.py", "model.py", "data.py", "lib", "tools"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name)
    small = FILE.replace("PATH", str(corpus))
    small = small.replace("steps=400", "steps=4").replace("peak_lrs=(1e-2, 2e-2, 4e-2),", "seeds=2,")
    write(root / "configs/growth/tiny.py", small)
    write(root / "README.md", "<!-- results -->\n<!-- /results -->\n")

    def go(*words: str, code: int = 0) -> str:
        line = [sys.executable, "train.py", *words]
        done = subprocess.run(line, capture_output=True, text=True, cwd=root, env=conftest.environment())
        assert done.returncode == code, done.stderr + done.stdout
        return done.stdout + done.stderr

    out = go("study", "configs/growth/tiny.py", "--record", "--json")
    record = json.loads((root / "results/growth/tiny.json").read_text())
    assert json.loads(out.splitlines()[-1]) == record
    assert record["command"] == "python train.py study configs/growth/tiny.py --record"
    for arm in ("deep", "grown"):
        for seed, end in record["arms"][arm]["bpb"]["by_seed"].items():
            summary = json.loads((root / f"runs/tiny/{arm}-own-s{seed}/summary.json").read_text())
            assert end == summary["eval/a.test/bpb"]
            assert record["made_by"][0]["versions"] == summary["versions"]
    assert "is written" in go("papers", "--write")
    assert "| 1 confirmed, 1 reversed, 1 not run |" in (root / "configs/README.md").read_text()
    found = go("papers", "TINY", "001:39")
    assert "001:39 configs/growth/tiny.py" in found and "confirmed: it helps" in found
    assert "error: no file of the library has all of: tinny; the nearest" in go("papers", "tinny", code=2)


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

"""Studies: runs that arms need, conclusions over arms, equal runs, claims without a control."""
import json
import math
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import conftest
import numpy as np
import optax
import pytest

import model
import train
from lib import statistics
from lib.config import ROOT, load_file, to_json
from lib.disk import write
from lib.errors import InputError
from lib.optim import adamw
from lib.sizes import sizes
from lib.study import Chart, needs_of
from train import parse

study = load_file(ROOT / "tools/study.py")
papers = load_file(ROOT / "tools/papers.py")

FILE = '''"""Arms that start from a run of a run."""
from dataclasses import replace
from functools import partial

import numpy as np

from data import DataConfig, Source, text
from lib.edits import stack
from lib.study import Claim, Study
from model import ModelConfig
from train import Config, Phase, Schedule

base = Config(
    model=ModelConfig(layers=1, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=16),
    data=DataConfig(sources={"a": Source(partial(text, path="PATH"))}, tokenizer="bytes", dev=0.1, test=0.1),
    phases=(Phase(steps=4, batch=4, seq=32),), schedule=Schedule(peak=1e-2, warmup=2),
    overlap=8, eval_every=4, eval_tokens=500, prompts=(),
)
second = replace(base, init_from="needs:base@4")


def read(model, context, run: str = ""):
    """An edit that reads a run."""
    assert run.startswith("/"), run
    return stack(model, context)


def slope(figures):
    """How the loss falls with a doubling of FLOPs, from arm to arm."""
    flops, loss = (np.array([own[name].mean() for own in figures.values()]) for name in ("flops", "bpb"))
    return float(np.polyfit(np.log2(flops), loss, 1)[0])


def ends(figures):
    """Two numbers."""
    return {arm: own["bpb"].mean() for arm, own in figures.items()}


study = Study(
    question="Does a start help?",
    needs={"base": base, "second": second},
    arms={
        "plain": base,
        "again": replace(second, init_from="needs:second"),
        "reads": replace(base, phases=(replace(base.phases[0], edits=(partial(read, run="needs:base"),)),)),
    },
    quick={"phases.*.steps": 2, "eval_every": 2},
    measures={"trained": "model/trained"},
    conclusions={"slope": slope, "end": ends},
    claims=(
        Claim(says="it reads", arm="again", control=None, below=3.0),
        Claim(says="loss falls", measure="slope", below=0.0),
        Claim(says="that end", measure="end: again", above=3.0),
        Claim(says="more is spent", arm="again", measure="flops", above=0.0),
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


class Trainer:
    """In place of the subprocesses: runs of 1e6 FLOPs that end the lower the more they start from."""

    def __init__(self):
        self.made, self.fail, self.pid, self.code = [], {}, 1, 0

    def __call__(self, line, stdout, stderr, env):
        config, _ = parse([str(word) for word in line[2:]])
        run = Path(config.runs) / config.name
        self.made.append(f"{run.parent.name}/{run.name}")
        self.code = self.fail.get(config.name, 0)
        if self.code:
            return self
        start = config.init_from.split("@")[0]
        assert not start or (Path(start) / "summary.json").is_file()
        end = 4 - 0.5 * bool(start) - 0.5 * ("second" in start) + 0.01 * config.seed
        last = {"train/tokens": 400, "train/flops": 1e6, "eval/a/bpb": end, "eval/a.test/bpb": end,
                "model/params": 100, "model/trained": 90, "train/loss": end}
        write(run / "metrics.jsonl", json.dumps(last))
        write(run / "config.json", json.dumps(to_json(config)))
        write(run / "summary.json", json.dumps(dict.fromkeys("versions commit host device devices".split())))
        return self

    def wait(self):
        """The exit code."""
        return self.code


@pytest.fixture
def trainer(monkeypatch) -> Trainer:
    """Runs that are made up."""
    fake = Trainer()
    monkeypatch.setattr(study.subprocess, "Popen", fake)
    monkeypatch.setattr(study, "gpus", list)
    return fake


# ------------------------------------------------------------------------------------------ what is needed

def test_needed_runs_are_made_once_a_seed_before_those_that_need_them_and_are_charged(file, trainer, capsys):
    result = call(file, "--seeds", "2")
    runs = [made.removeprefix("tiny/") for made in trainer.made]
    assert set(runs[:2]) == {"base-own-s1", "base-own-s2"}
    assert set(runs[2:4]) == {"second-own-s1", "second-own-s2"}
    # plain is base, so it is made by that name already
    assert sorted(runs[4:]) == [f"{arm}-own-s{seed}" for arm in ("again", "reads") for seed in (1, 2)]
    assert (file.parent / "runs/tiny/plain-own-s1").is_symlink()
    flops = {arm: own["flops"] for arm, own in result["arms"].items()}
    assert flops == {"plain": 1e6, "again": 3e6, "reads": 2e6}
    assert result["arms"]["again"]["needs"] == ["second", "base"]
    assert result["needs"]["second"]["flops"] == 1e6
    assert result["needs"]["base"]["runs"][2]["bpb"] == pytest.approx(4.02)
    assert result["cost"]["flops"] == 2 * (3 + 2) * 1e6  # three arms and two needed runs, each once
    config = json.loads((file.parent / "runs/tiny/second-own-s2/config.json").read_text())
    assert config["init_from"] == f"{file.parent}/runs/tiny/base-own-s2@4" and config["seed"] == 2
    out = capsys.readouterr().out
    assert "base-own-s1: 4.0100 bits per byte on dev" in out
    assert "again: its FLOPs are with those of the runs that it needs: second 1e+06, base 1e+06" in out
    made = len(trainer.made)
    call(file, "--seeds", "2")
    assert len(trainer.made) == made
    call(file, "--seeds", "2", "--arms", "reads", "--quick")
    assert trainer.made[made:] == ["tiny-quick/base-own-s1", "tiny-quick/base-own-s2",
                                   "tiny-quick/reads-own-s1", "tiny-quick/reads-own-s2"]
    quick = json.loads((file.parent / "runs/tiny-quick/base-own-s1/config.json").read_text())
    assert quick["phases"][0]["steps"] == 2


def test_tuning_needs_runs_of_its_own_seed(file, trainer):
    file.write_text(file.read_text().replace("quick=", "peak_lrs=(1e-2, 2e-2), quick="))
    result = call(file, "--seeds", "1", "--arms", "again")
    assert {"tiny/base-own-s0", "tiny/second-own-s0", "tiny/second-own-s1"} <= {*trainer.made}
    assert not any(made.startswith("tiny/second-0") for made in trainer.made)
    tuned = [made for made in trainer.made if made.endswith("s0")]
    assert result["cost"]["tuning_flops"] >= len(tuned) * 1e6


def test_what_needs_a_run_that_failed_is_not_made(file, trainer):
    trainer.fail = {"second-own-s2": 1}
    result = call(file, "--seeds", "2")
    assert result["failed"]["again-own-s2"] == "it needs second-own-s2"
    assert [*result["arms"]["again"]["runs"]] == [1] and "tiny/again-own-s2" not in trainer.made


def test_a_run_whose_need_was_made_anew_is_refused(file, trainer):
    call(file, "--seeds", "1")
    place = file.parent / "runs/tiny/second-own-s1/summary.json"
    write(place, place.read_text())
    call(file, "--seeds", "1")
    write(place, json.dumps(json.loads(place.read_text()) | {"host": "another"}))
    with pytest.raises(InputError, match="again-own-s1 needs second-own-s1, which was made anew since; del"):
        call(file, "--seeds", "1")


REFUSED = [
    ('"needs:second"', '"needs:secnod"', "the run needed by arms.again.init_from is 'secnod'; did you"),
    ('run="needs:base"', 'run="needs:bsae"', "arms.reads.phases.0.edits.0.run is 'bsae'; did you mean"),
    ('"needs:base@4"', '"needs:first"', "needed by needs.second.init_from is 'first'; allowed are: base"),
    ('"needs:base@4"', '"needs:second"', "needs.second needs itself, by way of second; allowed are runs"),
    ('{"base": base,', '{"base": replace(base, init_from="needs:second"),', "needs itself, by way of"),
    ('{"base": base,', '{"plain": base, "base": base,', "a name in needs is 'plain', which is an arm's"),
    ('{"base": base,', '{"base": 3,', "needs.base is 3; allowed is a Config"),
    ('"model/trained"', '"model/trainde"', "measures.trained is 'model/trainde', which a run of the arm"),
    ('{"slope": slope,', '{"slope": 3,', "conclusions.slope is 3 .int.; allowed is a function"),
    ('measure="slope"', 'measure="slop"', "claims.1 has no arm, and its measure 'slop' is no concl"),
    ('control=None, below=3.0', 'control=None, below=3.0, measure="speed_up_flops"', "compares two arms"),
    ('"again", control=None', '"agian", control=None', "claims.0.arm is 'agian'; did you mean 'again'"),
]


@pytest.mark.parametrize("old, new, sentence", REFUSED)
def test_mistakes_are_refused_when_the_file_is_loaded(file, old, new, sentence):
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(InputError, match=re.escape(f"config file {file}, line ")) as caught:
        study.load_study(str(file))
    assert re.search(sentence, str(caught.value)), caught.value


def test_by_hand_an_arm_says_what_it_needs_and_a_need_is_trained_like_an_arm(file, capsys):
    assert train.main([f"{file}:again"]) == 2
    said = capsys.readouterr().err
    assert f"init_from is 'needs:second', a run that `python train.py study {file}` makes first" in said
    assert f"by hand, `python train.py {file}:second` makes one, and --init_from RUN names it" in said
    config, _ = parse([f"{file}:second", "--init_from", "runs/base"])
    assert config.init_from == "runs/base" and not needs_of(config)
    assert needs_of(parse([f"{file}:reads"])[0]) == {"phases.0.edits.0.run": "base"}


# --------------------------------------------------------------- conclusions, and claims of them

def test_conclusions_and_claims_without_a_control(file, trainer, capsys):
    result = call(file, "--seeds", "3")
    # plain ends at 4.02 with 1 of FLOPs, again at 3.02 with 3, reads at 4.02 with 2
    expected = np.polyfit(np.log2([1, 3, 2]), [4.02, 3.02, 4.02], 1)[0]
    found = result["conclusions"]
    assert found["slope"]["value"] == pytest.approx(expected) and found["slope"]["half"] < 1e-6
    t = statistics.interval([3.01, 3.02, 3.03])
    assert (found["end: again"]["value"], found["end: again"]["half"]) == pytest.approx(t)
    assert [claim["verdict"] for claim in result["claims"]] == [
        "undecided", "confirmed", "undecided", "confirmed"]
    own, law, end, spent = result["claims"]
    assert own["values"] == pytest.approx({1: 3.01, 2: 3.02, 3: 3.03}) and own["control"] is None
    assert law["mean"] == found["slope"]["value"] and spent["mean"] == 2e6
    out = capsys.readouterr().out
    assert "| slope | " in out and "| end: again | 3.02 ± 0.02484 |" in out
    assert "undecided: it reads (bpb, again: 3.0200 ± 0.0248; claimed below 3.0)" in out
    assert "confirmed: loss falls (slope: " in out
    assert result["measures"]["trained"]["again"]["own"][0] == 90
    partly = call(file, "--seeds", "3", "--arms", "again")
    assert partly["conclusions"] == {} and len(partly["claims"]) == 2


def test_the_interval_of_a_conclusion_is_student_s_for_a_mean():
    values = np.array([1.0, 2.0, 4.0, 8.0])

    def conclude(function, values):
        return statistics.conclude("x", function, {"a": {"bpb": values, "y": values**2}})["x"]

    for n in (2, 3, 4):
        found = conclude(lambda figures: figures["a"]["bpb"].mean(), values[:n])
        assert (found["value"], found["half"]) == pytest.approx(statistics.interval(values[:n].tolist()))
    many = np.arange(20.0)
    found = conclude(lambda figures: figures["a"]["bpb"].mean(), many)
    assert found["half"] == pytest.approx(statistics.interval(many.tolist())[1], rel=0.05)
    assert found == conclude(lambda figures: figures["a"]["bpb"].mean(), many)
    assert conclude(lambda figures: figures["a"]["bpb"].mean(), values[:1])["half"] is None
    for n in (2, 3, 6, 9):
        drawn, shares = statistics.resamples(n)
        assert drawn.shape[1] == n and shares.sum() == pytest.approx(1)
    # where all seeds are one and the same there is no correlation: that resample is left out
    found = conclude(lambda f: np.corrcoef(f["a"]["bpb"], f["a"]["y"])[0, 1], values)
    assert 0.9 < found["value"] < 1 and 0 < found["half"] < 1
    assert conclude(lambda figures: math.nan, values)["half"] is None
    with pytest.raises(InputError, match="the conclusion 'x' ends in KeyError: 'z'; allowed is figures"):
        conclude(lambda figures: figures["z"], values)


def recorded(file, monkeypatch) -> Path:
    """A house that holds the study's file, with its record of three seeds."""
    root = file.parent / "house"
    for place, text in {"configs/growth/tiny.py": file.read_text(),
                        "README.md": "<!-- results -->\n<!-- /results -->\n"}.items():
        write(root / place, text)
    monkeypatch.setattr(study, "ROOT", root)
    monkeypatch.setattr(papers, "ROOT", root)
    place = root / "configs/growth/tiny.py"
    study.main([str(place), "--runs", str(root / "runs"), "--record", "--seeds", "3"])
    return root


def test_a_record_and_its_pages_have_them(file, trainer, monkeypatch):
    root = recorded(file, monkeypatch)
    record = json.loads((root / "results/growth/tiny.json").read_text())
    assert record["needs"] == {name: dict(tokens=400, flops=1e6) for name in ("base", "second")}
    assert record["arms"]["again"]["needs"] == ["second", "base"]
    assert record["conclusions"]["slope"]["value"] < 0
    assert [claim["control"] for claim in record["claims"]] == [None, None, None, "plain"]
    ledger = papers.pages(root)[root / "results/README.md"]
    assert "| it reads | bpb: again | 3.0200 ± 0.0248 | below 3 | undecided |" in ledger
    assert "| loss falls | slope | -0." in ledger and "| flops: again less plain | +2000000.0000 " in ledger


# ------------------------------------------------------------------------------------------------- charts

CHART = '''
def losses(figures):
    """Losses of the arms over FLOPs, and a line of 3."""
    flops = [own["flops"].mean() for own in figures.values()]
    return {"arms": (flops, [own["bpb"] for own in figures.values()]), "three": (range(1, 21), 20 * [3])}


charts = [Chart(title="all of them", curves=losses, across="FLOPs"),
          Chart(title="again", curves=losses, across="FLOPs", up="bits")]
study = '''


@pytest.fixture
def charted(file) -> Path:
    """The study's file, with charts."""
    text = file.read_text().replace("import Claim,", "import Chart, Claim,").replace("study = ", CHART, 1)
    file.write_text(text.replace("    quick=", "    charts=charts,\n    quick="))
    return file


def test_charts_of_all_arms_are_in_the_result_and_in_the_picture(charted, trainer, monkeypatch):
    drawn = []
    monkeypatch.setattr(study, "draw_chart", lambda panel, chart: drawn.append(chart))
    result = call(charted, "--seeds", "3")
    first, second = result["charts"]
    assert drawn == [first, second]
    assert (first["title"], first["across"], first["up"]) == ("all of them", "FLOPs", "bits per byte")
    assert (second["title"], second["up"]) == ("again", "bits")
    arms = first["curves"]["arms"]
    assert arms["x"] == [1e6, 3e6, 2e6]
    assert (arms["y"][1], arms["half"][1]) == pytest.approx(statistics.interval([3.01, 3.02, 3.03]))
    assert first["curves"]["three"] == dict(x=[*range(1, 21)], y=20 * [3.0], half=None)
    assert json.loads((charted.parent / "runs/tiny/study.json").read_text())["charts"] == result["charts"]


def test_a_record_s_page_shows_the_charts(charted, trainer, monkeypatch):
    root = recorded(charted, monkeypatch)
    assert (root / "results/growth/tiny.png").read_bytes()[1:4] == b"PNG"
    assert "](growth/tiny.png)" in papers.pages(root)[root / "results/README.md"]


def test_a_record_without_charts_has_no_picture(file, trainer, monkeypatch):
    root = recorded(file, monkeypatch)
    assert not (root / "results/growth/tiny.png").exists()
    assert ".png" not in papers.pages(root)[root / "results/README.md"]


def test_without_all_arms_there_is_a_curve_for_each(charted, trainer, monkeypatch):
    drawn = []
    curves = study.draw_curves
    monkeypatch.setattr(study, "draw_curves", lambda *told: drawn.append(told) or curves(*told))
    assert call(charted, "--seeds", "2", "--arms", "again")["charts"] == []
    assert len(drawn) == 1
    assert (charted.parent / "runs/tiny/study.png").read_bytes()[1:4] == b"PNG"


def test_a_chart_has_a_line_for_each_curve_and_marks_for_few_places(charted, trainer):
    result = call(charted, "--seeds", "2")
    panels = study.draw(result).axes
    assert [panel.get_title() for panel in panels] == ["all of them", "again"]
    labels = panels[0].get_legend_handles_labels()[1]
    assert labels == ["arms", "three"] and panels[0].get_xscale() == "log"
    arms, three = (lines[0] for lines in panels[0].containers)
    assert [*arms.get_xdata()] == [1e6, 3e6, 2e6] and arms.get_marker() == "o"
    assert [*three.get_ydata()] == 20 * [3.0] and three.get_marker() in ("", "None")
    few = {"a": dict(x=[1, 2, 4], y=[3.0, 1.0, 2.0], half=None)}
    panel = study.draw_charts([dict(title="t", across="x", up="y", curves=few)]).axes[0]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["1", "2", "4"]


@pytest.mark.parametrize("old, new, said", [
    ('across="FLOPs"', 'acros="FLOPs"', "Chart has no field 'acros'; did you mean 'across'?"),
    ('title="again"', 'title=""', "chart.title is ''; allowed is a text, not empty"),
    ("curves=losses, across", "curves=3, across", "chart.curves is 3 (int); allowed is a function"),
    ("curves=losses, across", "curves=read, across", "chart.curves is read, which is not told its context"),
    ("charts=charts", "charts=3", "charts is 3"),
    ("charts=charts", "charts=[3]", "charts.0 is 3"),
])
def test_a_chart_that_is_none_is_refused_when_the_file_is_loaded(charted, old, new, said):
    text = charted.read_text()
    assert old in text
    charted.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=re.escape(said)):
        study.load_study(str(charted))


def given(figures, value=None):
    """A chart's curves: a value, or else a measure that is not there."""
    return figures["a"]["own"] if value is None else value


@pytest.mark.parametrize("value, said", [
    ([1, 2], "the chart 'all' ends in AttributeError: 'list' object has no attribute 'items'; allowed"),
    ({"a": 1}, "the chart 'all' ends in TypeError: "),
    ({"a": [[1, 2], [1]]}, "curves: given of "),
    ({"a": [1, [1]]}, "curves: given of "),
    ({"a": [[1], [[[1]]]]}, "curves: given of "),
    (None, "the chart 'all' ends in KeyError: 'own'; allowed is figures -> curves"),
])
def test_what_a_chart_s_function_may_not_give(value, said):
    chart = Chart(title="all", curves=partial(given, value=value), across="x")
    with pytest.raises(InputError, match=re.escape(said)):
        study.charted(chart, {"a": {"bpb": np.ones(2)}})


# --------------------------------------------------------------------------------------------- equal runs

def test_a_run_of_an_equal_config_is_made_once_whichever_study_asks(file, trainer, capsys):
    other = file.with_name("other.py")
    text = file.read_text().replace('"plain": base', '"first": base')
    other.write_text(text)
    call(file, "--seeds", "1")
    made = len(trainer.made)
    capsys.readouterr()
    result = call(other, "--seeds", "1", "--arms", "again")
    assert len(trainer.made) == made and result["arms"]["again"]["flops"] == 3e6
    run = file.parent / "runs/other/again-own-s1"
    assert run.is_symlink() and run.resolve() == (file.parent / "runs/tiny/again-own-s1").resolve()
    assert "again-own-s1 is " in capsys.readouterr().out
    assert call(other, "--seeds", "1", "--arms", "again")["arms"]["again"]["flops"] == 3e6
    # `reads` has a function of the file's own, which is another file's now, though of the same source
    call(other, "--seeds", "1")
    assert trainer.made[made:] == ["other/reads-own-s1"]
    changed = file.with_name("changed.py")
    changed.write_text(text.replace("mlp=16", "mlp=16, norm_eps=1e-4"))
    call(changed, "--seeds", "1", "--arms", "again")
    assert [run for run in trainer.made if run.startswith("changed/")] == [
        f"changed/{name}-own-s1" for name in ("base", "second", "again")]


def test_what_was_linked_to_may_go_or_change(file, trainer):
    other = file.with_name("other.py")
    other.write_text(file.read_text())
    call(file, "--seeds", "1", "--arms", "plain")
    call(other, "--seeds", "1", "--arms", "plain")
    link, made = file.parent / "runs/other/plain-own-s1", file.parent / "runs/tiny/plain-own-s1"
    assert trainer.made == ["tiny/plain-own-s1"] and link.is_symlink()
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"clip": 3.0}))
    call(other, "--seeds", "1", "--arms", "plain")
    assert not link.is_symlink() and trainer.made[1:] == ["other/plain-own-s1"]
    third = file.with_name("third.py")
    third.write_text(file.read_text())
    call(third, "--seeds", "1", "--arms", "plain")
    link = file.parent / "runs/third/plain-own-s1"
    assert link.resolve() == (file.parent / "runs/other/plain-own-s1").resolve() and len(trainer.made) == 2
    shutil.rmtree(link.resolve())
    call(third, "--seeds", "1", "--arms", "plain")
    assert not link.is_symlink() and trainer.made[2:] == ["third/plain-own-s1"]
    (link / ".key").write_text("of other code")
    call(other, "--seeds", "1", "--arms", "plain")
    assert trainer.made[3:] == ["other/plain-own-s1"]


def test_other_code_makes_other_runs(file, trainer, monkeypatch):
    other = file.with_name("other.py")
    other.write_text(file.read_text())
    call(file, "--seeds", "1", "--arms", "plain")
    monkeypatch.setattr(study.equal, "house", lambda: ["another"])
    call(other, "--seeds", "1", "--arms", "plain")
    assert trainer.made == ["tiny/plain-own-s1", "other/plain-own-s1"]


# ------------------------------------------------------------------------------------ what a phase trains

def test_sizes_are_of_what_is_trained():
    shape = model.ModelConfig(layers=2, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=16, vocab=64)
    every = sizes(shape, adamw, frozenset())
    whole = model.count(shape)
    assert every["model/trained"] == whole
    groups = len(adamw(model.table(shape)))
    assert every["model/opt_bytes"] == 2 * 4 * whole + 4 * groups  # two moments, and a count
    frozen = sizes(shape, adamw, frozenset({"embed"}))
    assert whole - frozen["model/trained"] == 64 * 16
    assert frozen["model/opt_bytes"] == every["model/opt_bytes"]

    def plain(table):
        return {param.group: optax.identity() for param in table.values()}

    assert sizes(shape, plain, frozenset())["model/opt_bytes"] == 0

    def without_embed(table):
        return {group: own for group, own in adamw(table).items() if group != "embed"}

    left_out = sizes(shape, without_embed, frozenset())
    assert left_out["model/trained"] == frozen["model/trained"]
    assert every["model/opt_bytes"] - left_out["model/opt_bytes"] == 2 * 4 * 64 * 16 + 4


# ------------------------------------------------------------------------------------------ a whole study

def test_a_study_with_needs_by_the_command_line(file):
    """Each arm starts from its own run, rows say what is trained, and what was spent adds up."""
    text = file.read_text().replace('"plain": base', '"plain": frozen')
    frozen = 'frozen = replace(base, phases=(replace(base.phases[0], lr={"embed": 0.0}),))\n\n\ndef read('
    file.write_text(text.replace("def read(", frozen, 1))
    line = [sys.executable, ROOT / "train.py", "study", file, "--seeds", "1", "--quick", "--runs",
            file.parent / "runs", "--arms", "again"]
    file.write_text(file.read_text().replace("@4", "@2"))  # where --quick ends
    done = subprocess.run(line, capture_output=True, text=True, env=conftest.environment())
    assert done.returncode == 0, done.stderr + done.stdout
    directory = file.parent / "runs/tiny-quick"
    result = json.loads((directory / "study.json").read_text())
    one = result["needs"]["base"]["flops"]
    assert result["arms"]["again"]["flops"] == 3 * one == 3 * result["arms"]["plain"]["flops"]
    trained = result["measures"]["trained"]
    assert trained["again"]["own"][0] - trained["plain"]["own"][0] == 258 * 16
    first, last = (train.load(str(directory / f"{run}-own-s1"))[0] for run in ("base", "again"))
    assert max(float(abs(first[name] - last[name]).max()) for name in first) < 0.3


# ------------------------------------------------------------------------------------------------ the docs

def test_the_example_of_the_docs_is_a_study(tmp_path):
    """It is accepted with --quick and without, its arms find what they need, its law is fitted."""
    page = (ROOT / "docs/extending.md").read_text("utf-8")
    code = re.search(r"(?ms)tested in tests/test_seams_study.py -->\n```python\n(.*?)^```", page).group(1)
    file = tmp_path / "law.py"
    file.write_text(code)
    for words in [], ["--quick"]:
        request = study.read(study.arguments_of([str(file), *words]))
        for name in [*request.arms, "teacher"]:
            config, _ = parse([str(word) for word in study.command(request, study.Job(name, None, 1))])
            train.check(config)
            assert bool(config.init_from.endswith("teacher-own-s1")) == (name == "on")
    fall = request.study.measures["fall"]
    assert fall([{"train/loss": 3.0}, {"eval/stdlib/bpb": 9.0}, {"train/loss": 2.25}]) == 0.75
    exponent = request.study.conclusions["exponent"]
    params = {arm: np.array([float(10 ** i)] * 3) for i, arm in enumerate(("layers1", "layers2", "layers4"))}
    figures = {arm: {"bpb": size**-0.5, "model/params": size} for arm, size in params.items()}
    assert statistics.conclude("exponent", exponent, figures)["exponent"] == pytest.approx(
        dict(value=-0.5, half=0.0), abs=1e-9)
    (chart,) = request.study.charts
    drawn = study.charted(chart, figures)["curves"]["loss"]
    assert (drawn["x"], drawn["y"]) == ([1, 10, 100], pytest.approx([1, 10**-0.5, 0.1]))

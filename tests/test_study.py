"""tools/study.py: a study's runs, its comparisons and verdicts; the runs are made up."""
import contextlib
import io
import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest
from study_cases import (
    OWN,
    Trainer,
    call,
    change,
    make_up_runs,
    read_json,
    runs_of,
    study,
    write_file,
)

from lib.config import ROOT
from lib.errors import InputError


@pytest.fixture
def file(tmp_path, corpus) -> Path:
    """A study's file."""
    return write_file(tmp_path / "tiny.py", corpus)


@pytest.fixture
def trainer(monkeypatch) -> Trainer:
    """Runs are made up, and noted."""
    return make_up_runs(monkeypatch)


class Made(NamedTuple):
    """A study of made-up runs."""

    file: Path
    result: dict
    runs: list[str]  # that were made
    out: str  # what was printed

    @property
    def directory(self) -> Path:
        """Where its runs are, if it is not quick."""
        return runs_of(self.file) / "tiny"


def make(directory: Path, corpus: Path, *arguments: str) -> Made:
    """Run the study with made-up runs."""
    file = write_file(directory / "tiny.py", corpus)
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        trainer = make_up_runs(patch)
        result = call(file, *arguments)
    return Made(file, result, trainer.made, out.getvalue())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus) -> Made:
    """The study with three seeds."""
    return make(tmp_path_factory.mktemp("whole"), corpus, "--seeds", "3")


@pytest.fixture(scope="module")
def quick(tmp_path_factory, corpus) -> Made:
    """The quick study."""
    return make(tmp_path_factory.mktemp("quick"), corpus, "--quick", "--json")


# ---------------------------------------------------------------------------------- a whole study


TUNING = [
    "deep-0.01-s0",
    "deep-0.02-s0",
    "deep-0.04-s0",
    "grown-0.01-s0",
    "grown-0.02-s0",
    "grown-0.04-s0",
    "grown-0.08-s0",
    "grown-0.16-s0",
]
COMPARED = [
    "deep-0.02-s1",
    "deep-0.02-s2",
    "deep-0.02-s3",
    "grown-0.08-s1",
    "grown-0.08-s2",
    "grown-0.08-s3",
]


def test_each_arm_is_tuned_on_seed_0_and_run_at_its_rate_with_the_others(whole):
    """The grid is extended for `grown`, twice; no run is made two times."""
    assert sorted(whole.runs) == sorted(TUNING + COMPARED)


def test_an_arm_has_its_best_rate_and_that_is_bracketed(whole):
    arms = whole.result["arms"]
    rates = {name: (arm["rate"], arm["bracketed"]) for name, arm in arms.items()}
    assert rates == {"deep": (0.02, True), "grown": (0.08, True)}


def test_arms_are_compared_at_equal_seeds(whole):
    """Each seed has the same difference, so there is no interval to speak of."""
    gap = whole.result["arms"]["grown"]["less_control"]["bpb"]
    assert [*gap["values"]] == [1, 2, 3]
    assert gap["mean"] == pytest.approx(-0.2)
    assert gap["half"] < 1e-9


def test_a_speed_up_is_of_tokens_and_of_flops_with_those_of_a_teacher(whole):
    """deep's end, after four evaluations, is reached by grown at 3.8; its teacher took 1 more."""
    less = whole.result["arms"]["grown"]["less_control"]
    assert less["speed_up_tokens"]["mean"] == pytest.approx(4 / 3.8 - 1)
    assert less["speed_up_flops"]["mean"] == pytest.approx(4 / 4.8 - 1)


def test_claims_about_arms_that_run_are_judged(whole):
    """The claim about the third arm is not."""
    helps, learns = whole.result["claims"]
    assert helps["verdict"] == "confirmed"
    assert learns["verdict"] == "reversed"
    assert learns["mean"] == pytest.approx(-0.4)


def test_the_cost_of_tuning_is_counted_by_itself(whole):
    cost = whole.result["cost"]
    assert cost["tuning_tokens"] == len(TUNING) * 400
    assert cost["tokens"] == len(COMPARED) * 400


def test_a_study_leaves_a_file_a_picture_and_a_table(whole):
    assert read_json(whole.directory / "study.json")["control"] == "deep"
    assert (whole.directory / "study.png").read_bytes()[1:4] == b"PNG"
    assert "| grown | 0.08 | 400 |" in whole.out


def test_runs_that_are_complete_are_not_made_again(whole, trainer):
    again = call(whole.file, "--seeds", "3")
    assert again["arms"].keys() == whole.result["arms"].keys()
    assert trainer.made == []
    call(whole.file, "--seeds", "4")
    assert trainer.made == ["deep-0.02-s4", "grown-0.08-s4"]


def test_a_quick_study_gives_no_verdict(quick):
    verdicts = [claim["verdict"] for claim in quick.result["claims"]]
    assert verdicts == ["not judged", "not judged"]
    lines = quick.out.splitlines()
    assert "--quick: too short to say anything of the question" in lines
    unjudged = [line for line in lines if line.startswith("not judged: ")]
    assert len(unjudged) == 2
    assert "confirmed" not in quick.out
    assert not (quick.file.parent / "results").exists()


def test_json_prints_the_record_on_the_last_line(quick):
    *_, last = quick.out.splitlines()
    assert json.loads(last)["quick"]


# -------------------------------------------------------------------------------- rates and seeds


def test_a_phase_s_own_schedule_keeps_its_ratio_to_the_run_s(whole):
    """The peak of grown's first phase is twice that of the run."""
    grown = read_json(whole.directory / "grown-0.04-s0/config.json")
    first, second = grown["phases"]
    assert grown["schedule"]["peak"] == 0.04
    assert first["schedule"]["peak"] == 0.08
    assert second["schedule"] is None


def test_a_group_s_own_schedule_keeps_its_ratio_to_the_run_s(file, trainer):
    """Its peak is three times that of the run."""
    change(file, "steps=400,", "steps=400, lr=dict(embed=Schedule(peak=3e-2)),")
    call(file, "--seeds", "1")
    deep = read_json(runs_of(file) / "tiny/deep-0.04-s0/config.json")
    assert deep["schedule"]["peak"] == 0.04
    assert deep["phases"][0]["lr"]["embed"]["peak"] == 0.12


def test_an_optimum_that_is_not_bracketed_is_reported(file, trainer, capsys):
    trainer.best["grown"] = 10.0
    grown = call(file, "--seeds", "1")["arms"]["grown"]
    assert grown["bracketed"] is False
    out = capsys.readouterr().out
    assert "| grown | 0.16 (!) |" in out
    assert "(!) grown: its best rate is an end of those tried" in out


def test_one_seed_gives_figures_without_intervals(file, trainer, capsys):
    result = call(file, "--seeds", "1")
    assert result["arms"]["grown"]["less_control"]["bpb"]["half"] is None
    assert [claim["verdict"] for claim in result["claims"]] == ["undecided"] * 2
    assert "one seed: no intervals" in capsys.readouterr().out


def test_a_measure_of_the_file_s_own_decides_on_rates_and_claims_and_is_shown(
    file, trainer, capsys
):
    """It is the made-up loss upside down, so the worst rate wins, which is below the grid."""
    file.write_text(file.read_text() + OWN)
    result = call(file, "--seeds", "2")
    assert result["arms"]["deep"]["rate"] == 0.0025
    assert result["arms"]["grown"]["rate"] == 0.0025

    deep_end = 1 + math.log2(0.0025 / 2e-2) ** 2
    grown_end = 0.8 + math.log2(0.0025 / 8e-2) ** 2
    mean_of_seeds = 0.15  # (0.1 + 0.2) / 2, which seeds 1 and 2 add
    own = result["measures"]["own"]
    assert own["deep"]["own"][0] == pytest.approx(-deep_end - mean_of_seeds)
    assert own["deep"]["mean"] == 0
    assert own["grown"]["mean"] == pytest.approx(deep_end - grown_end)
    (claim,) = result["claims"]
    assert claim["mean"] == own["grown"]["mean"]
    assert claim["verdict"] == "reversed"
    assert f"| own | {-deep_end - mean_of_seeds:.4f} ± " in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- the runs


@pytest.fixture
def pinned(monkeypatch) -> list[tuple[int, tuple]]:
    """(process, cores) of each time that a run is put on some of the five cores that there are."""
    found = []

    def noted(pid, cores):
        found.append((pid, tuple(cores)))

    monkeypatch.setattr(study.os, "sched_getaffinity", lambda pid: {4, 5, 6, 7, 8}, raising=False)
    monkeypatch.setattr(study.os, "sched_setaffinity", noted, raising=False)
    monkeypatch.setattr(study.os, "cpu_count", lambda: 5)
    return found


def test_a_run_by_itself_has_all_cores(file, trainer, pinned):
    call(file, "--seeds", "1")
    assert trainer.made
    assert not pinned


def test_runs_side_by_side_share_the_cores(file, trainer, pinned):
    call(file, "--seeds", "1", "--jobs", "2")
    assert len(pinned) == len(trainer.made)
    assert set(pinned) == {(1, (4, 6, 8)), (1, (5, 7))}


def test_more_runs_at_a_time_than_cores_are_refused(file, trainer, pinned):
    with pytest.raises(InputError, match="--jobs is 6; allowed is 1 to 5"):
        call(file, "--jobs", "6")


def test_a_run_that_fails_is_reported_and_left_out_with_its_pair(file, trainer, capsys):
    trainer.fail = {"grown-0.08-s2": 1}
    result = call(file, "--seeds", "3")
    gap = result["arms"]["grown"]["less_control"]["bpb"]
    assert [*gap["values"]] == [1, 3]
    assert "grown-0.08-s2 failed, exit code 1: error: boom" in capsys.readouterr().out


def test_a_run_made_by_another_config_is_not_taken_for_this_one_s(file, trainer, whole):
    change(file, "mlp=16", "mlp=24")
    with pytest.raises(InputError, match="another config .model.mlp.*delete it"):
        study.main([str(file), "--runs", str(runs_of(whole.file)), "--seeds", "1"])


def test_the_shape_and_tokenizer_of_a_run_to_start_from_are_no_change(file, trainer):
    change(file, "deep = Config(", 'deep = Config(init_from="base",')
    call(file, "--seeds", "1")
    place = runs_of(file) / "tiny/deep-0.02-s1/config.json"
    config = read_json(place)
    config["model"]["mlp"] = 64
    config["data"]["tokenizer"] = "base/tokenizer.model"
    place.write_text(json.dumps(config))
    call(file, "--seeds", "1")

    place.write_text(json.dumps(config | {"clip": 2.0}))
    with pytest.raises(InputError, match="another config .clip"):
        call(file, "--seeds", "1")


def test_a_metric_that_a_run_turns_out_not_to_have_is_refused_after_the_first_run(file, trainer):
    """An eval of the config's own may give any metric, so the file alone does not tell."""
    own = 'def own(params, apply):\n    return {"own/x": 1.0}\n'
    change(file, "deep = Config(", f"{own}\n\ndeep = Config(")
    change(file, "prompts=(),", "prompts=(), evals=(own,),")
    change(file, '"train/loss"', '"own/y"')
    sentence = (
        "the claim 'it learns' has the measure 'own/y', which run "
        "deep-0.01-s0 does not have; allowed are: train/tokens"
    )
    with pytest.raises(InputError, match=sentence):
        call(file)
    assert trainer.made == ["deep-0.01-s0"]


# ------------------------------------------------------------------- mistakes of the command line


MISTAKES = [
    ("--arms grown,thrid", "defines no arm 'thrid'; did you mean 'third'?"),
    ("--arms grown,x", "defines no arm 'x'; allowed are: deep, grown, third"),
    ("--seeds 0", "--seeds is 0; allowed is 1 or more"),
    ("--sedes 2", "unrecognized arguments"),
    ("--jobs 0", "--jobs is 0; allowed is 1 to"),
]


@pytest.mark.parametrize("words, sentence", MISTAKES)
def test_a_mistake_of_the_command_line_is_one_sentence(file, trainer, words, sentence):
    with pytest.raises(InputError, match=sentence):
        call(file, *words.split())
    assert not trainer.made


def test_a_file_that_is_not_there_is_one_sentence(file, trainer):
    with pytest.raises(InputError, match="neither a config file"):
        call(file.with_name("tyni.py"))


def test_quick_is_refused_where_a_study_has_no_quick_fields(file, trainer):
    change(file, 'quick={"phases.*.steps": 4}', "quick={}")
    with pytest.raises(InputError, match="has no `quick` in its study"):
        call(file, "--quick")


def test_the_directory_of_a_study_is_one_helpful_sentence(whole):
    sentence = "is the directory of a study; allowed is the study's"
    with pytest.raises(InputError, match=sentence):
        study.main([str(whole.directory)])


def test_the_directory_of_a_run_is_one_helpful_sentence(whole):
    with pytest.raises(InputError, match="is the directory of a run; allowed is"):
        study.main([str(whole.directory / "deep-0.02-s1")])


def test_an_arm_is_one_helpful_sentence(file):
    sentence = "names an arm; allowed is the file, with --arms deep"
    with pytest.raises(InputError, match=sentence):
        study.main([f"{file}:deep"])


def test_a_file_of_one_config_is_one_helpful_sentence():
    with pytest.raises(InputError, match="which `python train.py .*quickstart.py`"):
        study.main([str(ROOT / "configs/quickstart.py")])

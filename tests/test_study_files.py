"""lib/study.py: what a study's file may say, and the mistakes that are refused as it is loaded."""
import re
from dataclasses import replace
from pathlib import Path

import pytest
from study_cases import call, change, study, write_file

import train
from lib.errors import InputError
from lib.study import Claim, Study
from train import parse


@pytest.fixture
def file(tmp_path, corpus) -> Path:
    """A study's file."""
    return write_file(tmp_path / "tiny.py", corpus)


@pytest.fixture
def plain(file) -> Study:
    """The study of the file as it is."""
    return study.load_study(str(file))


# ------------------------------------------------------------------------------ what a study says


def test_a_study_has_defaults(plain):
    assert plain.first == "deep"
    assert plain.seeds == 5
    assert plain.tuned_by == ""
    assert plain.measures == {}


def test_a_study_has_one_paper_or_several_or_none(plain):
    (paper,) = plain.papers
    assert paper.title == "On Tiny Things"
    assert paper.year == 2024
    assert paper.seeds == ("001:39",)
    assert replace(plain, paper=(paper, paper)).papers == (paper, paper)
    assert replace(plain, paper=()).papers == ()


def test_a_claim_s_control_is_the_study_s(plain):
    """That is the first arm where the study names none."""
    claim = plain.claims[0]
    assert plain.control_of(claim) == "deep"
    other = replace(plain, control="third", claims=())
    assert other.control_of(claim) == "third"


def test_a_claim_s_bound_is_known_by_its_side(plain):
    bounds = [claim.bound for claim in plain.claims]
    assert bounds == [{"below": 10.0}, {"above": 10.0}, {"below": 0.0}]


def test_a_file_without_an_arm_named_is_a_run_of_the_control(file):
    config, found = parse([str(file)])
    assert found == f"{file}:deep"
    assert config == parse([f"{file}:deep"])[0]


def test_an_arm_that_a_file_does_not_define_is_refused(file):
    with pytest.raises(InputError, match="defines no arm 'x'; its arms: deep, grown, third"):
        train.load_config(f"{file}:x")


# ----------------------------------------------------------------------- what a claim may be about


def may_claim(plain: Study, measure: str, arms: dict | None = None) -> bool:
    """May a claim about `grown`, beside its control, be by this measure? arms: other ones."""
    claim = Claim(says="x", arm="grown", below=0.0, measure=measure)
    try:
        replace(plain, arms=arms or plain.arms, claims=[claim])
    except InputError:
        return False
    return True


WRITTEN = [
    "bpb",
    "speed_up_flops",
    "speed_up_tokens",
    "eval/a/loss",
    "eval/a/bpb",
    "eval/a.test/bpb",
    "eval/a.test/loss",
    "train/loss",
    "train/grad_norm",
    "data/waste",
    "data/truncated",
    "model/params",
    "perf/tokens_per_s",
]
NOT_WRITTEN = [
    "own/x",
    "data/a/rows",
    "reader/grad_norm",
    "matrix/update_ratio",  # nothing edits deep
]


@pytest.mark.parametrize("measure", WRITTEN)
def test_a_claim_may_be_by_any_metric_that_every_run_writes(plain, measure):
    assert may_claim(plain, measure)


@pytest.mark.parametrize("measure", NOT_WRITTEN)
def test_a_claim_may_not_be_by_a_metric_that_a_run_of_its_arms_cannot_write(plain, measure):
    assert not may_claim(plain, measure)


def test_a_claim_may_be_by_update_ratios_where_both_arms_are_edited(plain):
    edited = plain.arms | {"deep": plain.arms["grown"]}
    assert may_claim(plain, "matrix/update_ratio", edited)
    assert not may_claim(plain, "matrix/update", edited)


@pytest.fixture
def evaluated(plain) -> dict:
    """Arms with an eval of their own, of which nobody knows what it gives."""
    return {name: replace(arm, evals=(len,)) for name, arm in plain.arms.items()}


@pytest.mark.parametrize("measure", ["own/x", "blimp", "eval/whole/loss"])
def test_a_claim_may_be_by_any_metric_of_evals_that_both_arms_have(plain, evaluated, measure):
    assert may_claim(plain, measure, evaluated)
    without = evaluated | {"deep": plain.arms["deep"]}
    assert not may_claim(plain, measure, without)


@pytest.mark.parametrize(
    "measure", ["train/los", "eval/a/bbp", "speed_up_flop", "eval/a.test/x", "data/wast"]
)
def test_evals_excuse_no_misspelt_metric(plain, evaluated, measure):
    assert not may_claim(plain, measure, evaluated)


# ------------------------------------------------------------------------------- what is refused

# Each mistake: a text of the file, what is in its place, the sentence as a pattern.
FIELDS = [
    ("peak_lrs=", "rates=", "Study has no field 'rates'; allowed are: question, arms, paper"),
    ("peak_lrs=", "peak_lr=", "Study has no field 'peak_lr'; did you mean 'peak_lrs'?"),
    (
        'question="Is it better to grow?",',
        "",
        "Study lacks its field 'question'; it needs: question, arms",
    ),
    (
        'question="Is it better to grow?"',
        'question=""',
        "question is ''.*; allowed is a text",
    ),
    ("peak_lrs=", "seeds=0, peak_lrs=", "seeds is 0; allowed is an integer, 1 or more"),
]

PAPERS = [
    ("year=2024", "yaer=2024", "Paper has no field 'yaer'; did you mean 'year'?"),
    (
        "year=2024",
        'year="2024"',
        "paper.year is '2024' .str.; allowed is an integer, 1 or more",
    ),
    (
        'seeds=("001:39",)',
        'seeds="001:39"',
        "paper.seeds is '001:39' .str.; allowed is a tuple",
    ),
    (
        'seeds=("001:39",)',
        'seeds=("1:39",)',
        "paper.seeds.0 is '1:39'; allowed is a text, such as",
    ),
    (
        'paper=Paper(title="On Tiny Things", authors="Small et al.", year=2024, seeds=("001:39",))',
        'paper="On Tiny Things"',
        "paper is 'On Tiny Things' .str.; allowed is a tuple",
    ),
]

ARMS = [
    ("peak_lrs=", 'control="depe", peak_lrs=', "control is 'depe'; did you mean 'deep'?"),
    (
        '("deep", "grown")',
        '("deep", "wide")',
        "default_arms.1 is 'wide'; allowed are: deep, grown, third",
    ),
    (
        '"third": deep',
        '"third": deep.model',
        "arms.third is ModelConfig.*; allowed is a Config",
    ),
    ('"third": deep', '"third": 3', "arms.third is 3; allowed is a Config"),
    (
        'arms={"deep": deep, "grown": grown, "third": deep}',
        "arms={}",
        "arms is {}.*; allowed is one arm",
    ),
    (
        '{"grown": 1e6}',
        '{"gown": 1e6}',
        "a name in teacher_flops is 'gown'; did you mean 'grown'?",
    ),
    (
        '{"grown": 1e6}',
        '{"grown": -1}',
        "teacher_flops.grown is -1; allowed is a finite number, 0 or more",
    ),
]

CLAIMS = [
    ("below=10.0", "bellow=10.0", "Claim has no field 'bellow'; did you mean 'below'?"),
    ('arm="third"', 'arm="thrid"', "claims.2.arm is 'thrid'; did you mean 'third'?"),
    (
        'arm="third"',
        'arm="third", control="depe"',
        "claims.2.control is 'depe'; did you mean 'deep'?",
    ),
    (
        'arm="third"',
        'arm="deep"',
        "claims.2.arm is 'deep'.*; allowed is another arm than its control",
    ),
    (
        "below=10.0",
        "below=10.0, above=1.0",
        "the claim 'it helps' has below=10.0 and above=1.0; allowed is",
    ),
    (
        ", below=10.0",
        "",
        "the claim 'it helps' has below=None and above=None; allowed is one of the two",
    ),
    (
        "below=10.0",
        'below="10"',
        "claim.below is '10' .str.; allowed is a finite number or None",
    ),
    (
        'Claim(says="of another arm", arm="third", below=0.0)',
        'dict(says="of another arm")',
        "claims.2 is .* .dict.; allowed is Claim",
    ),
]

MEASURES = [
    (
        '"train/loss"',
        '"train/los"',
        "claims.1.measure is 'train/los', which a run of the arm 'grown' does "
        "not have; did you mean 'train/loss'?",
    ),
    (
        '"train/loss"',
        '"eval/b/bpb"',
        "claims.1.measure is 'eval/b/bpb'.*; did you mean 'eval/a/bpb'?",
    ),
    (
        '"train/loss"',
        '"speedup_flops"',
        "claims.1.measure is.*; did you mean 'speed_up_flops'?",
    ),
    (
        '"train/loss"',
        '"x"',
        "claims.1.measure is 'x'.*; allowed are: bpb, speed_up_flops, .*model/params",
    ),
    (
        "test=0.1",
        "test=0.0",
        "claims.0.measure is 'bpb', which a run of the arm 'grown' does not have",
    ),
    ("peak_lrs=", 'tuned_by="own", peak_lrs=', "tuned_by is 'own'; allowed are: none"),
    (
        "peak_lrs=",
        'tuned_by="won", measures={"own": sum}, peak_lrs=',
        "tuned_by is 'won'; did you mean",
    ),
    (
        "peak_lrs=",
        'measures={"own": 3}, peak_lrs=',
        "measures.own is 3; allowed is a function of rows",
    ),
    (
        "peak_lrs=",
        'measures={"bpb": sum}, peak_lrs=',
        "a name in measures is 'bpb'.*; allowed is a name",
    ),
]

RATES = [
    (
        "(1e-2, 2e-2, 4e-2)",
        "(1e-2, 4e-2, 2e-2)",
        "peak_lrs is .*; allowed is learning rates above 0, asc",
    ),
    (
        "(1e-2, 2e-2, 4e-2)",
        "(0.0, 2e-2)",
        "peak_lrs.0 is 0.0; allowed is a finite number, more than 0",
    ),
    (
        "(1e-2, 2e-2, 4e-2)",
        "4e-2",
        "peak_lrs is 0.04 .float.; allowed is a tuple",
    ),
    (
        "dev=0.1",
        "dev=0.0",
        "data.dev of the arm 'deep' is 0.0.*; allowed is a share to tune its rate on",
    ),
]

QUICK = [
    (
        "phases.*.steps",
        "phases.*.stesp",
        "quick has 'phases.[*].stesp', but the arm 'deep' has no field "
        "'phases.0.stesp'; did you mean 'steps'?",
    ),
    (
        "phases.*.steps",
        "phases.1.steps",
        "quick has 'phases.1.steps', but the arm 'deep' has no field "
        "'phases.1.steps'; allowed are: 0",
    ),
    (
        "phases.*.steps",
        "phase.*.steps",
        "but the arm 'deep' has no field .*; did you mean 'phases'?",
    ),
]

REFUSED = [*FIELDS, *PAPERS, *ARMS, *CLAIMS, *MEASURES, *RATES, *QUICK]
NAMES = [f"{new or old} {i}" for i, (old, new, _) in enumerate(REFUSED)]


@pytest.mark.parametrize("old, new, sentence", REFUSED, ids=NAMES)
def test_a_mistake_is_refused_when_the_file_is_loaded(file, old, new, sentence):
    """Whoever loads it: the study command, or a run of an arm; the sentence names the file."""
    change(file, old, new)
    place = re.escape(f"config file {file}, line ")
    with pytest.raises(InputError, match=f"{place}.*{sentence}"):
        study.load_study(str(file))
    with pytest.raises(InputError, match=f"{place}.*{sentence}"):
        train.load_config(f"{file}:deep")


def test_an_exception_in_the_file_is_refused_with_its_line(file):
    change(file, "study = Study(", "1 / 0\nstudy = Study(")
    before, _, _ = file.read_text().partition("1 / 0")
    line = before.count("\n") + 1
    with pytest.raises(InputError, match=f"line {line}: ZeroDivisionError"):
        call(file, "--quick")


NO_STUDY = [  # what the file defines in the place of its study, the sentence as a pattern
    (
        "config = deep",
        "but one config, which `python train.py .*tiny.py` trains; configs/README.md",
    ),
    (
        'arms = {"a": deep}',
        "defines no `study = Study[(][.]{3}[)]`; configs/README.md lists",
    ),
    (
        "study = 3",
        "defines no `study = Study[(][.]{3}[)]`; configs/README.md lists",
    ),
]


def keep_configs(file: Path, line: str):
    """Write a line in the place of all that a file says of its study."""
    configs, _, _ = file.read_text().partition("study = Study(")
    file.write_text(f"{configs}{line}\n")


@pytest.mark.parametrize("line, sentence", NO_STUDY)
def test_what_is_no_study_s_file_is_one_helpful_sentence(file, line, sentence):
    keep_configs(file, line)
    with pytest.raises(InputError, match=sentence):
        call(file)


def test_the_run_command_knows_the_arms_of_a_file_that_is_no_study(file):
    keep_configs(file, 'arms = {"a": deep}')
    assert train.load_config(f"{file}:a").overlap == 8

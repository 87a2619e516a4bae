"""configs/: the truncation toy process, and what every study has to have."""
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import conftest
import jax
import numpy as np
import pytest
from conftest import course_of

import model
import train
from lib.config import ROOT, load_file
from lib.packing import best_fit
from train import parse

packing = load_file(ROOT / "configs/packing.py")
truncation = load_file(ROOT / "configs/truncation.py")
study = load_file(ROOT / "tools/study.py")


# ------------------------------------------------------------------------------------------------ the files


def test_an_arm_of_a_config_file_is_named_after_a_colon(capsys):
    file = str(ROOT / "configs/packing.py")
    config, _ = parse([f"{file}:best_fit", "--seed", "3"])
    assert config.phases[0].packing is best_fit
    assert (config.seed, config.name) == (3, "packing-best_fit")
    assert parse([file])[0].name == "packing"
    for arm in packing.arms:
        train.check(parse([f"{file}:{arm}"])[0])
    assert train.main([f"{file}:worst_fit"]) == 2
    assert "concat_no_mask, concat, best_fit" in capsys.readouterr().err


CORPUS = """from functools import partial

from data import DataConfig, Source, text
from model import ModelConfig
from train import Config, Phase

config = Config(model=ModelConfig(vocab=320), overlap=0, phases=(Phase(steps=9, batch=2, seq=64),),
                data=DataConfig(sources={"text": Source(partial(text, path="PLACE"))}, dev=0.1, test=0.1))
"""


def test_corpus_bench_compares_the_packings_and_times_batches_and_tokenizing(tmp_path, corpus, capsys):
    (tmp_path / "some.py").write_text(CORPUS.replace("PLACE", str(corpus)))
    train.verb("corpus", ["bench", str(tmp_path / "some.py"), "--seconds", "0.2"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    plain, best = (found["packings"][name] for name in ("concat_and_split", "best_fit"))
    assert plain["rows"] == plain["ideal"] == best["ideal"] <= best["rows"]
    assert plain["cut"] > best["cut"] and plain["cut_fitting"] > 0 == best["cut_fitting"]
    assert found["packings"]["first_fit"]["rows"] >= plain["rows"] and best["rows_s"] >= best["plan_s"] > 0
    assert found["batch"]["tokens_per_s"] > 0 and found["tokenizing"]["share"] > 0


@pytest.mark.parametrize("p", [0.6, 0.75, 0.9])
def test_the_closed_form_of_truncation_is_what_enumeration_gives(p):
    for m in range(9):
        joint = np.zeros((2**m, 2))  # of the bits seen and the next one
        for first, *bits in itertools.product((0, 1), repeat=m + 2):
            chance = 0.5 * math.prod(p if bit == first else 1 - p for bit in bits)
            joint[int("0" + "".join(map(str, bits[:-1])), 2), bits[-1]] += chance
        nats = -np.sum(joint * np.log(joint / joint.sum(1, keepdims=True)))
        assert truncation.closed_form(m, p) == pytest.approx(nats, abs=1e-12)


def test_the_closed_form_of_truncation_is_the_paper_s():
    table = {0.6: [.6931, .6923, .6916, .6903, .6880, .6846, .6803, .6762],
             0.75: [.6931, .6616, .6417, .6148, .5871, .5686, .5628, .5623],
             0.9: [.6931, .4714, .4085, .3493, .3275, .3251, .3251, .3251]}
    for p, losses in table.items():
        found = [truncation.closed_form(m, p) for m in (0, 1, 2, 4, 8, 16, 32, 64)]
        assert found == pytest.approx(losses, abs=6e-5)
    assert truncation.entropy(0.75) == pytest.approx(0.5623, abs=5e-5)


def test_the_process_keeps_its_first_bit_with_probability_p():
    for truncated, agree in ((False, 0.8), (True, 0.8**2 + 0.2**2)):
        documents = list(truncation.process(20_000, 0.8, truncated))
        bits = np.array([[int(c) for c in d.text] for d in documents])
        assert bits.shape == (20_000, 15) and len({d.path for d in documents}) == 20_000
        assert bits[:, 0].mean() == pytest.approx(0.5, abs=0.015)
        assert np.mean(bits[:, 1:] == bits[:, :1], 0) == pytest.approx(np.full(14, agree), abs=0.015)
        assert np.mean(bits[:, 3] == bits[:, 9]) == pytest.approx(0.8**2 + 0.2**2, abs=0.015)


@pytest.mark.parametrize("truncated", [False, True])
def test_the_evaluation_gives_a_model_that_knows_the_process_what_is_expected(truncated):
    def apply(params, ids, p=0.75):
        """Logits of what is best: X0 counts for certain where it is there, all bits seen alike elsewhere."""
        ones = np.cumsum(ids[:, 1:] == ord("1"), 1)
        seen = np.arange(1, ids.shape[1])
        if truncated:
            lead = (2 * ones - seen) * np.log(p / (1 - p))
            one = p / (1 + np.exp(-lead)) + (1 - p) / (1 + np.exp(lead))
        else:
            one = np.where(ids[:, 1:2] == ord("1"), p, 1 - p) * np.ones_like(seen)
        one = np.concatenate([np.full((len(ids), 1), 0.5), one], 1)
        logits = np.full((*ids.shape, 258), -100.0)
        logits[..., ord("0")], logits[..., ord("1")] = np.log(1 - one), np.log(one)
        return logits

    found = truncation.by_position(None, apply, 0.75, truncated)
    assert found["truncation/largest_error"] < 1e-9 and found["truncation/m0"] == pytest.approx(np.log(2))
    assert found["truncation/m2"] == pytest.approx(0.6417 if truncated else 0.5623, abs=5e-5)


@pytest.mark.study
@pytest.mark.parametrize("arm", ["full", "truncated"])
def test_truncation_trained_is_within_a_hundredth_of_the_closed_form(arm, tmp_path, request):
    file = str(ROOT / "configs/truncation.py")
    line = [sys.executable, str(ROOT / "train.py"), f"{file}:{arm}", "--runs", str(tmp_path)]
    env = os.environ | conftest.USERS  # one device, as anyone would run it
    subprocess.run(line, env=env, check=True, stdout=subprocess.DEVNULL)
    rows = (tmp_path / f"truncation-{arm}/metrics.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, rows) if "truncation/m2" in row][-1]
    for m in (2, 8):
        expected = truncation.closed_form(m, 0.75) if arm == "truncated" else truncation.entropy(0.75)
        assert last[f"truncation/m{m}"] == pytest.approx(expected, abs=0.01)
    assert last["step"] == 1_500 and last["truncation/largest_error"] < 0.01


# ------------------------------------------------------------------------------------------------ the studies

STUDIES = [p for p in sorted((ROOT / "configs").rglob("*.py")) if "\nstudy = Study(" in p.read_text("utf-8")]


def asked(path, *words: str) -> study.Request:
    """What a command line asks of a study's file."""
    return study.read(study.arguments_of([str(path), *words]))


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_arm_of_a_study_is_accepted_in_full_and_with_quick(path):
    own, default = load_file(path).study, asked(path)
    assert default.arms[0] == own.first
    assert set(default.arms) == {own.first, *(own.default_arms or own.arms)}
    for quick in {False, bool(own.quick)}:
        every = asked(path, "--arms", ",".join(own.arms), *["--quick"] * quick)
        assert every.claims == list(own.claims) and set(every.arms) == set(own.arms)
        for arm in every.arms:
            for rate in own.peak_lrs[:1] or [None]:
                config, _ = parse(study.command(every, study.Job(arm, rate, 1)))
                train.check(config)
                assert rate is None or config.schedule.peak == pytest.approx(rate)


@pytest.mark.parametrize("path", [p for p in STUDIES if "one budget of" in load_file(p).__doc__],
                         ids=lambda p: p.stem)
def test_the_arms_of_a_study_have_the_budget_and_the_decay_that_it_says(path):
    file = load_file(path)
    context = model.Context(jax.random.key(0), 0, None, None, None)
    budget = "flops" if "budget of model FLOPs" in " ".join(file.__doc__.split()) else "tokens"
    courses = [course_of(config, context) for config in file.study.arms.values()]
    spent = [getattr(course, budget)[-1] for course in courses]
    assert max(spent) / min(spent) < (1.003 if budget == "flops" else 1 + 1e-9)
    assert len({replace(course.models[-1], norm_eps=0.0) for course in courses}) == 1
    for config, course in zip(file.study.arms.values(), courses, strict=True):
        s, rate, share = config.schedule, course.rates["matrix"], getattr(course, budget) / max(spent)
        assert s.shape == "wsd" and rate[-1] == pytest.approx(s.final * s.peak, rel=1e-3)
        falls = share[(share > 0.5) & (rate < 0.999 * s.peak)]
        assert falls[0] == pytest.approx(1 - s.decay, abs=0.01) and len(falls) > 5


@pytest.mark.study
@pytest.mark.parametrize("path", [p for p in STUDIES if load_file(p).study.quick],
                         ids=lambda p: p.stem)
def test_a_quick_study_gives_every_arm_s_figures(path, tmp_path):
    """In a directory of its own, beside the runs that it starts from, which are made in a hurry."""
    own, shared, here = load_file(path).study, ROOT.parent / "shared", tmp_path / "here"
    here.mkdir()
    if "../shared" in path.read_text("utf-8"):
        if not shared.is_dir():
            pytest.skip(f"{shared} is not there")
        (tmp_path / "shared").symlink_to(shared)
    env = os.environ | conftest.USERS  # one device, as anyone would run it

    def go(*words):
        line = [sys.executable, str(ROOT / "train.py"), *words]
        done = subprocess.run(line, env=env, cwd=here, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    small = "--sample_tokens 4 --eval_tokens 2000 --phases.0.steps 4".split()
    if "runs/quickstart" in path.read_text("utf-8"):
        go(*small, "--phases.1.steps", "4")
    for name in {arm.init_from for arm in own.arms.values()} - {"", "runs/quickstart"}:
        stem, arm = name.removeprefix("runs/").split("-")  # made by another arm
        base, = (ROOT / "configs").rglob(f"{stem}.py")
        go(f"{base}:{arm}", *small)
    said = go("study", str(path), "--quick", "--jobs", str(min(2, os.cpu_count())))
    result = json.loads((here / f"runs/{path.stem}-quick/study.json").read_text())
    assert [*result["arms"]] == asked(path).arms and not result["failed"]
    for name, arm in result["arms"].items():
        assert [*arm["runs"]] == ["1", "2"] and [*arm["less_control"]["bpb"]["values"]] == ["1", "2"], name
        assert 0 < arm["bpb"][0] < 10 and arm["flops"] > 0
        assert f"| {name} |" in said
    assert len(result["claims"]) == len(asked(path).claims)

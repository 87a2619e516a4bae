"""configs/: what every file of the library has to have, and what studies share."""
import ast
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import conftest
import jax
import pytest
from conftest import course_of

import model
import train
from configs import base
from lib.config import ROOT, from_json, load_file, to_json
from lib.edits import reset_embeddings
from lib.packing import best_fit
from lib.study import NEED, Study, needs_of
from train import parse

study = load_file(ROOT / "tools/study.py")
LIBRARY = sorted((ROOT / "configs").glob("*/*.py"))
STUDIES = [path for path in LIBRARY if hasattr(load_file(path), "study")]
HEADER = "Paper", "Method", "Here", "Cost", "Run"
LINES, EXPERIMENT = 120, 40  # the most of a file, and of its experiment

# Processes that make rows, apart from the studies that ask what a model makes of them.
SHARED = "configs.bursty", "configs.parts_of_speech", "configs.points"
# Which config takes a function of another one, besides configs/base.py, and which function.
BORROWS = {
    "baselines/beside": {
        "configs.baselines.strong.on", "configs.context.best_fit", "configs.context.meco",
        "configs.growth.minitron", "configs.selection.skill_it"},
    "growth/g_stack_beside": {"configs.baselines.recipe.old", "configs.baselines.strong.on"},
    "growth/tables": {"configs.growth.t5.MARKS", "configs.growth.t5.asked"},
    "growth/pruning_value": {
        f"configs.growth.minitron.{name}"
        for name in ("SIZES", "large", "plain", "small", "tuned", "wide")
    },
    "baselines/scaling": {"configs.baselines.llama_1_3b.config",
                          "configs.baselines.llama_350m.config"},
    "baselines/shakespeare_char": {"configs.baselines.muon.muon"},
    "baselines/nanochat": {"configs.baselines.nanochat_muon.COOL",
                           "configs.baselines.nanochat_muon.nanochat_muon"} | {
        f"configs.baselines.strong.{name}" for name in ("capped", "flops", "on", "past")},
    "baselines/nanochat_muon": {
        f"configs.baselines.muon.{name}" for name in ("COEFFICIENTS", "orthogonal", "rms_of")},
    "baselines/strong": {"configs.baselines.muon.muon"},
    "baselines/steps_500": {"configs.baselines.muon.muon", "configs.baselines.recipe.as_before",
                            "configs.baselines.recipe.old", "configs.baselines.recipe.redrawn",
                            "configs.baselines.strong.config"},
    "baselines/strong_parts": {"configs.baselines.muon.muon"} | {
        f"configs.baselines.strong.{name}" for name in (
            "capped", "config", "on", "parts", "strong")},
    "continual/agem": {
        "configs.continual.rewarm.base", "configs.continual.rewarm.cosine",
        "configs.continual.rewarm.first"},
    "continual/ewc": {
        "configs.continual.agem.ENDS", "configs.continual.agem.measures",
        "configs.continual.agem.naive"},
    "continual/infinite": {
        "configs.continual.rewarm.base", "configs.continual.rewarm.cosine",
        "configs.continual.rewarm.first", "configs.forgetting.active_forgetting.permuted"},
    "continual/meta_replay": {
        "configs.continual.rewarm.base", "configs.continual.rewarm.continued",
        "configs.continual.rewarm.sources"},
    "continual/rewarm": {"configs.forgetting.active_forgetting.permuted"},
    "continual/stability_gap": {
        "configs.continual.agem.package", "configs.continual.rewarm.base",
        "configs.continual.rewarm.cosine", "configs.continual.rewarm.first"} | {
            f"configs.selection.qurating.{name}" for name in ("documented", "sampled", "top")},
    "forgetting/active_forgetting_beside": {"configs.baselines.recipe.old",
                                            "configs.baselines.strong.on",
                                            "configs.forgetting.active_forgetting.study"},
    "forgetting/cw2v": {f"configs.forgetting.vocabulary.{name}" for name in (
        "base", "early", "larger", "swap", "swap_vocabulary")},
    "forgetting/lexinvariant": {"configs.forgetting.active_forgetting.permuted"},
    "understanding/circuit": {"configs.understanding.bursty.bursty"},
    "understanding/icl_and_descent": {
        "configs.understanding.bursty.bursty", "configs.understanding.circuit.untrained"},
    "understanding/discrete_functions": {
        f"configs.understanding.bursty.{name}" for name in ("recurrent", "recurrent_rows")},
    "understanding/teaching_sequences": {
        f"configs.understanding.discrete_functions.{name}"
        for name in ("K", "arm", "draw", "hypotheses", "labels")},
    "understanding/bursty": {f"configs.understanding.mixers.{name}" for name in ("gru", "gru_rows")},
    "understanding/induction": {"configs.understanding.bursty.accuracies"},
    "understanding/mixers": {f"configs.understanding.s4d.{name}" for name in ("arm", "flops", "mixed")},
    "understanding/word_classes": {
        f"configs.understanding.probes.{name}" for name in ("trained", "untrained")},
    "parameters/loqt": {f"configs.parameters.qlora.{name}"
                        for name in ("quantised", "restored", "stored", "weight_bytes")},
    "parameters/qlora": {"configs.parameters.layra.lora", "configs.parameters.layra.old"},
    "parameters/sltrain": {"configs.parameters.low_rank.factored",
                           "configs.parameters.low_rank.product"},
    "selection/climb": {"configs.selection.qurating.PACKINGS", "configs.selection.qurating.scores"},
    "objectives/awr": {"configs.objectives.preferences.mle", "configs.objectives.preferences.rwr"},
    "objectives/real_toxicity": {"configs.objectives.preferences.BAD",
                                 "configs.objectives.preferences.GOOD",
                                 "configs.objectives.preferences.is_bad",
                                 "configs.objectives.preferences.write_lines",
                                 "configs.objectives.preferences.study"},
    "objectives/bidirectional": {f"configs.objectives.prose.{name}" for name in (
        "MEASURES", "fine", "config", "pre")},
    "objectives/drbert": {f"configs.objectives.prose.{name}" for name in (
        "MEASURES", "fine", "config", "pre")},
    "objectives/lexicon_masking": {f"configs.objectives.prose.{name}" for name in (
        "MEASURES", "fine", "pre", "config")},
    "objectives/structural": {f"configs.objectives.prose.{name}" for name in (
        "MEASURES", "config", "fine", "pre")},
    "objectives/birdie": {f"configs.objectives.codegen2.{name}" for name in (
        "PREFIX", "SENTINELS", "asked", "infill", "prefix")},
    "selection/d4": {"configs.selection.qurating.best", "configs.selection.qurating.pack"},
    "selection/diversify": {"configs.selection.d4.k_means"},
    "selection/ingenious": {"configs.selection.d4.chance", "configs.selection.d4.embed",
                            "configs.selection.qurating.best", "configs.selection.qurating.pack"},
    "selection/miniplm": {"configs.selection.salt.highest", "configs.selection.salt.judged"},
    "unlearning/who_is_harry_potter": {"configs.continual.agem.package"},
}
# Studies whose arms have the same budget and shape in the end, and whose rates fall over the same
# last part of it.
BUDGET = {
    "growth/bert2bert": "flops",
    "growth/incremental": "flops",
    "growth/learngene": "flops",
    "growth/ligo": "flops",
    "context/best_fit": "tokens",
    "context/dataset_decomposition": "tokens",
    "context/in_context_pretraining": "tokens",
    "context/meco": "tokens",
    "selection/climb": "tokens",
    "selection/qurating": "tokens",
}


def name_of(path) -> str:
    """A file of the library as "growth/g_stack"."""
    return path.relative_to(ROOT / "configs").with_suffix("").as_posix()


every_file = pytest.mark.parametrize("path", LIBRARY, ids=name_of)
every_study = pytest.mark.parametrize("path", STUDIES, ids=name_of)


# ---------------------------------------------------------------------------------------- the files


@every_file
def test_a_file_of_the_library_begins_with_a_header(path):
    said = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    fields = re.findall(r"(?m)^([A-Z]\w+):", said)
    assert [field for field in fields if field in HEADER] == [*HEADER]
    assert re.search(r"(?m)^Run:.*\n    python train\.py", said)


@every_file
def test_a_file_of_the_library_has_a_study_or_a_config(path):
    found = getattr(load_file(path), "study", None)
    assert isinstance(found, Study) or isinstance(train.load_config(str(path)), train.Config)


@every_study
def test_the_header_of_a_study_names_its_papers(path):
    text = path.read_text("utf-8")
    said = ast.get_docstring(ast.parse(text))
    assert text.count("\nstudy = Study(") == 1
    for paper in load_file(path).study.papers:
        assert paper.authors in said
        assert str(paper.year) in said
        assert all(number in said for number in paper.seeds)


def lines_of_experiment(tree: ast.Module) -> int:
    """How many lines of a file are neither its docstring nor imports, functions or classes."""
    functions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    plain = [node for node in tree.body[1:] if not isinstance(node, functions)]
    return sum(node.end_lineno - node.lineno + 1 for node in plain)


@every_file
def test_a_file_of_the_library_is_short(path):
    text = path.read_text("utf-8")
    lines = text.splitlines()
    experiment = lines_of_experiment(ast.parse(text))
    assert len(lines) <= LINES
    assert experiment <= EXPERIMENT
    for line in lines:
        command = line.startswith(("    python train.py", "    ... --"))
        assert len(line) <= 100 or command


@every_file
def test_a_config_takes_from_another_one_no_more_than_a_paper_s_own_function(path):
    taken = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "configs":
            if node.module not in SHARED:
                taken |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert taken - {"configs.base"} == BORROWS.get(name_of(path), set())


# -------------------------------------------------------------------------------------- the studies


def asked(path, *words: str) -> study.Request:
    """The study that a command line asks for."""
    return study.read(study.arguments_of([str(path), *words]))


@every_study
@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
def test_every_arm_of_a_study_is_accepted_in_full_and_with_quick(path, quick):
    own = load_file(path).study
    flags = ["--quick"] if quick else []
    rate = own.peak_lrs[0] if own.peak_lrs else None
    assert own.quick
    assert own.claims

    default = asked(path, *flags)
    assert default.arms[0] == own.first
    assert {*default.arms} == {own.first, *(own.default_arms or own.arms)}

    every = asked(path, "--arms", ",".join(own.arms), *flags)
    assert {*every.arms} == {*own.arms}
    assert len(every.claims) == len(own.claims)
    for arm in every.arms:
        words = study.command(every, study.Job(arm, rate, 1))
        config, _ = parse([str(word) for word in words])
        train.check(config)
        assert rate is None or config.schedule.peak == pytest.approx(rate)


@every_study
def test_every_arm_can_be_written_down(path):
    for config in load_file(path).study.arms.values():
        written = json.loads(json.dumps(to_json(config)))
        assert to_json(from_json(train.Config, written)) == to_json(config)


@every_study
def test_a_head_of_its_own_goes_with_the_embeddings(path):
    """Where they are frozen with all of the body, or drawn anew at a rate of their own, it is too."""
    own = load_file(path).study
    for name, config in (own.arms | own.needs).items():
        left_out = {*getattr(config.optimizer, "keywords", {}).get("frozen", ())}
        for phase in () if config.model.tied else config.phases:
            frozen = left_out | {group for group, rate in phase.lr.items() if rate == 0}
            alone = name == "head"  # perp.py trains that and nothing else
            assert alone or "head" in frozen or not {"embed", "matrix", "vector"} <= frozen, name
            anew = any(edit.apply is reset_embeddings for edit in phase.repeat)
            assert not anew or phase.lr.get("head") == phase.lr.get("embed"), name


@pytest.mark.parametrize("name", BUDGET)
def test_the_arms_of_a_study_have_the_budget_and_the_decay_that_it_says(name):
    arms = load_file(ROOT / f"configs/{name}.py").study.arms
    free = {arm: config for arm, config in arms.items() if not needs_of(config)}  # others: own tests
    budget = BUDGET[name]
    context = model.Context(jax.random.key(0), 0, None, None, None)
    courses = [course_of(config, context) for config in free.values()]
    spent = [getattr(course, budget)[-1] for course in courses]
    most = 1.003 if budget == "flops" else 1 + 1e-9
    assert max(spent) / min(spent) < most
    shapes = {replace(course.models[-1], norm_eps=0.0) for course in courses}
    assert len(shapes) == 1

    for config, course in zip(free.values(), courses, strict=True):
        schedule = config.schedule
        rate = course.lr["matrix"]
        share = getattr(course, budget) / max(spent)
        falls = share[(share > 0.5) & (rate < 0.999 * schedule.peak)]
        assert schedule.shape == "wsd"
        assert rate[-1] == pytest.approx(schedule.final * schedule.peak, rel=1e-3)
        assert falls[0] == pytest.approx(1 - schedule.decay, abs=0.01)
        assert len(falls) > 5


def test_an_arm_of_a_config_file_is_named_after_a_colon(capsys):
    file = str(ROOT / "configs/context/best_fit.py")
    config, _ = parse([f"{file}:best_fit", "--seed", "3"])
    assert config.phases[0].packing is best_fit
    assert (config.seed, config.name) == (3, "best_fit-best_fit")
    for arm in load_file(file).study.arms:
        config, _ = parse([f"{file}:{arm}"])
        train.check(config)

    assert train.main([f"{file}:worst_fit"]) == 2
    assert "concat_no_mask, concat, best_fit" in capsys.readouterr().err


@pytest.mark.library
@every_study
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
    given = {arm.init_from for arm in own.arms.values() if not arm.init_from.startswith(NEED)}
    for name in given - {"", "runs/quickstart"}:
        stem, arm = name.removeprefix("runs/").split("-")  # made by another arm
        go(f"{path.with_name(stem)}.py:{arm}", *small)
    said = go("study", str(path), "--quick", "--jobs", str(min(2, os.cpu_count())))
    result = json.loads((here / f"runs/{path.stem}-quick/study.json").read_text())
    assert [*result["arms"]] == asked(path, "--quick").arms and not result["failed"]
    assert result["cost"]["processor_seconds"] > 1
    for name, arm in result["arms"].items():
        assert [*arm["runs"]] == ["1", "2"] and arm["flops"] > 0, name
        assert f"| {name} |" in said
        if own.arms[name].data.test:
            assert 0 < arm["bpb"][0] < 10
            assert name == own.first or [*arm["less_control"]["bpb"]["values"]] == ["1", "2"], name
        for measure in own.measures:
            assert math.isfinite(result["measures"][measure][name]["own"][0]), measure
    assert len(result["claims"]) == len(asked(path, "--quick").claims)


# ---------------------------------------------------------------------------------- what they share


def test_quick_takes_changes_and_keeps_what_it_is_told_to():
    assert base.quick() == base.QUICK
    assert base.quick() is not base.QUICK

    kept = ("phases.*.seq", "model.embed")
    made = base.quick({"model.layers": 1, "overlap": 4}, keep=kept)
    assert made["model.layers"] == 1
    assert made["overlap"] == 4
    assert base.QUICK["overlap"] == 8
    assert base.QUICK.keys() - made.keys() == {*kept}


SHAPES = [(64, 2, 172), (96, 3, 256), (128, 4, 344), (192, 6, 512)]


@pytest.mark.parametrize("embed, heads, mlp", SHAPES)
def test_shapes_have_heads_of_32_and_an_mlp_of_8_3_of_the_width(embed, heads, mlp):
    shape = base.shape(3, embed, 500)
    assert (shape.layers, shape.embed, shape.vocab) == (3, embed, 500)
    assert (shape.heads, shape.kv_heads) == (heads, heads)
    assert (shape.head_dim, shape.mlp) == (32, mlp)


def test_steps_for_is_the_inverse_of_flops():
    shape = base.small.model
    phase = base.small.phases[0]
    for steps in (1, 17, 300):
        spent = base.flops(shape, replace(phase, steps=steps))
        assert base.steps_for(spent, shape, phase) == steps

    context = model.Context(jax.random.key(0), 0, None, None, None)
    course = course_of(base.small, context)
    assert course.flops[-1] == base.flops(shape, phase)

"""configs/growth/minitron.py and pruning_value.py: budgets, teachers, winning tickets."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import course_of
from edit_cases import IDS, context
from edit_cases import random_params as some

import model
import train
from configs import base
from lib.config import ROOT, load_file
from lib.prune import prune
from lib.schedule import models_of
from lib.teacher import divergence, taught
from model import Model

pytestmark = pytest.mark.library
minitron = load_file(ROOT / "configs/growth/minitron.py")
value = load_file(ROOT / "configs/growth/pruning_value.py")
CUT = "first", "magnitude", "activations"


def given():
    one = np.ones((2, 12), np.int32)
    return context(batches=lambda n: [dict(tokens=IDS, segments=one, positions=one)])


def test_what_is_cut_and_from_scratch_have_one_budget_the_wide_model_included():
    arms = minitron.study.arms
    wide = course_of(minitron.wide, given()).flops[-1]
    total = {"scratch": course_of(arms["scratch"], given()).flops[-1]}
    for name in CUT:
        train.check(arms[name])
        last = models_of(arms[name], given())[-1]
        assert replace(last, norm_eps=1e-6) == minitron.small
        total[name] = wide + course_of(arms[name], given()).flops[-1]
    assert max(total.values()) / min(total.values()) < 1.003


def test_a_teacher_s_forward_pass_is_in_the_budget_of_kl_flops():
    arms, seq = minitron.study.arms, minitron.plain.seq
    both = taught(minitron.small, minitron.large, "teacher")
    plain, short = (base.flops(shape, arms[arm].phases[0]) for shape, arm in (
        (minitron.small, "activations"), (both, "kl_flops")))
    assert abs(short / plain - 1) < 0.02
    assert arms["kl"].phases[0].steps == arms["activations"].phases[0].steps
    assert both.flops(both, seq) > 2 * minitron.small.flops(minitron.small, seq)
    for arm in ("first_kl", "kl", "kl_flops"):
        assert arms[arm].token_loss is divergence and "teacher" not in arms[arm].optimizer({})


def test_scratch_e_has_the_steps_of_both_phases_and_scratch_b_their_flops():
    arms = value.study.arms
    steps = {name: arm.phases[0].steps for name, arm in arms.items()}
    assert steps["scratch_e"] == steps["ticket"] == value.short.phases[0].steps + steps["pruned"]
    spent = course_of(value.short, given()).flops[-1] + course_of(arms["pruned"], given()).flops[-1]
    assert course_of(arms["scratch_b"], given()).flops[-1] == pytest.approx(spent, rel=2e-3)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_ticket_is_the_draw_under_the_mask_of_the_trained_model(tiny, seed):
    """The units of the draw that `prune` keeps of the trained model, as large as the small shape's."""
    trained, drawn = Model(tiny, some(tiny, seed)), Model(tiny, some(tiny, 7))
    sizes = dict(kv_heads=1, mlp=20, embed=16)
    loaded = trained.params, SimpleNamespace(model=tiny)
    seen = []

    def load(run, step):
        seen.append((run, step))
        return loaded

    numbered = {n: x * 0 + np.arange(x.size).reshape(x.shape) for n, x in trained.params.items()}
    kept = value.ticket(drawn, context(load=load), "run@3", **sizes).model
    assert seen == [("run", 3)]
    places = value.ticket(Model(tiny, numbered), context(load=load), "run", **sizes).model.params
    pruned = prune(trained, context(), **sizes).model
    assert kept.config == pruned.config
    small = model.table(kept.config)
    for name, param in model.table(tiny).items():
        factor = small[name].init / param.init if param.init else 1.0
        assert name not in ("q", "k", "v", "gate", "up") or factor == pytest.approx(2**0.5)
        index = np.rint(np.asarray(places[name], np.float64) / factor).astype(int)
        np.testing.assert_allclose(
            kept.params[name], factor * np.asarray(drawn.params[name]).ravel()[index], rtol=1e-6)
        if param.group != "vector":  # whose gains pruning makes up for
            np.testing.assert_array_equal(
                pruned.params[name], np.asarray(trained.params[name]).ravel()[index])


def test_a_ticket_that_is_larger_is_refused(tiny):
    def load(run, step):
        return some(tiny), SimpleNamespace(model=tiny)

    with pytest.raises(ValueError, match="kv_heads is 9, .* allowed is as many and fewer"):
        value.ticket(Model(tiny, some(tiny)), context(load=load), "run", kv_heads=9, mlp=1, embed=1)

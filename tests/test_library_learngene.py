"""configs/growth/learngene.py with a teacher: what trains, by which loss, at what cost."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import course_of, rows, strong
from edit_cases import IDS, context

import model
import train
from lib.config import ROOT, load_file
from lib.kernels import Mask
from lib.optim import State, init_opt_state
from lib.teacher import adopt, adopt_random, release, with_teacher
from model import Model

pytestmark = pytest.mark.library
learngene = load_file(ROOT / "configs/growth/learngene.py")
study = learngene.study


def with_drawn_teachers(config):
    """An arm whose teachers are drawn in place of those that its study makes first."""
    drawn = partial(adopt_random, shape=dict(layers=6))
    phases = []
    for phase in config.phases:
        edits = [drawn if getattr(edit, "func", None) is adopt else edit for edit in phase.edits]
        phases.append(replace(phase, edits=tuple(edits)))
    return replace(config, phases=tuple(phases))


def test_arms_cost_the_same_the_teacher_s_passes_included():
    courses = {name: course_of(with_drawn_teachers(arm), context()) for name, arm in study.arms.items()}
    costs = [course.flops[-1] for course in courses.values()]
    assert max(costs) / min(costs) < 1.003
    assert len({course.models[-1] for course in courses.values()}) == 1  # without a teacher
    steps = {name: arm.phases[-1].steps for name, arm in study.arms.items()}
    assert steps["taught"] < steps["linear"] and steps["stages_taught"] < steps["stagewise"]


@pytest.fixture(scope="module")
def beside(tiny):
    """A model of four layers of two genes, with a teacher of another depth."""
    config, deep = replace(tiny, layers=4), replace(tiny, layers=3)
    params = strong(deep)
    return with_teacher(Model(config, strong(config)), "teacher", deep, params).model, params, deep


def test_half_of_the_loss_is_the_divergence_from_the_teacher(beside):
    (config, params), teacher, deep = beside
    batch = model.whole(jnp.asarray(IDS)) | {"targets": jnp.asarray(IDS)}
    got = model.losses(params, batch, Mask("causal", 0), config, learngene.soft, {"step": 0})
    alone = {name: x for name, x in params.items() if "/" not in name}
    ours = jax.nn.log_softmax(model.apply(alone, IDS, replace(deep, layers=4)))
    theirs = jax.nn.log_softmax(model.apply(teacher, IDS, deep))
    nats = -jnp.take_along_axis(ours, jnp.asarray(IDS)[..., None], -1)[..., 0]
    want = 0.5 * nats + 0.5 * jnp.sum(jnp.exp(theirs) * (theirs - ours), -1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_genes_alone_train_and_the_teacher_has_no_state(beside):
    config, params = beside[0]
    run = replace(study.arms["stages_taught"], model=config)
    state = State(params, init_opt_state(params, config, run.optimizer), jnp.int32(0), jnp.int32(0))
    assert "teacher" not in state.opt
    step = jax.jit(train.make_step(run, config, run.phases[0]), static_argnames="mask")
    lr = dict.fromkeys(model.groups(config), np.float32(0.01))
    state, _ = step(state, rows(), lr, mask=Mask("causal", 0))
    for name, x in state.params.items():
        if name.startswith("teacher/"):
            np.testing.assert_array_equal(x, params[name])
        elif model.table(config)[name].layered:
            moved = [bool(np.any(x[i] != params[name][i])) for i in range(4)]
            assert moved == [True, True, False, False], name
    freed = release(Model(config, state.params), context()).model
    grown = learngene.expand(freed, context(), stages=(0, 0, 0, 1, 1, 1)).model
    assert grown.config.layers == 6 and not any("/" in name for name in grown.params)
    np.testing.assert_array_equal(grown.params["q"], state.params["q"][jnp.array([0, 0, 0, 1, 1, 1])])

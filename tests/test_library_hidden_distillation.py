"""configs/objectives: hidden_distillation.py, minilm.py and random_teachers.py; what a student matches."""
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows, strong

import model
import train
from lib.config import ROOT, load_file
from lib.kernels import Mask
from lib.teacher import adopt_random, adopt_self, with_teacher
from model import CAUSAL, Context, Model

pytestmark = pytest.mark.library
hidden, minilm, random = (load_file(ROOT / f"configs/objectives/{name}.py") for name in (
    "hidden_distillation", "minilm", "random_teachers"))
BATCH = {name: jnp.asarray(x) for name, x in rows().items()}
REAL = BATCH["segments"] > 0


def context(seed=0):
    return Context(jax.random.key(seed), 0, None, None, None)


@pytest.fixture(scope="module")
def pair(tiny):
    """A model with relations and 2 heads, and a wider and deeper teacher with as many heads."""
    config = replace(tiny, heads=2, kv_heads=2, head_dim=16, forward=minilm.with_relations)
    wide = replace(config, layers=3, embed=48, head_dim=24)
    student = Model(config, strong(config))
    return student, wide, with_teacher(student, "teacher", wide, strong(wide)).model


def test_states_are_the_plain_ones_and_relations_those_of_the_last_block(pair):
    """By hand, for one head: attention of q to k with what is seen, softmax of v v / sqrt(h)."""
    (config, params), _, _ = pair
    plain = replace(config, forward=model.llama)
    states, given = model.forward(params, BATCH, CAUSAL, config)
    np.testing.assert_allclose(states, model.forward(params, BATCH, CAUSAL, plain)[0], atol=1e-5)
    found = {}

    def attend(q, k, v, layer):
        return model.plain_attend(BATCH, CAUSAL, config)(q, k, v)[0], (q, k, v)

    x = model.embedded(params, BATCH, config)
    _, (kept, _) = model.stream(params, x, BATCH, CAUSAL, config, attend=attend)
    found = dict(zip("qkv", (np.asarray(y[-1]) for y in kept), strict=True))
    segments = np.asarray(BATCH["segments"])
    for t, head in ((5, 0), (14, 1)):
        see = [s for s in range(t + 1) if segments[0, s] == segments[0, t]]
        for kind, one in enumerate((found["q"][0, t, head, 0], found["v"][0, t, head])):
            other = found["kv"[kind]][0, see, head]
            scores = np.exp(other @ one / 4.0)
            want = np.zeros(24)
            want[see] = scores / scores.sum()
            np.testing.assert_allclose(np.exp(given["relations"][0, t, kind, head]), want, atol=1e-5)


def test_the_divergence_of_relations_is_zero_for_equal_models_and_else_positive(pair):
    student, wide, taught = pair
    same = adopt_self(student, context()).model
    equal = model.losses(same.params, BATCH, CAUSAL, same.config, minilm.minilm)
    np.testing.assert_allclose(np.where(REAL, equal, 0), 0, atol=1e-5)
    got = model.losses(taught.params, BATCH, CAUSAL, taught.config, minilm.minilm)
    theirs = model.forward(strong(wide), BATCH, CAUSAL, wide)[1]["relations"]
    ours = model.forward(student.params, BATCH, CAUSAL, student.config)[1]["relations"]
    p = np.exp(np.asarray(theirs, np.float64))
    want = np.sum(p * (np.asarray(theirs) - np.asarray(ours)), -1).mean(-1).sum(-1)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)
    assert (np.asarray(got)[np.asarray(REAL)] > -1e-5).all() and float(got.mean()) > 0.05

    def total(params):
        return jnp.mean(model.losses(params, BATCH, CAUSAL, taught.config, minilm.minilm))

    grads = jax.grad(total)(taught.params)
    assert all(not np.any(x) for name, x in grads.items() if name.startswith("teacher/"))
    assert np.any(grads["v"][-1]) and not np.any(grads["o"][-1])  # what comes after is not taught


def test_rates_go_by_tokens_in_all_arms():
    """By FLOPs a teacher would make them fall early, before what relations do not teach learns."""
    arms = minilm.study.arms.values()
    assert {(arm.schedule, arm.schedule.budget) for arm in arms} == {(minilm.plain.schedule, "tokens")}
    assert len({tuple((phase.steps, phase.schedule) for phase in arm.phases) for arm in arms}) == 1


def test_bidirectional_relations_see_all_of_a_segment(pair):
    (config, params), _, _ = pair
    given = model.forward(params, BATCH, Mask("bidirectional", 0), config)[1]["relations"]
    seen = np.exp(given[0, 0, 0, 0]) > 0
    np.testing.assert_array_equal(seen, np.asarray(BATCH["segments"])[0] == 1)


def test_held_states_add_their_squared_distance(tiny):
    config = replace(tiny, forward=hidden.with_states)
    student, other = Model(config, strong(config)), replace(tiny)
    nats = model.losses(student.params, BATCH, CAUSAL, tiny)
    same = adopt_self(student, context()).model
    got = model.losses(same.params, BATCH, CAUSAL, same.config, hidden.held)
    np.testing.assert_allclose(got, nats, rtol=1e-5, atol=1e-5)
    params = model.init(other, jax.random.key(5))
    apart = with_teacher(student, "teacher", other, params).model
    got = model.losses(apart.params, BATCH, CAUSAL, apart.config, hidden.held)
    one, two = (model.forward(each, BATCH, CAUSAL, tiny)[0] for each in (student.params, params))
    np.testing.assert_allclose(got, nats + jnp.sum((one - two)**2, -1), rtol=1e-4)
    rows = [{"train/loss": 3.0}, *[{"train/loss": 1.0}] * 9, {"train/loss": 2.0}, {"eval/xml/loss": 5.0}]
    assert hidden.gap(rows) == 3.0
    assert hidden.gap([row | {"nats": 1.5} for row in rows[:-1]] + rows[-1:]) == 3.5


def test_the_gap_of_a_student_is_without_its_distance(tiny):
    """`nats` of a step with a teacher are those of the student alone; the loss is above them."""
    config = replace(tiny, forward=hidden.with_states)
    student = Model(config, strong(config))
    apart = with_teacher(student, "teacher", tiny, model.init(tiny, jax.random.key(5))).model
    loss = train.loss_of(hidden.student, apart.config, hidden.student.phases[0])
    numerator, (count, metrics) = loss.sums(apart.params, {}, BATCH, 0, CAUSAL)
    alone, _ = model.weighted_mean(model.losses(student.params, BATCH, CAUSAL, tiny), BATCH)
    np.testing.assert_allclose(metrics["nats"], alone[0] / alone[1], rtol=1e-4)
    assert float(numerator / count) > float(metrics["nats"]) + 1


def test_a_student_begins_near_its_teacher(tiny):
    """At 0 it is the teacher, at 1 it is its own draw; in between draws keep their deviation."""
    own = Model(tiny, model.init(tiny, jax.random.key(1)))
    taught = adopt_random(own, context(2)).model
    near, half, far = (random.begin_near(taught, context(), a).model.params for a in (0.0, 0.5, 1.0))
    for name in model.table(tiny):
        np.testing.assert_allclose(near[name], near[f"teacher/{name}"], rtol=1e-6)
        np.testing.assert_array_equal(far[name], own.params[name])
    want = (half["teacher/embed"] + own.params["embed"]) / 2**0.5
    np.testing.assert_allclose(half["embed"], want, rtol=1e-5)
    assert float(half["embed"].std()) == pytest.approx(tiny.embed**-0.5, rel=0.03)
    loss = model.losses(near, BATCH, CAUSAL, taught.config, random.divergence)
    np.testing.assert_allclose(loss, 0, atol=1e-5)


def test_a_linear_probe_finds_a_linear_label():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2_000, 12))
    labels = np.argmax(x @ rng.normal(size=(12, 3)), 1)
    assert random.accuracy(x, labels, 3) > 0.9
    assert random.accuracy(x, rng.integers(0, 3, 2_000), 3) < 0.42

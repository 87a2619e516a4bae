"""configs/growth/: stacking, width growth, freezing, pruning, learngenes."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import course_of
from edit_cases import IDS, apart, context, loss, scores, some, wider

import model
import train
from lib.config import ROOT, load_file
from lib.edits import stack
from lib.freezing import asleep, freeze
from lib.kernels import Mask
from lib.optim import first_state
from lib.prune import prune
from lib.schedule import models_of
from lib.sharding import MeshConfig, make_mesh
from lib.widen import widen
from model import Model

CHAPTER = ROOT / "configs/growth"
bert2bert, g_stack, incremental, learngene, minitron = (
    load_file(CHAPTER / f"{name}.py")
    for name in ("bert2bert", "g_stack", "incremental", "learngene", "minitron"))
equal = np.testing.assert_array_equal


def test_width_growth_arms_cost_the_same():
    arms = bert2bert.study.arms
    costs = {}
    for name, config in arms.items():
        train.check(config)
        course = course_of(config, context())
        assert replace(course.models[-1], norm_eps=1e-6) == bert2bert.wide
        costs[name] = course.flops[-1]
    assert max(costs.values()) / min(costs.values()) < 1.001


@pytest.mark.parametrize("tied,top", [(True, 1), (False, 2)])
def test_a_sub_model_is_the_lowest_layers_and_trains_its_top(tiny, tied, top):
    config = replace(tiny, layers=4, tied=tied)
    params = some(config)

    def used(p, step, config=config):
        wide = params["embed"].shape[1]
        return bert2bert.sub_models(p, step, {}, config, embed=wide, begin=5, until=30, top=top)

    @jax.jit
    def both(p, step):
        return used(p, step), jax.grad(lambda p: loss(used(p, step), config))(p)

    rows, depths = model.table(config), set()
    for step in range(5, 30):
        sub, grads = both(params, step)
        moved = {n: np.asarray(g != 0).reshape(len(g), -1).any(1) for n, g in grads.items()}
        depth = int(np.count_nonzero(np.asarray(sub["o"]).reshape(4, -1).any(1)))
        for name in (n for n in params if rows[n].layered):
            assert moved[name].tolist() == [depth - top <= l < depth for l in range(4)], (name, step)
        assert moved["norm"].all() and (tied or moved["head"].all())
        assert moved["embed"].any() == tied
        if depth not in depths:
            lowest = {n: x[:depth] if rows[n].layered else x for n, x in params.items()}
            np.testing.assert_allclose(scores(sub, config), scores(lowest, replace(config, layers=depth)),
                                       atol=1e-5)
        depths.add(depth)
    assert depths == set(range(top, 5, top))
    for step in (4, 30):
        whole, grads = both(params, step)
        for name, x in params.items():
            equal(whole[name], x)
        assert all(np.asarray(grads["q"] != 0).reshape(4, -1).any(1))
    assert used(params, 5, replace(config, embed=16)) is params


def test_two_stages_begin_with_the_wide_model_and_no_evaluation_is_of_a_sub_model():
    config = bert2bert.study.arms["two_stage"]
    stage, (narrow, _) = config.reparam.keywords, config.phases
    assert stage["begin"] == narrow.steps and stage["embed"] == bert2bert.wide.embed
    assert stage["begin"] + 20 < stage["until"]
    assert not any(s % config.eval_every == 0 for s in range(stage["begin"] + 1, stage["until"]))


# ---------------------------------------------------------------------------------- freezing layers


def test_frozen_layers_stay_bit_for_bit_and_move_again(tiny):
    """Weight decay, old moments and the clipped norm included, through a step that is compiled once."""
    config = replace(tiny, unroll=1)
    run = train.Config(model=config, optimizer=asleep, clip=1e-2, reparam=partial(
        freeze, begin=1, until=3, layers=1))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = first_state(config, run.optimizer, mesh, jax.random.key(0))
    one = np.ones((2, 11), np.int32)
    batch = dict(tokens=IDS[:, :-1], targets=IDS[:, 1:], segments=one, positions=np.cumsum(one, 1) - 1,
                 weights=one.astype(np.float32), source=0 * one)
    step = jax.jit(train.make_step(run, config), static_argnames="mask")
    rates = dict.fromkeys(model.groups(config), np.float32(1e-2))
    blocks = [n for n, p in model.table(config).items() if p.axes[0] == "layers"]
    moved = []
    for _ in range(4):
        after, metrics = step(state, batch, rates, mask=Mask("causal", 0))
        pairs = [(state.params[n], after.params[n]) for n in blocks]
        pairs += [tuple(s.opt["matrix"][0].mu["q"] for s in (state, after))]
        moved.append([[bool(np.any(old[l] != new[l])) for l in (0, 1)] for old, new in pairs])
        state = after
    for i, rows in enumerate(moved):
        assert rows == [[i in (0, 3), True]] * len(rows)


def test_freeze_takes_the_gradient_of_what_it_names(tiny):
    untied = replace(tiny, tied=False)
    params = model.init(untied, jax.random.key(0))

    def moved(step, **arguments):
        def total(p):
            used = freeze(p, step, {}, untied, begin=5, until=8, **arguments)
            return sum(jnp.sum(x) for x in used.values())
        return {n: np.asarray(x) for n, x in jax.jit(jax.grad(total))(params).items()}

    assert all(x.all() for step in (4, 8) for x in moved(step).values())
    assert not any(x.any() for x in moved(5).values())
    assert {n for n, x in moved(7, names="*norm").items() if not x.any()} == {"attn_norm", "mlp_norm", "norm"}
    for name, x in moved(6, layers=1).items():
        blocks = model.table(tiny)[name].axes[0] == "layers" if name != "head" else False
        assert x[1:].all() and bool(x[0].any()) != blocks


def test_incremental_arms_cost_the_same():
    costs = []
    for config in incremental.study.arms.values():
        train.check(config)
        course = course_of(config, context())
        assert course.models[-1] == incremental.scratch.model
        costs.append(course.flops[-1])
    assert max(costs) / min(costs) < 1.002


# ------------------------------------------------------------------------------------------ pruning


def calibration(n):
    """Batches of the sort that a run's context gives."""
    one = np.ones((2, 12), np.int32)
    batch = dict(tokens=IDS, segments=one, positions=np.cumsum(one, 1) - 1)
    return [batch | dict(tokens=IDS[:, ::-1] if i else IDS) for i in range(n)]


def with_silent_layers(before):
    """Layers after the first and the last that add nothing."""
    (config, params), *_ = stack(before, context(), layers=(0, 0, 1, 1))
    silent = {n: params[n].at[jnp.array([1, 3])].set(0) for n in ("o", "down")}
    return Model(config, params | silent)


@pytest.mark.parametrize("by,tied", [("magnitude", True), ("activations", False), ("first", True)])
def test_pruning_what_growth_added_gives_the_old_model_back(tiny, by, tied):
    before = wider("float32", tiny, tied)
    grown = widen(with_silent_layers(before), context(), embed=48, kv_heads=3, mlp=60, new="zero").model
    if by == "first":
        grown = widen(before, context(), embed=48, kv_heads=3, mlp=60, new="zero").model
    given = context(batches=calibration)
    small = prune(grown, given, layers=2, kv_heads=2, mlp=48, embed=32, by=by, batches=2)
    assert replace(small.model.config, norm_eps=1e-6) == before.config
    assert apart(small, before) <= 1e-5
    for name, p in model.table(before.config).items():
        if p.group != "vector":
            equal(small.model.params[name], before.params[name])


def test_pruning_keeps_what_matters_and_cuts_moments_along(tiny):
    """Units made larger are those that stay, in their order, each layer its own."""
    before, keep = wider("float32", tiny, True), np.array([[1, 5, 40], [0, 2, 47]])
    loud = before.params["down"].at[np.arange(2)[:, None], keep].mul(100.0)
    before = Model(before.config, before.params | {"down": loud})
    for by in ("magnitude", "activations"):
        edited = prune(before, context(batches=calibration), mlp=3, by=by, batches=1, moments="map")
        equal(edited.model.params["down"], np.take_along_axis(np.asarray(loud), keep[:, :, None], 1))
        names = model.groups(tiny)["matrix"]
        moments = edited.policy["matrix"]({n: before.params[n] for n in names}, "mu")
        equal(moments["gate"], np.take_along_axis(np.asarray(before.params["gate"]), keep[:, None], 2))


def test_pruning_refuses(tiny):
    with pytest.raises(ValueError, match="mlp is 49, but the model has 48"):
        prune(wider("float32", tiny, True), context(), mlp=49)
    with pytest.raises(ValueError, match="by is 'luck'"):
        prune(wider("float32", tiny, True), context(), mlp=4, by="luck")


def test_pruning_arms_are_runs():
    """Their shapes come from shapes alone, calibration batches or not."""
    one = np.ones((2, 12), np.int32)
    given = context(batches=lambda n: [dict(tokens=IDS, segments=one, positions=one)])
    for config in minitron.study.arms.values():
        train.check(config)
        last = models_of(config, given)[-1]
        assert (last.embed, last.kv_heads, last.heads, last.mlp, last.layers) == (96, 3, 3, 256, 4)
    spent = {name: course_of(arm, given).flops[-1] for name, arm in minitron.study.arms.items()}
    assert max(spent.values()) / min(spent.values()) < 1.003


# ---------------------------------------------------------------------------------------- learngene


def test_expanded_layers_are_a_linear_function_of_depth(tiny):
    before = Model(replace(tiny, layers=4), some(replace(tiny, layers=4)))
    for depth in (2, 6):
        edited = learngene.expand(before, context(), layers=depth)
        assert edited.model.config == replace(tiny, layers=depth)
        for name, p in model.table(tiny).items():
            x, y = np.asarray(before.params[name]), edited.model.params[name]
            t = np.arange(depth).reshape(-1, *(1,) * (x.ndim - 1)) / depth
            linear = (1 - t) * x[0] + t * x[1] if p.axes[0] == "layers" else x
            np.testing.assert_allclose(y, linear, atol=1e-6)


def test_stage_wise_layers_are_their_list(tiny):
    before = Model(replace(tiny, layers=4), some(replace(tiny, layers=4)))
    edited = learngene.expand(before, context(), stages=(0, 0, 1, 1, 2, 2))
    for name, p in model.table(tiny).items():
        x = np.asarray(before.params[name])
        equal(edited.model.params[name], x[[0, 0, 1, 1, 2, 2]] if p.axes[0] == "layers" else x)


@pytest.mark.parametrize("shared,arguments", [
    (partial(learngene.linear, layers=4), dict(layers=4)),
    (partial(learngene.stagewise, stages=(0, 0, 1, 1)), dict(stages=(0, 0, 1, 1)))], ids=["linear", "stages"])
def test_expansion_to_the_depth_trained_computes_what_was_trained(tiny, shared, arguments):
    config = replace(tiny, layers=4)
    before = Model(config, some(config))
    used = shared(before.params, 0, {}, config)
    for name, x in learngene.expand(before, context(), **arguments).model.params.items():
        np.testing.assert_allclose(x, used[name], atol=1e-6)
    grads = jax.jit(jax.grad(lambda p: loss(shared(p, 0, {}, config), config)))(before.params)
    genes = [bool(np.any(np.asarray(grads["q"][l]) != 0)) for l in range(4)]
    assert genes == [True, True, False, False]
    deeper = replace(tiny, layers=6)
    other = model.init(deeper, jax.random.key(0))
    assert shared(other, 0, {}, deeper) is other  # after the expansion layers are free


@pytest.mark.parametrize("arguments", [{}, dict(layers=3, stages=(0,)), dict(stages=(0, 2)), dict(layers=-1)])
def test_expand_refuses(tiny, arguments):
    with pytest.raises(ValueError, match="expand: layers is"):
        learngene.expand(Model(tiny, some(tiny)), context(), **arguments)


# ------------------------------------------------------------------------------------------ g_stack


def flops_of(arm: train.Config) -> tuple[float, list[int]]:
    """(training FLOPs of an arm, the depth of each of its phases)."""
    course = course_of(arm, context())
    return course.flops[-1], [m.layers for m in course.models]


def test_the_arms_of_stacking_cost_the_same():
    total, depths = flops_of(g_stack.study.arms["scratch"])
    assert depths == [8]
    for arm in "stack identity random_on_top stack_g2 stack_g8 stack_early stack_late annealed".split():
        flops, depths = flops_of(g_stack.study.arms[arm])
        assert flops == pytest.approx(total, rel=0.01) and depths[1] == 8
    assert flops_of(g_stack.study.arms["stack_g8"])[1] == [1, 8]
    for arm in "gradual", "middle":
        assert flops_of(g_stack.study.arms[arm])[1] == [2, 4, 6, 8]
        assert flops_of(g_stack.study.arms[arm])[0] == pytest.approx(total, rel=1e-3)
        steps = np.array([p.steps for p in g_stack.study.arms[arm].phases])
        np.testing.assert_allclose(steps, steps.sum() * np.array([.1, .2, .3, .4]), atol=1.5)
    assert g_stack.middle(4, 1) == (0, 1, 1, 2, 3) and g_stack.middle(6, 2) == (0, 1, 2, 3, 2, 3, 4, 5)
    assert g_stack.middle(2, 2) == (0, 1, 0, 1) and g_stack.top(4, 2) == (0, 1, 2, 3, 2, 3)
    for arm in "scratch_4x", "stack_4x":
        assert flops_of(g_stack.study.arms[arm])[0] == pytest.approx(4 * total, rel=0.01)
    base, deep = g_stack.study.arms["stack"].phases
    short, tokens = (g_stack.study.arms[arm].phases[0] for arm in ("short", "scratch_tokens"))
    assert short.steps == deep.steps and tokens.steps == base.steps + deep.steps
    assert flops_of(g_stack.study.arms["short"])[0] == pytest.approx(7 / 8 * total, rel=0.01)


def test_the_arms_of_stacking_decay_over_the_same_last_flops_and_end_at_the_same_rate():
    for arm in "scratch", "stack", "stack_late":
        course = course_of(g_stack.study.arms[arm], context())
        rate, share = course.lr["matrix"], course.flops / course.flops[-1]
        assert rate[-1] == pytest.approx(0.05 * 8e-3)
        assert share[(share > 0.5) & (rate < 0.999 * 8e-3)][0] == pytest.approx(0.6, abs=0.005)


def test_every_arm_of_stacking_is_a_config_that_is_accepted():
    for arm in g_stack.study.arms.values():
        train.check(replace(arm, name="x"))


def narrowed(arm: str) -> tuple[model.ModelConfig, dict, dict]:
    """(shape after the growth, parameters before and after it) of an arm of g_stack.py, narrower."""
    config = replace(g_stack.study.arms[arm].model, embed=32, mlp=48, heads=2, kv_heads=2,
                     head_dim=8, vocab=50, unroll=1)
    shapes = []

    @jax.jit
    def made():
        before = after = model.Model(config, model.init(config, jax.random.key(0)))
        for edit in g_stack.study.arms[arm].phases[1].edits:
            after = edit(after, model.Context(jax.random.key(1), 0, None, None, None)).model
        shapes.append(after.config)
        return before.params, after.params

    before, after = made()
    return shapes[0], before, after


logits_of = jax.jit(model.apply, static_argnums=2)


def test_copies_that_are_silenced_keep_the_function_and_learn_from_there():
    """G_zero: logits as before within 1e-5; the copies' other weights are the layer's, and they learn."""
    config, before, after = narrowed("identity")
    ids = jnp.arange(24).reshape(2, 12)
    one = replace(config, layers=2)
    np.testing.assert_allclose(logits_of(after, ids, config), logits_of(before, ids, one), atol=1e-5)
    np.testing.assert_array_equal(after["q"], before["q"][np.array([0, 0, 0, 0, 1, 1, 1, 1])])
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model.apply(p, ids, config)))))(after)
    assert (np.abs(grads["down"]).max((1, 2)) > 0).all() and (np.abs(grads["o"]).max((1, 2, 3, 4)) > 0).all()


def test_what_is_annealed_is_the_shallow_function_at_first_and_the_deep_one_in_the_end():
    config, before, after = narrowed("annealed")
    weights, ids = g_stack.study.arms["annealed"].reparam, jnp.arange(24).reshape(2, 12)
    start = g_stack.study.arms["annealed"].phases[0].steps
    assert set(weights.keywords) == {"layers", "start", "steps"} and weights.keywords["start"] == start

    @jax.jit
    def scores(step):
        return model.apply(weights(after, step, None), ids, config)

    np.testing.assert_allclose(scores(start), logits_of(before, ids, replace(config, layers=2)), atol=1e-5)
    np.testing.assert_allclose(scores(start + 100), logits_of(after, ids, config), atol=1e-6)
    for end in start, start + 100:
        assert np.abs(scores(start + 50) - scores(end)).max() > 1e-4
    np.testing.assert_array_equal(weights(before, 3, None)["o"], before["o"])  # nothing is new in the base

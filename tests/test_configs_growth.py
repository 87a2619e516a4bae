"""configs/growth/: stacking, width growth, freezing, pruning, learngenes."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import course_of
from edit_cases import (
    IDS,
    block_names,
    context,
    largest_change,
    logits,
    loss,
    random_model,
    random_params,
)

import model
import train
from configs.base import loud
from lib.config import ROOT, load_file
from lib.edits import stack
from lib.freezing import asleep, freeze
from lib.kernels import Mask
from lib.optim import first_state
from lib.prune import prune
from lib.sharding import MeshConfig, make_mesh
from lib.widen import widen
from model import Model

pytestmark = pytest.mark.library

CHAPTER = ROOT / "configs/growth"
bert2bert = load_file(CHAPTER / "bert2bert.py")
g_stack = load_file(CHAPTER / "g_stack.py")
incremental = load_file(CHAPTER / "incremental.py")
learngene = load_file(CHAPTER / "learngene.py")
equal = np.testing.assert_array_equal
close = np.testing.assert_allclose


def flops_of(arm: train.Config, given=None) -> float:
    """The training FLOPs of a run."""
    return course_of(arm, given or context()).flops[-1]


def depths_of(arm: train.Config) -> list[int]:
    """How many layers the model of each phase has."""
    return [config.layers for config in course_of(arm, context()).models]


# ------------------------------------------------------------------------------------- width growth


def test_width_growth_arms_cost_the_same():
    costs = []
    for config in bert2bert.study.arms.values():
        train.check(config)
        course = course_of(config, context())
        grown = course.models[-1]
        assert replace(grown, norm_eps=1e-6) == bert2bert.wide
        costs.append(course.flops[-1])
    assert max(costs) / min(costs) < 1.001


def layers_that_move(gradients: dict) -> dict[str, list[bool]]:
    """For each index of a parameter's first axis, whether it has a gradient anywhere."""
    moved = {}
    for name, gradient in gradients.items():
        rows = np.asarray(gradient).reshape(len(gradient), -1)
        assert np.all(np.isfinite(rows))
        moved[name] = np.any(rows != 0, axis=1).tolist()
    return moved


def sub_model_and_gradients(config: model.ModelConfig, top: int):
    """A compiled function of parameters and step: what `sub_models` uses, the loss's gradient."""
    stage = dict(embed=config.embed, begin=5, until=30, top=top)

    def used(params, step):
        return bert2bert.sub_models(params, step, {}, config, **stage)

    def loss_of_used(params, step):
        return loss(used(params, step), config)

    @jax.jit
    def both(params, step):
        gradients = jax.grad(loss_of_used)(params, step)
        return used(params, step), gradients

    return both


def lowest_layers(whole: Model, depth: int) -> Model:
    """The model without the layers above `depth`."""
    config, params = whole
    lowest = {name: params[name][:depth] for name in block_names(config)}
    return Model(replace(config, layers=depth), params | lowest)


@pytest.mark.parametrize("tied,top", [(True, 1), (False, 2)])
def test_a_sub_model_is_the_lowest_layers_and_trains_its_top(tiny, tied, top):
    config = replace(tiny, layers=4, tied=tied)
    params = random_params(config)
    both = sub_model_and_gradients(config, top)
    depths = set()

    for step in range(5, 30):
        sub, gradients = both(params, step)
        moved = layers_that_move(gradients)
        outputs = np.asarray(sub["o"]).reshape(4, -1)
        depth = np.count_nonzero(outputs.any(1))
        in_training = [depth - top <= layer < depth for layer in range(4)]
        for name in block_names(config):
            assert moved[name] == in_training, (name, step)
        assert all(moved["norm"])
        assert tied or all(moved["head"])
        assert any(moved["embed"]) == tied
        if depth not in depths:
            shallow = lowest_layers(Model(config, params), int(depth))
            close(logits(sub, config), logits(shallow.params, shallow.config), atol=1e-5)
        depths.add(depth)

    assert depths == set(range(top, 5, top))


@pytest.mark.parametrize("tied,top", [(True, 1), (False, 2)])
@pytest.mark.parametrize("step", [4, 30])
def test_before_and_after_the_stage_of_sub_models_the_whole_model_trains(tiny, tied, top, step):
    config = replace(tiny, layers=4, tied=tied)
    params = random_params(config)
    whole, gradients = sub_model_and_gradients(config, top)(params, step)
    for name, x in params.items():
        equal(whole[name], x)
    assert all(layers_that_move(gradients)["q"])


def test_a_model_of_another_width_has_no_sub_models(tiny):
    narrow = replace(tiny, layers=4, embed=16)
    params = random_params(narrow)
    stage = dict(embed=tiny.embed, begin=5, until=30, top=1)
    assert bert2bert.sub_models(params, 5, {}, narrow, **stage) is params


def test_two_stages_begin_with_the_wide_model_and_no_evaluation_is_of_a_sub_model():
    config = bert2bert.study.arms["two_stage"]
    stage = config.reparam.keywords
    begin, until = stage["begin"], stage["until"]
    narrow, _ = config.phases

    assert begin == narrow.steps
    assert stage["embed"] == bert2bert.wide.embed
    assert begin + 20 < until
    steps = range(begin + 1, until)
    assert not any(step % config.eval_every == 0 for step in steps)


# ---------------------------------------------------------------------------------- freezing layers


def test_frozen_layers_stay_bit_for_bit_and_move_again(tiny):
    """Weight decay, old moments and the clipped norm leave them; the step is compiled once."""
    config = replace(tiny, unroll=1, rows=loud)
    reparam = partial(freeze, begin=1, until=3, layers=1)
    run = train.Config(model=config, optimizer=asleep, clip=1e-2, reparam=reparam)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = first_state(config, run.optimizer, mesh, jax.random.key(0))
    one = np.ones((2, 11), np.int32)
    batch = dict(
        tokens=IDS[:, :-1],
        targets=IDS[:, 1:],
        segments=one,
        positions=np.cumsum(one, 1) - 1,
        weights=one.astype(np.float32),
        source=0 * one,
    )
    step = jax.jit(train.make_step(run, config), static_argnames="mask")
    rates = dict.fromkeys(model.groups(config), np.float32(1e-2))

    def layers_of(state):
        """Parameters and a moment of the blocks, each [layers ...]."""
        arrays = [state.params[name] for name in block_names(config)]
        return [*arrays, state.opt["matrix"][0].mu["q"]]

    for i in range(4):
        after, _ = step(state, batch, rates, mask=Mask("causal", 0))
        frozen = i in (1, 2)
        for old, new in zip(layers_of(state), layers_of(after), strict=True):
            assert np.any(old[0] != new[0]) == (not frozen)
            assert np.any(old[1] != new[1])
        state = after


def test_freeze_takes_the_gradient_of_what_it_names(tiny):
    untied = replace(tiny, tied=False)
    params = model.init(untied, jax.random.key(0))

    def gradients(step, **arguments):
        def total(params):
            used = freeze(params, step, {}, untied, begin=5, until=8, **arguments)
            return sum(jnp.sum(x) for x in used.values())

        found = jax.jit(jax.grad(total))(params)
        return {name: np.asarray(x) for name, x in found.items()}

    for step in (4, 8):
        assert all(x.all() for x in gradients(step).values())
    assert not any(x.any() for x in gradients(5).values())

    by_name = gradients(7, names="*norm")
    frozen = {name for name, x in by_name.items() if not x.any()}
    assert frozen == {"attn_norm", "mlp_norm", "norm"}

    blocks = block_names(tiny)
    for name, x in gradients(6, layers=1).items():
        assert x[1:].all()
        assert x[0].any() == (name not in blocks)


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
    """n batches of the sort that a run's context gives: IDS, and then IDS from the back."""
    one = np.ones((2, 12), np.int32)
    positions = np.cumsum(one, 1) - 1
    forward = dict(tokens=IDS, segments=one, positions=positions)
    backward = forward | dict(tokens=IDS[:, ::-1])
    return [forward, *[backward] * (n - 1)]


def with_silent_layers(before: Model) -> Model:
    """Layers after the first and the last that add nothing."""
    deeper = stack(before, context(), layers=(0, 0, 1, 1)).model
    new = jnp.array([1, 3])
    silent = {}
    for name in ("o", "down"):
        silent[name] = deeper.params[name].at[new].set(0)
    return Model(deeper.config, deeper.params | silent)


@pytest.mark.parametrize("by,tied", [
    ("magnitude", True),
    ("activations", False),
    ("first", True),
])
def test_pruning_what_growth_added_gives_the_old_model_back(tiny, by, tied):
    before = random_model(tiny, tied)
    deeper = before if by == "first" else with_silent_layers(before)
    large = dict(embed=48, kv_heads=3, mlp=60)
    grown = widen(deeper, context(), new="zero", **large).model

    given = context(batches=calibration)
    sizes = dict(layers=2, kv_heads=2, mlp=48, embed=32)
    small = prune(grown, given, by=by, batches=2, **sizes)

    assert replace(small.model.config, norm_eps=1e-6) == before.config
    assert largest_change(small, before) <= 1e-5
    for name, row in model.table(before.config).items():
        if row.group != "vector":
            equal(small.model.params[name], before.params[name])


@pytest.mark.parametrize("by", ["magnitude", "activations"])
def test_pruning_keeps_the_largest_units_of_each_layer_and_cuts_moments_along(tiny, by):
    config, params = random_model(tiny, tied=True)
    keep = np.array([[1, 5, 40], [0, 2, 47]])  # the units of each layer that are made large
    layer = np.arange(2)[:, None]
    loud = params["down"].at[layer, keep].mul(100.0)
    before = Model(config, params | {"down": loud})

    given = context(batches=calibration)
    edited = prune(before, given, mlp=3, by=by, batches=1, moments="map")

    left = np.take_along_axis(np.asarray(loud), keep[:, :, None], 1)
    equal(edited.model.params["down"], left)

    tree = {name: before.params[name] for name in model.groups(tiny)["matrix"]}
    moments = edited.policy["matrix"](tree, "mu")
    left = np.take_along_axis(np.asarray(tree["gate"]), keep[:, None], 2)
    equal(moments["gate"], left)


@pytest.mark.parametrize("arguments,message", [
    (dict(mlp=49), "mlp is 49, but the model has 48"),
    (dict(mlp=4, by="luck"), "by is 'luck'"),
], ids=["size", "score"])
def test_pruning_refuses(tiny, arguments, message):
    before = random_model(tiny, tied=True)
    with pytest.raises(ValueError, match=message):
        prune(before, context(), **arguments)


# ---------------------------------------------------------------------------------------- learngene


def of_layers(tiny, layers: int) -> Model:
    """A random model of so many layers."""
    config = replace(tiny, layers=layers)
    return Model(config, random_params(config))


@pytest.mark.parametrize("depth", [2, 6])
def test_expanded_layers_are_a_linear_function_of_depth(tiny, depth):
    before = of_layers(tiny, 4)

    edited = learngene.expand(before, context(), layers=depth)

    assert edited.model.config == replace(tiny, layers=depth)
    for name in model.table(tiny):
        expected = np.asarray(before.params[name])
        if name in block_names(tiny):
            first, second = expected[:2]
            places = [layer / depth for layer in range(depth)]
            expected = [(1 - t) * first + t * second for t in places]
        close(edited.model.params[name], expected, atol=1e-6)


def test_stage_wise_layers_are_their_list(tiny):
    before = of_layers(tiny, 4)
    stages = (0, 0, 1, 1, 2, 2)

    edited = learngene.expand(before, context(), stages=stages)

    for name in model.table(tiny):
        expected = np.asarray(before.params[name])
        if name in block_names(tiny):
            expected = expected[list(stages)]
        equal(edited.model.params[name], expected)


@pytest.mark.parametrize("shared,arguments", [
    (learngene.linear, dict(layers=4)),
    (learngene.stagewise, dict(stages=(0, 0, 1, 1))),
], ids=["linear", "stages"])
def test_expansion_to_the_depth_trained_computes_what_was_trained(tiny, shared, arguments):
    before = of_layers(tiny, 4)
    shared = partial(shared, **arguments)
    used = shared(before.params, 0, {}, before.config)

    expanded = learngene.expand(before, context(), **arguments).model.params

    for name, x in expanded.items():
        close(x, used[name], atol=1e-6)

    def loss_of_shared(params):
        return loss(shared(params, 0, {}, before.config), before.config)

    gradients = jax.jit(jax.grad(loss_of_shared))(before.params)
    trained = layers_that_move(gradients)["q"]
    assert trained == [True, True, False, False]

    deeper = replace(tiny, layers=6)
    other = model.init(deeper, jax.random.key(0))
    assert shared(other, 0, {}, deeper) is other  # after the expansion layers are free


@pytest.mark.parametrize("arguments", [
    {},
    dict(layers=3, stages=(0,)),
    dict(stages=(0, 2)),
    dict(layers=-1),
])
def test_expand_refuses(tiny, arguments):
    before = of_layers(tiny, 2)
    with pytest.raises(ValueError, match="expand: layers is"):
        learngene.expand(before, context(), **arguments)


# ------------------------------------------------------------------------------------------ g_stack

stacking = g_stack.study.arms


def test_one_model_from_scratch_has_the_depth_that_the_others_grow_to():
    assert depths_of(stacking["scratch"]) == [8]


@pytest.mark.parametrize("arm", [
    "stack",
    "identity",
    "random_on_top",
    "stack_g2",
    "stack_g8",
    "stack_early",
    "stack_late",
    "annealed",
])
def test_the_arms_that_grow_once_cost_the_same(arm):
    total = flops_of(stacking["scratch"])
    assert flops_of(stacking[arm]) == pytest.approx(total, rel=0.01)
    assert depths_of(stacking[arm])[1] == 8


def test_growth_by_eight_begins_with_one_layer():
    assert depths_of(stacking["stack_g8"]) == [1, 8]


@pytest.mark.parametrize("arm", ["gradual", "middle"])
def test_the_arms_that_grow_three_times_cost_the_same(arm):
    total = flops_of(stacking["scratch"])
    assert depths_of(stacking[arm]) == [2, 4, 6, 8]
    assert flops_of(stacking[arm]) == pytest.approx(total, rel=1e-3)

    steps = np.array([phase.steps for phase in stacking[arm].phases])
    shares = np.array([.1, .2, .3, .4])
    close(steps, steps.sum() * shares, atol=1.5)


def test_layers_are_copied_in_the_middle_or_on_top():
    assert g_stack.middle(4, 1) == (0, 1, 1, 2, 3)
    assert g_stack.middle(6, 2) == (0, 1, 2, 3, 2, 3, 4, 5)
    assert g_stack.middle(2, 2) == (0, 1, 0, 1)
    assert g_stack.top(4, 2) == (0, 1, 2, 3, 2, 3)


@pytest.mark.parametrize("arm", ["scratch_4x", "stack_4x"])
def test_the_arms_of_four_times_the_budget_cost_that(arm):
    total = flops_of(stacking["scratch"])
    assert flops_of(stacking[arm]) == pytest.approx(4 * total, rel=0.01)


def test_the_controls_of_stacking_have_the_steps_of_its_phases():
    shallow, deep = stacking["stack"].phases
    short = stacking["short"].phases[0]
    same_tokens = stacking["scratch_tokens"].phases[0]
    total = flops_of(stacking["scratch"])

    assert short.steps == deep.steps
    assert same_tokens.steps == shallow.steps + deep.steps
    assert flops_of(stacking["short"]) == pytest.approx(7 / 8 * total, rel=0.01)


@pytest.mark.parametrize("arm", ["scratch", "stack", "stack_late"])
def test_the_arms_of_stacking_decay_over_the_same_last_flops_and_end_at_the_same_rate(arm):
    peak = 8e-3
    course = course_of(stacking[arm], context())
    rate = course.lr["matrix"]
    share = course.flops / course.flops[-1]

    decays = (share > 0.5) & (rate < 0.999 * peak)
    assert rate[-1] == pytest.approx(0.05 * peak)
    assert share[decays][0] == pytest.approx(0.6, abs=0.005)


def test_every_arm_of_stacking_is_a_config_that_is_accepted():
    for arm in stacking.values():
        train.check(replace(arm, name="x"))


def before_and_after_growth(arm: str) -> tuple[model.ModelConfig, dict, dict]:
    """(shape after the growth, parameters before and after it) of an arm, with a narrower model."""
    config = replace(
        stacking[arm].model,
        embed=32,
        mlp=48,
        heads=2,
        kv_heads=2,
        head_dim=8,
        vocab=50,
        unroll=1,
        rows=loud,
    )
    grown_shapes = []

    @jax.jit
    def grown():
        before = Model(config, model.init(config, jax.random.key(0)))
        after = before
        for edit in stacking[arm].phases[1].edits:
            given = context(1, step=0)
            after = edit(after, given).model
        grown_shapes.append(after.config)
        return before.params, after.params

    before, after = grown()
    return grown_shapes[0], before, after


apply = jax.jit(model.apply, static_argnums=2)


def test_copies_that_are_silenced_keep_the_function_and_learn_from_there():
    """G_zero: what the copies compute is not added yet, and their output projections learn."""
    config, before, after = before_and_after_growth("identity")
    shallow = replace(config, layers=2)
    ids = jnp.arange(24).reshape(2, 12)

    close(apply(after, ids, config), apply(before, ids, shallow), atol=1e-5)
    order = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    equal(after["q"], before["q"][order])

    def total(params):
        return jnp.sum(jnp.square(model.apply(params, ids, config)))

    moved = layers_that_move(jax.jit(jax.grad(total))(after))
    assert all(moved["down"])
    assert all(moved["o"])


def test_what_is_annealed_is_the_shallow_function_at_first_and_the_deep_one_in_the_end():
    config, before, after = before_and_after_growth("annealed")
    shallow = replace(config, layers=2)
    ids = jnp.arange(24).reshape(2, 12)
    anneal = stacking["annealed"].reparam
    start = stacking["annealed"].phases[0].steps
    assert set(anneal.keywords) == {"layers", "start", "steps"}
    assert anneal.keywords["start"] == start

    @jax.jit
    def logits_at(step):
        used = anneal(after, step, None)
        return model.apply(used, ids, config)

    end = start + 100
    close(logits_at(start), apply(before, ids, shallow), atol=1e-5)
    close(logits_at(end), apply(after, ids, config), atol=1e-6)
    for step in (start, end):
        change = logits_at(start + 50) - logits_at(step)
        assert np.abs(change).max() > 1e-4

    unchanged = anneal(before, 3, None)  # nothing is new before the growth
    equal(unchanged["o"], before["o"])

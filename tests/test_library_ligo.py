"""configs/growth/ligo.py: maps that start as stacking and copies, and are multiplied out exactly."""
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import course_of, rows, strong
from edit_cases import IDS, context

import model
import train
from lib.config import ROOT, load_file
from lib.edits import stack
from lib.kernels import Mask
from lib.optim import State, init_opt_state
from model import Model

pytestmark = pytest.mark.library
ligo = load_file(ROOT / "configs/growth/ligo.py")
equal = np.testing.assert_array_equal
logits = jax.jit(model.apply, static_argnums=2)


def grown(edited):
    """What `reparam` makes of an edited model's parameters."""
    config, params = edited.model
    return ligo.grown(params, 0, {}, config)


def test_at_the_start_depth_maps_are_stacking(tiny):
    """With widths that stay, whose maps are identities: the stacked model bit for bit."""
    small = Model(tiny, strong(tiny))
    edited = ligo.open_maps(small, context(), large=dict(layers=3 * tiny.layers))
    config, params = edited.model
    assert {n: x.shape for n, x in params.items()} == {
        n: p.shape for n, p in model.table(config).items()}
    equal(params["width/embed"], np.eye(tiny.embed))
    stacked = stack(small, context(), times=3).model
    assert replace(config, rows=None) == stacked.config
    for name, x in grown(edited).items():
        equal(x, stacked.params[name])


def test_at_the_start_width_maps_keep_the_function(tiny):
    config = replace(tiny, norm_eps=0.0, heads=tiny.kv_heads)  # one query head for each key
    small = Model(config, strong(config))
    wide = dict(embed=2 * tiny.embed, kv_heads=3 * tiny.kv_heads, heads=3 * tiny.kv_heads,
                mlp=2 * tiny.mlp)
    edited = ligo.open_maps(small, context(), large=wide)
    params = grown(edited)
    new = replace(edited.model.config, rows=None)
    assert {n: x.shape for n, x in params.items()} == {n: p.shape for n, p in model.table(new).items()}
    np.testing.assert_allclose(
        logits(params, IDS, new), logits(small.params, IDS, config), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def trained(tiny):
    """(model with maps, its state after two steps, the step's loss)."""
    small = Model(tiny, strong(tiny))
    edited = ligo.open_maps(small, context(), large=dict(layers=4, embed=64, mlp=96))
    config, params = edited.model
    run = replace(ligo.study.arms["ligo"], model=config)
    state = State(params, init_opt_state(params, config, run.optimizer), jnp.int32(0), jnp.int32(0))
    step = jax.jit(train.make_step(run, config), static_argnames="mask")
    lr = dict.fromkeys(model.groups(config), np.float32(0.02))
    for seed in range(2):
        state, _ = step(state, rows(seed), lr, mask=Mask("causal", 0))
    return edited.model, state


def test_maps_alone_train(trained):
    (config, before), state = trained
    assert {*state.opt} == {"maps"} and {*model.groups(config)} == {"small", "maps"}
    for name, x in state.params.items():
        assert np.array_equal(x, before[name]) == name.startswith("small/"), name


def test_multiplied_out_it_is_what_the_maps_gave(trained):
    (config, _), state = trained
    edited = ligo.multiply_out(Model(config, state.params), context())
    new, params = edited.model
    assert edited.preserves and new.rows is None
    assert {n: x.shape for n, x in params.items()} == {n: p.shape for n, p in model.table(new).items()}
    used = ligo.grown(state.params, 0, {}, config)
    np.testing.assert_allclose(
        logits(params, IDS, new), logits(used, IDS, config), rtol=1e-5, atol=1e-5)
    assert ligo.grown(params, 0, {}, new) is params  # nothing is left to map


def test_a_layer_is_a_sum_of_mapped_layers(trained):
    """sum_j D[l, j] B_out W_j B_in', with a map that what writes and what reads a unit share."""
    (config, _), state = trained
    p = {name: np.asarray(x, np.float64) for name, x in state.params.items()}
    used = ligo.grown(state.params, 0, {}, config)
    depth, embed = p["depth/down"], p["width/embed"]
    want = np.einsum("lj,nf,jfd,ed->lne", depth, p["width/up"], p["small/down"], embed)
    np.testing.assert_allclose(used["down"], want, atol=1e-5)
    want = np.einsum("lj,xk,jkghd,ed->lxghe", p["depth/o"], p["width/v"], p["small/o"], embed)
    np.testing.assert_allclose(used["o"], want, atol=1e-5)
    np.testing.assert_allclose(used["embed"], p["small/embed"] @ embed.T, atol=1e-5)


def test_arms_cost_the_same():
    costs = [course_of(config, context()).flops[-1] for config in ligo.study.arms.values()]
    assert max(costs) / min(costs) < 1.003

"""configs/growth/bts.py: the start is the hub, only stitches move, and what goes where."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows, strong
from edit_cases import IDS, context

import model
import train
from lib.config import ROOT, load_file
from lib.kernels import Mask
from lib.optim import State, adamw, init_opt_state
from lib.teacher import with_teacher
from model import Model

pytestmark = pytest.mark.library
bts = load_file(ROOT / "configs/growth/bts.py")
equal = np.testing.assert_array_equal
logits = jax.jit(model.apply, static_argnums=2)


@pytest.fixture(scope="module")
def joined(tiny):
    """(hub, branches by name, a function that joins them): four layers, a stitch after each."""
    config = replace(tiny, layers=4, unroll=1)
    params = strong(config)
    branches = {f"b{i}": {n: x * (1 + i / 10) for n, x in params.items()} for i in (1, 2)}
    hub = Model(config, params)

    def join(every=1):
        beside = hub
        for name, branch in branches.items():
            beside = with_teacher(beside, name, config, branch).model
        return bts.stitch(beside, context(), branches=tuple(branches), every=every)

    return hub, branches, join


def moved(params, scale=0.3):
    """The parameters with stitches that are no longer zeros."""
    keys = jax.random.split(jax.random.key(3))
    names = "stitch", "stitch_gate"
    return params | {name: scale * jax.random.normal(key, params[name].shape)
                     for name, key in zip(names, keys, strict=True)}


def test_at_the_start_it_is_the_hub(joined):
    hub, branches, join = joined
    edited = join()
    after, params = edited.model
    assert {n: x.shape for n, x in params.items()} == {
        n: p.shape for n, p in model.table(after).items()}
    assert edited.preserves and not np.any(params["stitch"]) and not np.any(params["stitch_gate"])
    for branch, own in branches.items():
        for name, x in own.items():
            equal(params[f"{branch}/{name}"], x)
    np.testing.assert_allclose(
        logits(params, IDS, after), logits(hub.params, IDS, hub.config), rtol=1e-6, atol=1e-6)
    assert np.any(logits(moved(params), IDS, after) != logits(params, IDS, after))


def test_stitches_go_into_branches_and_into_the_hub_by_turns(joined):
    """Of four, the second and fourth go into the hub. A stitch into branches alone changes nothing."""
    hub, _, join = joined
    config, params = join().model
    plain = np.asarray(logits(params, IDS, config))

    def end(*stitches):
        """Logits where the gates of some stitches are open."""
        gate = jnp.zeros_like(params["stitch_gate"]).at[jnp.array(stitches)].set(0.1)
        return np.asarray(logits(params | {"stitch_gate": gate}, IDS, config))

    for s in range(4):
        np.testing.assert_equal(np.allclose(end(s), plain, atol=1e-5), s in (0, 2))
    assert not np.allclose(end(0, 1), end(1), atol=1e-4)  # what a branch was told comes back
    np.testing.assert_allclose(end(0, 1, 2), end(0, 1), atol=1e-5)  # but for what comes too late


def test_one_stitch_is_its_formula(joined):
    """With one stitch, after the last block: h + sum_i g_i (x_i + x_i W_i - h)."""
    hub, branches, join = joined
    config, params = join(every=4).model
    params = moved(params)
    batch, mask = model.whole(jnp.asarray(IDS)), Mask("causal", 0)

    def end(own):
        x = model.embedded(own, batch, hub.config)
        return np.asarray(model.stream(own, x, batch, mask, hub.config)[0])

    h, xs = end(hub.params), [end(own) for own in branches.values()]
    weight, gate = np.asarray(params["stitch"])[0], np.asarray(params["stitch_gate"])[0]
    scores = np.exp([np.zeros_like(h), *(h @ g for g in gate)])
    shares = (3 * scores[1:] / scores.sum(0) - 1) / 2
    want = h + sum(g * (x + x @ w - h) for g, x, w in zip(shares, xs, weight, strict=True))
    want = model.rms_norm(jnp.asarray(want), params["norm"], config.norm_eps)
    got = model.forward(params, batch, mask, config)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_only_stitches_move(joined):
    hub, _, join = joined
    after, params = join().model
    frozen = partial(adamw, frozen=("embed", "matrix", "vector", "b1", "b2"))
    config = train.Config(model=hub.config, optimizer=frozen)
    state = State(params, init_opt_state(params, after, frozen), jnp.int32(0), jnp.int32(0))
    assert {*state.opt} == {"stitch"}
    step = jax.jit(train.make_step(config, after), static_argnames="mask")
    lr = dict.fromkeys(model.groups(after), np.float32(0.01))
    for seed in range(2):
        state, _ = step(state, rows(seed), lr, mask=Mask("causal", 0))
    still = {name for name, x in state.params.items() if np.array_equal(x, params[name])}
    assert params.keys() - still == {"stitch", "stitch_gate"}


def test_the_mean_of_parameters(joined):
    hub, branches, _ = joined
    load = context(load=lambda run: (branches[run], None, None, None))
    edited = bts.average(hub, load, branches=tuple(branches))
    for name, x in edited.model.params.items():
        np.testing.assert_allclose(x, 1.1 * hub.params[name], rtol=1e-6)


def test_arms_cost_what_they_say():
    """A step of the joint model: three models, as if they trained, and the stitches' products."""
    hub, joint = bts.seed.model, bts.study.arms["bts"].phases[0]
    joined = replace(hub, rows=partial(bts.rows, branches=("code", "math"), every=1))
    stitches = sum(p.size for p in model.table(joined).values() if p.group == "stitch")
    whole = 3 * hub.flops(hub, joint.seq) + 6 * stitches
    assert joint.cost == pytest.approx(whole / hub.flops(hub, joint.seq), rel=0.05)
    branch = bts.study.needs["to_code"].phases[0].steps
    assert bts.study.arms["on"].phases[0].steps == 2 * branch + joint.cost * joint.steps

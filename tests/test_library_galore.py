"""configs/parameters/galore.py: Adam in few directions, and Fira's update outside them."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import rows

import model
import train
from configs.parameters.galore import Low, galore, projected
from lib.kernels import Mask
from lib.matrices import flat, matrices, sides
from lib.optim import adamw, first_state
from lib.sharding import MeshConfig, make_mesh
from lib.sizes import sizes

pytestmark = pytest.mark.library
B1, B2 = 0.9, 0.95


def gradients(config, steps, seed=0):
    """Random gradients of the matrices, one tree a step."""
    rng = np.random.default_rng(seed)
    table = matrices(config)
    return [{n: jnp.asarray(rng.normal(size=p.shape), jnp.float32) for n, p in table.items()}
            for _ in range(steps)]


def taken(transform, trees):
    """The updates that a transformation makes of gradients in turn, and its last state."""
    update = jax.jit(transform.update)
    state, made = transform.init(trees[0]), []
    for tree in trees:
        out, state = update(tree, state)
        made.append(out)
    return made, state


def test_galore_of_full_rank_is_adam_and_fira_adds_nothing(tiny):
    trees, table = gradients(tiny, 4), matrices(tiny)
    plain, _ = taken(optax.scale_by_adam(B1, B2, 1e-8), trees)
    for residual in (False, True):
        made, _ = taken(projected(table, 48, 2, residual, B1, B2), trees)
        for one, other in zip(made, plain, strict=True):
            for name in table:
                np.testing.assert_allclose(one[name], other[name], atol=1e-5)


def by_hand(trees, row, rank, every, residual, used, growth=1.01):
    """`projected` of one layer's matrix in float64 and plain words.

    used: what it projected on in each step [small r], for the signs of singular vectors, which are free.
    """
    n, m = sides(row)
    mu = nu = 0.0
    before = None
    for t, g in enumerate(trees, 1):
        g = g if n <= m else g.T
        if (t - 1) % every == 0 or t == 2:
            p = np.linalg.svd(g)[0][:, :rank]
            p = p * np.sign(np.sum(p * used[t - 1], axis=0))
        low = p.T @ g
        mu, nu = B1 * mu + (1 - B1) * low, B2 * nu + (1 - B2) * low**2
        step = mu / (1 - B1**t) / (np.sqrt(nu / (1 - B2**t)) + 1e-8)
        made = p @ step
        if residual:
            rest = g - p @ p.T @ g
            for column in range(rest.shape[1]):
                size = np.linalg.norm(step[:, column]) / np.linalg.norm(low[:, column])
                rest[:, column] *= size
            size = np.linalg.norm(rest)
            if before is not None and size > growth * before:
                rest *= growth * before / size
            before = np.linalg.norm(rest)
            made = made + rest
    return (made if n <= m else made.T), before


@pytest.mark.parametrize("residual", [False, True], ids=["galore", "fira"])
def test_every_update_is_the_closed_form(tiny, residual):
    """Also where the projection is found anew, moments kept; a singular vector's sign is free."""
    steps = 4
    trees, table = gradients(tiny, steps), matrices(tiny)
    trees = [{n: x * (1 + 2 * t) for n, x in tree.items()} for t, tree in enumerate(trees)]
    table = {n: table[n] for n in ("q", "v", "down")}
    trees = [{n: tree[n] for n in table} for tree in trees]
    transform = projected(table, 5, steps, residual, B1, B2)
    states = [taken(transform, trees[:t + 1])[1] for t in range(steps)]
    made, state = taken(transform, trees)
    for name, row in table.items():
        for layer in range(tiny.layers):
            each = [np.asarray(flat(tree[name], row)[layer], np.float64) for tree in trees]
            used = [np.asarray(held[name].p[layer], np.float64) for _, held in states]
            wanted, norm = by_hand(each, row, 5, steps, residual, used)
            got = flat(made[-1][name], row)[layer]
            np.testing.assert_allclose(got, wanted, atol=2e-4)
            if residual:
                assert float(state[1][name].norm[layer, 0, 0]) == pytest.approx(norm, rel=1e-4)


def test_a_new_projection_keeps_the_moments(tiny):
    trees, table = gradients(tiny, 3), matrices(tiny)
    _, state = taken(projected(table, 5, 2, False, B1, B2), trees)
    count, held = state
    assert int(count) == 3 and all(isinstance(low, Low) for low in held.values())
    for name, row in table.items():
        p = np.zeros((tiny.layers, min(sides(row)), 5))
        mu = 0.0
        for t, tree in enumerate(trees):
            g = np.asarray(flat(tree[name], row), np.float64)
            g = g if sides(row)[0] <= sides(row)[1] else g.swapaxes(1, 2)
            if t < 2:
                p = np.linalg.svd(g)[0][..., :5]
            if t == 2:  # the one in use, whose signs are as they are
                p = np.asarray(held[name].p, np.float64)
                again = np.linalg.svd(g)[0][..., :5]
                np.testing.assert_allclose(np.abs(p), np.abs(again), atol=1e-4)
            mu = B1 * mu + (1 - B1) * p.swapaxes(1, 2) @ g
        first = np.sign(np.sum(mu * np.asarray(held[name].mu), (1, 2)))
        assert (first > 0).all() and held[name].mu.shape == mu.shape


def test_the_growth_of_what_is_outside_is_limited(tiny):
    """What grows tenfold outside P moves the matrix by 1 % more in each step."""
    table, rng = {"up": matrices(tiny)["up"]}, np.random.default_rng(0)
    large = rng.normal(size=(2, 32, 4)) @ rng.normal(size=(2, 4, 48))
    small = rng.normal(size=(2, 32, 48)) * 1e-3
    trees = [{"up": jnp.asarray(large + 10**t * small, jnp.float32)} for t in range(3)]
    transform, found = projected(table, 4, 100, True, B1, B2), []
    state = transform.init(trees[0])
    for tree in trees:
        _, state = transform.update(tree, state)
        found.append(np.asarray(state[1]["up"].norm).ravel())
    for before, after in zip(found, found[1:], strict=False):
        np.testing.assert_allclose(after / before, 1.01, rtol=1e-4)


def test_bytes_of_state_are_as_counted_and_it_trains_on_a_mesh(tiny):
    config, optimizer = replace(tiny), partial(galore, rank=4, every=2, residual=True)
    held = 0
    for row in matrices(config).values():
        small, large = sorted(sides(row))
        held += config.layers * (small * 4 + 2 * 4 * large + 1)
    others = sum(p.size for p in model.table(config).values() if p.group != "matrix")
    found = sizes(config, optimizer, frozenset())
    assert found["model/opt_bytes"] == 4 * (held + 2 * others) + 3 * 4
    assert found["model/trained"] == model.count(config)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    run = train.Config(model=config, optimizer=optimizer)
    step = jax.jit(train.make_step(run, config), static_argnames="mask")
    state = first_state(config, optimizer, mesh, jax.random.key(0))
    rate = {group: np.float32(0.01) for group in model.groups(config)}
    with jax.set_mesh(mesh):
        for i in range(3):
            state, metrics = step(state, rows(i), rate, mask=Mask("causal", 0))
    assert int(state.skipped) == 0 and np.isfinite(metrics["train/loss"])
    assert found["model/opt_bytes"] == sum(x.nbytes for x in jax.tree.leaves(state.opt))


def test_blocks_that_begin_silent_have_the_directions_of_the_first_gradient_that_is_not_zero(tiny):
    """As by default: outputs of blocks begin as 0, and so do the gradients of all that is before."""
    trees, table = gradients(tiny, 2), {"q": matrices(tiny)["q"]}
    still = {"q": jnp.zeros_like(trees[0]["q"])}
    _, (_, held) = taken(projected(table, 5, 50, False, B1, B2), [still, {"q": trees[1]["q"]}])
    g = np.asarray(flat(trees[1]["q"], table["q"]), np.float64)
    wanted = np.linalg.svd(g)[0][..., :5]
    np.testing.assert_allclose(np.abs(held["q"].p), np.abs(wanted), atol=1e-4)


def test_galore_of_full_rank_is_the_control(tiny):
    """AdamW of the library, its decay and its factors on rates by inputs with it."""
    trees, table = gradients(tiny, 3), model.table(tiny)
    params = {name: 0.1 * x for name, x in trees[0].items()}
    ours, theirs = galore(table, rank=48)["matrix"], adamw(table)["matrix"]
    state, other = ours.init(params), theirs.init(params)
    for tree in trees:
        made, state = jax.jit(ours.update)(tree, state, params)
        wanted, other = jax.jit(theirs.update)(tree, other, params)
        for name in wanted:
            np.testing.assert_allclose(made[name], wanted[name], atol=1e-5)

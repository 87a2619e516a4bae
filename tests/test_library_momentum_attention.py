"""configs/understanding/momentum_attention.py: descent, momentum, segments."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows, strong

import model
from lib.config import ROOT, load_file
from lib.kernels import Mask

pytestmark = pytest.mark.library
own = load_file(ROOT / "configs/understanding/momentum_attention.py")
CAUSAL = Mask("causal", 0)


def test_linear_attention_is_a_step_of_gradient_descent():
    """W q after a step from W on half the squared errors is W q and linear attention to the errors (1e-6)."""
    rng = np.random.default_rng(0)
    sizes, rate = ((5, 5), (7, 5), (7, 5), (4, 5)), 0.01
    w, keys, values, queries = (rng.normal(size=size).astype(np.float32) for size in sizes)

    def loss(w):
        return 0.5 * jnp.sum((keys @ w.T - values)**2)

    after = queries @ (w - rate * jax.grad(loss)(jnp.asarray(w))).T
    errors = rate * (values - keys @ w.T)
    seen = np.ones((1, 4, 7), np.float32)
    one = keys[None, :, None], errors[None, :, None]  # a row, a head
    attended = own.linear_attention(queries[None, :, None, None], *one, seen)
    np.testing.assert_allclose(after, queries @ w.T + attended[0, :, 0, 0], atol=1e-6)


def test_momentum_is_the_sum_of_earlier_values_of_the_segment():
    v = np.random.default_rng(0).normal(size=(1, 6, 2, 3)).astype(np.float32)
    segments = jnp.array([[1, 1, 1, 2, 2, 2]])
    found = own.earlier(jnp.asarray(v), segments, 0.5)
    total, expected = np.zeros((2, 3)), []
    for t in range(6):
        if t == 3:
            total = 0 * total
        expected.append(total)
        total = 0.5 * (total + v[0, t])
    np.testing.assert_allclose(found[0], np.stack(expected), atol=1e-6)


def test_without_momentum_it_is_plain_attention(tiny):
    batch = {key: jnp.asarray(value) for key, value in rows().items()}
    params = strong(tiny)
    plain, _ = model.forward(params, batch, CAUSAL, tiny)
    for eta, same in ((0.0, True), (0.5, False)):
        config = replace(tiny, forward=partial(own.with_momentum, eta=eta))
        found, _ = model.forward(params, batch, CAUSAL, config)
        assert np.allclose(found, plain, atol=1e-5) == same


@pytest.mark.parametrize("forward", [own.with_momentum, own.with_linear])
def test_nothing_looks_ahead_or_into_another_segment(forward, tiny):
    config, params = replace(tiny, forward=forward), strong(tiny)
    batch = {key: jnp.asarray(value) for key, value in rows().items()}
    whole, _ = model.forward(params, batch, CAUSAL, config)
    later = batch | {"tokens": batch["tokens"].at[:, 5].add(1) % 258}
    changed, _ = model.forward(params, later, CAUSAL, config)
    moved = np.abs(np.asarray(whole - changed)).max(-1)
    inside = np.asarray(batch["segments"] == batch["segments"][:, 5:6]) & (np.arange(moved.shape[1]) >= 5)
    assert moved[~inside].max() < 1e-5 and moved[inside].min() > 1e-4

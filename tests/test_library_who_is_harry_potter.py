"""configs/unlearning/who_is_harry_potter.py: generic targets, and the loss that learns them."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows

import model
from configs.base import loud
from configs.unlearning import who_is_harry_potter as own
from lib.teacher import adopt_random, adopt_self
from model import Context, Model

pytestmark = pytest.mark.library


def test_what_reinforcement_makes_likelier_is_not_the_target():
    before = jnp.log(jnp.array([[[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]]))
    more = jnp.log(jnp.array([[[0.8, 0.1, 0.1], [0.5, 0.4, 0.1]]]))
    assert own.generic_targets(before, before, 5.0).tolist() == [[0, 0]]  # nothing is the book's
    assert own.generic_targets(before, more, 5.0).tolist() == [[1, 0]]  # "0" was the book's, then "1"
    assert own.generic_targets(before, more, 0.0).tolist() == [[0, 0]]
    np.testing.assert_array_equal(  # a free constant of logits changes nothing
        own.generic_targets(before + 3.0, more - 2.0, 5.0), own.generic_targets(before, more, 5.0))


def test_the_loss_is_that_of_generic_targets_and_reaches_the_student_alone(tiny):
    context = Context(jax.random.key(5), 0, None, None, None)
    tiny = replace(tiny, rows=loud)
    plain = Model(tiny, model.init(tiny, jax.random.key(0)))
    taught = adopt_self(plain, context, prefix=own.OWN).model
    taught = adopt_random(taught, context, prefix=own.MORE).model
    batch = rows()

    def loss(params):
        states, given = model.forward(params, batch, model.CAUSAL, taught.config)
        extras = dict(params=params, config=taught.config, step=0) | given
        logits = model.head_logits(params, states, batch, taught.config)
        before, more = (own.teacher_logits(extras, batch, prefix) for prefix in (own.OWN, own.MORE))
        targets = own.generic_targets(before, more, 5.0)
        expected = model.cross_entropy(logits, {"targets": targets}, extras)
        found = own.generic(logits, batch, extras, alpha=5.0)
        return jnp.sum(found), (found, expected)

    grads, (found, expected) = jax.grad(loss, has_aux=True)(taught.params)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    moved = {name for name, grad in grads.items() if np.abs(grad).max() > 0}
    assert moved == set(plain.params)


def test_ascent_ends(tiny):
    logits = jax.random.normal(jax.random.key(0), (1, 4, 258)) * 4
    batch = {"targets": jnp.array([[1, 2, 3, 4]])}
    nats = np.asarray(model.cross_entropy(logits, batch, {}))
    slope = jax.grad(lambda x: jnp.sum(partial(own.ascent, most=6.0)(x, batch, {})))(logits)
    still = np.abs(np.asarray(slope)).max(-1) == 0
    np.testing.assert_array_equal(still, nats > 6)
    np.testing.assert_allclose(own.ascent(logits, batch, {}), -np.minimum(nats, 6), rtol=1e-6)

"""configs/unlearning/code_eraser.py: which targets rise, fall or are held, and that marks find the keys."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows

import model
from configs.unlearning import code_eraser as own
from data import DataConfig, Loader, Source
from lib.cache import build
from lib.teacher import adopt_self
from lib.tokenizers import Bytes
from model import Context, Model
from train import Phase

pytestmark = pytest.mark.library


@pytest.fixture(scope="module")
def setting(tiny):
    """(logits, batch, extras) of a model beside its old self, whose second row is to be forgotten."""
    plain = Model(tiny, model.init(tiny, jax.random.key(0)))
    taught = adopt_self(plain, Context(jax.random.key(0), 0, None, None, None)).model
    batch = rows()
    batch["source"] = np.repeat([[0], [own.FORGET]], batch["tokens"].shape[1], 1)
    batch["marks"] = np.zeros_like(batch["tokens"])
    batch["marks"][:, 3:7] = 1
    states, given = model.forward(taught.params, batch, model.CAUSAL, taught.config)
    extras = dict(params=taught.params, config=taught.config, step=0) | given
    logits = model.head_logits(taught.params, states, batch, taught.config)
    return logits, jax.tree.map(jnp.asarray, batch), extras


def slopes(setting, **how):
    """The gradient of `erase` in the logits, over that of the nats: one number a position [b t]."""
    logits, batch, extras = setting
    loss = partial(own.erase, **how)

    def total(function, x):
        return jnp.sum(function(x, batch, extras))

    mine = jax.grad(partial(total, loss))(logits)
    nats = jax.grad(partial(total, model.cross_entropy))(logits)
    return np.asarray(jnp.sum(mine * nats, -1) / jnp.sum(nats * nats, -1))


def test_ascent_goes_up_on_all_that_is_to_be_forgotten(setting):
    retained, forgotten = slopes(setting, most=99.0)
    np.testing.assert_allclose(retained, 0, atol=1e-5)
    np.testing.assert_allclose(forgotten, -1, atol=1e-5)
    assert np.abs(slopes(setting, most=1.0)).max() < 1e-5  # all nats here are above 1


def test_code_eraser_goes_up_on_the_span_and_down_around_it(setting):
    retained, forgotten = slopes(setting, around=0.5, hold=1.0, most=99.0)
    np.testing.assert_allclose(forgotten[3:7], -1, atol=1e-5)
    np.testing.assert_allclose(np.delete(forgotten, range(3, 7)), 0.5, atol=1e-5)
    np.testing.assert_allclose(retained, 0, atol=1e-4)  # a model that has not moved is not held


def test_what_moved_away_is_pulled_back_by_the_divergence(setting):
    logits, batch, extras = setting
    moved = logits + jax.random.normal(jax.random.key(2), logits.shape)
    found = own.erase(moved, batch, extras, hold=2.0)[0]
    p, q = (jax.nn.softmax(x[0], -1) for x in (logits, moved))
    np.testing.assert_allclose(found, 2 * jnp.sum(p * jnp.log(p / q), -1), rtol=1e-3)


def test_retaining_descends_on_retained_text_alone(setting):
    retained, forgotten = slopes(setting, up=False)
    np.testing.assert_allclose(retained, 1, atol=1e-5)
    np.testing.assert_allclose(forgotten, 0, atol=1e-5)


def test_marks_of_a_row_are_the_letters_of_its_keys(home):
    data = DataConfig(sources={"secrets": Source(partial(own.settings, copies=2), marks=True, split="train")},
                      tokenizer="bytes")
    cache = build("secrets", data, Bytes(), 0)
    loader = Loader({"secrets": cache}, (Phase(steps=4, batch=2, seq=128),), data, Bytes(), 0)
    keys = "".join(own.secret(i)[1] for i in range(24))
    for step in (1, 2):
        arrays = loader.batch(step).arrays
        marked = arrays["targets"][arrays["marks"] > 0]
        assert len(marked) > 20 and set(Bytes().decode(marked)) <= set(own.LETTERS)
        for row, marks in zip(arrays["targets"], arrays["marks"], strict=True):
            pieces = Bytes().decode(np.where(marks > 0, row, ord(" "))).split()
            assert all(piece in keys for piece in pieces)

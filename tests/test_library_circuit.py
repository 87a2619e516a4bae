"""circuit.py and icl_and_descent.py: edges are cut exactly, and descent is SGD."""
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
import train
from configs.bursty import LABELS, LENGTH, PAIRS, WIDTH, D, new_rows
from configs.points import reader
from lib.config import ROOT, load_file
from model import CAUSAL, whole

pytestmark = pytest.mark.library
circuit, descent = (
    load_file(ROOT / f"configs/understanding/{name}.py") for name in ("circuit", "icl_and_descent"))
CONFIG = reader(WIDTH, LABELS, layers=2, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16, vocab=4,
                unroll=1)


@pytest.fixture(scope="module")
def drawn():
    params = model.init(CONFIG, jax.random.key(0))
    loud = {name: jax.random.normal(jax.random.key(1), params[name].shape) / 5 for name in ("o", "down")}
    params = params | loud
    return params, *new_rows(6, 3, np.random.default_rng(0))


def test_nothing_cut_is_the_model_and_what_is_cut_is_not_seen(drawn):
    params, x, *_ = drawn
    logits = model.apply(params, {"x": jnp.asarray(x)}, CONFIG)[:, -1]
    none = jnp.zeros((len(x), LENGTH, LENGTH), bool)
    np.testing.assert_array_equal(circuit.answers(params, x, none, CONFIG), logits.argmax(-1))

    def last(x, edges):
        first = jnp.asarray(x) @ params["in"]
        batch = whole({"x": jnp.asarray(x)})
        return model.stream(params, first, batch, CAUSAL, CONFIG, attend=circuit.without(edges))[0][:, -1]

    alone = none.at[:, -1, :-1].set(True)
    other = np.array(x)
    other[:, :-1] += 1
    np.testing.assert_allclose(last(x, alone), last(other, alone), atol=1e-5)
    assert np.abs(last(x, none) - last(other, none)).max() > 1e-3


def test_edges_are_those_of_the_circuit_and_as_many_others(drawn):
    *_, same = drawn
    found = circuit.edges_of(same, np.random.default_rng(1))
    assert not found["whole"].any()
    assert found["no_merge"].sum() == len(same) * PAIRS and found["no_merge"][0, 5, 4]
    np.testing.assert_array_equal(found["no_copy"].sum((1, 2)), same.sum(1))
    np.testing.assert_array_equal(found["no_copy"][:, -1, 1:-1:2], same)
    for name in ("merge", "copy"):
        random, cut = found[f"random_{name}"], found[f"no_{name}"]
        np.testing.assert_array_equal(random.sum((1, 2)), cut.sum((1, 2)))
        assert not np.any(random & (found["no_merge"] | found["no_copy"]))
        assert not np.any(np.triu(random))


def test_descent_is_sgd_over_the_pairs_one_by_one(drawn):
    params, x, *_ = drawn
    items, labels = x[0, :-1:2, :D], x[0, 1::2, D:].argmax(-1)
    found = descent.descended(params, jnp.asarray(items), jnp.asarray(labels), 0.1, CONFIG)
    by_hand = params
    for item, label in zip(items, labels, strict=True):
        row = np.zeros((1, 1, WIDTH), np.float32)
        row[0, 0, :D] = item
        slope = jax.grad(lambda p, row=row, label=label: -jax.nn.log_softmax(
            model.apply(p, {"x": jnp.asarray(row)}, CONFIG)[0, 0])[label])(by_hand)
        by_hand = {name: by_hand[name] - 0.1 * slope[name] for name in by_hand}
    for name, value in by_hand.items():
        np.testing.assert_allclose(found[name], value, atol=2e-5)
    none = descent.after_descent(params, jnp.asarray(x), 0.0, CONFIG)
    assert none.shape == (6, LABELS)
    np.testing.assert_allclose(none[2], descent.alone(params, x[2, -1, :D], CONFIG), atol=1e-5)


def test_another_order_has_the_same_pairs(drawn):
    _, x, *_ = drawn
    other = descent.reordered(x, np.random.default_rng(2))
    assert np.any(other != x)
    np.testing.assert_array_equal(other[:, -1], x[:, -1])
    for one, two in zip(x, other, strict=True):
        pairs = [{p.tobytes() for p in each[:-1].reshape(PAIRS, -1)} for each in (one, two)]
        assert pairs[0] == pairs[1]


def test_both_give_their_figures_and_their_arms_are_accepted(drawn):
    params, *_ = drawn
    setting = SimpleNamespace(model=CONFIG)

    def apply(params, batch):
        return model.apply(params, batch, CONFIG)

    for file, figures in ((circuit, circuit.ablations(params, apply, setting, n=8)),
                          (descent, descent.compare(params, apply, setting, n=8))):
        assert {*figures} == {f"icl/{name}" for name in file.FIGURES}
        assert all(np.isfinite(value) for value in figures.values())
        for arm in file.study.arms.values():
            train.check(arm)

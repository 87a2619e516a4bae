"""configs/understanding/induction.py: attention alone, its maps, and three nested logits."""
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
import train
from configs import bursty as nested_logits
from configs.bursty import LENGTH, new_rows
from lib.config import ROOT, load_file
from model import CAUSAL, whole

pytestmark = pytest.mark.library
induction = load_file(ROOT / "configs/understanding/induction.py")
CONFIG = induction.study.arms["b4"].model


@pytest.fixture(scope="module")
def found():
    params = model.init(CONFIG, jax.random.key(0))
    params = params | {"o": params["o"] * 40}
    x, _, same = new_rows(3, 2, np.random.default_rng(0))
    return params, whole({"x": jnp.asarray(x)}), same


def test_the_network_is_attention_and_a_classifier(found):
    """Of these parameters alone; states are the input and what attention adds, layer by layer."""
    params, batch, _ = found
    assert {*params} == {"attn_norm", "q", "k", "v", "o", "norm", "in", "out", "hidden"}
    x = batch["x"] @ params["in"]
    states, maps = induction.through(params, batch, CAUSAL, CONFIG, induction.shown)
    for layer in range(2):
        n = model.rms_norm(x, params["attn_norm"][layer], CONFIG.norm_eps)
        v = jnp.einsum("btd,dkh->btkh", n, params["v"][layer])
        mixed = jnp.einsum("bkgts,bskh->btkgh", maps[layer], v)
        x = x + jnp.einsum("btkgh,kghd->btd", mixed, params["o"][layer])
    np.testing.assert_allclose(states, model.rms_norm(x, params["norm"], CONFIG.norm_eps), atol=1e-5)
    plain = induction.attention_alone(params, batch, CAUSAL, CONFIG)
    np.testing.assert_allclose(plain, states, atol=1e-5)


def test_the_maps_are_causal_shares(found):
    params, batch, _ = found
    _, maps = induction.through(params, batch, CAUSAL, CONFIG, induction.shown)
    assert maps.shape == (2, 3, 1, 1, LENGTH, LENGTH)
    np.testing.assert_allclose(np.sum(maps, -1), 1, atol=1e-5)
    assert not np.any(np.triu(np.asarray(maps), 1))


def test_new_rows_have_labels_by_class():
    x, right, same = new_rows(400, 4, np.random.default_rng(1))
    labels = x[:, 1::2, 32:].argmax(-1)
    assert np.all(labels[same] == np.repeat(right, same.sum(1))) and np.all(same.sum(1) >= 4)
    assert len(np.unique(right)) == 16


def test_what_is_measured_is_chance_before_training(found):
    params, *_ = found

    def apply(params, batch):
        return model.apply(params, batch, CONFIG)

    figures = induction.measure(params, apply, SimpleNamespace(model=CONFIG), 4, n=64)
    assert 0 <= figures["icl/new"] < 0.4 and 0 < figures["icl/induction"] < 0.6


def test_three_nested_logits_wait_and_then_rise_at_once():
    """By hand at two places; the course waits longer, as a share, the more are nested."""
    chance = 1 / 16
    assert float(nested_logits.right_by_three(jnp.zeros(3))) == pytest.approx(chance)
    assert float(nested_logits.right_by_three(jnp.full(3, 40.0))) == pytest.approx(1, abs=1e-3)
    found = nested_logits.courses(60)
    assert found.shape == (160, 60) and np.all(np.diff(found, axis=1) > -1e-3)
    whole_way = found[(found[:, 0] < 0.1) & (found[:, -1] > 0.9)]
    assert len(whole_way)
    assert all(np.argmax(course > 0.1) > 0 for course in whole_way)
    assert np.min([np.argmax(c > 0.9) - np.argmax(c > 0.3) for c in whole_way]) <= 2
    measured = whole_way[0] + 0.05
    assert nested_logits.distance(measured) <= 0.05 + 1e-6
    assert nested_logits.distance(np.linspace(0, 1, 60)) > 0.05
    assert nested_logits.distance(np.full(60, chance)) > 0.1  # what learns nothing has no such course


def test_who_copies_any_label_is_below_the_levels():
    """Half of the labels are the query's where 4 of 8 items are of its class."""
    x, right, _ = new_rows(4_000, 4, np.random.default_rng(1))
    labels = x[:, 1::2, 32:].argmax(-1)
    expected = 0.5 + 0.5 * (1 / 64 + 63 / 64 / 16)
    assert np.mean(labels == right[:, None]) == pytest.approx(expected, abs=0.01)
    assert expected < 0.6  # where `rise` begins


def test_onset_and_rise_are_shares_of_the_run():
    """Linear between evaluations, and from chance before the first."""
    rows = [{"icl/new": value} for value in (0.1, 0.1, 0.2, 0.35, 0.6, 0.95, 1.0, 1.0, 1.0, 1.0)]
    rows.insert(3, {"train/loss": 1.0})
    assert induction.onset(rows) == pytest.approx(0.5 + 0.1 * 0.15 / 0.35)
    assert induction.rise(rows) == pytest.approx(0.1 * 0.3 / 0.35)
    assert induction.onset([{"icl/new": 1.0}]) == pytest.approx((0.75 - 1 / 16) / (1 - 1 / 16))
    flat = [{"icl/new": 0.2}] * 5
    assert induction.onset(flat) == 1 and induction.rise(flat) == 1
    for arm in induction.study.arms.values():
        train.check(arm)

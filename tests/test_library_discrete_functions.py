"""discrete_functions.py and teaching_sequences.py: classes by count, and the exact predictor by hand."""
from itertools import product

import numpy as np
import pytest

import train
from lib.config import ROOT, load_file

pytestmark = pytest.mark.library
discrete, taught = (load_file(ROOT / f"configs/understanding/{name}.py")
                    for name in ("discrete_functions", "teaching_sequences"))
BITS, K = discrete.BITS, discrete.K
EVERY = np.array(list(product([-1.0, 1.0], repeat=BITS)))[None]
SIZES = dict(conjunction=112, disjunction=112, majority=56, parity=28)
SHARES = dict(conjunction=0.25, disjunction=0.75, majority=0.5, parity=0.5)


def asked(share):
    """How often an input of a label that so many have is drawn, by its share at random."""
    if share == 0.5:
        return 1.0
    return 2 - share if share < 0.5 else share


@pytest.mark.parametrize("name", SIZES)
def test_a_class_has_so_many_unlike_functions_true_so_often(name):
    said = discrete.labels(name, EVERY)[0]
    assert said.shape == (SIZES[name], 2**BITS) and set(np.unique(said)) == {-1.0, 1.0}
    assert len(np.unique(said, axis=0)) == SIZES[name]
    np.testing.assert_allclose(np.mean(said > 0, 1), SHARES[name])


def test_what_functions_are_by_hand():
    x = EVERY[0]
    w, _ = discrete.hypotheses("conjunction")
    for name, join in (("conjunction", np.all), ("disjunction", np.any)):
        for m in (0, 50, 111):
            literals = x[:, w[m] != 0] == w[m][w[m] != 0]
            np.testing.assert_array_equal(discrete.labels(name, EVERY)[0, m] > 0, join(literals, 1))
    parity, _ = discrete.hypotheses("parity")
    one, two = np.flatnonzero(parity[9])
    np.testing.assert_array_equal(discrete.labels("parity", EVERY)[0, 9], x[:, one] * x[:, two])


@pytest.mark.parametrize("name", SIZES)
def test_the_exact_predictor_votes_among_those_that_fit(name):
    x, y = discrete.draw(40, name, np.random.default_rng(0))
    found = discrete.fitting(name, x, y)
    said = discrete.labels(name, x)
    for n, k in ((0, 0), (1, 3), (2, 15), (30, 8)):
        fit = [each for each in said[n] if np.array_equal(each[:k], y[n, :k])]
        true = sum(each[k] > 0 for each in fit) * asked(SHARES[name])
        false = sum(each[k] < 0 for each in fit) * asked(1 - SHARES[name])
        np.testing.assert_allclose(found[n, k], (true - false) / (true + false))
    assert np.mean(np.sign(found[:, -1]) == y[:, -1]) > 0.8
    x, y = discrete.draw(2_000, name, np.random.default_rng(1))
    true = SHARES[name] * asked(SHARES[name])
    assert abs(np.mean(y > 0) - true) < 0.02 and 0.4 < true < 0.6
    # what comes true as often as the exact predictor says, also where it has seen nothing
    said = discrete.fitting(name, x, y)[:, :4]
    assert abs(np.mean(y[:, :4] * np.sign(said)) - np.mean(np.abs(said))) < 0.04


def test_the_nearest_example_gives_its_label():
    x = np.ones((1, 3, BITS))
    x[0, 0, :4], x[0, 1, :2] = -1, -1
    assert discrete.nearest(x, np.array([[1.0, -1.0, 1.0]])) == [-1]
    x[0, 0] = x[0, 1]
    assert discrete.nearest(x, np.array([[1.0, -1.0, 1.0]])) == [0]


def test_a_teaching_sequence_leaves_one_function():
    """So the exact predictor is right from the third example on; after random ones it is not."""
    x, y = taught.taught_rows(300, 1.0, np.random.default_rng(1))
    assert np.all(y[:, :2] == 1)
    np.testing.assert_array_equal(discrete.fitting("conjunction", x, y)[:, 2:], y[:, 2:])
    x, y = taught.taught_rows(300, 0.0, np.random.default_rng(1))
    assert np.mean(np.abs(discrete.fitting("conjunction", x, y)[:, 2]) == 1) < 0.3
    x, y = taught.taught_rows(1000, 0.5, np.random.default_rng(2))
    right = discrete.fitting("conjunction", x, y)[:, 2:] == y[:, 2:]
    assert abs(np.mean(right.all(1)) - 0.5) < 0.06


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_other_examples_are_drawn_as_for_the_function_of_the_row(share):
    """So 1 - 0.75^2 of them have the rarer label."""
    _, y = taught.taught_rows(4000, share, np.random.default_rng(4))
    np.testing.assert_allclose(np.mean(y[:, 2:] > 0), 0.4375, atol=0.01)


def test_figures_are_of_the_third_and_the_last_example(monkeypatch):
    """By the exact predictor, in the place of a model."""
    monkeypatch.setattr(taught, "answers", lambda params, apply, x, y: np.round(
        discrete.fitting("conjunction", x, y), 9))
    found = taught.compare(None, None, "conjunction")
    assert found["icl/third"] == 1
    assert found["icl/third_random"] == pytest.approx(0.65, abs=0.02)
    assert found["icl/last_random"] == pytest.approx(0.99, abs=0.01)


def test_the_arms_are_accepted():
    for file in (discrete, taught):
        for arm in file.study.arms.values():
            train.check(arm)
    row = {"tokens": np.zeros(2 * K, np.int32)}
    made, _ = taught.rows(row, np.random.default_rng(3), name="conjunction", share=1.0)
    assert made["x"].shape == (2 * K, BITS + 1) and made["x"][1, 0] == made["x"][3, 0] == 1

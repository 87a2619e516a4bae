"""function_classes.py, sequential_functions.py, representations.py: exact predictors, against sampling."""
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import model
import train
from configs.points import exact, reader, values
from lib.config import ROOT, load_file

pytestmark = pytest.mark.library
classes, sequential, represented = (
    load_file(ROOT / f"configs/understanding/{name}.py")
    for name in ("function_classes", "sequential_functions", "representations"))
NOISE = 0.5


@pytest.mark.parametrize("name", classes.CLASSES)
def test_the_exact_predictor_is_the_mean_over_sampled_functions(name):
    """Weighted by their likelihood on the points before, among 200,000 of the class."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 8, 2))
    families = classes.CLASSES[name]
    y = values(families, x, NOISE, rng)
    means, _ = exact(families, x, y, NOISE)
    sampled = values(families, np.repeat(x, 200_000, 0), 0.0, rng)
    logs = -np.square(sampled - y) / (2 * NOISE**2)
    for k in (0, 1, 2, 4):
        total = logs[:, :k].sum(1)
        chance = np.exp(total - total.max())
        chance /= chance.sum()
        assert abs(chance @ sampled[:, k] - means[0, k]) < 8 * np.sqrt(np.sum(chance**2))


def test_no_family_s_own_ridge_is_better_than_the_average_over_them():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6_000, 10, 2))
    for name in ("mixture", "sparse"):
        y = values(classes.CLASSES[name], x, NOISE, rng)
        best, each = exact(classes.CLASSES[name], x, y, NOISE)
        error = np.mean((best - y) ** 2)
        assert all(error < 0.97 * np.mean((rival - y) ** 2) for rival in each)
        assert error < np.mean((each.mean(0) - y) ** 2)


@pytest.mark.parametrize("family", [*sum(classes.CLASSES.values(), ()), represented.fixed],
                         ids=lambda f: getattr(f, "__name__", "one"))
def test_features_have_variance_1(family):
    size = 3 if family is represented.fixed else 2
    found = family(np.random.default_rng(2).normal(size=(20_000, 4, size))).reshape(80_000, -1)
    np.testing.assert_allclose(np.mean(found**2, 0), 1, rtol=0.35)


def test_a_window_slides_and_is_needed():
    x = np.arange(12.0).reshape(1, 6, 2)
    found = sequential.window(x, 3)
    np.testing.assert_array_equal(found[0, 4], [8, 9, 6, 7, 4, 5])
    np.testing.assert_array_equal(found[0, 0], [0, 1, 0, 0, 0, 0])
    rng = np.random.default_rng(3)
    x = rng.normal(size=(3_000, 10, 2))
    one, two = ([lambda x, length=length: sequential.window(x, length)] for length in (1, 2))
    y = values(two, x, NOISE, rng)
    errors = [np.mean((exact(each, x, y, NOISE)[0] - y)[:, -1] ** 2) for each in (one, two)]
    assert errors[1] < 0.75 * errors[0]
    blind = np.mean((sequential.alone(x, y, 2) - y)[:, -1] ** 2)
    assert errors[1] < 0.75 * blind and blind < errors[0]
    np.testing.assert_allclose(sequential.alone(x, y, 1), exact(one, x, y, NOISE)[0])


def says_nothing(params, batch):
    """Answers 0 [n 2k 1]."""
    return np.zeros((*batch["x"].shape[:2], 1))


def knows_the_window(params, batch):
    """Answers of ridge regression on a window of 2."""
    said, x, y = says_nothing(params, batch), batch["x"][:, ::2, 1:], batch["x"][:, 1::2, 0]
    family = [lambda x: sequential.window(x, 2)]
    said[:, ::2, 0] = exact(family, x.astype(float), y.astype(float), NOISE)[0]
    return said


def test_claims_are_met_by_who_knows_and_not_by_who_says_nothing():
    found = sequential.compare(None, knows_the_window, 2)
    assert abs(found["icl/ratio"] - 1) < 1e-5 and abs(found["icl/shuffled"] - 1) < 1e-5
    assert found["icl/blind"] < 0.5
    found = sequential.compare(None, says_nothing, 2)
    assert found["icl/ratio"] > 3 and found["icl/blind"] > 1.4 and found["icl/shuffled"] < 0.8
    for name, least in {"mixture": -0.05, "quadratic": 0.0}.items():
        assert classes.compare(None, says_nothing, name)["icl/gap"] > least


def test_rows_of_the_three_files_have_their_points_and_arms_are_accepted():
    row = {"tokens": np.zeros(72, np.int32)}
    for made, k in (
        (classes.functions(row, np.random.default_rng(4), name="mixture")[0], classes.K),
        (sequential.sequences(row, np.random.default_rng(4), length=2)[0], sequential.K),
        (represented.functions(row, np.random.default_rng(4), family="fixed")[0], represented.K),
    ):
        n = 72 // (2 * k)
        assert made["x"].shape[0] == made["y"].shape[0] == 2 * k * n == 2 * made["weights"].sum()
        assert made["segments"].max() == n > 1 and made["positions"].max() == 2 * k - 1
    for file in (classes, sequential, represented):
        for arm in file.study.arms.values():
            train.check(arm)


def test_a_probe_finds_what_is_planted_and_nothing_else():
    rng = np.random.default_rng(5)
    goal = rng.normal(size=(2_000, 3))
    states = np.concatenate([goal @ rng.normal(size=(3, 3)), rng.normal(size=(2_000, 8))], 1)
    assert represented.explained(states, goal) > 0.999
    assert abs(represented.explained(rng.normal(size=(2_000, 8)), goal)) < 0.05


def test_the_stream_that_is_probed_is_the_model_s():
    """After the last block it is what the answers are made of."""
    config = reader(4, layers=2, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=16, vocab=4, unroll=1)
    params = model.init(config, jax.random.key(0))
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(3, 5, 3)), rng.normal(size=(3, 5))
    found = represented.layers_of(params, x, y, config)
    assert found.shape == (2, 15, 16)
    normed = model.rms_norm(found[-1], params["norm"], config.norm_eps) @ params["out"]

    def apply(params, batch):
        return model.apply(params, batch, config)

    said = represented.answers(params, apply, x, y)
    np.testing.assert_allclose(said.ravel(), normed[:, 0], atol=1e-5)
    figures = represented.compare(params, apply, SimpleNamespace(model=config), "fixed", n=40)
    assert figures.keys() == {"icl/ratio", "icl/wrong", "icl/probe"}
    assert all(np.isfinite(value) for value in figures.values())

"""functions.py and configs/points.py: closed forms against sampling, and what is read."""
import jax
import numpy as np
import pytest

import model
import train
from configs.points import answers, averaged, evidence, in_turn, reader, regression
from lib.config import ROOT, load_file

pytestmark = pytest.mark.library
functions = load_file(ROOT / "configs/understanding/functions.py")
SMALL = dict(layers=1, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=16, vocab=4, unroll=1)


def test_bayesian_regression_is_the_mean_over_sampled_weights():
    """And its penalty is that of ridge regression; its variance is that of what comes."""
    rng = np.random.default_rng(0)
    x, y, _ = functions.draw(3, 0, rng)
    means, variances = regression(x, y, functions.NOISE)
    w = rng.normal(size=(200_000, functions.D))
    for n in range(3):
        fits = x[n] @ w.T
        logs = -np.square(y[n][:, None] - fits) / (2 * functions.NOISE**2)
        for k in (0, 1, 4, 7):
            chance = np.exp(logs[:k].sum(0) - logs[:k].sum(0).max()) if k else np.ones(len(w))
            chance /= chance.sum()
            error = 6 * np.sqrt(variances[n, k] * np.sum(chance**2))
            assert abs(chance @ fits[k] - means[n, k]) < error + 1e-12
        gram = x[n, :5].T @ x[n, :5] + functions.NOISE**2 * np.eye(functions.D)
        ridge = np.linalg.solve(gram, x[n, :5].T @ y[n, :5])
        np.testing.assert_allclose(means[n, 5], x[n, 5] @ ridge)
    x, y, _ = functions.draw(20_000, 0, rng)
    means, variances = regression(x, y, functions.NOISE)
    np.testing.assert_allclose(np.mean((y - means) ** 2, 0), variances.mean(0), rtol=0.08)


@pytest.mark.parametrize("tasks", [1, 4, 64])
def test_dmmse_is_the_posterior_mean_and_its_log_loss_is_within_log_m_of_the_best(tasks):
    x, y, _ = functions.draw(500, tasks, np.random.default_rng(1))
    found = functions.dmmse(x, y, tasks)
    means, logs = functions.pool_means(x, y, tasks)
    pool, noise = functions.pool_of(tasks), functions.NOISE
    for n, k in ((0, 0), (3, 2), (7, 7)):
        chance = np.array([np.exp(-np.sum((y[n, :k] - x[n, :k] @ w) ** 2) / (2 * noise**2)) for w in pool])
        np.testing.assert_allclose(found[n, k], chance @ (x[n, k] @ pool.T) / chance.sum(), rtol=1e-9)
    # density of each y under the average of Gaussians, and under each of them
    each = -np.square(y - means) / (2 * noise**2)
    share = np.exp(logs - logs.max(0))
    mixture = np.log(np.sum(share * np.exp(each), 0) / share.sum(0))
    regret = each.sum(2).max(0) - mixture.sum(1)
    assert np.all(regret <= np.log(tasks) + 1e-9) and np.all(regret >= -1e-9)
    assert tasks == 1 or np.mean((found - y) ** 2) < np.mean((regression(x, y, noise)[0] - y) ** 2)


def test_on_new_tasks_ridge_is_best_and_evidence_tells_which_family_is_true():
    x, y, clean = functions.draw(4_000, 0, np.random.default_rng(2))
    ridge, variances = regression(x, y, functions.NOISE)
    errors = [np.mean((guess - clean) ** 2) for guess in (
        ridge, functions.dmmse(x, y, 4), functions.dmmse(x, y, 1024), regression(x, y, 1.0)[0])]
    assert min(errors) == errors[0] and errors[1] > 2 * errors[0]
    # far enough from it to be told apart from a model that regresses nearly as well
    many, near = functions.dmmse(x, y, 1024), regression(x, y, np.sqrt(2) * functions.NOISE)[0]
    gaps = [np.mean((guess - many) ** 2 - (guess - ridge) ** 2) for guess in (ridge, near, many)]
    assert gaps[0] > 0.1 and gaps[1] > 0.08 and gaps[2] == -gaps[0]
    wrong, spread = regression(np.square(x), y, functions.NOISE)
    means = np.stack([ridge, wrong])
    logs = np.stack([evidence(y, ridge, variances), evidence(y, wrong, spread)])
    assert np.all(logs[:, :, 0] == 0) and np.mean(logs[0, :, -1] > logs[1, :, -1]) > 0.9
    mixed = averaged(means, logs)
    np.testing.assert_allclose(mixed[:, 0], means[:, :, 0].mean(0))
    assert np.mean((mixed - clean)[:, -1] ** 2) < 0.2 * np.mean((wrong - clean)[:, -1] ** 2)


def test_a_model_answers_from_the_points_before():
    """A later point, and its own y, change nothing; an earlier y does."""
    config = reader(functions.D + 1, **SMALL)
    assert not {"embed", "head"} & model.table(config).keys()
    params = model.init(config, jax.random.key(0))
    loud = {n: jax.random.normal(jax.random.key(1), params[n].shape) / 3 for n in ("o", "down")}
    params = params | loud
    x, y, _ = functions.draw(2, 0, np.random.default_rng(3))

    def said(y):
        return answers(params, lambda p, batch: model.apply(p, batch, config), x, y)

    plain, changed = said(y), y.copy()
    changed[:, 3] += 1
    np.testing.assert_array_equal(said(changed)[:, :4], plain[:, :4])
    assert np.all(np.any(said(changed)[:, 4:] != plain[:, 4:], 0))


def test_a_row_is_what_the_model_is_asked():
    """Loss where a y is due, of that y; a pool's rows are of its tasks."""
    length = 2 * functions.K
    row = {"tokens": np.zeros(length, np.int32), "targets": np.zeros(length, np.int32)}
    made, mask = functions.lines(row, np.random.default_rng(5), tasks=4)
    assert mask == {"kind": "causal", "window": 0} and made["x"].shape == (length, functions.D + 1)
    asked = made["weights"] > 0
    np.testing.assert_array_equal(np.flatnonzero(asked), np.arange(0, length, 2))
    np.testing.assert_array_equal(made["y"][asked], made["x"][1::2, 0])
    assert not np.any(made["x"][asked, 0]) and not np.any(made["x"][~asked, 1:])
    x, y, clean = functions.draw(50, 4, np.random.default_rng(6))
    fits = np.einsum("nkd,md->nmk", x, functions.pool_of(4))
    assert np.all(np.abs(fits - clean[:, None]).max(2).min(1) < 1e-9)
    np.testing.assert_array_equal(in_turn(x, y)[:, 1::2, 0], y.astype(np.float32))
    for arm in functions.study.arms.values():
        train.check(arm)

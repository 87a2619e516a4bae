"""In-context regression: when does a model know its tasks by heart, and when does it regress?

Paper: Pretraining task diversity and the emergence of non-Bayesian in-context learning for
    regression, Raventós et al. 2023 (003:33);
    What and How does In-Context Learning Learn? Bayesian Model Averaging, Parameterization, and
    Generalization, Zhang et al. 2023 (003:17)
Method: rows x1 y1 .. xK yK with y = w x + noise, w one of a pool of M tasks. Who knows the pool
    predicts by its posterior mean over it (dMMSE), which is Bayesian model averaging; who does not,
    by ridge regression. Raventós et al.: from some M on a model regresses on new tasks too. Zhang
    et al. bound the regret of the average by log M / T, and what more layers err less by.
Here: 4 dimensions and 8 points (theirs: 8 and 16), three layers, pools of 4 and 1,024 tasks, or a
    new task for each function. shallow: the pool of 4, one layer. gap: squared distance of the
    answers to dMMSE's on new tasks, less that to ridge's; for who regresses exactly 2.09 with the
    pool of 4 and 0.14 with 1,024. excess: the error on new tasks over ridge's, as a share. regret:
    squared distance to the true function, on the pool, over dMMSE's. A test holds the average's log
    loss to log M.
Cost: four arms, twelve runs of up to 70 seconds, twelve minutes on a CPU core.
Run:
    python train.py study configs/understanding/functions.py --jobs 2
"""
from functools import partial

import numpy as np

from configs.points import answers, averaged, functions_in, in_context, point_row, regression
from lib.study import Claim, Paper, Study
from train import Config

D, K, NOISE = 4, 8, 0.5  # dimensions, points of a row, deviation of the noise


def pool_of(tasks: int) -> np.ndarray:
    """[tasks, D] The weights of a pool, the same for every seed."""
    return np.random.default_rng(1).normal(size=(tasks, D))


def draw(n: int, tasks: int, rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [n K D], y [n K] and y without noise, of n rows of a pool's tasks; of new ones where 0."""
    x = rng.normal(size=(n, K, D))
    w = pool_of(tasks)[rng.integers(tasks, size=n)] if tasks else rng.normal(size=(n, D))
    clean = np.einsum("nkd,nd->nk", x, w)
    return x, clean + NOISE * rng.normal(size=(n, K)), clean


def lines(row: dict, rng, tasks: int) -> tuple[dict, dict]:
    """An objective: fresh points, each of a task of the pool."""
    x, y, _ = draw(functions_in(row, K), tasks, rng)
    return point_row(row, x, y)


def pool_means(x, y, tasks: int) -> tuple[np.ndarray, np.ndarray]:
    """(predictions, log density of the points before) [M n K] of each task of a pool."""
    means = np.einsum("nkd,md->mnk", x, pool_of(tasks))
    each = -np.square(y - means) / (2 * NOISE**2)
    return means, np.cumsum(each, 2) - each


def dmmse(x, y, tasks: int) -> np.ndarray:
    """[n K] The posterior mean under a uniform pool."""
    return averaged(*pool_means(x, y, tasks))


def compare(params, apply, tasks: int, n: int = 1024) -> dict[str, float]:
    """gap, excess and regret, as above; where tasks are new, dMMSE is ridge."""
    x, y, _ = draw(n, 0, np.random.default_rng(2))
    own, (ridge, _) = answers(params, apply, x, y), regression(x, y, NOISE)
    best = dmmse(x, y, tasks) if tasks else ridge
    gap = np.square(own - best) - np.square(own - ridge)
    errors = [np.mean(np.square(each - y)) for each in (own, ridge)]
    x, y, clean = draw(n, tasks, np.random.default_rng(3))
    best = dmmse(x, y, tasks) if tasks else regression(x, y, NOISE)[0]
    regrets = [np.mean(np.square(each - clean)) for each in (answers(params, apply, x, y), best)]
    return {"icl/gap": float(np.mean(gap)), "icl/excess": float(errors[0] / errors[1] - 1),
            "icl/regret": float(regrets[0] / regrets[1])}


def arm(tasks: int, layers: int = 3) -> Config:
    """A pool of so many tasks, 0 for a new one each time."""
    given = partial(lines, tasks=tasks), partial(compare, tasks=tasks)
    return in_context(*given, D + 1, 2 * K, layers, 2_500)


study = Study(
    question="When does a model know its tasks by heart, and when does it regress?",
    paper=(Paper(title="Pretraining task diversity and the emergence of non-Bayesian in-context "
                 "learning for regression", authors="Raventós et al.", year=2023,
                 seeds=("003:33",)),
           Paper(title="What and How does In-Context Learning Learn? Bayesian Model Averaging, "
                 "Parameterization, and Generalization", authors="Zhang et al.", year=2023,
                 seeds=("003:17",))),
    arms={"unlimited": arm(0), "pool4": arm(4), "pool1024": arm(1024), "shallow": arm(4, 1)},
    measures={name: f"icl/{name}" for name in ("gap", "excess", "regret")},
    quick={"phases.*.steps": 4, "model.embed": 16, "model.mlp": 16, "eval_every": 4},
    claims=(
        Claim(says="of 4 tasks it knows all by heart, also where others are asked", arm="pool4",
              control=None, measure="gap", below=0.0),
        Claim(says="of 1,024 it regresses", arm="pool1024", control=None, measure="gap", above=0.0),
        Claim(says="new tasks each time: within a tenth of ridge", arm="unlimited", control=None,
              measure="excess", below=0.1),
        Claim(says="its regret is near that of the average over models", arm="pool4",
              control=None, measure="regret", below=1.25),
        Claim(says="and falls with depth", arm="shallow", control="pool4", measure="regret",
              above=0.0),
    ),
    seeds=3,
)

"""Sequential functions in context: does a model regress on a window of what came before?

Paper: Can Transformers Learn Sequential Function Classes In Context?, Campbell et al. 2023
    (001:124)
Method: rows x1 y1 .. xK yK where y_k is a function of x_k and of those before it in a window that
    slides, and a transformer trained on them. It is compared to what can be known, and tested with
    labels that are randomised.
Here: y_k = a x_k + b x_{k-1} + noise, 2 dimensions, 10 points, windows of 1 and 2; linear ones
    alone (the paper has recurrent networks besides). shallow: one layer, not three. ratio: squared
    error of the last answer over that of ridge regression on the window, which is exact. blind:
    over that of ridge on x_k alone, to which b x_{k-1} is noise. shuffled: the ratio where the
    labels before the last are permuted, which the exact predictor goes by as if they were true. Who
    always says 0 has a ratio of 3.6, and 0.78 shuffled; ridge on x_k alone has 2.4 and 0.81. So
    shuffled tells little. shallow stays at who says 0, and so tells nothing of the window: in one
    layer no key holds an x with its y.
Cost: three arms, nine runs of up to 90 seconds, six minutes on two CPU cores.
Run:
    python train.py study configs/understanding/sequential_functions.py --jobs 2
"""
from functools import partial

import numpy as np

from configs.points import answers, exact, functions_in, in_context, point_row, regression, values
from lib.study import Claim, Paper, Study
from train import Config

D, K, NOISE = 2, 10, 0.5  # dimensions, points of a row, deviation of the noise


def window(x, length: int):
    """So many last points, zeros before the first [n K 2 length]."""
    found = [x]
    for _ in range(length - 1):
        before = np.concatenate([np.zeros_like(x[:, :1]), found[-1][:, :-1]], 1)
        found.append(before)
    return np.concatenate(found, -1)


def alone(x, y, length: int) -> np.ndarray:
    """Ridge regression on x_k alone [n K]: to it the other points of a window are noise."""
    noise = np.sqrt(NOISE**2 + (length - 1) / length)
    return regression(x, y, noise, 1 / (D * length))[0]


def sequences(row: dict, rng, length: int) -> tuple[dict, dict]:
    """An objective: a fresh row of a function of a window."""
    x = rng.normal(size=(functions_in(row, K), K, D))
    y = values([partial(window, length=length)], x, NOISE, rng)
    return point_row(row, x, y)


def compare(params, apply, length: int, n: int = 1024) -> dict[str, float]:
    """ratio, blind and shuffled, as above."""
    rng, family = np.random.default_rng(2), partial(window, length=length)
    x = rng.normal(size=(n, K, D))
    y = values([family], x, NOISE, rng)
    mixed = np.concatenate([rng.permuted(y[:, :-1], axis=1), y[:, -1:]], 1)

    def error(said):
        return np.mean(np.square(said - y)[:, -1])

    own, harmed = (error(answers(params, apply, x, labels)) for labels in (y, mixed))
    best, fooled = (error(exact([family], x, labels, NOISE)[0]) for labels in (y, mixed))
    found = {"ratio": own / best, "shuffled": harmed / fooled,
             "blind": own / error(alone(x, y, length))}
    return {f"icl/{name}": float(value) for name, value in found.items()}


def arm(length: int, layers: int = 3) -> Config:
    """A window of so many points."""
    given = partial(sequences, length=length), partial(compare, length=length)
    return in_context(*given, D + 1, 2 * K, layers, 2_500)


study = Study(
    question="Does a model regress on a window of what came before?",
    paper=Paper(title="Can Transformers Learn Sequential Function Classes In Context?",
                authors="Campbell et al.", year=2023, seeds=("001:124",)),
    arms={"window1": arm(1), "window2": arm(2), "shallow": arm(2, 1)},
    measures={name: f"icl/{name}" for name in ("ratio", "blind", "shuffled")},
    quick={"phases.*.steps": 4, "model.embed": 16, "model.mlp": 16, "eval_every": 4},
    claims=(
        Claim(says="its error is within a fifth of the exact predictor's", arm="window2",
              control=None, measure="ratio", below=1.2),
        Claim(says="below what the point alone can tell", arm="window2", control=None,
              measure="blind", below=1.0),
        Claim(says="permuted labels harm it no more than that predictor", arm="window2",
              control=None, measure="shuffled", below=1.2),
        Claim(says="nor much less: it goes by them too", arm="window2", control=None,
              measure="shuffled", above=0.85),
        Claim(says="one layer does not find the window", arm="shallow", control="window2",
              measure="ratio", above=0.0),
    ),
    seeds=3,
)

"""Regression on a representation: do lower layers compute it, and upper ones regress?

Paper: How Do Transformers Learn In-Context Beyond Simple Functions? A Case Study on Learning with
    Representations, Guo et al. 2023 (003:45)
Method: y = w f(x) with f a network that is fixed, and w of the row. The optimal predictor is ridge
    regression on f(x). The paper's transformers come near it, and probes find f(x) in the middle
    layers, at the positions of x and of y.
Here: 3 dimensions, f a random layer of 16 tanh units and 3 sums of them, 12 points, 4 layers.
    plain: y = w x, the control. ratio: squared error of the last answer over that of the exact
    predictor. wrong: over that of ridge on x (plain: on f(x)). probe: R² with which f(x) is a
    linear function of the stream at x, in the best layer but the last, on rows of their own.
    untrained: the same in a model as drawn.
Cost: three arms, seven runs of a minute or a moment, four minutes on two CPU cores.
Run:
    python train.py study configs/understanding/representations.py --jobs 2
"""
from functools import cache, partial

import jax
import numpy as np

from configs.points import answers, exact, functions_in, in_context, in_turn, point_row, values
from lib.study import Claim, Paper, Study
from model import CAUSAL, stream, whole
from train import Config

D, K, NOISE, UNITS = 3, 12, 0.5, 16  # dimensions, points, deviation of the noise, units of f


@cache
def network() -> tuple[np.ndarray, np.ndarray]:
    """The weights of f, [D UNITS] and [UNITS D]; its numbers have variance 1."""
    rng = np.random.default_rng(9)
    inner, outer = 2 * rng.normal(size=(D, UNITS)), rng.normal(size=(UNITS, D))
    sample = np.tanh(rng.normal(size=(20_000, D)) @ inner) @ outer
    return inner, outer / np.std(sample, 0)


def fixed(x):
    """f(x) [n K D] of points."""
    inner, outer = network()
    return np.tanh(x @ inner) @ outer


FAMILIES = {"fixed": fixed, "plain": np.asarray}


def functions(row: dict, rng, family: str) -> tuple[dict, dict]:
    """An objective: a fresh row of a function that is linear in f(x), or in x."""
    x = rng.normal(size=(functions_in(row, K), K, D))
    y = values([FAMILIES[family]], x, NOISE, rng)
    return point_row(row, x, y)


def explained(states, goal) -> float:
    """R² of the best linear function of states [m d] for goals [m p], fitted on the first half."""
    half, design = len(states) // 2, np.concatenate([states, np.ones((len(states), 1))], 1)
    fit, *_ = np.linalg.lstsq(design[:half], goal[:half], rcond=1e-6)
    left = np.sum(np.square(goal[half:] - design[half:] @ fit))
    return float(1 - left / np.sum(np.square(goal[half:] - np.mean(goal[half:], 0))))


def layers_of(params, x, y, config) -> np.ndarray:
    """The stream [layers, n K, d] at the positions of x, after each block."""
    batch = whole({"x": in_turn(x, y)})

    def visit(x, layer, w):
        return x, x

    @jax.jit
    def states(params):
        first = batch["x"] @ params["in"]
        return stream(params, first, batch, CAUSAL, config, visit=visit)[1][1]

    found = np.asarray(states(params))[:, :, ::2]
    return found.reshape(len(found), -1, found.shape[-1])


def compare(params, apply, config, family: str, n: int = 1024) -> dict[str, float]:
    """ratio, wrong and probe, as above."""
    rng, other = np.random.default_rng(2), "plain" if family == "fixed" else "fixed"
    x = rng.normal(size=(n, K, D))
    y = values([FAMILIES[family]], x, NOISE, rng)
    said = {name: exact([FAMILIES[name]], x, y, NOISE)[0] for name in FAMILIES}
    said["own"] = answers(params, apply, x, y)
    error = {name: np.mean(np.square(each - y)[:, -1]) for name, each in said.items()}
    states, goal = layers_of(params, x, y, config.model), fixed(x).reshape(-1, D)
    found = max(explained(each, goal) for each in states[:-1])
    return {"icl/ratio": float(error["own"] / error[family]), "icl/probe": found,
            "icl/wrong": float(error["own"] / error[other])}


def arm(family: str, steps: int = 2_000) -> Config:
    """A family of functions."""
    given = partial(functions, family=family), partial(compare, family=family)
    return in_context(*given, D + 1, 2 * K, 4, steps)


study = Study(
    question="Do lower layers compute a representation that upper ones regress on?",
    paper=Paper(title="How Do Transformers Learn In-Context Beyond Simple Functions? A Case Study "
                "on Learning with Representations", authors="Guo et al.", year=2023,
                seeds=("003:45",)),
    arms={"fixed": arm("fixed"), "plain": arm("plain"), "untrained": arm("fixed", 1)},
    measures={name: f"icl/{name}" for name in ("ratio", "wrong", "probe")},
    quick={"phases.*.steps": 4, "model.embed": 16, "model.mlp": 16, "eval_every": 4},
    claims=(
        Claim(says="within 30 % of ridge on f(x)", arm="fixed", control=None, measure="ratio",
              below=1.3),
        Claim(says="below ridge on x", arm="fixed", control=None, measure="wrong", below=1.0),
        Claim(says="a layer has f(x)", arm="fixed", control=None, measure="probe", above=0.8),
        Claim(says="more than where it is of no use", arm="plain", measure="probe", below=0.0),
        Claim(says="and than in a model as drawn", arm="untrained", measure="probe", below=0.0),
    ),
    seeds=3,
)

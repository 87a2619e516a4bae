"""Rows of numbers, for studies that share them: points x_1 y_1 .. x_k y_k of an unknown function.

A model reads each vector by a matrix and gives numbers at each position: rows, `forward` and
`outputs` of a ModelConfig. What the best possible reader would say is Bayesian regression.
"""
from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np

from data import DataConfig, Source, nothing
from lib.objectives import CAUSAL
from model import ModelConfig, Param, Params, rms_norm, stream
from train import Config, Phase, Schedule

# Rows come from the objective alone; nothing is held out, since each row is new.
PROCESS = DataConfig(sources={"rows": Source(nothing)}, tokenizer="numbers:2", dev=0.0, test=0.0)


def vectors(config: ModelConfig, rows: dict[str, Param], width: int, outputs: int = 1) -> dict:
    """A `rows`: a matrix "in" [width, embed] and one "out" [embed, outputs], and no vocabulary."""
    kept = {name: row for name, row in rows.items() if "vocab" not in row.axes}
    read = Param(("in", "embed"), (width, config.embed), 1.0)
    say = Param(("embed", "out"), (config.embed, outputs), config.embed**-0.5)
    return kept | {"in": read, "out": say}


def read_vectors(params: Params, batch, mask, config: ModelConfig, mixer=None):
    """A `forward`: final states of vectors batch["x"] [b t width]. mixer: see `model.stream`."""
    first = batch["x"].astype(config.dtype) @ params["in"]
    x, _ = stream(params, first, batch, mask, config, mixer=mixer)
    return rms_norm(x, params["norm"], config.norm_eps)


def say_numbers(params: Params, states, batch, config: ModelConfig):
    """An `outputs`: numbers [b t outputs]."""
    return states @ params["out"]


def squared(logits, batch, extras):
    """A `token_loss`: squared error of the first number, for batch["y"]."""
    return jnp.square(logits[..., 0] - batch["y"])


def reader(width: int, outputs: int = 1, **shape) -> ModelConfig:
    """A model that reads vectors and says numbers. shape: fields of its ModelConfig."""
    rows = partial(vectors, width=width, outputs=outputs)
    return ModelConfig(rows=rows, forward=read_vectors, outputs=say_numbers, **shape)


def in_turn(x, y) -> np.ndarray:
    """x [n k d] and y [n k] as vectors (0, x) and (y, 0) in turn, float32 [n 2k d+1]."""
    n, k, d = x.shape
    out = np.zeros((n, 2 * k, d + 1), np.float32)
    out[:, ::2, 1:] = x
    out[:, 1::2, 0] = y
    return out


def functions_in(row: dict, points: int) -> int:
    """How many functions a row has room for, of so many points each."""
    return len(row["tokens"]) // (2 * points)


def point_row(row: dict, x, y) -> tuple[dict, dict]:
    """What an objective returns: points x [n k d] and y [n k] of n functions, a segment each.

    There is a loss where a y is due.
    """
    n, k = y.shape
    place = np.tile(np.arange(2 * k, dtype=np.int32), n)
    made = dict(
        x=in_turn(x, y).reshape(len(place), -1),
        y=np.repeat(y.ravel(), 2).astype(np.float32),
        positions=place,
        segments=np.repeat(np.arange(1, n + 1, dtype=np.int32), 2 * k),
        weights=(place % 2 == 0).astype(np.float32),
    )
    return row | made, CAUSAL


def answers(params: Params, apply, x, y) -> np.ndarray:
    """What a model says of y [n k] at each x [n k d], having seen the points before."""
    said = apply(params, dict(x=in_turn(x, y)))
    return np.asarray(said)[:, ::2, 0].astype(np.float64)


def regression(features, y, noise: float, prior: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(means, variances) [n k] of each y [n k] given the points before: Bayesian linear regression.

    features [n k p]. Weights are normal, of variance `prior`, and y has noise of this deviation. So
    the mean is that of ridge regression with the penalty noise² / prior.
    """
    p = features.shape[-1]
    means, variances = np.zeros(y.shape), np.zeros(y.shape)
    for k in range(y.shape[1]):
        seen, x = features[:, :k], features[:, k]
        precision = np.swapaxes(seen, 1, 2) @ seen / noise**2 + np.eye(p) / prior
        covariance = np.linalg.inv(precision)
        pull = np.einsum("nkp,nk->np", seen, y[:, :k]) / noise**2
        means[:, k] = np.einsum("np,npq,nq->n", x, covariance, pull)
        variances[:, k] = np.einsum("np,npq,nq->n", x, covariance, x) + noise**2
    return means, variances


def evidence(y, means, variances) -> np.ndarray:
    """Log density of the points before each one [n k], for a predictor of these."""
    each = -0.5 * (np.log(2 * np.pi * variances) + np.square(y - means) / variances)
    total = np.cumsum(each, 1)
    return total - each


def averaged(means, logs) -> np.ndarray:
    """Bayesian model averaging [n k]: of predictions [m n k], by the evidence `logs` of each."""
    share = np.exp(logs - np.max(logs, 0))
    return np.sum(share * means, 0) / np.sum(share, 0)


# What maps points x [n k d] to features [n k p], in which functions of a family are linear.
Family = Callable[[np.ndarray], np.ndarray]


def values(families: Sequence[Family], x, noise: float, rng) -> np.ndarray:
    """y [n k] of points: each row's function is of one of these families.

    Its weights are normal of variance 1 / p, so that features of variance 1 give y about that.
    """
    which = rng.integers(len(families), size=len(x))
    found = []
    for family in families:
        features = family(x)
        size = features.shape[-1]
        w = rng.normal(size=(len(x), size)) / np.sqrt(size)
        found.append(np.einsum("nkp,np->nk", features, w))
    clean = np.choose(which[:, None], found)
    return clean + noise * rng.normal(size=clean.shape)


def exact(families: Sequence[Family], x, y, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """(Bayesian predictions of such y [n k], those of each family alone [m n k])."""
    means, logs = [], []
    for family in families:
        features = family(x)
        found = regression(features, y, noise, 1 / features.shape[-1])
        means.append(found[0])
        logs.append(evidence(y, *found))
    return averaged(np.stack(means), np.stack(logs)), np.stack(means)


def in_context(objective, evaluation, width: int, seq: int, layers: int = 3,
               steps: int = 1_500) -> Config:
    """A run on functions of `seq` vectors of this width each, four a row, loss squared."""
    return Config(
        model=reader(width, layers=layers, embed=64, heads=2, kv_heads=2, head_dim=32, mlp=172),
        data=PROCESS, phases=(Phase(steps=steps, batch=16, seq=4 * seq, objective=objective),),
        token_loss=squared, prompts=(), overlap=0, evals=(evaluation,), eval_every=500, keep=1,
        schedule=Schedule(shape="linear", peak=3e-3, warmup=100, final=0.0), save_every=5_000)

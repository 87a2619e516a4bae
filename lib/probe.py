"""Probes: the states of a model by block, and linear maps that read them."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from model import (
    CAUSAL,
    ModelConfig,
    embedded,
    stream,
    whole,
)


@partial(jax.jit, static_argnames="config")
def states(params, batch, config: ModelConfig) -> jax.Array:
    """The residual stream before the first block and after each one [1 + layers, b t d].

    batch: ids [b t], each row one segment, or a batch's arrays. Blocks are those of `stream`.
    """
    batch = whole(batch)
    first = embedded(params, batch, config)
    _, kept = stream(params, first, batch, CAUSAL, config, visit=keep)
    _, after = kept
    return jnp.concatenate([first[None], after])


def keep(x, layer, w):
    """A `visit` of `stream` that keeps the stream as it is after each block."""
    return x, x


def over_spans(x: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Means [k n d] of states x [k b t d] over spans (row, begin, end) of positions [n 3]."""
    means = []
    for row, begin, end in spans:
        inside = x[:, row, begin:end]
        means.append(inside.mean(1))
    return np.stack(means, 1)


def ridge(x: np.ndarray, y: np.ndarray, alpha: float = 1e-3) -> tuple[np.ndarray, np.ndarray]:
    """(weights [d k], bias [k]) of the linear map from x [n d] to y [n k], in float64.

    It minimises the mean squared error and alpha times the squared weights of columns of x that
    are scaled to variance 1. The bias is free.
    """
    x = x.astype(np.float64)
    n, width = x.shape
    center = x.mean(0)
    size = x.std(0) + 1e-12
    scaled = (x - center) / size
    middle = y.mean(0)
    products = scaled.T @ (y - middle)
    gram = scaled.T @ scaled
    penalty = alpha * n * np.eye(width)
    weights = np.linalg.solve(gram + penalty, products)
    weights /= size[:, None]
    bias = middle - center @ weights
    return weights, bias


def r2(y: np.ndarray, predicted: np.ndarray) -> float:
    """The share of the variance of y that predictions explain; below 0 where the mean is better."""
    left = np.square(y - predicted)
    around = np.square(y - y.mean(0))
    share = left.sum() / around.sum()
    return float(1 - share)

"""Momentum attention: if attention is a step of gradient descent, does it gain by momentum?

Paper: Why Can GPT Learn In-Context? Language Models Implicitly Perform Gradient Descent as
    Meta-Optimizers, Dai et al. 2023 (003:64)
Method: linear attention adds to a linear map what one step of gradient descent on the keys and
    values of the context would: its values are the errors of that step. So attention is descent,
    and momentum is a sum of earlier values, weighed by eta to the power of their distance, that is
    added to what attention gives.
Here: bytes of Python's library at equal steps. All arms have the rate that mixers.py finds best for
    plain attention; the others were not tuned. momentum: softmax attention and that sum, eta 0.5
    and, as slow, 0.9; it is not normalised, as in the paper, and does not leave its segment.
    linear: the mean of values times (query x key) / sqrt(width), a step of rate 1 / (t sqrt(width))
    from a map of zeros. The identity is a test. The paper's gains are of 350M models; its eta is
    not known to us.
Cost: 12 runs, 3 minutes on two CPU cores.
Run:
    python train.py study configs/understanding/momentum_attention.py --jobs 2
    python train.py configs/understanding/momentum_attention.py:momentum     one arm by hand
"""
from dataclasses import replace
from functools import partial

import jax.numpy as jnp

from configs import base
from lib.kernels import allowed
from lib.study import Claim, Paper, Study
from model import ModelConfig, embedded, plain_attend, rms_norm, stream


def linear_attention(q, k, v, seen):
    """Sums over s of v (k . q) [b t k g h], by queries q [b t k g h]; k and v [b s k h].

    seen: weights [b t s] of keys for queries. It is what W q gains by a step of descent on half the
    squared errors of W k, where v are rates times errors (Dai et al., section 2).
    """
    products = jnp.einsum("btkgh,bskh->bkgts", q, k) * seen[:, None, None]
    return jnp.einsum("bkgts,bskh->btkgh", products, v)


def earlier(v, segments, eta: float):
    """Sums [b t k h] of the values v before t in its segment, times eta to the power of t - s."""
    t = jnp.arange(v.shape[1])
    distance = t[:, None] - t
    same = segments[:, :, None] == segments[:, None, :]
    weights = jnp.where(same & (distance > 0), eta**distance.clip(0).astype(v.dtype), 0)
    return jnp.einsum("bts,bskh->btkh", weights, v)


def attending(params, batch, mask, config: ModelConfig, attend):
    """The plain `forward` with another way to attend."""
    x, _ = stream(params, embedded(params, batch, config), batch, mask, config, attend=attend)
    return rms_norm(x, params["norm"], config.norm_eps)


def with_momentum(params, batch, mask, config: ModelConfig, eta: float = 0.5):
    """A `forward` with momentum attention."""
    plain = plain_attend(batch, mask, config)

    def attend(q, k, v):
        means, kept = plain(q, k, v)
        return means + earlier(v, batch["segments"], eta)[:, :, :, None], kept

    return attending(params, batch, mask, config, attend)


def with_linear(params, batch, mask, config: ModelConfig):
    """A `forward` with linear attention, a mean over keys, divided by the root of their width."""
    segments, t = batch["segments"], jnp.arange(batch["segments"].shape[1])
    seen = allowed(mask, t, t, segments, segments, batch.get("prefix")).astype(config.dtype)
    seen /= seen.sum(-1, keepdims=True) * config.head_dim**0.5

    def attend(q, k, v):
        return linear_attention(q, k, v, seen), None

    return attending(params, batch, mask, config, attend)


def arm(**fields):
    """A run on bytes, of a model with these fields."""
    own = replace(base.shape(3, 96, 0), **fields)
    data = replace(base.small.data, tokenizer="bytes")
    return replace(base.small, model=own, data=data, prompts=())


study = Study(
    question="If attention is a step of gradient descent, does it gain by momentum?",
    paper=Paper(title="Why Can GPT Learn In-Context? Language Models Implicitly Perform Gradient "
                "Descent as Meta-Optimizers", authors="Dai et al.", year=2023, seeds=("003:64",)),
    arms={"plain": arm(), "momentum": arm(forward=with_momentum),
          "slow": arm(forward=partial(with_momentum, eta=0.9)), "linear": arm(forward=with_linear)},
    quick=base.quick(),
    claims=(
        Claim(says="momentum is ahead of plain attention", arm="momentum", below=0.0),
        Claim(says="so is a slow one", arm="slow", below=0.0),
        Claim(says="linear attention is behind", arm="linear", above=0.0),
    ),
    seeds=3,
)

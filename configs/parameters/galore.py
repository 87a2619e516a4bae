"""GaLore and Fira: can Adam's moments live in the few directions in which a gradient is largest?

Paper: Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?, Chen et al. 2024
    (001:187); GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, Zhao et al.
    2024 (arXiv 2403.03507)
Method: of each matrix's gradient G, P holds the first r singular vectors of its smaller side, found
    anew every so many steps. Adam runs on R = P'G, the moments are kept when P changes, and the
    update is P Adam(R) (GaLore). Fira adds what P leaves out, G - P R, each column scaled by
    |Adam(R)| / |R| of that column; where its norm grows by more than 1 % in a step it is cut back.
Here: r 24 of 96, a new P every 50 steps, the scale of P Adam(R) is 1 where the papers have 0.25,
    so that arms share their grid of rates. Norms are those of Adam's step with its bias corrected.
    A matrix whose smaller side is no more than r keeps P = 1, which is Adam. Weight decay is that
    of the control, 0.1. Embeddings, gains and the head have AdamW.
Cost: eighteen runs at most of 200 steps, a quarter of a minute each: five minutes on two CPU cores.
Run:
    python train.py study configs/parameters/galore.py --jobs 2
    python train.py configs/parameters/galore.py:fira               one arm by hand
"""
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from configs import base
from lib.matrices import flat, sides
from lib.optim import adamw
from lib.study import Claim, Paper, Study
from model import Param


class Low(NamedTuple):
    """The state of `projected`: of each matrix {name: array}, and the steps taken."""

    count: jax.Array
    p: dict  # [layers small r]
    mu: dict  # [layers r large]
    nu: dict  # [layers r large]
    norm: dict  # [layers 1 1], of the last update outside P; 0 before the first


def projected(rows: dict[str, Param], rank: int, every: int, residual: bool, b1: float, b2: float,
              eps: float = 1e-8, growth: float = 1.01) -> optax.GradientTransformation:
    """Adam on r directions of each layer's matrix, as a transformation; residual: Fira."""

    def wide(name: str) -> bool:
        n, m = sides(rows[name])
        return n <= m

    def turned(name, x):  # [layers small large]
        x = flat(x, rows[name])
        return x if wide(name) else x.swapaxes(1, 2)

    def back(name, x):
        x = x if wide(name) else x.swapaxes(1, 2)
        return x.reshape(rows[name].shape)

    def init(params):
        state = Low(jnp.zeros((), jnp.int32), {}, {}, {}, {})
        for name, x in params.items():
            layers, small, large = turned(name, x).shape
            r = min(rank, small)
            state.p[name] = jnp.broadcast_to(jnp.eye(small, r, dtype=x.dtype), (layers, small, r))
            state.mu[name] = state.nu[name] = jnp.zeros((layers, r, large), x.dtype)
            state.norm[name] = jnp.zeros((layers, 1, 1), x.dtype)
        return state

    def directions(g, p):
        r = p.shape[2]
        return jnp.linalg.svd(g, full_matrices=False)[0][..., :r]

    def outside(g, p, low, step, before):
        """(Fira's update outside P, its norm): g, p, R, Adam(R) and the last norm."""
        gain = norms(step, 1) / (norms(low, 1) + eps)
        rest = (g - p @ low) * gain
        limit = jnp.maximum(norms(rest, (1, 2)) / (before + eps), growth) / growth
        limit = jnp.where(before > 0, limit, 1.0)
        rest = rest / limit
        return rest, norms(rest, (1, 2))

    def update(grads, state, params=None):
        made, new = {}, Low(state.count + 1, {}, {}, {}, {})
        for name, g in grads.items():
            g, p = turned(name, g), state.p[name]
            if p.shape[2] < p.shape[1]:
                p = lax.cond(state.count % every == 0, directions, lambda g, p: p, g, p)
            low = p.swapaxes(1, 2) @ g
            mu = b1 * state.mu[name] + (1 - b1) * low
            nu = b2 * state.nu[name] + (1 - b2) * low**2
            step = mu / (1 - b1**new.count)
            step = step / (jnp.sqrt(nu / (1 - b2**new.count)) + eps)
            whole, norm = p @ step, state.norm[name]
            if residual:
                rest, norm = outside(g, p, low, step, norm)
                whole = whole + rest
            made[name] = back(name, whole)
            new.p[name], new.mu[name], new.nu[name], new.norm[name] = p, mu, nu, norm
        return made, new

    return optax.GradientTransformation(init, update)


def norms(x, axis):
    """Euclidean norms along axes, which stay."""
    return jnp.sqrt(jnp.sum(x * x, axis, keepdims=True))


def galore(table: dict[str, Param], rank: int = 24, every: int = 50, residual: bool = False,
           b1: float = 0.9, b2: float = 0.95, weight_decay: float = 0.1) -> dict:
    """An `optimizer`: `projected` for the matrices, AdamW for the rest; residual: Fira."""
    matrices = projected(table, rank, every, residual, b1, b2)
    decayed = optax.chain(matrices, optax.add_decayed_weights(weight_decay))
    return adamw(table, b1, b2, weight_decay=weight_decay) | {"matrix": decayed}


adam = base.scaled(replace(base.small, model=base.shape(3, 96, 512), eval_every=50), 200)
study = Study(
    question="Can Adam's moments live in the few directions in which a gradient is largest?",
    paper=(Paper(title="Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
                 authors="Chen et al.", year=2024, seeds=("001:187",)),
           Paper(title="GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
                 authors="Zhao et al.", year=2024)),
    arms={"adamw": adam, "galore": replace(adam, optimizer=galore),
          "fira": replace(adam, optimizer=partial(galore, residual=True))},
    peak_lrs=(4e-3, 8e-3),
    quick=base.quick(),
    claims=(
        Claim(says="GaLore is behind AdamW", arm="galore", above=0.0),
        Claim(says="Fira beats GaLore", arm="fira", control="galore", below=0.0),
        Claim(says="Fira is within a twentieth of a bit of AdamW", arm="fira", below=0.05),
    ),
    seeds=3,
)

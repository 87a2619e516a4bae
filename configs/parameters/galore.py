"""GaLore and Fira: can Adam's moments live in the few directions in which a gradient is largest?

Paper: Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?, Chen et al. 2024
    (001:187); GaLore, Zhao et al. 2024 (arXiv 2403.03507)
Method: P holds the first r singular vectors of a matrix's gradient G, of its smaller side, found
    anew every so many steps. Adam runs on R = P'G, whose moments are kept; the update is P Adam(R)
    (GaLore). Fira adds what P leaves out, G - P R, each column scaled by |Adam(R)| / |R| of that
    column; where its norm grows by more than 1 % in a step it is cut back.
Here: r 24 of 96, a new P every 50 steps and after the first one: the outputs of blocks begin as 0,
    and so do most gradients. The scale of P Adam(R) is 1 where the papers have 0.25, so that arms
    share their rates. Norms are of Adam's step with its bias corrected. Where the smaller side is
    no more than r, P is 1: that is Adam. Embeddings and gains have AdamW, weight decay is 0.1.
Cost: some twenty runs of 200 steps, a quarter of a minute each: five minutes on two CPU cores.
Run:
    python train.py study configs/parameters/galore.py --jobs 2
"""
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from configs import base
from lib.matrices import flat, smaller_first
from lib.optim import adamw, lr_factors, scale_each
from lib.sharding import constrain
from lib.study import Claim, Paper, Study
from model import Param


class Low(NamedTuple):
    """What `projected` holds for a matrix, of each layer."""

    p: jax.Array  # [layers small r]
    mu: jax.Array  # [layers r large], and so is nu
    nu: jax.Array
    norm: jax.Array  # [layers 1 1], of the last update outside P; 0 before the first


def projected(rows: dict[str, Param], rank: int, every: int, residual: bool, b1: float, b2: float,
              eps: float = 1e-8, growth: float = 1.01) -> optax.GradientTransformation:
    """Adam on r directions of each layer's matrix; its state is (steps taken, {name: Low})."""
    def begin(name, x):
        layers, small, large = smaller_first(flat(x, rows[name]), rows[name]).shape
        p = jnp.eye(small, min(rank, small), dtype=x.dtype)[None].repeat(layers, 0)
        zeros = jnp.zeros((layers, p.shape[2], large), x.dtype)
        return Low(p, zeros, zeros, jnp.zeros((layers, 1, 1), x.dtype))

    def directions(g, p):  # as many as p has
        return jnp.linalg.svd(g, full_matrices=False)[0][..., :p.shape[2]]

    def outside(g, p, low, step, before):  # Fira's update outside P, and its norm
        rest = (g - p @ low) * norms(step, 1) / (norms(low, 1) + eps)
        over = jnp.maximum(norms(rest, (1, 2)) / (before + eps), growth) / growth
        rest = rest / jnp.where(before > 0, over, 1.0)
        return rest, norms(rest, (1, 2))

    def one(g, old: Low, count):
        p, norm, t = old.p, old.norm, count + 1
        if p.shape[2] < p.shape[1]:
            p = lax.cond((count % every == 0) | (count == 1), directions, lambda g, p: p, g, p)
        low = p.swapaxes(1, 2) @ g
        mu = b1 * old.mu + (1 - b1) * low
        nu = b2 * old.nu + (1 - b2) * low**2
        step = mu / (1 - b1**t) / (jnp.sqrt(nu / (1 - b2**t)) + eps)
        made = p @ step
        if residual:
            rest, norm = outside(g, p, low, step, norm)
            made += rest
        return made, Low(p, mu, nu, norm)

    def init(params):
        return jnp.zeros((), jnp.int32), {name: begin(name, x) for name, x in params.items()}

    def update(grads, state, params=None):
        (count, old), made, new = state, {}, {}
        for name, g in grads.items():
            row = rows[name]
            g = constrain(smaller_first(flat(g, row), row), None, None, None)  # gathered, for svd
            out, new[name] = one(g, old[name], count)
            made[name] = smaller_first(out, row).reshape(row.shape)
        return made, (count + 1, new)

    return optax.GradientTransformation(init, update)


def norms(x, axis):
    """Euclidean norms along axes, which stay."""
    return jnp.sqrt(jnp.sum(x * x, axis, keepdims=True))


def galore(table: dict[str, Param], rank: int = 24, every: int = 50, residual: bool = False,
           b1: float = 0.9, b2: float = 0.95, weight_decay: float = 0.1) -> dict:
    """An `optimizer`: `projected` for the matrices, AdamW for the rest; residual: Fira."""
    low = projected(table, rank, every, residual, b1, b2)
    factors = lr_factors(table, 1.0, 64)
    decayed = optax.chain(low, optax.add_decayed_weights(weight_decay), scale_each(factors))
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
    peak_lrs=(4e-3, 8e-3), measures={"bytes": "model/opt_bytes"}, quick=base.quick(), seeds=3,
    claims=(
        Claim(says="GaLore is behind AdamW", arm="galore", above=0.0),
        Claim(says="Fira beats GaLore", arm="fira", control="galore", below=0.0),
        Claim(says="Fira is within a twentieth of a bit of AdamW", arm="fira", below=0.05),
        Claim(says="with less state", arm="fira", measure="model/opt_bytes", below=-0.5),
    ),
)

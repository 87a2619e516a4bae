"""Factors alone: what does W = A B cost, and does balancing its factors win some of it back?

Paper: Scalable Parameter and Memory Efficient Pretraining for LLM: Recent Algorithmic Advances
    and Benchmarking, Glentis et al. 2025 (001:107)
Method: each matrix is a product A B of rank r from the first step. Every so many steps, with the
    singular value decomposition A B = U S V', set A = U S^1/2 and B = S^1/2 V', which changes
    nothing but the gradient (weight refactorisation), and set the optimiser's moments to zero
    (momentum reset). The paper's 1B model is ahead of GaLore and Fira at less memory.
Here: matrices of 96 x 96 and 96 x 256 at rank 16. refactored has both, every 40 steps. The
    decomposition is that of an r x r matrix between two QR factorisations. Embeddings, gains and
    the head are whole. The product is formed and multiplied as one matrix, so that a step costs
    what it does in full; what the arms save is memory.
Cost: 18 runs of 200 steps, a quarter of a minute each: some five minutes on two CPU cores.
Run:
    python train.py study configs/parameters/low_rank.py --jobs 2
    python train.py configs/parameters/low_rank.py:refactored       one arm by hand
"""
from dataclasses import replace

import jax.numpy as jnp

from configs import base
from lib.matrices import matrices, sides
from lib.study import Claim, Paper, Study
from model import Context, Edited, Model, Param
from train import Config, Edit


def factored(config, rows: dict[str, Param], rank: int = 16) -> dict[str, Param]:
    """A `rows`: factors A [n r] and B [r m] in place of each matrix of the blocks.

    Their product is drawn with the deviation that the matrix has in the plain table.
    """
    chosen = matrices(config)
    stored = {name: row for name, row in rows.items() if name not in chosen}
    for name, row in chosen.items():
        n, m = sides(row)
        for end, axes, shape, deviation in (
            ("a", ("in", "rank"), (n, rank), n**-0.5),
            ("b", ("rank", "out"), (rank, m), row.init * (n / rank) ** 0.5),
        ):
            shape = config.layers, *shape
            stored[f"{name}/{end}"] = Param(("layers", *axes), shape, deviation)
    return stored


def product(params: dict, step, batch, config, alpha: float = 0.0) -> dict:
    """A `reparam`: W = A B, or (alpha / r) A B where alpha is not 0, reshaped as the plain one."""
    used = {name: x for name, x in params.items() if "/" not in name}
    for name, row in matrices(config).items():
        a, b = params[f"{name}/a"], params[f"{name}/b"]
        scale = alpha / a.shape[-1] if alpha else 1.0
        used[name] = (scale * a @ b).reshape(row.shape)
    return used


def balanced(a, b):
    """The factors U S^1/2 and S^1/2 V' of the product of a [l n r] and b [l r m]."""
    left, of_a = jnp.linalg.qr(a)
    right, of_b = jnp.linalg.qr(b.swapaxes(1, 2))
    u, s, v = jnp.linalg.svd(of_a @ of_b.swapaxes(1, 2), full_matrices=False)
    root = jnp.sqrt(s)[:, None, :]
    return left @ (u * root), (root.swapaxes(1, 2) * v) @ right.swapaxes(1, 2)


def refactor(model: Model, context: Context, weights: bool = True) -> Edited:
    """An edit: `balanced` factors, and moments begun afresh; without `weights` the second alone."""
    params = dict(model.params)
    if weights:
        for name in matrices(model.config):
            pair = f"{name}/a", f"{name}/b"
            params |= zip(pair, balanced(*map(params.get, pair)), strict=True)
    return Edited(Model(model.config, params), {"matrix": "reset"}, preserves=True)


full = base.scaled(replace(base.small, model=base.shape(3, 96, 512), eval_every=50), 200)
low = replace(full, model=replace(full.model, rows=factored), reparam=product)
(phase,), T = full.phases, 40


def every(edit) -> Config:
    """The low-rank run with an edit every T steps."""
    return replace(low, phases=(replace(phase, repeat=(Edit(edit, every=T, forgets=False),)),))


study = Study(
    question="What does W = A B cost, and does balancing its factors win some of it back?",
    paper=Paper(title="Scalable Parameter and Memory Efficient Pretraining for LLM: Recent "
                      "Algorithmic Advances and Benchmarking",
                authors="Glentis et al.", year=2025, seeds=("001:107",)),
    arms={"full": full, "low_rank": low, "refactored": every(refactor)},
    peak_lrs=(4e-3, 8e-3),
    measures={"stored": "model/params", "trained": "model/trained", "bytes": "model/opt_bytes"},
    quick=base.quick(),
    claims=(
        Claim(says="factors alone are behind full matrices", arm="low_rank", above=0.0),
        Claim(says="refactorisation with a reset of moments beats factors alone",
              arm="refactored", control="low_rank", below=0.0),
        Claim(says="and is within a tenth of a bit of full matrices", arm="refactored", below=0.1),
    ),
    seeds=3,
)

"""SLTrain: does a sparse matrix of 3 % make up for what a product of low rank lacks?

Paper: SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining,
    Han et al. 2024 (001:32)
Method: W = (alpha / r) A B + S, from the first step. The support of S, a share of the entries, is
    drawn at random and fixed; its values train. B begins as zero, A as in LoRA, S uniform in
    +-1/sqrt(n). The paper saves up to 73 % of the memory of LLaMA 7B, with quantisation and updates
    layer by layer, and is near full rank at 60M to 7B.
Here: r 16, a share of 0.03 as in the paper, matrices of 96 x 96 and 96 x 256. The support is
    stored, as int32, and does not train. lora has the matrices as they were drawn, frozen, in
    place of S; in it alone outputs of blocks are drawn too, not 0. Embeddings, gains and the head
    are whole. W is formed and multiplied as one matrix, so that a step costs what it does in full;
    no quantisation.
Cost: twelve runs of 200 steps at two rates, a quarter of a minute each: four minutes on two cores.
Run:
    python train.py study configs/parameters/sltrain.py --jobs 2
    python train.py configs/parameters/sltrain.py:sltrain           one arm by hand
"""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from configs import base
from configs.parameters.low_rank import factored, product
from lib.lora import FROZEN, adapted, lora_rows, unfrozen
from lib.matrices import matrices, sides
from lib.study import Claim, Paper, Study
from model import Param
from train import Config


def support(key, shape: tuple[int, int], dtype, size: int) -> jax.Array:
    """Distinct places below `size`, drawn for each layer and ascending: an `init` [layers k]."""
    layers, k = shape

    def draw(key):
        return jnp.sort(jax.random.choice(key, size, (k,), replace=False))

    return jax.vmap(draw)(jax.random.split(key, layers))


def uniform(key, shape: tuple[int, ...], dtype, bound: float) -> jax.Array:
    """An `init`: uniform between -bound and bound."""
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def sparse_rows(config, rows: dict[str, Param], rank: int = 16,
                share: float = 0.03) -> dict[str, Param]:
    """A `rows`: factors in place of each matrix, and values on a fixed support."""
    stored = factored(config, rows, rank)
    for name, row in matrices(config).items():
        n, m = sides(row)
        k = round(share * n * m)
        a, b = stored[f"{name}/a"], stored[f"{name}/b"]
        stored[f"{name}/a"] = replace(a, init=(3 * n) ** -0.5)
        stored[f"{name}/b"] = replace(b, init=0.0)
        stored[f"{name}/where"] = Param(("layers", "state"), (config.layers, k),
                                        partial(support, size=n * m), FROZEN, "int32")
        stored[f"{name}/values"] = Param(("layers", "state"), (config.layers, k),
                                         partial(uniform, bound=n**-0.5), "matrix")
    return stored


def sparse_plus_low(params: dict, step, batch, config, alpha: float = 16.0) -> dict:
    """A `reparam`: W = (alpha / r) A B + S."""
    used = product(params, step, batch, config, alpha)
    layer = jnp.arange(config.layers)[:, None]
    for name, row in matrices(config).items():
        entries = used[name].reshape(config.layers, -1)
        entries = entries.at[layer, params[f"{name}/where"]].add(params[f"{name}/values"])
        used[name] = entries.reshape(row.shape)
    return used


def beside(config, rows: dict[str, Param]) -> dict[str, Param]:
    """A `rows`: LoRA's factors beside frozen matrices, none of which is 0."""
    return lora_rows(config, base.loud(config, rows), rank=16)


def arm(rows, reparam) -> Config:
    """A run whose model stores other rows."""
    return replace(full, model=replace(full.model, rows=rows), reparam=reparam, optimizer=unfrozen)


full = base.scaled(replace(base.small, model=base.shape(3, 96, 512), eval_every=50), 200)
study = Study(
    question="Does a sparse matrix of 3 % make up for what a product of low rank lacks?",
    paper=Paper(title="SLTrain: a sparse plus low-rank approach for parameter and memory efficient "
                      "pretraining", authors="Han et al.", year=2024, seeds=("001:32",)),
    arms={"full": full,
          "low_rank": replace(full, model=replace(full.model, rows=factored), reparam=product),
          "lora": arm(beside, adapted),
          "sltrain": arm(sparse_rows, sparse_plus_low)},
    peak_lrs=(4e-3, 8e-3),
    measures={"stored": "model/params", "trained": "model/trained", "bytes": "model/opt_bytes"},
    quick=base.quick(),
    claims=(
        Claim(says="sparse plus low rank beats low rank", arm="sltrain", control="low_rank",
              below=0.0),
        Claim(says="and beats low rank beside frozen matrices", arm="sltrain", control="lora",
              below=0.0),
        Claim(says="it is within a tenth of a bit of full rank", arm="sltrain", below=0.1),
        Claim(says="low rank alone is behind full rank", arm="low_rank", above=0.0),
    ),
    seeds=3,
)

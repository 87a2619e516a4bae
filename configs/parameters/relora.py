"""ReLoRA: do many updates of low rank, merged in turn, train a model where one does not?

Paper: ReLoRA: High-Rank Training Through Low-Rank Updates, Lialin et al. 2023 (arXiv 2307.05695);
    LoRA: Low-Rank Adaptation of Large Language Models, Hu et al. 2021 (arXiv 2106.09685)
Method: train all of the model for a while, then W + (alpha / r) A B with W frozen. Every so many
    steps add the product to W, draw A anew, set B to zero, forget 99.9 % of the optimiser's moments
    at random, and warm the rate up again under a falling curve. So the sum of the updates has a
    higher rank than any of them.
Here: the same quarter of the steps trains all of the matrices, then full goes on, lora has one
    pair of factors, relora a new one every 30 steps. Embeddings and gains train throughout. The
    two moments keep the same entries, where the paper's code draws two sets: a mean that is kept
    beside a variance that is not would be a step without bound. The product of the factors is
    formed and multiplied as one matrix, so that a step costs what it does in full.
Cost: nine runs of 200 steps, a quarter of a minute each: some three minutes on two CPU cores.
Run:
    python train.py study configs/parameters/relora.py --jobs 2
    python train.py configs/parameters/relora.py:relora             one arm by hand
"""
import zlib
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from configs import base
from lib.lora import adapted, add_lora, unfrozen
from lib.study import Claim, Paper, Study
from model import Context, Edited, Model, draw, table
from train import Edit, Schedule


def pruned(tree: dict, moment: str, key: jax.Array, share: float) -> dict:
    """A share of each moment's entries, drawn at random, the rest zero; of all moments the same."""
    out = {}
    for name, x in tree.items():
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        out[name] = jnp.where(jax.random.bernoulli(own, share, x.shape), x, 0)
    return out


def merge(model: Model, context: Context, alpha: float = 16.0, keep: float = 0.001) -> Edited:
    """An edit: the factors' product into the matrices, A drawn anew, B zero; moments `pruned`."""
    rows, params = table(model.config), dict(model.params)
    params |= adapted(params, 0, {}, model.config, alpha)
    for name, row in rows.items():
        if "/" in name:
            params[name] = draw(name, row, context.key, params[name].dtype)
    policy = partial(pruned, key=context.key, share=keep)
    return Edited(Model(model.config, params), {"matrix": policy}, preserves=True)


def restarts(share: float, cycles: int = 5, warm: float = 0.2, final: float = 0.1) -> float:
    """A `Schedule.shape`: linear decay to `final`, with a warm-up of a part of each cycle."""
    within = 1 - (-share * cycles) % 1  # 1 at the end of a cycle
    return (1 - (1 - final) * share) * min(1.0, max(within, 0.01) / warm)


full = base.scaled(replace(base.small, model=base.shape(3, 96, 512), eval_every=50), 50)
first, K = full.phases[0], 30
later = replace(first, steps=5 * K, schedule=Schedule(shape="linear", warmup=6, peak=8e-3))
full = replace(full, phases=(first, later), schedule=Schedule(shape="constant", peak=8e-3))
jagged = replace(later.schedule, shape=partial(restarts, final=0.1), warmup=0)
low = replace(later, edits=(add_lora,))
lora = replace(full, phases=(first, low), reparam=adapted, optimizer=unfrozen)
merged = replace(low, schedule=jagged, repeat=(Edit(merge, every=K, forgets=False),))
study = Study(
    question="Do many updates of low rank, merged in turn, train a model where one does not?",
    paper=(Paper(title="ReLoRA: High-Rank Training Through Low-Rank Updates",
                 authors="Lialin et al.", year=2023),
           Paper(title="LoRA: Low-Rank Adaptation of Large Language Models",
                 authors="Hu et al.", year=2021)),
    arms={"full": full, "lora": lora, "relora": replace(lora, phases=(first, merged))},
    measures={"trained": "model/trained", "bytes": "model/opt_bytes"},
    quick=base.quick({"phases.0.steps": 2}),
    claims=(
        Claim(says="one pair of factors is behind full training", arm="lora", above=0.0),
        Claim(says="merging in turn beats one pair", arm="relora", control="lora", below=0.0),
        Claim(says="and is behind full training", arm="relora", above=0.0),
    ),
    seeds=3,
)

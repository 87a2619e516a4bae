"""MoRA: does a square matrix memorise more than two factors with as many parameters?

Paper: MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning, Jiang et al. 2024 (001:59)
Method: in place of LoRA's A [n r] and B [r m] a square M of side sqrt(r (n + m)): an update of
    higher rank, with as many parameters. What a matrix reads is cut into groups of that side, each
    turned by its number as RoPE turns positions and multiplied by M; the products are strung
    together (eq. 9). All of it is linear, so it merges. The paper's own task is to memorise pairs
    of UUIDs: MoRA is near full training, LoRA far behind.
Here: a model of bytes that knows such pairs from others learns 96 pairs of 8 hexadecimal digits
    each, at rank 2. Of a value's digits, each after the true ones, a guess misses .94, and so do
    both. As in the paper's code the last group is filled up with the first inputs.
Cost: three bases of 150 steps, some fifteen runs of 200: five minutes on two CPU cores.
Run:
    python train.py study configs/parameters/mora.py --jobs 2
"""
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np

from configs import base
from data import DataConfig, Document, Source
from lib.lora import adapted, add_lora, attach, freeze_rows, unfrozen
from lib.matrices import matrices, sides
from lib.study import Claim, Paper, Study
from model import Context, Edited, Model, Param
from train import Config, Phase, Schedule

PAIRS = 96  # to memorise


def pairs(seed: int, number: int) -> Iterator[Document]:
    """Documents "KEY:VALUE" of 8 hexadecimal digits each."""
    for key, value in np.random.default_rng(seed).integers(2**32, size=(number, 2)).tolist():
        yield Document(path=f"{key:08x}", text=f"{key:08x}:{value:08x}")


def memory(params, apply, tokenizer) -> dict[str, float]:
    """An `evals`: the share of the values' digits that are likeliest after what precedes them."""
    texts = [document.text for document in pairs(1, PAIRS)]
    ids = np.array([[tokenizer.bos, *tokenizer.encode(text)] for text in texts], np.int32)
    right = np.argmax(np.asarray(apply(params, ids))[:, 9:-1], -1) == ids[:, 10:]
    digits = float(right.mean())
    return {"memory/digits": digits, "memory/missed": 1 - digits}


def compress(x, side: int):
    """x [... n] -> [... groups side]: cut into groups, each turned by its number (eq. 9)."""
    missing = -x.shape[-1] % side
    x = jnp.concatenate([x, x[..., :missing]], -1).reshape(*x.shape[:-1], -1, side)
    frequency = 10_000.0 ** (-jnp.arange(0, side, 2) / side)
    angle = jnp.tile(jnp.arange(x.shape[-2])[:, None] * frequency, (1, 2))
    one, two = jnp.split(x, 2, -1)
    return x * jnp.cos(angle) + jnp.concatenate([-two, one], -1) * jnp.sin(angle)


def decompress(y, outputs: int):
    """y [... groups side] -> [... outputs]: strung together, and again from the first if short."""
    y = y.reshape(*y.shape[:-2], -1)
    return jnp.take(y, jnp.arange(outputs) % y.shape[-1], axis=-1)


def merged(square, n: int, m: int):
    """[layers n m]: the matrix that x -> decompress(compress(x) M) is, of M [layers side side]."""
    groups = compress(jnp.eye(n, dtype=square.dtype), square.shape[-1])  # [n groups side]
    return decompress(jnp.einsum("ngi,lio->lngo", groups, square), m)


def mora_rows(config, rows: dict[str, Param], rank: int) -> dict[str, Param]:
    """A `rows`: a square matrix, zero yet, beside each matrix of a model that is frozen."""
    stored = freeze_rows(rows, config, alone=True)
    for name, row in matrices(config).items():
        side = math.isqrt(sum(sides(row)) * rank) // 2 * 2  # even, no more entries than factors
        stored[f"{name}/m"] = Param(("layers", "in", "out"), (config.layers, side, side), 0.0)
    return stored


def squared(params: dict, step, batch, config) -> dict:
    """A `reparam`: W + `merged`; a model without square matrices stays as it is."""
    used = {name: x for name, x in params.items() if "/" not in name}
    for name, row in matrices(config).items():
        if f"{name}/m" in params:
            used[name] += merged(params[f"{name}/m"], *sides(row)).reshape(row.shape)
    return used


def add_mora(model: Model, context: Context, rank: int = 2) -> Edited:
    """An edit: give a model square matrices, which alone train."""
    return attach(model, context, partial(mora_rows, rank=rank))


data = DataConfig(sources={"pairs": Source(partial(pairs, seed=1, number=PAIRS))},
                  tokenizer="bytes", dev=0.0, test=0.0)
phase, rate = Phase(steps=200, batch=16, seq=126), Schedule(shape="linear", peak=4e-3, final=0.05)
full = Config(model=base.shape(3, 64, 0), data=data, phases=(phase,), schedule=rate, overlap=0,
              init_from="needs:form", evals=(memory,), eval_every=50, keep=1)
form = replace(base.scaled(full, 150), init_from="", data=replace(data, sources={
    "pairs": Source(partial(pairs, seed=2, number=20_000))}))
few = replace(full, optimizer=unfrozen, phases=(replace(phase, edits=(add_mora,)),))
factors = replace(phase, edits=(partial(add_lora, rank=2, alone=True),))
claim = partial(Claim, measure="memory/digits")
study = Study(
    question="Does a square matrix memorise more than two factors with as many parameters?",
    paper=Paper(title="MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning",
                authors="Jiang et al.", year=2024, seeds=("001:59",)),
    needs={"form": form},
    arms={"lora": replace(few, reparam=partial(adapted, alpha=4.0), phases=(factors,)),
          "mora": replace(few, reparam=squared), "full": full},
    peak_lrs=(4e-3, 1.6e-2), tuned_by="missed", seeds=3,
    measures={"missed": "memory/missed", "trained": "model/trained"},
    quick={"phases.*.steps": 4, "phases.*.batch": 2, "eval_every": 2, "sample_tokens": 4},
    claims=(
        claim(says="a square matrix memorises more than factors", arm="mora", above=0.0),
        claim(says="with no more parameters", arm="mora", measure="model/trained", below=0.5),
        claim(says="full training memorises more yet", arm="full", control="mora", above=0.0),
    ),
)

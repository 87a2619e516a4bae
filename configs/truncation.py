"""Truncation hurts: a process whose loss is known in closed form, with its documents whole and cut.

X0 is a fair bit; every later bit is X0 with probability p and the other one else, whatever the rest is. Who
sees X0 loses H(p) nats a bit. Who starts at X1, as a model does that learns from pieces cut off their
documents' beginnings, has to infer X0, and loses `closed_form(m, p)` after m bits (Ding et al. 2024, "Fewer
Truncations Improve Language Modeling", 2.1 and appendix A). Both arms are trained, on documents of 15 bits, a
row each; every document is a new one, so nothing can be learnt by heart. By hand, two minutes each:

    python train.py configs/truncation.py:full
    python train.py configs/truncation.py:truncated

The evaluation is no sample: it weighs all 32,768 sequences by their probability. Measured, in nats (two cores
of an Intel Xeon, Python 3.11, jax 0.10.2, p = 0.75, seed 0), with the closed form below:

    bits seen      0      1      2      4      8      14    largest error
    full         .6932  .5624  .5624  .5624  .5624  .5624   0.00005
                 .6931  .5623  .5623  .5623  .5623  .5623
    truncated    .6932  .6617  .6418  .6149  .5872  .5712   0.00014
                 .6931  .6616  .6417  .6148  .5871  .5711
"""
import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from data import DataConfig, Document, Source
from lib.packing import one_per_row
from lib.schedule import Schedule
from model import ModelConfig
from train import Config, Phase

BITS = 15  # of a document: 16 positions, since it has an end


def entropy(p):
    """Nats of a bit that is 1 with probability p."""
    return -p * np.log(p) - (1 - p) * np.log1p(-p)


def closed_form(m: int, p: float) -> float:
    """Nats on the bit after m, where X0 is not among these: the mean over k, the number of zeros in them."""
    k, q = np.arange(m + 1), 1 - p
    if_0, if_1 = p**k * q**(m - k), p**(m - k) * q**k  # probability of one such sequence given X0
    ways = np.array([math.comb(m, i) for i in range(m + 1)])
    return float(np.sum(ways * (if_0 + if_1) / 2 * entropy((p * if_0 + q * if_1) / (if_0 + if_1))))


def process(documents: int = 400_000, p: float = 0.75, truncated: bool = False) -> Iterator[Document]:
    """Documents of 15 digits: X0 to X14 or, truncated, X1 to X15."""
    rng = np.random.default_rng([int(truncated), documents])
    first = rng.integers(0, 2, (documents, 1))
    later = first ^ (rng.random((documents, BITS)) > p)
    bits = later if truncated else np.concatenate([first, later[:, 1:]], axis=1)
    for i, digits in enumerate((bits + ord("0")).astype(np.uint8)):
        yield Document(str(i), digits.tobytes().decode("ascii"))


def by_position(params, apply, p: float, truncated: bool) -> dict[str, float]:
    """Expected nats on the bit after m, as `truncation/mM`, and the largest distance from what is expected.

    All sequences there are, weighted by their probability.
    """
    bits = np.arange(2**BITS)[:, None] >> np.arange(BITS) & 1
    later = bits if truncated else bits[:, 1:]
    ones = later.sum(1)
    if_1, if_0 = (x**ones * (1 - x)**(later.shape[1] - ones) / 2 for x in (p, 1 - p))  # jointly with X0
    weight = if_0 + if_1 if truncated else np.where(bits[:, 0], if_1, if_0)
    ids = np.concatenate([np.full_like(bits[:, :1], 256), bits[:, :-1] + ord("0")], axis=1)  # 256 is bos
    nats = np.zeros(BITS)
    for part in np.split(np.arange(len(bits)), 8):
        logits = np.asarray(apply(params, ids[part].astype(np.int32)), np.float64)
        target = np.take_along_axis(logits, bits[part, :, None] + ord("0"), 2)[..., 0]
        nats += weight[part] @ (np.log(np.exp(logits).sum(-1)) - target)
    expected = [closed_form(m, p) if truncated or m == 0 else float(entropy(p)) for m in range(BITS)]
    out = {f"truncation/m{m}": float(x) for m, x in enumerate(nats)}
    return out | {"truncation/largest_error": float(np.abs(nats - expected).max())}


def arm(truncated: bool, p: float = 0.75) -> Config:
    """The experiment on whole or on truncated documents."""
    documents = partial(process, documents=400_000, p=p, truncated=truncated)
    return Config(
        model=ModelConfig(layers=2, embed=32, heads=4, kv_heads=4, head_dim=8, mlp=88),
        data=DataConfig(sources={"bits": Source(documents)}, tokenizer="bytes", dev=0.0, test=0.0),
        phases=(Phase(steps=1_500, batch=256, seq=BITS + 1, packing=one_per_row),),
        schedule=Schedule(shape="wsd", peak=1e-2, warmup=50, decay=0.5, final=0.02),
        evals=(partial(by_position, p=p, truncated=truncated),),
        overlap=0,
        eval_every=500,
        save_every=500,
        sample_tokens=16,
    )


arms = {"full": arm(False), "truncated": arm(True)}
config = arms["truncated"]

"""Truncation: what does a model lose that learns from documents whose beginnings are cut off?

Paper: Fewer Truncations Improve Language Modeling, Ding et al. 2024 (001:39), 2.1 and appendix A
Method: a process whose loss is known in closed form. X0 is a fair bit; every later bit is X0 with
    probability p and the other one else. Who sees X0 loses H(p) nats a bit. Who starts at X1, as a
    model does that learns from pieces without their documents' beginnings, has to infer X0, and
    loses `closed_form(m, p)` after m bits.
Here: documents of 15 bits, a row each, whole or without X0, p = 0.75. Every document is a new one,
    so that nothing is learnt by heart. The evaluation is no sample: it weighs all 32,768 sequences
    by their probability. The closed form says 0.562 nats a bit with X0, and without it 0.642 after
    two bits and 0.587 after eight. Each arm is measured on documents of its own kind.
Cost: six runs of two minutes, eight minutes on two CPU cores with --jobs 2.
Run:
    python train.py study configs/context/truncation.py --jobs 2
    python train.py configs/context/truncation.py:truncated         one arm by hand, two minutes
"""
import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from data import DataConfig, Document, Source
from lib.packing import one_per_row
from lib.study import Claim, Paper, Study
from model import ModelConfig
from train import Config, Phase, Schedule

BITS = 15  # of a document: 16 positions, since it has an end
P = 0.75


def entropy(p):
    """Nats of a bit that is 1 with probability p."""
    return -p * np.log(p) - (1 - p) * np.log1p(-p)


def closed_form(m: int, p: float) -> float:
    """Nats on the bit after m without X0: the mean over k, the number of zeros among them."""
    k, q = np.arange(m + 1), 1 - p
    if_0, if_1 = p**k * q**(m - k), p**(m - k) * q**k  # probability of one sequence given X0
    ways = np.array([math.comb(m, i) for i in range(m + 1)])
    next_one = (p * if_0 + q * if_1) / (if_0 + if_1)
    return float(np.sum(ways * (if_0 + if_1) / 2 * entropy(next_one)))


def process(documents: int = 400_000, p: float = P, truncated: bool = False) -> Iterator[Document]:
    """Documents of 15 digits: X0 to X14 or, truncated, X1 to X15."""
    rng = np.random.default_rng([int(truncated), documents])
    first = rng.integers(0, 2, (documents, 1))
    later = first ^ (rng.random((documents, BITS)) > p)
    bits = later if truncated else np.concatenate([first, later[:, 1:]], axis=1)
    for i, digits in enumerate((bits + ord("0")).astype(np.uint8)):
        yield Document(str(i), digits.tobytes().decode("ascii"))


def by_position(params, apply, p: float, truncated: bool) -> dict[str, float]:
    """Expected nats on the bit after m, as `truncation/mM`, and the largest distance from theory.

    All sequences there are, weighted by their probability.
    """
    bits = np.arange(2**BITS)[:, None] >> np.arange(BITS) & 1
    later = bits if truncated else bits[:, 1:]
    ones = later.sum(1)
    if_1, if_0 = (x**ones * (1 - x)**(later.shape[1] - ones) / 2 for x in (p, 1 - p))  # and X0
    weight = if_0 + if_1 if truncated else np.where(bits[:, 0], if_1, if_0)
    ids = np.concatenate([np.full_like(bits[:, :1], 256), bits[:, :-1] + ord("0")], axis=1)  # bos
    nats = np.zeros(BITS)
    for part in np.split(np.arange(len(bits)), 8):
        logits = np.asarray(apply(params, ids[part].astype(np.int32)), np.float64)
        target = np.take_along_axis(logits, bits[part, :, None] + ord("0"), 2)[..., 0]
        nats += weight[part] @ (np.log(np.exp(logits).sum(-1)) - target)
    known = [m > 0 and not truncated for m in range(BITS)]  # X0, before the bit after m
    expected = [entropy(p) if sees else closed_form(m, p) for m, sees in enumerate(known)]
    out = {f"truncation/m{m}": float(x) for m, x in enumerate(nats)}
    return out | {"truncation/largest_error": float(np.abs(nats - expected).max())}


def arm(truncated: bool) -> Config:
    """The experiment on whole or on truncated documents."""
    documents = partial(process, documents=400_000, p=P, truncated=truncated)
    return Config(
        model=ModelConfig(layers=2, embed=32, heads=4, kv_heads=4, head_dim=8, mlp=88),
        data=DataConfig(sources={"bits": Source(documents)}, tokenizer="bytes", dev=0.0, test=0.0),
        phases=(Phase(steps=1_500, batch=256, seq=BITS + 1, packing=one_per_row),),
        schedule=Schedule(shape="wsd", peak=1e-2, warmup=50, decay=0.5, final=0.02),
        evals=(partial(by_position, p=P, truncated=truncated),),
        overlap=0, eval_every=500, save_every=500, sample_tokens=16,
    )


study = Study(
    question="What does a model lose that learns from documents whose beginnings are cut off?",
    paper=Paper(title="Fewer Truncations Improve Language Modeling", authors="Ding et al.",
                year=2024, seeds=("001:39",)),
    arms={"full": arm(False), "truncated": arm(True)},
    quick={"phases.*.steps": 4, "model.layers": 1, "model.embed": 16, "model.mlp": 16,
           "sample_tokens": 4},
    claims=(
        Claim(says="after two bits 0.08 nats, as the closed form says, here at least 0.07",
              arm="truncated", measure="truncation/m2", above=0.07),
        Claim(says="after eight bits 0.025 nats, here at least 0.02", arm="truncated",
              measure="truncation/m8", above=0.02),
        Claim(says="after fourteen bits less than 0.01 nats are left", arm="truncated",
              measure="truncation/m14", below=0.01),
        Claim(says="it does what can be done: no bit is 0.01 nats from the closed form",
              arm="truncated", control=None, measure="truncation/largest_error", below=0.01),
    ),
    seeds=3,
)

"""SALT: can a small, weak model help to train a larger one?

Paper: A Little Help Goes a Long Way: Efficient LLM Training by Leveraging Small LMs,
    Rawat et al. 2024 (000:14, 001:97)
Method: distil from a *smaller* teacher for the first steps, loss (1 - w) CE + w KL(teacher ||
    student) with w = 2/3, then train plainly. SALT_DS: distil on sequences that are challenging but
    learnable: high median loss of the teacher, over tokens that are among its likeliest k.
Here: functions and classes of Python's library, a teacher of 2 layers of 64, a student of 4 of 96,
    as many tokens for both. The first 60 of 200 steps are taught (the paper: 36 of 208 thousand).
    plain: none. rkd: all. salt_ds: on the harder half of 1,920 rows by the finished teacher (the
    paper: by an early one). longer: plain, at the FLOPs of salt, its teacher's training included.
Cost: six runs of a third of a minute a seed, seven minutes for three seeds on two CPU cores.
Run:
    python train.py study configs/selection/salt.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from data import DataConfig, Documents, Source, concat_and_split, stdlib
from lib.kernels import nll
from lib.optim import adamw
from lib.packing import ROW, fill
from lib.study import Claim, Paper, Study
from lib.teacher import adopt, divergence, release
from lib.tokenizers import Tokenizer
from model import apply, cross_entropy
from train import load


def distil(logits, batch, extras, share: float = 2 / 3):
    """A `token_loss` [b c]: (1 - share) cross-entropy + share KL(teacher || model), in nats."""
    soft = divergence(logits, batch, extras)
    return (1 - share) * cross_entropy(logits, batch, extras) + share * soft


def judged(plan: np.ndarray, rows: np.ndarray, seq: int, documents: Documents, tokenizer: Tokenizer,
           run: str, batch: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """(nats, rank) [rows, seq] of the targets of rows under a run, from rank 0; NaN: no loss."""
    params, config, _, _ = load(run)

    @jax.jit
    def look(params, arrays):
        logits, targets = apply(params, arrays, config.model), arrays["targets"]
        higher = logits > jnp.take_along_axis(logits, targets[..., None], -1)
        return nll(logits, targets), jnp.sum(higher, -1)

    nats, ranks = np.zeros((2, len(rows), seq))
    for first in range(0, len(rows), batch):
        some = rows[first:first + batch]
        arrays = fill(plan, np.resize(some, batch), seq, documents.ids, tokenizer)
        for into, x in zip((nats, ranks), look(params, arrays), strict=True):
            into[first:first + batch] = np.where(arrays["weights"] > 0, x, np.nan)[:len(some)]
    return nats, ranks


def highest(plan: np.ndarray, value: np.ndarray, share: float) -> np.ndarray:
    """The plan of the share of its first rows whose value [rows] is highest, in their old order."""
    kept = np.sort(np.argsort(-value, kind="stable")[:round(share * len(value))])
    plan = plan[np.isin(plan[:, ROW], kept)]
    plan[:, ROW] = np.searchsorted(kept, plan[:, ROW])
    return plan


def learnable(lengths, seq: int, documents: Documents, tokenizer: Tokenizer, run: str,
              share: float = 0.5, k: int = 10, among: int = 1_920) -> np.ndarray:
    """A packing: of the first rows, those whose median nats are highest, over ranks below k."""
    plan = concat_and_split(lengths, seq)
    rows = np.arange(min(among, plan[-1, ROW] + 1))
    nats, ranks = judged(plan, rows, seq, documents, tokenizer, run)
    nats[:, 0] = np.where((ranks < k).any(1), nats[:, 0], -np.inf)  # no target that it knows
    known = (ranks < k) | np.isneginf(nats)
    return highest(plan, np.nanmedian(np.where(known, nats, np.nan), 1), share)


STEPS, FIRST = 200, 60
small = replace(
    base.small, model=base.shape(4, 96, 512), optimizer=partial(adamw, frozen=("teacher",)),
    schedule=replace(base.small.schedule, budget="tokens"),
    data=DataConfig(sources={"code": Source(partial(stdlib, unit="definition"))}, window=1_000_000))
phase = replace(base.small.phases[0], steps=STEPS, batch=16)
plain = replace(small, phases=(phase,))
teacher = replace(plain, model=base.shape(2, 64, 512), optimizer=adamw)


def taught(steps: int, packing=concat_and_split):
    """A run whose first steps are taught."""
    edit = partial(adopt, run="needs:teacher")
    first = replace(phase, steps=steps, packing=packing, token_loss=distil, edits=(edit,))
    rest = replace(phase, steps=STEPS - steps, edits=(release,))
    return replace(small, phases=(first, rest)[:1 + (steps < STEPS)])


spent = base.flops(small.model, phase) + base.flops(teacher.model, phase) * (1 + FIRST / STEPS / 3)
study = Study(
    question="Can a small, weak model help to train a larger one?",
    paper=Paper(title="A Little Help Goes a Long Way: Efficient LLM Training by Leveraging Small "
                "LMs", authors="Rawat et al.", year=2024, seeds=("000:14", "001:97")),
    needs={"teacher": teacher},
    arms={
        "plain": plain,
        "salt": taught(FIRST),
        "salt_ds": taught(FIRST, partial(learnable, run="needs:teacher", share=0.5, k=10)),
        "rkd": taught(STEPS),
        "longer": base.scaled(plain, base.steps_for(spent, small.model, phase)),
    },
    quick=base.quick(),
    claims=(
        Claim(says="soft labels of a weaker model help at first", arm="salt", below=0.0),
        Claim(says="chosen rows help more", arm="salt_ds", control="salt", below=0.0),
        Claim(says="soft labels to the end are worse than at first alone", arm="rkd",
              control="salt", above=0.0),
        Claim(says="they are worth the teacher's cost", arm="salt", control="longer", below=0.0),
    ),
    seeds=3,
)

"""Self-pretraining: does denoising a task's own data, before it is learned, beat a random start?

Paper: Never Train from Scratch: Fair Comparison of Long-Sequence Models Requires Data-Driven
    Priors, Amos et al. 2023 (003:31)
Method: pre-train on nothing but the inputs of the task's training set, by the next token or by
    masked tokens, then train on its labels. Compared so, plain Transformers match state-space
    models on Long Range Arena; from scratch they are far behind.
Here: ListOps, one of the arena's tasks, of depth 2 and at most 30 tokens: nested MIN, MAX, MED and
    SUM modulo 10 of digits. 4,000 expressions; the answer is told where the expression ends.
    causal and masked: 300 steps on expressions alone, then 200 on answers, under one mask. scratch
    and masked_scratch: the 200, under either. long: 500 on answers. nats: of the answers of
    held-out expressions; the paper has accuracy. A guess costs 2.30 nats, and 2.05 by the outermost
    operation. causal ends at 2.08 and masked at 1.98, so they read little more than that; scratch
    is at 1.77, and even long at 1.66. Left out: the other tasks.
Cost: 15 runs of half a minute, 3 minutes on two CPU cores.
Run:
    python train.py study configs/objectives/self_pretraining.py --jobs 2
"""
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from configs import base
from data import DataConfig, Document, Source
from lib.objectives import BIDIRECTIONAL, CAUSAL, choose, hide
from lib.packing import best_fit
from lib.study import Claim, Paper, Study
from train import Phase, Schedule

OPERATIONS = {10: min, 11: max, 12: lambda digits: int(np.median(digits)),
              13: lambda digits: sum(digits) % 10}
CLOSE, EQUALS, IDS = 14, 15, 16  # 0 to 9 are digits


def expression(rng, depth: int, most: int = 4) -> tuple[list[int], int]:
    """(the ids of a nested expression, its value)."""
    if not depth:
        digit = int(rng.integers(10))
        return [digit], digit
    operation = int(rng.choice(list(OPERATIONS)))
    parts = [expression(rng, depth - 1 if rng.random() < 0.5 else 0, most)
             for _ in range(rng.integers(2, most + 1))]
    value = OPERATIONS[operation]([value for _, value in parts])
    return [operation, *sum((ids for ids, _ in parts), []), CLOSE], int(value)


def listops(number: int = 5_000, depth: int = 2, longest: int = 30) -> Iterator[Document]:
    """Expressions and their values, as numbers."""
    for i in range(number):
        rng, ids = np.random.default_rng([depth, i]), range(longest + 1)
        while len(ids) > longest - 2:
            ids, value = expression(rng, depth)
        yield Document(f"listops/{i}", " ".join(map(str, [*ids, EQUALS, value])))


def apart(row: dict) -> tuple[dict, np.ndarray, np.ndarray]:
    """(The row without answers among its inputs, where targets are of expressions, where answers).

    An answer is the target of the sign that ends an expression, and the input of the next place.
    """
    asked = row["tokens"] == EQUALS
    after = np.concatenate([[False], asked[:-1]])
    tokens = np.where(after, row["targets"], row["tokens"]).astype(np.int32)
    return row | {"tokens": tokens}, (row["weights"] > 0) & ~asked & ~after, asked


def answered(row: dict, rng, mask: str = "causal"):
    """An objective: tell the values of expressions."""
    row, _, asked = apart(row)
    return row | {"weights": asked * row["weights"]}, {"kind": mask, "window": 0}


def next_token(row: dict, rng):
    """An objective: the next token of expressions."""
    row, inside, _ = apart(row)
    return row | {"weights": inside.astype(np.float32)}, CAUSAL


def denoised(row: dict, rng, tokenizer, share: float = 0.15):
    """An objective: tokens of expressions that are hidden. Of values nothing is seen."""
    row, inside, asked = apart(row)
    row = row | {"targets": np.where(asked, tokenizer.eos, row["targets"]).astype(np.int32)}
    return hide(row, choose(inside, share, rng), rng, tokenizer), BIDIRECTIONAL


next_token.masks, denoised.masks = (CAUSAL,), (BIDIRECTIONAL,)
both = partial(answered, mask="bidirectional")
plain = Schedule(shape="wsd", peak=8e-3, warmup=20, decay=0.4, final=0.05)
pre = Phase(steps=300, batch=8, seq=128, packing=best_fit, schedule=plain)
fine = replace(pre, steps=200, objective=answered)
scratch = replace(
    base.small, model=base.shape(4, 64, 0), phases=(fine,), eval_every=500, prompts=(),
    data=DataConfig({"listops": Source(listops)}, tokenizer="numbers:16", dev=0.2, test=0.0))
first = {"causal": (replace(pre, objective=next_token), fine), "long": (replace(fine, steps=500),),
         "masked": (replace(pre, objective=denoised), replace(fine, objective=both)),
         "masked_scratch": (replace(fine, objective=both),)}


study = Study(
    question="Does denoising a task's own data beat a random start?",
    paper=Paper(title="Never Train from Scratch: Fair Comparison of Long-Sequence Models Requires "
                "Data-Driven Priors", authors="Amos et al.", year=2023, seeds=("003:31",)),
    arms={"scratch": scratch} | {
        name: replace(scratch, phases=phases) for name, phases in first.items()},
    measures={"nats": "eval/listops/own"},
    quick=base.quick(keep=("model.vocab", "data.tokenizer", "data.dev", "data.test")),
    claims=(
        Claim(says="the next token first is better than a random start", arm="causal",
              measure="nats", below=0.0),
        Claim(says="so are masked tokens", arm="masked", control="masked_scratch", measure="nats",
              below=0.0),
        Claim(says="and better than as many more steps on answers", arm="causal", control="long",
              measure="nats", below=0.0),
    ), seeds=3)

"""Structural objectives: does telling which spans belong together make a better encoder?

Paper: Structural Self-Supervised Objectives for Transformers, Di Liello 2023 (000:44)
Method: an encoder of masked tokens is trained a little longer to tell whether two spans are of one
    paragraph (SSP). Negatives are spans of other paragraphs. No labels are needed, and the task is
    like those of pairs of sentences, such as answer selection.
Here: a paragraph is a function or class of Python's library. Rows are two spans of 64 bytes that
    follow one another in one, or whose second is of another one. Each position tells it, as a label
    a row would be few. Then 200 steps of prose.py. masked: 700 steps of masked bytes. same: 300,
    then 400 of pairs, as a fourth of that leaves them at chance. both: 300, then 400 in which rows
    of the one and of the other come in turn. Left out: spans of one document against those of
    others, and tasks of pairs.
Cost: 9 runs of a minute, 9 minutes on two CPU cores.
Run:
    python train.py study configs/objectives/structural.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import numpy as np

from configs import base
from configs.objectives.prose import MEASURES, config, fine, pre
from lib.objectives import BIDIRECTIONAL, masked
from lib.packing import PLAN
from lib.study import Claim, Paper, Study


def pairs(lengths: np.ndarray, seq: int) -> np.ndarray:
    """The plan of rows of two spans of seq / 2, each row one segment.

    Each document has a row for every `seq` of its positions. The second span follows the first, in
    segment 1, in every other row. In those between it is of another document, in segment 2: the
    number of its segment is what a row has to tell.
    """
    half = seq // 2
    windows = [(document, start) for document, length in enumerate(lengths.tolist())
               for start in range(0, length - seq + 1, seq)]
    plan = []
    for row, (document, start) in enumerate(windows):
        others = windows[row + 1:] + windows[:row]
        apart = row % 2 and next((place for place in others if place[0] != document), None)
        second, begin = apart or (document, start)
        segment = 2 if apart else 1
        plan.append((row, segment, document, start, half, 0))
        plan.append((row, segment, second, begin + half, half, 0))
    return np.array(plan, np.int64).reshape(-1, len(PLAN))


def same(row: dict, rng):
    """An objective: tell at each position whether the spans of a row belong together."""
    together = (row["segments"][0] == 1).astype(np.int32)
    return row | {
        "tokens": row["targets"], "targets": np.full_like(row["targets"], together),
        "segments": np.minimum(row["segments"], 1),
    }, BIDIRECTIONAL


def either(row: dict, rng, tokenizer):
    """An objective: half of the rows tell whether spans belong together, half predict tokens."""
    if rng.random() < 0.5:
        return same(row, rng)
    return masked(row | {"segments": np.minimum(row["segments"], 1)}, rng, tokenizer)


same.masks = either.masks = (BIDIRECTIONAL,)
first = replace(pre, objective=masked)
rate = replace(pre.schedule, peak=4e-3)
later = replace(pre, steps=400, packing=pairs, schedule=rate)
second = {"masked": replace(later, packing=pre.packing, objective=masked),
          "same": replace(later, objective=same), "both": replace(later, objective=either)}
nats = partial(Claim, measure="nats", below=0.0)
study = Study(
    question="Does telling which spans belong together make a better encoder?",
    paper=Paper(title="Structural Self-Supervised Objectives for Transformers",
                authors="Di Liello", year=2023, seeds=("000:44",)),
    arms={name: replace(config, phases=(first, phase, fine)) for name, phase in second.items()},
    measures=MEASURES,
    quick=base.quick(keep=("phases.*.seq", "data.dev", "data.test")),
    claims=(
        nats(says="pairs of spans after masked tokens help a task of spans", arm="same"),
        nats(says="so do pairs among masked tokens", arm="both"),
    ), seeds=3)

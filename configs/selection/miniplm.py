"""MiniPLM: is text better to learn from that a large model knows and a small one does not?

Paper: MiniPLM: Knowledge Distillation for Pre-Training Language Models, Gu et al. 2024 (000:40)
Method: difference sampling. The score of a sequence is the loss of a small reference less the loss
    of a large teacher, both trained before. Keep the half with the highest scores, in order, and
    train the student on it plainly: what is easy for both and what is noise for both goes.
Here: functions and classes of Python's library. The teacher has 4 layers of 128 and 300 steps, the
    reference 2 of 64 and 100, the student 3 of 96 and 200. Of 6,400 rows of 128 positions half stay
    (the paper: of chunks of 1,025 tokens). chance: any half, which is plain training. knows: the
    half with the lowest loss of the teacher. hard: that with the highest loss of the reference.
    What it costs to judge rows is not charged. Left out: students of other tokenizers.
Cost: six runs a seed of a quarter to two minutes, nine minutes for three seeds on two CPU cores.
Run:
    python train.py study configs/selection/miniplm.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import numpy as np

from configs import base
from configs.selection.salt import highest, judged
from data import DataConfig, Documents, Source, concat_and_split, stdlib
from lib.packing import ROW
from lib.study import Claim, Paper, Study
from lib.tokenizers import Tokenizer


def difference(lengths, seq: int, documents: Documents, tokenizer: Tokenizer, teacher: str = "",
               reference: str = "", share: float = 0.5, among: int = 6_400) -> np.ndarray:
    """A packing: the share of the first rows with the most nats of `reference` less `teacher`.

    Nats are means over a row. A run that is not named counts as 0.
    """
    plan = concat_and_split(lengths, seq)
    rows = np.arange(min(among, plan[-1, ROW] + 1))
    score = np.zeros(len(rows))
    for sign, run in (-1, teacher), (1, reference):
        if run:
            nats, _ = judged(plan, rows, seq, documents, tokenizer, run)
            score += sign * np.nanmean(nats, 1)
    return highest(plan, score, share)


def made(layers: int, embed: int, steps: int, packing=concat_and_split):
    """A run of a model of some shape on what a packing leaves."""
    phase = replace(base.small.phases[0], steps=steps, batch=16, packing=packing)
    data = DataConfig(sources={"definitions": Source(partial(stdlib, unit="definition"))},
                      window=1_000_000)
    return replace(base.small, model=base.shape(layers, embed, 512), phases=(phase,), data=data)


student = partial(made, 3, 96, 200)
teacher, reference = "needs:teacher", "needs:reference"
study = Study(
    question="Is text better to learn from that a large model knows and a small one does not?",
    paper=Paper(title="MiniPLM: Knowledge Distillation for Pre-Training Language Models",
                authors="Gu et al.", year=2024, seeds=("000:40",)),
    needs={"teacher": made(4, 128, 300), "reference": made(2, 64, 100)},
    arms={
        "chance": student(),
        "miniplm": student(partial(difference, teacher=teacher, reference=reference)),
        "knows": student(partial(difference, teacher=teacher)),
        "hard": student(partial(difference, reference=reference)),
    },
    quick=base.quick(),
    claims=(
        Claim(says="the difference of two losses chooses better than chance", arm="miniplm",
              below=0.0),
        Claim(says="better than the teacher's loss alone", arm="miniplm", control="knows",
              below=0.0),
        Claim(says="better than the reference's loss alone", arm="miniplm", control="hard",
              below=0.0),
    ),
    seeds=3,
)

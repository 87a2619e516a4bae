"""Dataset decomposition: are rows of one piece of one document each, in powers of two, as good?

Paper: Dataset Decomposition: Faster LLM Training with Variable Sequence Length Curriculum,
    Pouransari et al. 2024
Method: documents are cut into pieces of 512, 256, 128, 64 and 32 positions, the largest first. A
    batch holds pieces of one length, so nothing is padded, no attention crosses documents, and
    short pieces cost less attention. Lengths come in cycles, short ones first.
Here: functions and classes of Python's library, with one budget of positions. concat: documents end
    to end, cut every 512. uniform: pieces, each length as often as the corpus has it. grow_p2: the
    same shares in each of eight cycles, at odds 16 : 8 : 4 : 2 : 1 until one is used up. A step is
    compiled for each length. What is left of a document below the shortest piece is never trained
    on: at a vocabulary of 2,048, 3.6 % of positions, and 23.5 % at the paper's minimum of 256,
    which suits web pages.
Cost: some 20 runs of half a minute, a quarter of an hour on two CPU cores.
Run:
    python train.py study configs/context/dataset_decomposition.py --jobs 2
    python train.py configs/context/dataset_decomposition.py:grow_p2 --phases.0.lengths.cycles 4
"""
from dataclasses import replace
from functools import partial

import numpy as np

from configs import base
from data import DataConfig, InputError, Source, stdlib
from lib.study import Claim, Paper, Study

LENGTHS = [32, 64, 128, 256, 512]
SHARES = [0.038, 0.065, 0.103, 0.138, 0.656]  # of the positions of the pieces, as measured


def power_of_two(lengths: np.ndarray, seq: int, longest: int = 512) -> np.ndarray:
    """A row for each piece of exactly `seq` positions, a power of two and at most `longest`.

    A document is cut into pieces of `longest` while it lasts and then by the binary digits of what
    is left, the highest first; positions are tokens + 1, as bos is read and eos predicted. Called
    once for each length of a phase, so a position is in the rows of one length at most.
    """
    lengths = np.asarray(lengths, np.int64)
    if seq & (seq - 1) or not 0 < seq <= longest:
        raise InputError(f"decomposition has rows of {seq}; "
                         f"allowed are powers of two up to {longest}")
    number = lengths // longest if seq == longest else lengths // seq % 2
    document = np.repeat(np.arange(len(lengths)), number)
    place = np.arange(len(document)) - np.repeat(np.cumsum(number) - number, number)
    start = place * seq if seq == longest else lengths[document] // (2 * seq) * (2 * seq)
    one = np.ones_like(document)
    row = np.arange(len(document))
    return np.stack([row, one, document, start, seq * one, 0 * one], axis=1)


def uniform(progress: float, lengths: list, shares: list) -> dict[int, float]:
    """Each length by its share of the corpus, so that all pieces are seen equally often."""
    return dict(zip(lengths, shares, strict=True))


def grow_p2(progress: float, lengths: list, shares: list, odds: list,
            cycles: int = 8) -> dict[int, float]:
    """In each cycle every length gets its share, at rates ~ `odds` among those not used up.

    At time s of a cycle, min(odds * s, share) of each length has been drawn; s is where these sum
    to the progress within the cycle (the expectation of the paper's draws without replacement).
    """
    odds, shares = np.array(odds, float), np.array(shares, float) / np.sum(shares)
    within, ends = progress * cycles % 1.0, np.sort(shares / odds)
    drawn = np.minimum(odds * ends[:, None], shares).sum(1)  # at each of these times
    ended = np.searchsorted(drawn, within + 1e-9, side="right")
    left = shares / odds >= ends[min(ended, len(ends) - 1)]
    return dict(zip(lengths, (odds * left).tolist(), strict=True))


phase = replace(base.small.phases[0], batch=2, seq=512)
pieces = replace(phase, packing=partial(power_of_two, longest=512))
equal = partial(uniform, lengths=LENGTHS, shares=SHARES)
growing = partial(grow_p2, lengths=LENGTHS, shares=SHARES, odds=[16, 8, 4, 2, 1], cycles=8)
concat = replace(
    base.small,
    model=base.shape(vocab=2048),  # at which SHARES were measured
    data=DataConfig(sources={"definitions": Source(partial(stdlib, unit="definition"))},
                    dev=0.03, test=0.03),
    phases=(phase,),
)
study = Study(
    question="Are rows of one piece of one document each, in powers of two, as good as cut ones?",
    paper=Paper(title="Dataset Decomposition: Faster LLM Training with Variable Sequence Length "
                "Curriculum", authors="Pouransari et al.", year=2024),
    arms={
        "concat": concat,
        "uniform": replace(concat, phases=(replace(pieces, lengths=equal),)),
        "grow_p2": replace(concat, phases=(replace(pieces, lengths=growing),)),
    },
    peak_lrs=base.RATES,
    quick=base.quick({"model.vocab": 258}, keep=("phases.*.seq",)),
    claims=(
        Claim(says="pieces cost no bits: at most 0.02 behind", arm="uniform", below=0.02),
        Claim(says="cycles from short to long are ahead of cut rows", arm="grow_p2", below=0.0),
        Claim(says="and of equal shares at all times", arm="grow_p2", control="uniform",
              below=0.0),
    ),
    seeds=3,
)

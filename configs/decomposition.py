"""Dataset decomposition: rows that are each one piece of one document, in lengths that are powers of two.

Documents are cut into pieces of 512, 256, 128, 64 and 32 positions, the largest first, and a batch holds
pieces of one length: nothing is padded, no attention crosses documents, and short pieces cost less attention
(Pouransari et al. 2024). Three arms with one model and one budget of positions, on the functions and classes
of the standard library:

    concat   documents end to end, cut every 512
    uniform  pieces, each length as often as the corpus has it
    grow_p2  the same shares in each of eight cycles, short ones first (odds 16 : 8 : 4 : 2 : 1,
             until one is used up)

What it costs: a compiled step for each length, five here, and what is left of a document below the shortest
piece, which is never trained on. The paper's minimum of 256 suits web pages. Share of positions dropped, at a
vocabulary of 2,048:

    shortest piece        256     64     32
    functions, classes   23.5 %  7.2 %  3.6 %   (two of three are shorter than 256)
    whole modules         2.0 %  0.5 %  0.3 %

By hand, about three minutes each on two CPU cores:

    python train.py configs/decomposition.py:grow_p2 --phases.0.lengths.cycles 4
"""
from dataclasses import replace
from functools import partial

import numpy as np

from data import DataConfig, InputError, Source, stdlib
from lib.schedule import Schedule
from model import ModelConfig
from train import Config, Phase

LENGTHS = [32, 64, 128, 256, 512]
SHARES = [0.038, 0.065, 0.103, 0.138, 0.656]  # of the positions of the pieces, as measured


def power_of_two(lengths: np.ndarray, seq: int, longest: int = 512) -> np.ndarray:
    """A row for each piece of exactly `seq` positions, a power of two and at most `longest`.

    A document is cut into pieces of `longest` while it lasts and then by the binary digits of what is left,
    the highest first; positions are tokens + 1, as bos is read and eos predicted. Called once for each length
    of a phase, so that a position is in the rows of one length at most.
    """
    lengths = np.asarray(lengths, np.int64)
    if seq & (seq - 1) or not 0 < seq <= longest:
        raise InputError(f"decomposition has rows of {seq}; allowed are powers of two up to {longest}")
    number = lengths // longest if seq == longest else lengths // seq % 2
    document = np.repeat(np.arange(len(lengths)), number)
    place = np.arange(len(document)) - np.repeat(np.cumsum(number) - number, number)
    start = place * seq if seq == longest else lengths[document] // (2 * seq) * (2 * seq)
    one = np.ones_like(document)
    return np.stack([np.arange(len(document)), one, document, start, seq * one, 0 * one], axis=1)


def uniform(progress: float, lengths: list, shares: list) -> dict[int, float]:
    """Each length by its share of the corpus, so that all pieces are seen equally often."""
    return dict(zip(lengths, shares, strict=True))


def grow_p2(progress: float, lengths: list, shares: list, odds: list, cycles: int = 8) -> dict[int, float]:
    """In each cycle every length gets its share, at rates ~ `odds` among those that are not used up.

    At time s of a cycle, min(odds * s, share) of each length has been drawn; s is where these sum to the
    progress within the cycle (the expectation of the paper's draws without replacement).
    """
    odds, shares = np.array(odds, float), np.array(shares, float) / np.sum(shares)
    within, ends = progress * cycles % 1.0, np.sort(shares / odds)
    drawn = np.minimum(odds * ends[:, None], shares).sum(1)  # at each of these times
    ended = np.searchsorted(drawn, within + 1e-9, side="right")
    open_ = shares / odds >= ends[min(ended, len(ends) - 1)]
    return dict(zip(lengths, (odds * open_).tolist(), strict=True))


concat = Phase(steps=600, batch=4, seq=512)
pieces = replace(concat, packing=partial(power_of_two, longest=512))
config = Config(
    model=ModelConfig(layers=4, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, vocab=2048),
    data=DataConfig(sources={"definitions": Source(partial(stdlib, unit="definition"))}),
    phases=(replace(pieces, lengths=partial(
        grow_p2, lengths=LENGTHS, shares=SHARES, odds=[16, 8, 4, 2, 1], cycles=8)),),
    schedule=Schedule(shape="wsd", peak=4e-3, warmup=20, decay=0.4, final=0.05),
    eval_every=100,
    prompts=("def ", "class "),
)
arms = {
    "concat": replace(config, phases=(concat,)),
    "uniform": replace(config, phases=(replace(pieces, lengths=partial(
        uniform, lengths=LENGTHS, shares=SHARES)),)),
    "grow_p2": config,
}

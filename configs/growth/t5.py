"""T5: is an encoder with a decoder ahead of a decoder alone, at equal FLOPs and a lab's size?

Paper: Training a T5 Using Lab-sized Resources, Ciosici & Derczynski 2022 (001:82)
Method: T5's span corruption. 15 % of a text goes, in spans of 3 on average, each behind a mark. A
    bidirectional encoder reads what is left. A decoder, which hears it by cross-attention between
    self-attention and MLP, says the marks and what was behind them.
Here: 4 layers 96 wide on Python's library, in bytes, marks are control characters. prefix_lm: a
    decoder reads both in one row, the text by a prefix mask. t5: that many layers twice, at equal
    FLOPs. half: half as many layers twice, the parameters of prefix_lm but for cross-attention, and
    its FLOPs too, by more steps. These are T5's comparisons (Raffel et al. 2020). Rotary positions
    stand for T5's biases, AdamW for Adafactor, with T5's inverse root of steps. What the paper
    advises on hardware and data loading is left out.
Cost: 9 runs of some 25 seconds, four minutes on two CPU cores.
Run:
    python train.py study configs/growth/t5.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import numpy as np

from configs import base
from lib.seq2seq import paired
from lib.study import Claim, Paper, Study
from train import Config, Phase, Schedule

MARKS = [1, 2, 3, 4, 5, 6, 7, 8]  # ids of control characters, which no text has


def lengths(source: int, share: float = 0.15, mean: float = 3.0) -> tuple[int, int, int]:
    """(text, text behind marks, marks) so that the rest and its marks fill `source` positions."""
    text = source
    while True:
        hidden = round(share * (text + 1))
        marks = max(1, round(hidden / mean))
        if text + 1 - hidden + marks > source:
            break
        text += 1
    hidden = round(share * text)
    return text, hidden, max(1, round(hidden / mean))


def parts(total: int, n: int, rng) -> np.ndarray:
    """[n] Lengths of 1 and more with this sum, all ways alike."""
    cuts = np.sort(rng.choice(total - 1, n - 1, replace=False)) + 1
    return np.diff([0, *cuts, total])


def asked(row: dict, given: list[int], told: list[int], source: int):
    """(row, mask): `given` in the first `source` positions, `told` behind, with loss on all of it
    but its first id, which must be the same in every row."""
    ids, size = np.zeros(len(row["tokens"]) + 1, np.int32), source + len(told)
    ids[:len(given)], ids[source:size] = given, told
    place = np.arange(len(ids) - 1, dtype=np.int32)
    read, said = place < len(given), (place >= source) & (place < size - 1)
    return row | dict(tokens=ids[:-1], targets=ids[1:], positions=place,
                      segments=(read | said).astype(np.int32), prefix=read.astype(np.int32),
                      weights=said.astype(np.float32)), dict(kind="prefix", window=0)


def span_corruption(row: dict, rng, source: int, share: float = 0.15, mean: float = 3.0):
    """T5's objective: a text with spans behind marks, then each mark with what it hides."""
    text, hidden, n = lengths(source, share, mean)
    kept, gone = parts(text - hidden, n, rng), parts(hidden, n, rng)
    ids, given, told, at = row["targets"].tolist(), [], [], 0
    for mark, a, b in zip(MARKS, kept.tolist(), gone.tolist(), strict=False):
        given += [*ids[at:at + a], mark]
        told += [mark, *ids[at + a:at + a + b]]
        at += a + b
    return asked(row, given, [*told, MARKS[n]], source)


def inverse_root(share: float, warm: float = 0.1) -> float:
    """A `Schedule.shape`: the root of warm / share, from a share `warm` of the budget on."""
    return (warm / max(share, warm)) ** 0.5


SOURCE = 96  # positions; so 107 bytes are corrupted, and 22 positions are to be said
phase = Phase(steps=200, batch=16, seq=128, objective=partial(span_corruption, source=SOURCE))
prefix_lm = replace(
    base.small, model=base.shape(4, 96, 258), phases=(phase,), prompts=(), eval_every=50,
    data=replace(base.small.data, tokenizer="bytes", test=0.0),
    schedule=Schedule(shape=inverse_root, peak=8e-3, warmup=20))


def pair(layers: int) -> Config:
    """An encoder-decoder with so many layers in each stack, for the FLOPs of `prefix_lm`."""
    shape = replace(prefix_lm.model, layers=layers, **paired(SOURCE))
    steps = base.steps_for(base.flops(prefix_lm.model, phase), shape, phase)
    return replace(base.scaled(prefix_lm, steps), model=shape)


study = Study(
    question="Is an encoder with a decoder ahead of a decoder alone, at equal FLOPs?",
    paper=Paper(title="Training a T5 Using Lab-sized Resources", authors="Ciosici & Derczynski",
                year=2022, seeds=("001:82",)),
    arms={"prefix_lm": prefix_lm, "t5": pair(4), "half": pair(2)},
    quick=base.quick(keep=("phases.*.seq",)),
    claims=(
        Claim(says="an encoder and a decoder beat a decoder of equal FLOPs", arm="t5",
              measure="eval/stdlib/own", below=0.0),
        Claim(says="so do they at its parameters", arm="half", measure="eval/stdlib/own",
              below=0.0),
        Claim(says="two whole stacks beat two halves, at equal FLOPs", arm="t5", control="half",
              measure="eval/stdlib/own", below=0.0),
    ),
    seeds=3,
)

"""Infinite schedule: can one learning rate serve texts that come in turn, with no known end?

Paper: Beyond Cosine Decay: On the effectiveness of Infinite Learning Rate Schedule for Continual
    Pre-training, Singh et al. 2025 (000:39)
Method: warm up to the peak, cool along a cosine to a constant rate, keep that for as long as text
    comes, and anneal exponentially to the least rate before the model is used. There is nothing to
    warm up again, so a change of text costs less of what is known. Repeated cosines are the rule
    that it is compared to: each text has its own warm-up and decay.
Here: three texts in turn: functions and classes of Python's library, then twice the same in another
    alphabet. cosine: a warm-up and a decay for each text. infinite: one schedule over all three, by
    `Schedule.shape`; the constant is half of the sum of peak and least rate, as in Ibrahim et al.,
    and a fifth of the last text anneals. Both too with a quarter of the rows from texts before
    (`_replay`), for which the paper says the same. "first" and "last" are bits per byte on test of
    the first and the last text; the figure of all is their mean over the three texts.
Cost: four arms, 12 runs of half a minute, four minutes on two CPU cores.
Run:
    python train.py study configs/continual/infinite.py --jobs 2
"""
import math
from dataclasses import replace
from functools import partial

from configs import base as shared
from configs.continual.rewarm import base, cosine, first
from configs.forgetting.active_forgetting import permuted
from data import Source, stdlib
from lib.study import Claim, Paper, Study
from train import Config, Schedule


def infinite(share: float, warm: float, cooled: float, annealed: float, constant: float,
             least: float) -> float:
    """The rate, as a share of the peak, after a share of the budget; Singh et al. 2025, section 3.

    Cosine from 1 at `warm` to `constant` at `cooled`, which stays until `annealed`; from there
    exponentially to `least` at 1. The schedule's own warm-up is to end at `warm`.
    """
    if share < cooled:
        through = max(0.0, share - warm) / (cooled - warm)
        return constant + (1 - constant) * 0.5 * (1 + math.cos(math.pi * through))
    if share < annealed:
        return constant
    return constant * (least / constant) ** ((share - annealed) / (1 - annealed))


TEXTS, STEPS, WARM = ("a", "b", "c"), 120, 12
TOTAL = STEPS * len(TEXTS)
sources = {"a": Source(partial(stdlib, unit="definition")), "b": Source(partial(permuted, seed=0)),
           "c": Source(partial(permuted, seed=1))}
again = replace(cosine, warmup=WARM)
once = Schedule(peak=cosine.peak, warmup=WARM, shape=partial(
    infinite, warm=WARM / TOTAL, cooled=STEPS / 2 / TOTAL, annealed=1 - STEPS / 5 / TOTAL,
    constant=(1 + cosine.final) / 2, least=cosine.final))


def in_turn(own: Schedule | None, replay: float) -> Config:
    """The texts in turn, each with a schedule of its own or with that of the run."""
    phases = []
    for i, text in enumerate(TEXTS):
        before = dict.fromkeys(TEXTS[:i], replay / max(i, 1))
        mixture = before | {text: 1 - sum(before.values())}
        phases.append(replace(first, steps=STEPS, mixture=mixture, schedule=own))
    return replace(base, data=replace(base.data, sources=sources), phases=tuple(phases),
                   schedule=once, eval_every=60)


study = Study(
    question="Can one learning rate serve texts that come in turn, with no known end?",
    paper=Paper(title="Beyond Cosine Decay: On the effectiveness of Infinite Learning Rate Schedule"
                " for Continual Pre-training", authors="Singh et al.", year=2025,
                seeds=("000:39",)),
    arms={"cosine": in_turn(again, 0.0), "infinite": in_turn(None, 0.0),
          "cosine_replay": in_turn(again, 0.25), "infinite_replay": in_turn(None, 0.25)},
    measures={"first": "eval/a.test/bpb", "last": "eval/c.test/bpb"},
    quick=shared.quick(keep=("data.test",)),
    claims=(
        Claim(says="over all texts, an infinite schedule is ahead", arm="infinite", below=0.0),
        Claim(says="with replay too", arm="infinite_replay", control="cosine_replay", below=0.0),
        Claim(says="it keeps more of the first text", arm="infinite", measure="first", below=0.0),
        Claim(says="and is not 0.1 behind on the last", arm="infinite", measure="last", below=0.1),
    ),
    seeds=3,
)

"""Birdie: do objectives learn more in shares that follow the reward of each?

Paper: Birdie: Advancing State Space Models with Reward-Driven Objectives and Curricula,
    Blouin et al. 2024 (001:91)
Method: a mixture of objectives, each announced by a token of its own, whose inputs are seen from
    both sides: prefix, infilling, deshuffling, copying, copying a span by its first tokens, and the
    next token. Every so many steps the shares are an action. Its reward is a sum over objectives of
    clamp(100 e tanh(sqrt(new old) e (1 - new / old)^3), -1, 1), by their dev losses before and
    after. A model of rewards chooses the next action among random ones: the mean of the best 8.
Here: a Transformer on Python's library in bytes, nine decisions. The model of rewards is ridge
    regression on the shares, where the paper has a gated network. uniform: equal shares. causal:
    the next token alone. `mean` is over the objectives' own dev losses in nats a predicted byte.
    Left out: state-space models, and tasks such as a phone book.
Cost: 9 runs of half a minute, 5 minutes on two CPU cores.
Run:
    python train.py study configs/objectives/birdie.py --jobs 2
"""
import math
from dataclasses import replace
from functools import partial

import numpy as np

from configs import base
from configs.objectives.codegen2 import PREFIX, SENTINELS, asked, infill, prefix
from data import Source, causal, stdlib
from lib.study import Claim, Paper, Study


def deshuffle(row, rng, tokenizer, length: int = 8):
    """Half a row in pieces out of order; the answer is that half as it was."""
    ids = row["targets"].tolist()[:len(row["targets"]) // 2]
    pieces = [ids[i:i + length] for i in range(0, len(ids), length)]
    mixed = sum((pieces[i] for i in rng.permutation(len(pieces))), [])
    return asked(row, tokenizer, "deshuffle", mixed, ids)


def copy(row, rng, tokenizer):
    """Half a row, and again."""
    ids = row["targets"].tolist()[:len(row["targets"]) // 2]
    return asked(row, tokenizer, "copy", ids, ids)


def find(row, rng, tokenizer, length: int = 16, key: int = 4):
    """The first tokens of a span, and a text that holds it; the answer is the rest of the span."""
    ids = row["targets"].tolist()[:len(row["targets"]) - length - 1]
    at = int(rng.integers(0, len(ids) - length + 1))
    span, (mark, *_) = ids[at:at + length], tokenizer.encode(SENTINELS[0])
    return asked(row, tokenizer, "find", [*span[:key], mark, *ids], span[key:])


OBJECTIVES = {"causal": causal, "prefix": prefix, "infill": infill, "deshuffle": deshuffle,
              "copy": copy, "find": find}
for objective in (deshuffle, copy, find):
    objective.masks = (PREFIX,)


def reward(old: float, new: float) -> float:
    """Of a dev loss that was `old` and is `new`: from -1 to 1, positive if it fell."""
    fell = (1 - new / old)**3
    return min(1.0, max(-1.0, 100 * math.e * math.tanh(math.sqrt(new * old) * fell * math.e)))


def action(number: int, taken: np.ndarray, rewards: np.ndarray, best: int = 8) -> np.ndarray:
    """The next shares [n], by ridge regression of rewards [m] on the shares taken [m n]."""
    n = taken.shape[1]
    drawn = np.random.default_rng([n, number]).dirichlet(np.ones(n), 256)
    if not len(rewards):
        return drawn[0]
    centre = rewards.mean()
    slope = np.linalg.solve(taken.T @ taken + 0.1 * np.eye(n), taken.T @ (rewards - centre))
    return drawn[np.argsort(-(drawn @ slope), kind="stable")[:best]].mean(0)


def birdie(progress: float, log: list, names: list, floor: float = 0.1) -> dict[str, float]:
    """A mixture: equal shares until the first evaluation, then one action after each."""
    losses = [[row[f"eval/{name}/own"] for name in names] for row in log]
    shares, taken, rewards = np.full(len(names), 1 / len(names)), [], []
    for number in range(len(log)):
        if number:
            each = map(reward, losses[number - 1], losses[number])
            taken, rewards = [*taken, shares], [*rewards, sum(each)]
        made = action(number, np.reshape(taken, (-1, len(names))), np.array(rewards))
        shares = (1 - floor) * made + floor / len(names)
    return dict(zip(names, shares.tolist(), strict=True))


def mean(rows: list[dict]) -> float:
    """The mean over objectives of their own dev losses, in the end."""
    last = [row for row in rows if "eval/copy/own" in row][-1]
    return float(np.mean([last[f"eval/{name}/own"] for name in OBJECTIVES]))


NAMES = list(OBJECTIVES)
(phase,) = base.small.phases
phase = replace(phase, steps=320, objective=OBJECTIVES, mixture=dict.fromkeys(NAMES, 1.0))
uniform = replace(
    base.small, model=base.shape(3, 96, 0), phases=(phase,), prompts=(), eval_every=32,
    eval_tokens=4_096, data=replace(base.small.data, tokenizer="bytes", test=0.0, sources={
        name: Source(stdlib) for name in NAMES}))
mixtures = {"causal": replace(phase, mixture={"causal": 1.0}), "uniform": phase,
            "birdie": replace(phase, mixture=partial(birdie, names=NAMES), steer=32)}
study = Study(
    question="Do objectives learn more in shares that follow the reward of each?",
    paper=Paper(title="Birdie: Advancing State Space Models with Reward-Driven Objectives and "
                "Curricula", authors="Blouin et al.", year=2024, seeds=("001:91",)),
    arms={name: replace(uniform, phases=(own,)) for name, own in mixtures.items()},
    control="uniform",
    measures={"mean": mean},
    quick=base.quick({"phases.*.steps": 70, "eval_tokens": 500}, keep=("eval_every",)),
    claims=(
        Claim(says="objectives that are not trained are not learned", arm="causal", measure="mean",
              above=0.2),
        Claim(says="shares by reward beat equal ones", arm="birdie", measure="mean", below=0.0),
        Claim(says="and cost the next token nothing", arm="birdie", measure="eval/causal/own",
              below=0.0),
    ), seeds=3)

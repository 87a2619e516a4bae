"""PassUntil: is a skill that small models seem to lack there, and can its growth be foretold?

Paper: Unlock Predictable Scaling from Emergent Abilities, Hu et al. 2024 (003:44)
Method: what greedy decoding never gets right may come out right once in a thousand samples. Sample
    until r of them pass; the probability is then r over the number drawn (PassUntil). Of small
    models it is not zero, and over sizes N it follows a law, log PU = -c N^-a, which is fitted to
    small ones and read off at a large one.
Here: a walk of three steps through 64 states by a made-up table, which is more than small ones of
    five widths can hold. Right answers are one text, so the true probability is known too: `exact`
    is the mean of exp(-nats) over new items, 3e-5 for who goes by the last state alone.
    `pass_until` is the estimate from samples at temperature 1, of which 2 are to pass among 192 at
    most; r / n is too high on average, here by 14 % or more. `greedy` is the share right greedily.
    The law is fitted by `exact` to four sizes; the conclusion is by what share the largest's log
    misses it, and how much more greedy's, none and all half an item. Three seeds decide neither.
Cost: five arms, 15 runs of half a minute, four minutes on two CPU cores.
Run:
    python train.py study configs/understanding/pass_until.py --jobs 2
"""
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from configs import base as shared
from data import DataConfig, Document, Source
from lib.study import Claim, Paper, Study
from lib.tasks import judged

STATES, STEPS = 64, 3  # of the table, of a walk
TABLE = np.random.default_rng(7).integers(STATES, size=(STATES, STATES))


def item(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """(a walk's inputs and first state; the next ones, TABLE[state, input] each) as ids."""
    inputs = rng.integers(STATES, size=STEPS).tolist()
    walk = [int(rng.integers(STATES))]
    for given in inputs:
        walk.append(int(TABLE[walk[-1], given]))
    return [*(STATES + given for given in inputs), walk[0]], walk[1:]


def walks(count: int = 20_000) -> Iterator[Document]:
    """Walks, a document each; the inputs and the first state carry no loss."""
    rng = np.random.default_rng(0)
    for number in range(count):
        before, after = (" ".join(map(str, ids)) for ids in item(rng))
        yield Document(f"walk/{number}", after, prefix=before)


def pass_until(passed: np.ndarray, r: int) -> np.ndarray:
    """Of items: r over the samples that r passes took, or passes over samples if they were fewer.

    passed: whether each sample of an item passes, bool [items, samples], in order.
    """
    total = np.cumsum(passed, 1)
    taken = np.argmax(total == r, 1) + 1
    return np.where(total[:, -1] < r, total[:, -1] / passed.shape[1], r / taken)


def skill(params, apply, tokenizer, config, generate, count=256, sampled=32, r=2, rounds=6):
    """An `evals`: `exact` and `greedy` of `count` new items, `pass_until` of the first `sampled`.

    Each round draws 32 samples an item. `known` is `exact` of those that are sampled.
    """
    rng = np.random.default_rng(1)
    items = [item(rng) for _ in range(count)]
    pairs = [([tokenizer.bos, *ask], answer) for ask, answer in items]
    nats, greedy = judged(params, apply, tokenizer, pairs, config.phases[-1].seq)
    prompts, right = zip(*[pair for pair in pairs[:sampled] for _ in range(32)], strict=True)
    right, passed = [tokenizer.decode(answer) for answer in right], []
    for i in range(rounds):
        texts = generate(prompts, tokens=STEPS, temperature=1.0, seed=i * len(prompts))
        passed.append(np.reshape(np.array(texts) == np.array(right), (sampled, 32)))
    p = np.exp(-nats)
    return {"own/exact": float(p.mean()), "own/known": float(p[:sampled].mean()),
            "own/pass_until": float(pass_until(np.concatenate(passed, 1), r).mean()),
            "own/greedy": float(greedy.mean())}


def law(sizes, values) -> tuple[float, float]:
    """(a, c) of log value = -c size^-a, by least squares of log(-log value) on log size."""
    slope, constant = np.polyfit(np.log(sizes), np.log(-np.log(values)), 1)
    return -slope, float(np.exp(constant))


def foretold(figures: dict) -> dict[str, float]:
    """By what share the largest's log misses the law of the others; how much more greedy's."""
    sizes = [own["model/params"].mean() for own in figures.values()]
    missed = {}
    for measure in ("exact", "greedy"):
        half = {"exact": 0, "greedy": 1 / 512}[measure]
        values = np.clip([own[measure].mean() for own in figures.values()], half, 1 - half)
        a, c = law(sizes[:-1], values[:-1])
        missed[measure] = abs(-c * sizes[-1] ** -a / np.log(values[-1]) - 1)
    return {"missed": missed["exact"], "greedy": missed["greedy"] - missed["exact"]}


one = replace(
    shared.small, data=DataConfig(sources={"walks": Source(walks, split="train")},
                                  tokenizer=f"numbers:{2 * STATES}", dev=0.0, test=0.0),
    phases=(replace(shared.small.phases[0], steps=800, batch=32, seq=64),), evals=(skill,),
    eval_every=10_000, prompts=("0",), sample_tokens=STEPS)
study = Study(
    question="Is a skill that small models seem to lack there, and can its growth be foretold?",
    paper=Paper(title="Unlock Predictable Scaling from Emergent Abilities", authors="Hu et al.",
                year=2024, seeds=("003:44",)),
    arms={f"width_{width}": replace(one, model=shared.shape(2, width, 0, 4))
          for width in (8, 12, 16, 20, 24)},
    conclusions={"law": foretold}, seeds=3,
    measures={name: f"own/{name}" for name in ("exact", "known", "pass_until", "greedy")},
    quick=shared.quick(keep=("model.embed", "model.vocab", "data.tokenizer", "data.dev",
                             "data.test")),
    claims=(
        Claim(says="small models foretell the largest's log", measure="law: missed", below=0.1),
        Claim(says="greedy accuracy foretells it less well", measure="law: greedy", above=0.0),
        Claim(says="the smallest does nothing right greedily", arm="width_8", control=None,
              measure="greedy", below=0.02),
        Claim(says="yet it can", arm="width_8", control=None, measure="exact", above=6e-5),
    ),
)

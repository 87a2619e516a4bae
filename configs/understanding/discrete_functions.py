"""Boolean functions in context: which are learnt from examples, and as well as can be?

Paper: Understanding In-Context Learning in Transformers and LLMs by Learning to Learn Discrete
    Functions, Bhattamishra et al. 2024 (001:141)
Method: rows x1 y1 .. xK yK of a Boolean function, bits and labels as ±1. Transformers learn
    conjunctions, disjunctions and majorities in context, sparse parities not; models without
    attention do nearly as well on the simple ones. The other half is in teaching_sequences.py.
Here: 8 bits and 16 examples (theirs: 28 and 70), of one function of two bits, either of them
    negated, of the parity of two, or the majority of three. Of two inputs one with the rarer label
    is taken, if one is rarer. accuracy: of the last label; 0.58 without examples (majority 0.71,
    parity 0.61). lead: less that of the nearest example's. behind: that of all functions that fit,
    by how often each asks such inputs, which is exact, less it. recurrent: a GRU, no attention.
Cost: 15 runs of 20 to 30 seconds, eight minutes on two CPU cores.
Run:
    python train.py study configs/understanding/discrete_functions.py --jobs 2
"""
from dataclasses import replace
from functools import cache, partial
from itertools import combinations, product

import numpy as np

from configs.points import answers, functions_in, in_context, point_row
from configs.understanding.bursty import recurrent, recurrent_rows
from lib.study import Claim, Paper, Study
from train import Config

BITS, K = 8, 16  # of an input; examples of a row
RARER = {"conjunction": 1.0, "disjunction": -1.0}  # the label of a quarter of the inputs


@cache
def hypotheses(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(weights [m BITS], threshold) of a class: sign(w x - threshold); parities: of a product."""
    found, size = [], 3 if name == "majority" else 2
    signs = list(product((1, -1), repeat=size)) if name in RARER else [(1,) * size]
    for bits, sign in product(combinations(range(BITS), size), signs):
        w = np.zeros(BITS)
        w[list(bits)] = sign
        found.append(w)
    return np.array(found), {"conjunction": 1.0, "disjunction": -1.0}.get(name, 0.0)


def labels(name: str, x) -> np.ndarray:
    """±1 [n m K] of inputs x [n K BITS] under each function of a class."""
    w, threshold = hypotheses(name)
    if name == "parity":
        return np.stack([np.prod(x[..., each != 0], -1) for each in w], 1)
    return np.sign(np.einsum("nkd,md->nmk", x, w) - threshold)


def draw(n: int, name: str, rng, which=None) -> tuple[np.ndarray, np.ndarray]:
    """x [n K BITS], y [n K] of functions `which`; of two inputs a rarer label's is preferred."""
    which = rng.integers(len(hypotheses(name)[0]), size=n) if which is None else which
    pairs = rng.choice([-1.0, 1.0], (n, 2 * K, BITS))
    both = labels(name, pairs)[np.arange(n), which].reshape(n, K, 2)
    rarer = both == RARER.get(name, 0.0)
    x = np.where(rarer[..., 1:] & ~rarer[..., :1], pairs[:, 1::2], pairs[:, ::2])
    return x, labels(name, x)[np.arange(n), which]


def fitting(name: str, x, y) -> np.ndarray:
    """[n K] The mean label under all functions that fit the examples before, as `draw` asks."""
    said, fits = labels(name, x), np.ones((len(x), len(hypotheses(name)[0]), K))
    fits[..., 1:] = np.cumprod(said == y[:, None], 2)[..., :-1]
    asked = np.where(said == RARER.get(name, 0.0), 1.75, 0.75)  # by its share at random
    return np.average(said, 1, fits * asked)


def nearest(x, y) -> np.ndarray:
    """[n] The mean label of the nearest examples to the last."""
    near = np.einsum("nkd,nd->nk", x[:, :-1], x[:, -1])
    best = near == near.max(1, keepdims=True)
    return np.average(y[:, :-1], 1, best)


def examples(row: dict, rng, name: str) -> tuple[dict, dict]:
    """An objective: a fresh row of a function of a class."""
    return point_row(row, *draw(functions_in(row, K), name, rng))


def compare(params, apply, name: str, n: int = 1024) -> dict[str, float]:
    """accuracy, behind and lead, as above; ties count half."""
    x, y = draw(n, name, np.random.default_rng(2))
    said, best = answers(params, apply, x, y), fitting(name, x, y)

    def share(guess, right):
        return float(np.mean(0.5 + 0.5 * np.sign(np.round(guess, 9)) * right))

    own, other, exact = (share(g, y[:, -1]) for g in (said[:, -1], nearest(x, y), best[:, -1]))
    return {"icl/accuracy": own, "icl/behind": exact - own, "icl/lead": own - other}


def arm(name: str, objective=examples, evaluation=compare) -> Config:
    """A class of functions."""
    given = partial(objective, name=name), partial(evaluation, name=name)
    return in_context(*given, BITS + 1, 2 * K)


attention, gru_rows = arm("conjunction"), partial(recurrent_rows, width=BITS + 1)
without = replace(attention.model, forward=recurrent, rows=gru_rows)
SIMPLE = "conjunction", "disjunction", "majority"
study = Study(
    question="Which Boolean functions are learnt from examples in context, and how well?",
    paper=Paper(title="Understanding In-Context Learning in Transformers and LLMs by Learning to "
                "Learn Discrete Functions", authors="Bhattamishra et al.", year=2024,
                seeds=("001:141",)),
    arms={name: arm(name) for name in (*SIMPLE, "parity")} | dict(
        recurrent=replace(attention, model=without)),
    measures={name: f"icl/{name}" for name in ("accuracy", "behind", "lead")},
    quick={"phases.*.steps": 4, "model.embed": 48, "model.mlp": 16, "eval_every": 4},
    claims=(
        *(Claim(says=f"{name}: better than the nearest example", arm=name, control=None,
                measure="lead", above=0.0) for name in SIMPLE),
        Claim(says="nearly exact", arm="conjunction", control=None, measure="behind", below=0.05),
        Claim(says="parity is not", arm="parity", control=None, measure="lead", below=0.0),
        Claim(says="as well without attention", arm="recurrent", measure="accuracy", above=-0.05),
    ),
    seeds=3,
)

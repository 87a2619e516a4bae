"""Teaching sequences: does a model know a function after the few examples that leave no other?

Paper: Understanding In-Context Learning in Transformers and LLMs by Learning to Learn Discrete
    Functions, Bhattamishra et al. 2024 (001:141)
Method: a teaching sequence is a few examples after which one function of the class is possible.
    A transformer that is trained on rows that begin with one answers at once. On other examples it
    does as one that was never taught: it learns two algorithms and tells which is due.
Here: conjunctions as in discrete_functions.py. Two positive examples that differ in all other bits
    leave one of them. half: each row begins so or not, by a coin; taught: all do; plain: none does.
    third: accuracy on the example after these two. third_random: where two random ones stand
    there. last_random: on the last example of such a row. A tie counts half. The exact predictor
    has 1, 0.65 and 0.99 of these. To say no always has 0.56.
Cost: three arms, nine runs of half a minute, five minutes on two CPU cores.
Run:
    python train.py study configs/understanding/teaching_sequences.py --jobs 2
"""
from functools import partial

import numpy as np

from configs.points import answers, functions_in, point_row
from configs.understanding.discrete_functions import K, arm, draw, hypotheses, labels
from lib.study import Claim, Paper, Study

NAME = "conjunction"


def teaching(w, rng) -> np.ndarray:
    """Two inputs [n 2 BITS] for which conjunctions w [n BITS] hold, unlike in all other bits."""
    free = rng.choice([-1.0, 1.0], w.shape)
    return np.stack([np.where(w != 0, w, free), np.where(w != 0, w, -free)], 1)


def taught_rows(n: int, share: float, rng) -> tuple[np.ndarray, np.ndarray]:
    """x [n K BITS] and y [n K], of which a share begins with a teaching sequence."""
    w, _ = hypotheses(NAME)
    which = rng.integers(len(w), size=n)
    x, _ = draw(n, NAME, rng, which)
    mine = rng.random(n) < share
    x[mine, :2] = teaching(w[which], rng)[mine]
    return x, labels(NAME, x)[np.arange(n), which]


def rows(row: dict, rng, name: str, share: float = 0.0) -> tuple[dict, dict]:
    """An objective: a fresh row."""
    return point_row(row, *taught_rows(functions_in(row, K), share, rng))


def compare(params, apply, name: str, n: int = 2048) -> dict[str, float]:
    """third, third_random and last_random, as above."""
    found = {}
    for share, places in {1.0: {"third": 2}, 0.0: {"third_random": 2, "last_random": -1}}.items():
        x, y = taught_rows(n, share, np.random.default_rng(2))
        said = answers(params, apply, x, y)
        for figure, k in places.items():
            found[f"icl/{figure}"] = float(np.mean(0.5 + 0.5 * np.sign(said[:, k]) * y[:, k]))
    return found


def of(share: float):
    """Rows of which a share is taught."""
    return arm(NAME, partial(rows, share=share), compare)


study = Study(
    question="Does a model know a function after the few examples that leave no other?",
    paper=Paper(title="Understanding In-Context Learning in Transformers and LLMs by Learning to "
                "Learn Discrete Functions", authors="Bhattamishra et al.", year=2024,
                seeds=("001:141",)),
    arms={"plain": of(0.0), "taught": of(1.0), "half": of(0.5)},
    measures={name: f"icl/{name}" for name in ("third", "third_random", "last_random")},
    quick={"phases.*.steps": 4, "model.embed": 16, "model.mlp": 16, "eval_every": 4},
    claims=(
        Claim(says="after a teaching sequence it answers", arm="taught", control=None,
              measure="third", above=0.95),
        Claim(says="which it has to be taught to do", arm="taught", measure="third", above=0.05),
        Claim(says="one that sees both kinds answers too", arm="half", control="taught",
              measure="third", above=-0.05),
        Claim(says="and loses nothing on random examples", arm="half", measure="last_random",
              above=-0.05),
    ),
    seeds=3,
)

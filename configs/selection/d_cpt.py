"""D-CPT law: can the loss of a mixture be told from runs of other mixtures?

Paper: D-CPT Law: Domain-specific Continual Pre-Training Scaling Law for Large Language Models,
    Que et al. 2024 (000:67)
Method: go on training a model of N parameters on D tokens, a share r of them from the domain whose
    loss is L, with L = E + A / N^a + B r^n / D^b + C / (r + e)^c. Fit the law on a few mixtures; it
    then gives the share that a domain wants at any size and budget. The general text has a law of
    its own, with 1 - r.
Here: three sizes that have read Python's library for 120 steps go on for as many with a share of
    simplified wiki text. The rest is the library, from its beginning again. Both rates are warmed
    up and stay constant, so that each evaluation is a point. Shares of 0.1, 0.4, 0.6, 0.9 are
    fitted, 0.25 and 0.75 foretold. Against: no dependence on r, and straight lines between
    neighbours. The fit is least squares (the paper: a Huber loss by L-BFGS). L is on dev, in nats
    a token, and N has the embeddings too. The law errs by 0.8 %, lines by 1.0 %, so little is left
    to gain on them. Left out: the law across domains.
Cost: 18 runs of 6 seconds a seed and three that they start from, eight minutes for three seeds.
Run: in the directory of train.py,
    python train.py study configs/selection/d_cpt.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import numpy as np
from scipy.optimize import nnls

from configs import base
from data import DataConfig, Source, stdlib
from lib.laws import least
from lib.readers import jsonl
from lib.study import Claim, Paper, Study
from model import count
from train import Schedule

SIZES = {"s": (1, 32), "m": (2, 64), "l": (3, 96)}  # layers and width
SHARES, UNSEEN = (0.1, 0.4, 0.6, 0.9), (0.25, 0.75)  # of the domain
POINTS = 40, 80, 120  # steps
SOURCES = "wiki", "code"  # the domain, and what the models know


def terms(points: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """What E, A, B and C are multiplied by [n 4]; points [n 3]: N, D, r; exponents: a b n c e."""
    (size, tokens, share), (a, b, n, c, e) = points.T, exponents
    return np.stack([np.ones(len(points)), size**-a, share**n / tokens**b, (share + e) ** -c], 1)


def fit(points: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(exponents a b n c e, E A B C of 0 and more) of the law of least squares; N, D near 1."""
    def left(logs):
        shape = terms(points, np.exp(logs))
        return shape @ nnls(shape, losses)[0] - losses

    starts = [0.3, 0.5, 0.5, 0.3, 0.1], [0.5, 0.3, 0.1, 1.0, 0.5], [1.0, 1.0, 1.0, 0.1, 0.02]
    exponents = np.exp(least(left, np.log(starts), bounds=(np.log(1e-3), np.log(5.0))))
    return exponents, nnls(terms(points, exponents), losses)[0]


def at(rows: list[dict], source: str, step: int) -> float:
    """A measure: the last dev loss of a source up to a step."""
    known = [row for row in rows if f"eval/{source}/loss" in row and row["step"] <= step]
    return known[-1][f"eval/{source}/loss"]


def surface(figures: dict, source: str, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(points [n 3], losses [n]) of a source in the runs that have this share of the domain."""
    own = share if source == SOURCES[0] else 1 - share
    points = [(count(bases[size].model) / 1e5, step / 80, own) for size in SIZES for step in POINTS]
    losses = [figures[f"{size}{share}"][f"{source} at {step}"].mean()
              for size in SIZES for step in POINTS]
    return np.array(points), np.array(losses)


def foretold(figures: dict) -> dict[str, float]:
    """Of the law on unseen shares: R^2 by source, relative error, and less others' errors."""
    found, errors = {}, []
    for source in SOURCES:
        seen = [surface(figures, source, share) for share in SHARES]
        exponents, factors = fit(*map(np.concatenate, zip(*seen, strict=True)))
        a, b, c, d = (losses for _, losses in seen)
        where, true = map(np.concatenate, zip(*(surface(figures, source, share)
                                                for share in UNSEEN), strict=True))
        law = terms(where, exponents) @ factors
        constant = np.tile((a + b + c + d) / 4, 2)
        line = np.concatenate([a + b, c + d]) / 2  # unseen shares are in the middle
        errors.append([np.mean(np.abs(x / true - 1)) for x in (law, constant, line)])
        found[f"R2 {source}"] = 1 - np.sum((law - true) ** 2) / np.sum((true - true.mean()) ** 2)
    law, constant, line = np.mean(errors, 0)
    return found | {"error": law, "less a constant's": law - constant, "less a line's": law - line}


wiki = Source(partial(jsonl, path="../shared/data/leaner/train/wiki.jsonl"))
data = DataConfig(sources={"wiki": wiki, "code": Source(stdlib)}, dev=0.03, test=0.03)
phase = replace(base.small.phases[0], steps=120)
bases = {size: replace(base.small, model=base.shape(*shape, vocab=512), data=data, eval_every=40,
                       schedule=Schedule(shape="constant", peak=4e-3),
                       phases=(replace(phase, mixture={"code": 1.0}),))
         for size, shape in SIZES.items()}
arms = {f"{size}{r}": replace(known, init_from=f"needs:base_{size}",
                              phases=(replace(phase, mixture={"wiki": r, "code": 1 - r}),))
        for size, known in bases.items() for r in sorted((*SHARES, *UNSEEN))}
study = Study(
    question="Can the loss of a mixture be told from runs of other mixtures?",
    paper=Paper(title="D-CPT Law: Domain-specific Continual Pre-Training Scaling Law for Large "
                "Language Models", authors="Que et al.", year=2024, seeds=("000:67",)),
    needs={f"base_{size}": known for size, known in bases.items()},
    arms=arms,
    control="m0.4",
    quick=base.quick({"eval_tokens": 500}),
    measures={f"{source} at {step}": partial(at, source=source, step=step)
              for source in SOURCES for step in POINTS},
    conclusions={"unseen shares": foretold},
    claims=(
        Claim(says="the domain's law holds", measure="unseen shares: R2 wiki", above=0.95),
        Claim(says="so does that of the general text", measure="unseen shares: R2 code",
              above=0.95),
        Claim(says="the laws beat no dependence on the share",
              measure="unseen shares: less a constant's", below=0.0),
        Claim(says="they beat straight lines", measure="unseen shares: less a line's", below=0.0),
    ),
    seeds=3,
)

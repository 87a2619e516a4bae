"""Skill-it: does a graph of which skill helps which, estimated from runs, steer a mixture better?

Paper: Skill-it! A Data-Driven Skills Framework for Understanding and Training Language Models,
    Chen et al. 2023 (000:11, 001:37)
Method: what is still hard comes more often, and so does what helps that, by windowed multiplicative
    weights on dev losses and a graph A: A[i, j] is what training on skill i does for skill j,
    estimated from short runs on one skill each.
Here: sums of two digits; skills are to give the last digit of a sum, its carry, or both. The paper
    adds longer numbers, whose digits so short runs leave at chance. All runs go on from a base that
    knows the form. A[i, j] is how far j's dev loss falls on i alone, over how far on j alone, from
    0.1 to 1, else 0 (the paper has pairs too). No edge is left: one skill alone unlearns the form
    of the others. So the runs of estimated are those of identity, at a higher cost.
Cost: 21 runs of 10 to 20 seconds, four minutes on two CPU cores.
Run:
    python train.py study configs/selection/skill_it.py --jobs 2
"""
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from configs import base
from data import DataConfig, Document, Source
from lib.packing import one_per_row
from lib.study import Claim, Paper, Study

NAMES = ["last", "carry", "both"]


def sums(skill: int, documents: int = 20_000, seed: int = 0) -> Iterator[Document]:
    """Documents "4+9 last ", read without loss, and "3": what a skill of NAMES gives of the sum."""
    rng = np.random.default_rng([seed, skill])
    for i, (a, b) in enumerate(rng.integers(0, 10, (documents, 2)).tolist()):
        both = f"{a + b:02d}"
        answer = (both[1], both[0], both)[skill]
        yield Document(f"{skill}/{i}", answer, prefix=f"{a}+{b} {NAMES[skill]} ")


def graph_of(falls: np.ndarray, weak: float = 0.1) -> np.ndarray:
    """A [k k] of falls[i, j], by how much training on i alone lowers j's loss."""
    edges = falls / np.maximum(np.diag(falls), 1e-9)
    edges = np.where(edges < weak, 0, np.minimum(edges, 1))
    return np.maximum(edges, np.eye(len(falls)))


@lru_cache(8)
def falls_of(runs: tuple[str, ...], names: tuple[str, ...]) -> np.ndarray:
    """[k k] By how much each run, on one name alone, lowers each name's dev loss, first to last."""
    found = []
    for run in runs:
        lines = (Path(run).expanduser() / "metrics.jsonl").read_text("utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if f"eval/{names[0]}/loss" in row]
        found.append([rows[0][f"eval/{n}/loss"] - rows[-1][f"eval/{n}/loss"] for n in names])
    return np.array(found)


def steered(progress: float, log: list, names: list, graph: list | None = None, eta: float = 0.1,
            window: int = 3, halved: bool = True) -> dict[str, float]:
    """Shares ~ exp(eta A L): L sums the last `window` dev losses of each name; ones at first.

    A is the graph: A[i, j] is what learning i does for j. None is the identity. No memory beyond
    the window. halved: so are its 1s off the diagonal, as in Skill-it's code, all 0s and 1s.
    """
    A = np.eye(len(names)) if graph is None else np.array(graph, float)
    A = np.where(halved & (A == 1) & ~np.eye(len(A), dtype=bool), 0.5, A)
    losses = [[row[name] for name in names] for row in log[-window:]] or [[1.0] * len(names)]
    power = eta * A @ np.array(losses).sum(0)
    return dict(zip(names, np.exp(power - power.max()).tolist(), strict=True))


def estimated(progress: float, log: list, names: list, runs: list, eta: float = 0.1) -> dict:
    """`steered` by the graph of short runs, one on each name alone."""
    return steered(progress, log, names, graph_of(falls_of((*runs,), (*names,))), eta, halved=False)


def mean_loss(rows: list[dict]) -> float:
    """A measure: nats a token on the skills' test splits."""
    return float(np.mean([rows[-1][f"eval/{name}.test/loss"] for name in NAMES]))


phase = replace(base.small.phases[0], steps=60, batch=128, seq=16, packing=one_per_row)
known = replace(
    base.small,
    model=base.shape(2, 64, 0),
    data=DataConfig(sources={n: Source(partial(sums, skill=i)) for i, n in enumerate(NAMES)},
                    tokenizer="bytes", dev=0.02, test=0.05),
    phases=(replace(phase, mixture=dict.fromkeys(NAMES, 1.0)),),
    eval_every=50, eval_at=(0,), overlap=0, eval_tokens=4_096, prompts=("4+9 both ",))


def on(steps: int, mixture, steer: int = 0):
    """A run that goes on from the base."""
    own = replace(phase, steps=steps, mixture=mixture, steer=steer)
    return replace(known, init_from="needs:known", phases=(own,))


rule = partial(steered, names=NAMES, eta=0.3)
helps = partial(estimated, names=NAMES, eta=0.3, runs=[f"needs:only_{name}" for name in NAMES])
study = Study(
    question="Does a graph of which skill helps which, estimated from runs, steer a mixture?",
    paper=Paper(title="Skill-it! A Data-Driven Skills Framework for Understanding and Training "
                "Language Models", authors="Chen et al.", year=2023, seeds=("000:11", "001:37")),
    needs={"known": known} | {f"only_{name}": on(200, {name: 1.0}) for name in NAMES},
    arms={
        "uniform": on(400, dict.fromkeys(NAMES, 1.0)),
        "identity": on(400, rule, 50),
        "estimated": on(400, helps, 50),
    },
    measures={"loss": mean_loss},
    quick=base.quick({"phases.*.steps": 110}, keep=("phases.*.seq", "overlap", "eval_every")),
    claims=(
        Claim(says="a graph beats equal shares", arm="estimated", below=0.0, measure="loss"),
        Claim(says="and no graph", arm="estimated", control="identity", below=0.0, measure="loss"),
        Claim(says="no graph beats equal shares", arm="identity", below=0.0, measure="loss"),
    ),
    seeds=3,
)

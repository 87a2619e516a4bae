"""Packages: of which package of Python's library is a piece of code? A task for encoders.

Paper: none. bidirectional.py, lexicon_masking.py and drbert.py compare their encoders by it.
Method: a row of functions and classes is seen from both sides; at the first position of each the
    model tells its package, as the piece of the package's number.
Here: eight packages of some hundred definitions each, a fifth of their modules held out; 60 steps
    of 8 rows, so that an encoder which knows the code already could be ahead. Pre-training
    never asks for these pieces, and no encoder recorded so far is better than chance, ln 8 nats.
Cost: 60 steps, 10 seconds on two CPU cores.
Run:
    python train.py configs/objectives/packages.py
"""
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np

from configs import base
from data import DataConfig, Document, Skipped, Source, stdlib
from lib.objectives import BIDIRECTIONAL
from lib.sources import definitions
from model import weighted_mean
from train import Phase, Schedule

PACKAGES = ("asyncio", "distutils", "email", "importlib", "multiprocessing", "tkinter", "unittest",
            "xml")


def package(name: str) -> Iterator[Document | Skipped]:
    """The functions and classes of a package."""
    for module in stdlib():
        if isinstance(module, Document) and module.meta["domain"] == name:
            yield from definitions(module)


def name_source(row: dict, rng: np.random.Generator) -> tuple[dict, dict]:
    """An objective: tell the source of a segment at its first position, seen from both sides.

    The target is the piece with the number of the source. Inputs are the row's targets.
    """
    first = (row["positions"] == 0) & (row["segments"] > 0)
    changed = {
        "tokens": row["targets"],
        "targets": row["source"],
        "weights": first.astype(np.float32),
    }
    return row | changed, BIDIRECTIONAL


name_source.masks = (BIDIRECTIONAL,)


def sure(losses, batch):
    """A `reduce`: the weighted mean, and how often a target has over half of the probability."""
    ends, _ = weighted_mean(losses, batch)
    right = jnp.sum((losses < jnp.log(2.0)) * batch["weights"])
    return ends, {"sure": right / jnp.maximum(ends[1], 1)}


def over_sources(rows: list[dict], metric: str) -> float:
    """A measure of a study: the mean over packages of eval/SOURCE/METRIC, as last measured."""
    last = [row for row in rows if f"eval/{PACKAGES[0]}/{metric}" in row][-1]
    return float(np.mean([last[f"eval/{name}/{metric}"] for name in PACKAGES]))


MEASURES = {name: partial(over_sources, metric=metric)
            for name, metric in (("nats", "own"), ("sure", "sure"))}
rate = Schedule(shape="wsd", peak=8e-3, warmup=20, decay=0.4, final=0.05)
pre = Phase(steps=300, batch=8, seq=128, schedule=rate)  # what comes before the task
fine = replace(pre, steps=60, objective=name_source, reduce=sure,
               schedule=replace(rate, peak=2e-3, warmup=5))
sources = {name: Source(partial(package, name=name)) for name in PACKAGES}
config = replace(base.small, model=base.shape(3, 96), phases=(fine,), eval_every=400, prompts=(),
                 data=DataConfig(sources=sources, dev=0.2, test=0.0))

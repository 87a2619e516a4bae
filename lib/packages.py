"""A task for encoders: of which package of Python's library is a piece of code?"""
from collections.abc import Iterator
from functools import partial

import jax.numpy as jnp
import numpy as np

from data import Document, Skipped, Source, stdlib
from lib.objectives import BIDIRECTIONAL
from model import weighted_mean

PACKAGES = (
    "asyncio",
    "distutils",
    "email",
    "importlib",
    "multiprocessing",
    "tkinter",
    "unittest",
    "xml",
)


def package(name: str) -> Iterator[Document | Skipped]:
    """The functions and classes of a package."""
    for document in stdlib("definition"):
        if isinstance(document, Document) and document.meta["domain"] == name:
            yield document


def sources() -> dict[str, Source]:
    """A source for each package."""
    return {name: Source(partial(package, name=name)) for name in PACKAGES}


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

"""Prose: which bytes of code are in its comments and strings? A task for encoders.

Paper: none. bidirectional.py, lexicon_masking.py, drbert.py and structural.py compare their
    encoders by it.
Method: an encoder tells of each byte whether it is prose, a part of a comment or a string, or code.
    Python's own tokenizer says which; it needs the whole definition, a row has 128 bytes.
Here: the functions and classes of eight packages of Python's library, a fifth of their modules held
    out; 200 steps of 16 rows. The answer is a piece, byte 1 or 0, which the text never has. To say
    how much is prose at all costs some 0.68 nats and is right for three fifths of the bytes.
    Without training before, two seeds of three learn no more than that in time. The third ends at
    0.29 nats. After 300 steps of masked bytes all seeds learn more, and end between 0.2 and 0.42
    nats. One encoder's seeds are up to 0.2 apart, so three tell few encoders from each other.
Cost: 200 steps, 15 seconds on two CPU cores.
Run:
    python train.py configs/objectives/prose.py
"""
import io
import token
import tokenize
from collections.abc import Iterator
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from configs import base
from data import DataConfig, Document, Skipped, Source, stdlib
from lib.objectives import BIDIRECTIONAL
from lib.sources import definitions
from model import weighted_mean
from train import Phase, Schedule

PACKAGES = {"asyncio", "distutils", "email", "importlib", "multiprocessing", "tkinter", "unittest",
            "xml"}
PROSE = "COMMENT", "STRING", "FSTRING"  # so names of its tokens begin


def prose(code: str) -> tuple[tuple[int, int], ...]:
    """(start, end) of each comment and string of code, in characters."""
    starts = [0]
    for line in io.StringIO(code, newline=""):
        starts.append(starts[-1] + len(line))
    found = []
    for part in tokenize.generate_tokens(io.StringIO(code, newline="").readline):
        if token.tok_name[part.type].startswith(PROSE):
            (line, column), (last, end) = part.start, part.end
            found.append((starts[line - 1] + column, starts[last - 1] + end))
    return tuple(found)


def code() -> Iterator[Document | Skipped]:
    """The functions and classes of the packages, prose marked."""
    for module in stdlib():
        if isinstance(module, Document) and module.meta["domain"] in PACKAGES:
            for part in definitions(module):
                if isinstance(part, Document):
                    part = replace(part, marks=prose(part.text))
                yield part


def tell_prose(row: dict, rng: np.random.Generator) -> tuple[dict, dict]:
    """An objective: tell of each position whether it is marked. Inputs are the row's targets."""
    changed = {
        "tokens": row["targets"],
        "targets": (row["marks"] > 0).astype(np.int32),
    }
    return row | changed, BIDIRECTIONAL


tell_prose.masks = (BIDIRECTIONAL,)


def right(losses, batch):
    """A `reduce`: the weighted mean, and how often a target has over half of the probability."""
    ends, _ = weighted_mean(losses, batch)
    known = jnp.sum((losses < jnp.log(2.0)) * batch["weights"])
    return ends, {"right": known / jnp.maximum(ends[1], 1)}


def nats(rows: list[dict]) -> float:
    """A measure of a study: nats a byte of the task, as last measured."""
    return [row["eval/code/own"] for row in rows if "eval/code/right" in row][-1]


def share(rows: list[dict]) -> float:
    """A measure of a study: the share of bytes that are told rightly, as last measured."""
    return [row["eval/code/right"] for row in rows if "eval/code/right" in row][-1]


MEASURES = {"nats": nats, "right": share}
rate = Schedule(shape="wsd", peak=8e-3, warmup=20, decay=0.4, final=0.05)
pre = Phase(steps=300, batch=16, seq=128, schedule=rate)  # what comes before the task
fine = replace(pre, steps=200, objective=tell_prose, reduce=right)
config = replace(base.small, model=base.shape(3, 96, vocab=258), phases=(fine,), eval_every=1000,
                 prompts=(),
                 data=DataConfig(sources={"code": Source(code, marks=True)}, tokenizer="bytes",
                                 dev=0.2, test=0.0))

"""MeCo: does it pay to tell a model where a text comes from, if it must do without in the end?

Paper: Metadata Conditioning Accelerates Language Model Pre-training, Gao et al. 2025 (000:15)
Method: for 90 % of the steps each document begins with "URL: <domain>", read and not predicted; the
    last 10 % are plain (the cooldown). In the paper this is as good as plain training on half as
    much again; loss moves little, the gain is on tasks; without the cooldown it is worse.
Here: Python's library, the domain being the top-level package, with one budget of positions. plain:
    documents as they are. metadata: all with the prefix. metadata_then_plain: MeCo. Two sources
    hold the same documents: `eval/plain` is without the prefix, the figure to compare, and
    `eval/told` with it. A weak case: a third of the modules are alone in their package, so their
    metadata say nothing. The prefix takes its positions of the budget. The rate goes on where it
    was at the switch. For `Source.prepare` of other sources there are `in_front`; `tagged`,
    metadata inside the text and predicted; `shuffled_units`.
Cost: some 20 runs of 200 steps, each under half a minute: some six minutes on two CPU cores.
Run:
    python train.py study configs/context/meco.py --jobs 2
    python train.py configs/context/meco.py:metadata --data.sources.told.documents.template "{module}: "
"""
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from configs import base
from data import Document, InputError, Skipped, Source, stdlib
from lib.study import Claim, Paper, Study

UNITS = dict(line=r"(?<=\n)", sentence=r"(?<=[.!?])(?=\s)")  # where one ends


def fill(template: str, document: Document) -> str:
    """The template with the document's metadata in it; what is missing is empty."""
    return template.format_map(defaultdict(str, document.meta, path=document.path))


def in_front(document: Document, rng: np.random.Generator | None, template: str) -> Document:
    """A template of metadata before the text, without a loss on it."""
    return replace(document, prefix=fill(template, document))


def told(template: str) -> Iterator[Document | Skipped]:
    """`data.stdlib` with a template in front of all documents, held-out ones too."""
    for document in stdlib():
        yield in_front(document, None, template) if isinstance(document, Document) else document


def tagged(document: Document, rng: np.random.Generator, before: str, after: str = "") -> Document:
    """Templates of metadata around the text, as part of it: predicted too."""
    return replace(document, text=fill(before, document) + document.text + fill(after, document))


def shuffled_units(document: Document, rng: np.random.Generator, unit: str = "line",
                   copies: int = 2) -> list[Document]:
    """The document, and copies - 1 times its lines or sentences in a random order, whole."""
    if unit not in UNITS:
        raise InputError(f"shuffled_units has no unit {unit!r}; allowed are {', '.join(UNITS)}")
    units = [u for u in re.split(UNITS[unit], document.text) if u]
    made = [document]
    for i in range(1, copies):
        text = "".join(units[j] for j in rng.permutation(len(units)))
        made.append(replace(document, path=f"{document.path}#{i}", text=text))
    return made


def untold_dev(rows: list[dict]) -> float:
    """Bits per byte on dev without metadata, in the end."""
    return [row["eval/plain/bpb"] for row in rows if "eval/plain/bpb" in row][-1]


STEPS, COOLDOWN = 200, 0.1  # of each arm; the share of them without metadata
plain = replace(base.small.phases[0], steps=STEPS, mixture={"plain": 1.0})
with_metadata = replace(plain, mixture={"told": 1.0})
cooldown = replace(plain, steps=round(COOLDOWN * STEPS))
sources = {"plain": Source(stdlib), "told": Source(partial(told, template="URL: {domain}\n\n"))}
meco = replace(base.small, eval_every=50, data=replace(base.small.data, sources=sources), phases=(
    replace(with_metadata, steps=STEPS - cooldown.steps), cooldown))
untold = partial(Claim, measure="eval/plain.test/bpb")
study = Study(
    question="Does it pay to tell a model where a text comes from, if it must do without later?",
    paper=Paper(title="Metadata Conditioning Accelerates Language Model Pre-training",
                authors="Gao et al.", year=2025, seeds=("000:15",)),
    arms={
        "plain": replace(meco, phases=(plain,)),
        "metadata": replace(meco, phases=(with_metadata,)),
        "metadata_then_plain": meco,
    },
    peak_lrs=base.RATES,
    measures={"untold, on dev": untold_dev},
    tuned_by="untold, on dev",
    quick=base.quick(),
    claims=(
        untold(says="without a cooldown, a model that was always told is behind when it is not",
               arm="metadata", above=0.0),
        untold(says="the cooldown mends this", arm="metadata_then_plain", control="metadata",
               below=0.0),
        untold(says="after the cooldown it is at most 0.02 bits behind plain training",
               arm="metadata_then_plain", below=0.02),
        untold(says="it is ahead of plain training, as published on tasks",
               arm="metadata_then_plain", below=0.0),
        Claim(says="where the metadata are given, a model that was told is ahead",
              arm="metadata", measure="eval/told.test/bpb", below=0.0),
    ),
    seeds=3,
)

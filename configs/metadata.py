"""Metadata: does it pay to tell the model where a text comes from, if it must do without in the end?

Three arms with one model, one corpus and one number of positions:

    plain                documents as they are
    metadata             all training documents begin with "URL: <domain>" (here: the top-level package),
                         which is read and not predicted; the model never saw them without, as it is evaluated
    metadata_then_plain  90 % of the steps like that, the last 10 % plain: the cooldown mends this
                         (MeCo, Gao et al. 2025: as good as plain training on half as much again)

Two sources hold the same documents: `eval/plain/bpb` is without metadata, the figure to compare, and
`eval/told/bpb` with. Loss per token moves little in the paper; its gain is on tasks. A third of the modules
are alone in their package, so their metadata say nothing. What it costs: the prefix takes its positions of
the context and of the budget, the corpus is cached twice and every evaluation reads it twice. The rate goes
on where it was at the switch. By hand, about three minutes each on two CPU cores:

    python train.py configs/metadata.py:metadata_then_plain
    python train.py configs/metadata.py:metadata --data.sources.told.documents.template "{module}: "

For other sources there are functions for `Source.prepare`, which leave held-out documents plain: `in_front`;
`tagged`, metadata inside the text and predicted; `shuffled_units`.
"""
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from data import DataConfig, Document, InputError, Skipped, Source, stdlib
from lib.schedule import Schedule
from model import ModelConfig
from train import Config, Phase


def fill(template: str, document: Document) -> str:
    """The template with the document's metadata in it; what is missing is empty, and the format stays."""
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


UNITS = dict(line=r"(?<=\n)", sentence=r"(?<=[.!?])(?=\s)")  # where one ends


def shuffled_units(document: Document, rng: np.random.Generator, unit: str = "line",
                   copies: int = 2) -> list[Document]:
    """The document, and copies - 1 times its lines or sentences in a random order, every character kept."""
    if unit not in UNITS:
        raise InputError(f"shuffled_units has no unit {unit!r}; allowed are {', '.join(UNITS)}")
    units = [u for u in re.split(UNITS[unit], document.text) if u]
    mixed = ("".join(units[i] for i in rng.permutation(len(units))) for _ in range(copies - 1))
    return [document, *(replace(document, path=f"{document.path}#{i}", text=text)
                        for i, text in enumerate(mixed, 1))]


phase = Phase(steps=540, batch=8, seq=256, mixture={"told": 1.0})
config = Config(
    model=ModelConfig(layers=4, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, vocab=2048),
    data=DataConfig(sources={
        "plain": Source(stdlib),
        "told": Source(partial(told, template="URL: {domain}\n\n"))}),
    phases=(phase, replace(phase, steps=60, mixture={"plain": 1.0})),
    schedule=Schedule(shape="wsd", peak=4e-3, warmup=20, decay=0.4, final=0.05),
    eval_every=100,
    prompts=("def ", "class "),
)
arms = {
    "plain": replace(config, phases=(replace(phase, steps=600, mixture={"plain": 1.0}),)),
    "metadata": replace(config, phases=(replace(phase, steps=600),)),
    "metadata_then_plain": config,
}

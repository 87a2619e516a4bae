"""A sky of two sources, stars and moons. Every id tells the place that it is from."""
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from corpora import Points, points, stars

import data
from data import DataConfig, Source
from lib.cache import Cache, build
from lib.packing import ROW, SEGMENT
from lib.sources import split_of

FIRST_MOON = 0x20000  # ids below are stars


def moons():
    """Forty documents of 1 to 90 code points."""
    return points(FIRST_MOON, 40, 90)


SKY = DataConfig(
    sources={"stars": Source(stars), "moons": Source(moons)},
    dev=0.1,
    test=0.1,
    shard_tokens=1,
    window=2,
)


# ----------------------------------------------------------------------------------- making batches


def phase(**changes) -> SimpleNamespace:
    """A phase as the Loader needs it."""
    plain = dict(
        steps=5_000,
        batch=4,
        seq=32,
        mixture=None,
        lengths=None,
        steer=0,
        order=data.shuffled,
        packing=data.concat_and_split,
        objective=data.causal,
    )
    return SimpleNamespace(**plain | changes)


def rising(progress, losses):
    """A mixture that moves from stars to moons."""
    assert losses == []
    return {"stars": 1 - progress, "moons": progress}


def halves(sizes, seq):
    """A packing of one piece in a row, cut at half a row."""
    plan = data.concat_and_split(sizes, seq // 2)
    plan[:, ROW] = np.arange(len(plan))
    plan[:, SEGMENT] = 1
    return plan


@cache
def caches() -> dict[str, Cache]:
    """The caches of the sky; stars lie in three shards, moons in one."""
    made = {name: build(name, SKY, Points(), 0) for name in SKY.sources}
    assert made["stars"].total["shards"] == 3
    assert made["moons"].total["shards"] == 1
    return made


def loader(*phases, names=("stars", "moons"), seed: int = 0) -> data.Loader:
    """A loader over the sky, or over one of its sources."""
    chosen = {name: caches()[name] for name in names}
    return data.Loader(chosen, phases, SKY, Points(), seed)


def loader_with(sources: dict[str, Source], *phases) -> data.Loader:
    """A loader over sources of the sky that have other settings."""
    config = replace(SKY, sources=sources)
    chosen = {name: caches()[name] for name in sources}
    return data.Loader(chosen, phases, config, Points(), 0)


def rows_of(made: data.Loader, phase: int = 0, source: int = 0) -> data.Rows:
    """The rows of a source in a phase of one row length."""
    return made.rows[phase][0][source]


def drawn(made: data.Loader, steps: int, phase: int = 0) -> np.ndarray:
    """Rows [sources] that a phase of one row length has drawn after so many steps."""
    return made.draws[phase].after(steps)[0]


def first_rows(made: data.Loader, phase: int) -> np.ndarray:
    """The row [sources] that a phase of one row length begins with."""
    return made.draws[phase].first()[0]


# ---------------------------------------------------------------------------------- reading batches


class Place(NamedTuple):
    """Where a code point stands."""

    path: str  # of its document
    before: int  # the token in front of it


def trained_places(documents) -> dict[int, Place]:
    """The place of each code point of the train split."""
    found = {}
    for document in documents():
        if split_of(document.path, SKY.dev, SKY.test) != 0:
            continue
        before = Points.bos
        for char in document.text:
            found[ord(char)] = Place(document.path, before)
            before = ord(char)
    return found


class Piece(NamedTuple):
    """One segment of a row, by the names of the arrays that it is cut from."""

    tokens: list[int]
    targets: list[int]
    positions: list[int]
    source: list[int]
    weights: list[float]


def pieces_of(arrays: dict[str, np.ndarray]):
    """Every segment of a batch's rows, in order."""
    for row, segments in enumerate(arrays["segments"]):
        for number in range(1, segments.max() + 1):
            where = segments == number
            lists = [arrays[name][row, where].tolist() for name in Piece._fields]
            yield Piece(*lists)


def same(one: data.Batch, other: data.Batch):
    """Two batches have the same arrays and the same mask."""
    assert one.mask == other.mask
    assert one.arrays.keys() == other.arrays.keys()
    for name, values in one.arrays.items():
        np.testing.assert_array_equal(values, other.arrays[name], err_msg=name)


def every_so_many(first: int, parts: int):
    """The rows of one of `parts` processes: every so-manieth of a batch."""
    return lambda rows: np.arange(first, rows, parts)


def check_parts(made: data.Loader, step: int, parts: int):
    """Processes that make every so-manieth row alone have the rows and the mask of the whole."""
    whole = made.batch(step)
    for first in range(parts):
        part = made.batch(step, every_so_many(first, parts))
        rows = {name: values[first::parts] for name, values in whole.arrays.items()}
        same(part, whole._replace(arrays=rows))
        assert part.rows == whole.rows

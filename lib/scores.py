"""Scores of documents: what they may be chosen or put in order by."""

import math
import zlib

import numpy as np


def length(document, tokens) -> float:
    """A `Source.score`, where low is easy: tokens."""
    return float(len(tokens))


def compressibility(document, tokens) -> float:
    """A `Source.score`: bytes after zlib, over bytes. What repeats itself is easy."""
    text = document.text.encode("utf-8")
    before = max(1, len(text))
    after = len(zlib.compress(text, 9))
    return after / before


def field(document, tokens, key: str) -> float:
    """A `Source.score`: a number of the metadata; infinitely hard where there is none."""
    value = document.meta.get(key, math.inf)
    return float(value)


def rarity(documents) -> np.ndarray:
    """Mean -log frequency of each document's tokens, counted over the documents [documents].

    documents: the `data.Documents` that a packing is told.
    """
    ids = []
    for number in range(len(documents.shard)):
        own = documents.ids(number)
        ids.append(np.asarray(own, np.int64))
    every = np.concatenate(ids)
    counts = np.bincount(every)
    surprise = np.log(counts.sum() / np.maximum(counts, 1))
    return np.array([surprise[own].mean() for own in ids])

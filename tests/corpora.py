"""Sources that several test files build caches of."""
import itertools
import math
from dataclasses import replace

import numpy as np

from data import DataConfig, Document, Skipped, Source
from lib.cache import build
from lib.tokenizers import Bytes

FAIL = {"after": None}  # documents of `many` after which it fails; no part of a cache's key


def many():
    """Seven hundred short documents: at a shard each 256, three shards."""
    for i in range(700):
        if i == FAIL["after"]:
            raise OSError("the disk is gone")
        text = f"{i} tree" * (1 + i % 5)
        yield Document(f"{i:03d}", text, dict(number=i)) if i % 100 else Skipped(str(i), "odd")


MANY = DataConfig(sources={"many": Source(many)}, tokenizer="bytes", dev=0.1, test=0.1, shard_tokens=1)


def token_count(document, tokens):
    """A `score`: the number of tokens; short documents are left out."""
    return -math.inf if len(tokens) < 10 else len(tokens)


def with_many(**functions):
    """The config of `many` with functions set."""
    return replace(MANY, sources={"many": Source(many, **functions)})


class Points:
    """Code points as ids: with no code point used twice in a source, an id tells its document and place."""

    vocab, bos, eos, model = 2**20, 2**20 - 2, 2**20 - 1, b"points"

    def encode_batch(self, texts):
        return [np.array([ord(c) for c in text]) for text in texts]

    def decode(self, ids):
        return "".join(chr(i) for i in ids)


def points(first, documents, longest):
    """Documents of 1 to `longest` code points, from `first` on, each used once."""
    sizes = np.random.default_rng(first).integers(1, longest + 1, documents).tolist()
    for i, (size, end) in enumerate(zip(sizes, itertools.accumulate(sizes), strict=True)):
        yield Document(f"{first}/{i}", "".join(chr(first + p) for p in range(end - size, end)))


def stars():
    """Six hundred documents of 1 to 12 code points: three shards where a group seals one."""
    return points(0x10000, 600, 12)


def files(directory):
    """{path: bytes} of everything below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def built(documents, **fields):
    """The cache of one source in bytes."""
    return build("x", DataConfig(sources={"x": Source(documents)}, **fields), Bytes(), 0)


def kept(cache):
    """{path: text} of a cache in bytes."""
    return {d["path"]: Bytes().decode(s.tokens[s.offsets[n]:s.offsets[n + 1]])
            for s in map(cache.shard, range(cache.total["shards"])) for n, d in enumerate(s.documents())}


def kinds(counts):
    """{kind: how many} of what is counted as skipped."""
    return {k.removeprefix("skipped: "): n for k, n in counts.items() if k.startswith("skipped")}


def skipped(cache):
    """{kind: how many} of what a cache left out."""
    return kinds(cache.total["counts"])

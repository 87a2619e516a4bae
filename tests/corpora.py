"""Sources that several test files build caches of."""
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from data import DataConfig, Document, Skipped, Source
from lib.cache import Cache, build
from lib.tokenizers import Bytes

FAIL = {"after": None}  # documents of `many` after which it fails; no part of a cache's key


def many():
    """Seven hundred short documents: at a shard each 256, three shards."""
    for i in range(700):
        if i == FAIL["after"]:
            raise OSError("the disk is gone")
        if i % 100 == 0:
            yield Skipped(str(i), "odd")
            continue
        text = f"{i} tree" * (1 + i % 5)
        yield Document(f"{i:03d}", text, {"number": i})


MANY = DataConfig(
    sources={"many": Source(many)},
    tokenizer="bytes",
    dev=0.1,
    test=0.1,
    shard_tokens=1,
)


def documents_of(source) -> list[Document]:
    """The documents that a source gives, without what it skips."""
    return [item for item in source() if isinstance(item, Document)]


def token_count(document, tokens):
    """A `score`: the number of tokens; short documents are left out."""
    if len(tokens) < 10:
        return -math.inf
    return len(tokens)


def with_many(**functions) -> DataConfig:
    """The config of `many` with functions set."""
    return replace(MANY, sources={"many": Source(many, **functions)})


class Points:
    """Code points as ids.

    No code point is used twice in a source, so that an id tells its document and place.
    """

    vocab = 2**20
    bos = 2**20 - 2
    eos = 2**20 - 1
    model = b"points"

    def encode_batch(self, texts):
        return [np.array([ord(char) for char in text]) for text in texts]

    def decode(self, ids):
        return "".join(chr(i) for i in ids)


def points(first: int, documents: int, longest: int) -> Iterator[Document]:
    """Documents of 1 to `longest` code points, from `first` on, each used once."""
    sizes = np.random.default_rng(first).integers(1, longest + 1, documents).tolist()
    ends = itertools.accumulate(sizes)
    for i, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        text = [chr(first + place) for place in range(end - size, end)]
        yield Document(f"{first}/{i}", "".join(text))


def stars():
    """Six hundred documents of 1 to 12 code points: three shards where a group seals one."""
    return points(0x10000, 600, 12)


def files(directory: Path) -> dict[str, bytes]:
    """{path: bytes} of everything below a directory."""
    found = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def built(documents, **fields) -> Cache:
    """The cache of one source in bytes."""
    config = DataConfig(sources={"x": Source(documents)}, **fields)
    return build("x", config, Bytes(), 0)


def kept(cache: Cache) -> dict[str, str]:
    """{path: text} of a cache in bytes."""
    found = {}
    for number in range(cache.total["shards"]):
        shard = cache.shard(number)
        spans = itertools.pairwise(shard.offsets)
        for facts, (start, end) in zip(shard.documents(), spans, strict=True):
            found[facts["path"]] = Bytes().decode(shard.tokens[start:end])
    return found


def kinds(counts: dict[str, int]) -> dict[str, int]:
    """{kind: how many} of what is counted as skipped."""
    found = {}
    for name, number in counts.items():
        if name.startswith("skipped"):
            found[name.removeprefix("skipped: ")] = number
    return found


def skipped(cache: Cache) -> dict[str, int]:
    """{kind: how many} of what a cache left out."""
    return kinds(cache.total["counts"])

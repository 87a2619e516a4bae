"""What the tests of data share: loaders of sources in bytes, and documents that say what they are."""
from conftest import prose

import data
import train
from lib.cache import build
from lib.tokenizers import Bytes

PLAIN = train.Phase(steps=8, batch=4, seq=32)


def load(documents, *phases, **fields) -> data.Loader:
    """A loader of one source in bytes, all of it for training; `fields` are those of the source."""
    source = data.Source(documents, **fields)
    return load_all({"one": source}, *phases)


def load_all(sources: dict, *phases, seed: int = 0, log=None) -> data.Loader:
    """A loader of several sources in bytes, all for training."""
    config = data.DataConfig(
        sources=sources,
        tokenizer="bytes",
        dev=0.0,
        test=0.0,
        window=1_000_000,
        max_skipped=1.0,  # duplicates count as damage
    )
    caches = {name: build(name, config, Bytes(), 0) for name in sources}
    loader = data.Loader(caches, phases, config, Bytes(), seed)
    loader.restore(loader.start, log or [])
    return loader


def some(number: int = 40):
    """Documents of growing length, with metadata of five levels and three sites."""
    for i in range(number):
        text = prose(i, 10 + 7 * i)
        meta = {"level": i % 5, "domain": f"site{i % 3}"}
        yield data.Document(f"d{i}", text, meta)


def only_rows(loader: data.Loader) -> data.Rows:
    """The rows of a loader of one phase with one length and one source."""
    return loader.rows[0][0][0]


def only_window(loader: data.Loader) -> data.Window:
    """The first window of such a loader."""
    return only_rows(loader).window(0)


def everything_of(documents) -> data.Documents:
    """What a packing is told of the documents of a one-window source."""
    loader = load(documents, PLAIN)
    return only_window(loader).documents

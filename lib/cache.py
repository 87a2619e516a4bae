"""The token cache: the documents of a source as sealed shards on disk."""
import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lib.disk import FORMAT, cache_home, digest, locked, write
from lib.errors import InputError
from lib.keys import function_key
from lib.prefetch import prefetch
from lib.sources import SPLITS, SURROGATE, Document, Skipped, path_hash, split_of
from lib.tokenizers import Tokenizer

CHOSEN = ("deselected", "duplicate", "near-duplicate")  # kinds that are left out, but are no damage


class Shard(NamedTuple):
    """A sealed shard: `tokens` of all documents end to end, document i at offsets[i] to offsets[i + 1]."""

    tokens: np.ndarray  # uint16 or uint32, memory-mapped; no special tokens
    offsets: np.ndarray  # int64 [documents + 1]
    bytes: np.ndarray  # int64 [documents], of the text as tokenized, UTF-8
    split: np.ndarray  # uint8 [documents], index into SPLITS
    score: np.ndarray  # float32 [documents], NaN without a score function
    quiet: np.ndarray  # int32 [documents], tokens of the prefix: positions at the start without loss
    directory: Path

    def documents(self) -> list[dict]:
        """`path` and `meta` of each document."""
        return [json.loads(s) for s in (self.directory / "documents.jsonl").read_text("utf-8").splitlines()]


class Cache:
    """Sealed shards of one source in a directory; `builder`: a process still at work on it, and its log."""

    def __init__(self, directory: Path, name: str, builder: tuple[subprocess.Popen, Path] | None = None):
        self.directory, self.name, self.builder, self.sealed = directory, name, builder, 0
        self.shard = lru_cache(64)(self.open)

    def wait(self, shards: float = math.inf) -> int:
        """The number of sealed shards, once there are `shards` or the cache is complete."""
        while True:
            ended = not self.builder or self.builder[0].poll() is not None  # asked before looking at the disk
            complete = (self.directory / "complete").exists()
            self.sealed = next(i for i in itertools.count(self.sealed)  # several threads may wait
                               if not (self.directory / f"{i:06d}").exists())
            if self.sealed >= shards or complete:
                return self.sealed
            if ended:
                said = self.builder[1].read_text().strip().splitlines() if self.builder else []
                raise InputError(said[-1].removeprefix("error: ") if said else
                                 f"the token cache {self.directory} is not complete, and nobody builds it")
            time.sleep(0.1)

    def abandon(self):
        """End the builder, and so all waiting for it."""
        if self.builder:
            self.builder[0].terminate()

    def counts(self, shards: int) -> Counter:
        """What the first so many shards hold and what was left out, by kind."""
        return sum((Counter(self.facts(i)["counts"]) for i in range(shards)), Counter())

    def facts(self, number: int) -> dict:
        """What is known of shard `number`: counts, sizes of its files, the fingerprint of all up to it."""
        directory = self.directory / f"{number:06d}"
        try:
            facts = json.loads((directory / "seal.json").read_text())
            intact = all((directory / file).stat().st_size == size for file, size in facts["sizes"].items())
        except (OSError, ValueError):
            intact = False
        if not intact:
            raise InputError(f"the token cache {directory} is damaged (a file is missing or not of its "
                             f"sealed size); delete {self.directory} and it will be built again")
        return facts

    @property
    def total(self) -> dict:
        """`shards`, `counts`, and the `fingerprint` chained over text, tokens and settings; waits for all."""
        n = self.wait()
        return dict(shards=n, counts=self.counts(n), fingerprint=self.facts(n - 1)["fingerprint"])

    def open(self, number: int) -> Shard:
        """Shard `number`, checked against its seal and mapped; `shard` remembers the last ones."""
        directory, facts = self.directory / f"{number:06d}", self.facts(number)
        index = np.load(directory / "index.npz")
        tokens = (np.memmap(directory / "tokens.bin", dtype=facts["dtype"], mode="r")
                  if facts["counts"].get("tokens") else np.zeros(0, facts["dtype"]))
        return Shard(tokens, *(index[k] for k in Shard._fields[1:-1]), directory)


def cache_directory(name: str, config, tokenizer: Tokenizer, seed: int) -> Path:
    """The directory of the token cache of source `name`; its name ends with the key of all it depends on."""
    source = config.sources[name]
    key = digest([FORMAT, function_key(source.documents), function_key(source.prepare), function_key(source.score),
                  config.dev, config.test, config.shard_tokens, seed if source.prepare else 0,
                  hashlib.sha256(tokenizer.model).hexdigest()])
    return cache_home() / "tokens" / f"{name.replace('.', '_')}-{key}"


def build(name: str, config, tokenizer: Tokenizer, seed: int) -> Cache:
    """The token cache of source `name`: found complete, taken up where a build stopped, or built.

    One process builds, others wait. Shard boundaries depend on the documents alone.
    """
    directory = cache_directory(name, config, tokenizer, seed)
    if not (directory / "complete").exists():
        with locked(directory.with_suffix(".lock")):
            if not (directory / "complete").exists():
                write_shards(directory, name, config, tokenizer, seed)
    return Cache(directory, name)


def write_shards(directory: Path, name: str, config, tokenizer: Tokenizer, seed: int):
    """Build what is missing of a cache; called with its lock held."""
    for left in directory.glob("*.partial"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    cache = Cache(directory, name)
    number, shard = cache.wait(0), []
    total, chain = cache.counts(number), cache.facts(number - 1)["fingerprint"] if number else directory.name
    stream = iter(config.sources[name].documents())
    next(itertools.islice(stream, total["read"], total["read"]), None)  # what sealed shards hold already
    counts, text_hash = Counter(), hashlib.sha256()

    def take(_):  # in a thread, while the last group is hashed and sealed; a resumed build cuts groups alike
        group = list(itertools.islice(stream, 256))
        found = Counter(f"skipped: {d.kind}" for d in group if isinstance(d, Skipped))
        found, whole = found + Counter("read" for _ in group), [d for d in group if isinstance(d, Document)]
        return list(tokenize(whole, config, name, tokenizer, seed, found)), found

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(f"tokenizing {name}")
        for kept, found in prefetch(take, itertools.count(), 1):
            counts += found
            for d, *_ in kept:
                text_hash.update(json.dumps(astuple(d), sort_keys=True, default=str).encode())
            shard += kept
            if counts["tokens"] >= config.shard_tokens or (not found and counts["read"]):
                chain = digest([chain, text_hash.hexdigest()])
                seal(directory, number, shard, tokenizer, dict(counts=dict(counts), fingerprint=chain))
                total += counts
                shard, number, counts, text_hash = [], number + 1, Counter(), hashlib.sha256()
            now = total + counts
            lost = {k[9:]: n for k, n in now.items() if k[:9] == "skipped: " and k[9:] not in CHOSEN}
            late = now["read"] >= 1_000 or (not found and now["documents"])
            if late and sum(lost.values()) > config.max_skipped * now["read"]:
                raise InputError(f"source {name!r}: {lost} of {now['read']:,} documents are damaged, but "
                                 f"data.max_skipped is {config.max_skipped:g}; mend the source or raise it")
            if not found:
                break
            progress.update(bar, description=f"tokenizing {name}: {now['documents']:,} documents, "
                                             f"{now['bytes'] / 1e6:,.1f} MB, {now['tokens']:,} tokens")
    if not total["documents"]:
        lost = {k: n for k, n in total.items() if k.startswith("skipped")} or "nothing skipped"
        raise InputError(f"source {name!r} gives no document with text in it ({lost})")
    write(directory / "complete", "")


def tokenize(documents: list[Document], config, name: str, tokenizer: Tokenizer, seed: int,
             counts: Counter) -> Iterator[tuple]:
    """(document, ids, split, score, quiet) of documents after `prepare`; what is left out is counted."""
    source, ready = config.sources[name], []
    for document in documents:
        split = split_of(document.group or document.path, config.dev, config.test)
        made = source.prepare(document, np.random.default_rng([seed, path_hash(document.path)])) \
            if source.prepare and split == 0 else document
        ready += [(d, split) for d in (made if isinstance(made, list) else [made])]
    valid = [(d, split) for d, split in ready if not SURROGATE.search(d.prefix + d.text)]
    if len(valid) < len(ready):
        counts["skipped: lone surrogates"] += len(ready) - len(valid)
    encoded = (tokenizer.encode_batch([getattr(d, part) for d, _ in valid]) for part in ("prefix", "text"))
    for (document, split), prefix, ids in zip(valid, *encoded, strict=True):
        score = float(source.score(document, ids)) if source.score else math.nan
        if not len(ids) or score == -math.inf:
            counts["skipped: deselected" if len(ids) else "skipped: empty"] += 1
            continue
        counts.update(documents=1, tokens=len(prefix) + len(ids), bytes=len(document.text.encode("utf-8")))
        counts[f"{SPLITS[split]} documents"] += 1
        yield document, np.concatenate([prefix, ids]).astype(np.uint32), split, score, len(prefix)


def seal(directory: Path, number: int, shard: list, tokenizer: Tokenizer, facts: dict):
    """Write a shard beside its place, force it to disk, and rename it into place."""
    dtype = "uint16" if tokenizer.vocab <= 2**16 else "uint32"
    partly, place = directory / f"{number:06d}.partial", directory / f"{number:06d}"
    partly.mkdir(parents=True)
    with open(partly / "tokens.bin", "wb") as file:
        for _, ids, *_ in shard:
            file.write(np.asarray(ids, dtype).tobytes())
    np.savez(partly / "index.npz", offsets=np.cumsum([0] + [len(s[1]) for s in shard], dtype=np.int64),
             bytes=np.array([len(d.text.encode("utf-8")) for d, *_ in shard], np.int64),
             split=np.array([row[2] for row in shard], np.uint8),
             score=np.array([row[3] for row in shard], np.float32),
             quiet=np.array([row[4] for row in shard], np.int32))
    lines = (json.dumps(dict(path=d.path, meta=d.meta), default=str) + "\n" for d, *_ in shard)
    (partly / "documents.jsonl").write_text("".join(lines), "utf-8")
    facts |= dict(dtype=dtype, sizes={p.name: p.stat().st_size for p in sorted(partly.iterdir())})
    (partly / "seal.json").write_text(json.dumps(facts, indent=1))
    for file in partly.iterdir():
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
    partly.rename(place)

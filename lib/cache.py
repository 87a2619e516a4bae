"""The token cache: the documents of a source as sealed shards on disk."""
import contextlib
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lib.bind import parameters
from lib.disk import FORMAT, cache_home, digest, locked, read_rows, write
from lib.errors import InputError
from lib.keys import function_key
from lib.prefetch import prefetch
from lib.sources import (
    SPLITS,
    SURROGATE,
    Document,
    Skipped,
    Source,
    describe_skipped,
    path_hash,
    split_in,
)
from lib.tokenizers import Tokenizer, marked_tokens

# Kinds that are skipped, but no damage.
CHOSEN = ("deselected", "duplicate", "near-duplicate", "no text")
GROUP = 256  # documents that are tokenized together
JUDGED = 1_000  # documents after which the share of damaged ones is judged, and at the end

# ---------------------------------------------------------------------------------------- reading


class Shard(NamedTuple):
    """A sealed shard. The tokens of document i are tokens[offsets[i]:offsets[i + 1]]."""

    tokens: np.ndarray  # uint16 or uint32, memory-mapped; no special tokens
    offsets: np.ndarray  # int64 [documents + 1]
    bytes: np.ndarray  # int64 [documents], of the text as tokenized, UTF-8
    split: np.ndarray  # uint8 [documents], index into SPLITS
    score: np.ndarray  # float32 [documents] or [documents k], NaN without a score function
    quiet: np.ndarray  # int32 [documents], tokens of the prefix: they are read without loss
    texts: np.ndarray  # uint64 [documents], a hash of the text, wherever it came from
    directory: Path
    # int32 [spans 3], by document: its number, first token and end; None if the source has no marks
    marks: np.ndarray | None = None

    def documents(self) -> list[dict]:
        """`path` and `meta` of each document."""
        return read_rows(self.directory / "documents.jsonl")


class Cache:
    """The sealed shards of one source, in a directory.

    builder: a process that is still at work on it, and its log.
    """

    def __init__(self, directory: Path, name: str,
                 builder: tuple[subprocess.Popen, Path] | None = None):
        self.directory = directory
        self.name = name
        self.builder = builder
        self.sealed = 0  # shards that were there when it was last looked
        self.shard = lru_cache(64)(self.open)
        self.described = lru_cache(16)(lambda number: self.shard(number).documents())

    def wait(self, shards: float = math.inf) -> int:
        """The number of sealed shards, once there are `shards` or the cache is complete."""
        while True:
            # These two are asked before the shards are counted: what is sealed later is not missed.
            ended = self.builder is None or self.builder[0].poll() is not None
            complete = (self.directory / "complete").exists()
            self.sealed = self.count_sealed()
            if self.sealed >= shards or complete:
                return self.sealed
            if ended:
                raise InputError(self.why_incomplete())
            time.sleep(0.1)

    def count_sealed(self) -> int:
        """The number of sealed shards that are there now."""
        sealed = self.sealed
        while (self.directory / f"{sealed:06d}").exists():
            sealed += 1
        return sealed

    def why_incomplete(self) -> str:
        """The builder's last words or, without any, that there is none."""
        if self.builder:
            said = self.builder[1].read_text().strip().splitlines()
            if said:
                return said[-1].removeprefix("error: ")
        return f"the token cache {self.directory} is not complete, and nobody builds it"

    def abandon(self):
        """End the builder, and so all waiting for it."""
        if self.builder:
            self.builder[0].terminate()

    def facts(self, number: int) -> dict:
        """A shard's counts, the sizes of its files, and the fingerprint of all shards up to it."""
        directory = self.directory / f"{number:06d}"
        with contextlib.suppress(OSError, ValueError):
            facts = json.loads((directory / "seal.json").read_text())
            sizes = {file: (directory / file).stat().st_size for file in facts["sizes"]}
            if sizes == facts["sizes"]:
                return facts
        raise InputError(
            f"the token cache {directory} is damaged (a file is missing or not of its sealed "
            f"size); delete {self.directory} and it will be built again")

    def counts(self, shards: int) -> Counter:
        """What the first so many shards hold, and what was skipped, by kind."""
        total = Counter()
        for number in range(shards):
            total.update(self.facts(number)["counts"])
        return total

    @property
    def total(self) -> dict:
        """`shards`, `counts`, and the `fingerprint` of text, tokens and settings; waits for all."""
        shards = self.wait()
        fingerprint = self.facts(shards - 1)["fingerprint"]
        return dict(shards=shards, counts=self.counts(shards), fingerprint=fingerprint)

    def open(self, number: int) -> Shard:
        """Shard `number`, checked against its seal and mapped; `shard` remembers the last ones."""
        directory = self.directory / f"{number:06d}"
        facts = self.facts(number)
        if facts["counts"].get("tokens"):
            tokens = np.memmap(directory / "tokens.bin", dtype=facts["dtype"], mode="r")
        else:  # an empty file cannot be mapped
            tokens = np.zeros(0, facts["dtype"])
        index = np.load(directory / "index.npz")
        return Shard(tokens=tokens, directory=directory, **index)


# --------------------------------------------------------------------------------------- building


def cache_directory(name: str, config, tokenizer: Tokenizer, seed: int) -> Path:
    """The directory of a source's token cache; its name ends with the key of what it depends on."""
    source = config.sources[name]
    functions = [function_key(f) for f in (source.documents, source.prepare, source.score)]
    parts = [
        FORMAT, functions, *config.shares(name), config.shard_tokens,
        seed if source.prepare else 0, hashlib.sha256(tokenizer.model).hexdigest()]
    if source.split:
        parts.append({"split": source.split})
    if source.marks:
        parts.append("marks")
    return cache_home() / "tokens" / f"{name.replace('.', '_')}-{digest(parts)}"


def build(name: str, config, tokenizer: Tokenizer, seed: int) -> Cache:
    """The token cache of source `name`: found complete, taken up where a build stopped, or built.

    One process builds, others wait. Shard boundaries depend on the documents alone.
    """
    directory = cache_directory(name, config, tokenizer, seed)
    complete = directory / "complete"
    if not complete.exists():
        with locked(directory.with_suffix(".lock")):
            if not complete.exists():  # another process may have built it meanwhile
                write_shards(directory, name, config, tokenizer, seed)
                write(complete, "")
    return Cache(directory, name)


class Row(NamedTuple):
    """A document as a shard holds it."""

    document: Document
    ids: np.ndarray  # uint32, prefix included
    split: int  # index into SPLITS
    score: float | np.ndarray  # a number or a vector [k]; NaN without a score function
    quiet: int  # tokens of the prefix
    marks: np.ndarray | None  # int32 [spans 2]: first token and end; None if the source has none


class Unsealed:
    """What the next shard will hold."""

    def __init__(self):
        self.rows: list[Row] = []
        self.counts = Counter()
        self.hash = hashlib.sha256()  # of the documents

    def add(self, rows: list[Row], counts: Counter):
        """Append a group of documents."""
        self.rows += rows
        self.counts.update(counts)
        for row in rows:
            *content, split, marks = astuple(row.document)
            if split or marks:
                content.append({"split": split, "marks": marks})
            said = json.dumps(content, sort_keys=True, default=str)
            self.hash.update(said.encode())


def write_shards(directory: Path, name: str, config, tokenizer: Tokenizer, seed: int):
    """Build what is missing of a cache; called with its lock held."""
    remove_partial(directory)
    cache = Cache(directory, name)
    number = cache.wait(0)
    total = cache.counts(number)
    fingerprint = cache.facts(number - 1)["fingerprint"] if number else directory.name
    stream = iter(config.sources[name].documents())
    for _ in itertools.islice(stream, total["read"]):
        pass  # sealed shards hold these
    make = partial(next_group, stream, config, name, tokenizer, seed)
    shard = Unsealed()
    with progress_bar(name) as show:
        for rows, counts in prefetch(make, itertools.count(), depth=1):
            ended = not counts
            shard.add(rows, counts)
            total.update(counts)
            full = shard.counts["tokens"] >= config.shard_tokens
            if full or (ended and shard.counts["read"]):
                fingerprint = digest([fingerprint, shard.hash.hexdigest()])
                facts = dict(counts=dict(shard.counts), fingerprint=fingerprint)
                seal(directory, number, shard.rows, tokenizer, facts)
                number += 1
                shard = Unsealed()
            check_damage(name, config, total, ended)
            if ended:
                break
            show(total)


def remove_partial(directory: Path):
    """Remove what a build that was killed left half written."""
    for left in directory.glob("*.partial"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


@contextlib.contextmanager
def progress_bar(name: str):
    """A line on the terminal that says how far a build is; gives a function of the counts."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(f"tokenizing {name}")

        def show(counts: Counter):
            description = (f"tokenizing {name}: {counts['documents']:,} documents, "
                           f"{counts['bytes'] / 1e6:,.1f} MB, {counts['tokens']:,} tokens")
            progress.update(bar, description=description)

        yield show


def next_group(stream: Iterator[Document | Skipped], config, name: str, tokenizer: Tokenizer,
               seed: int, _number: int) -> tuple[list[Row], Counter]:
    """(rows, counts) of a stream's next documents; without counts at its end.

    It runs in a thread, while the group before is hashed and sealed. A build that is taken up cuts
    the same groups.
    """
    group = list(itertools.islice(stream, GROUP))
    documents = [item for item in group if isinstance(item, Document)]
    counts = Counter(f"skipped: {item.kind}" for item in group if isinstance(item, Skipped))
    counts.update("read" for _ in group)
    rows = list(tokenize(documents, config, name, tokenizer, seed, counts))
    return rows, counts


def tokenize(documents: list[Document], config, name: str, tokenizer: Tokenizer, seed: int,
             counts: Counter) -> Iterator[Row]:
    """The rows of documents after `prepare`; they and what is skipped are counted in `counts`."""
    source = config.sources[name]
    prepared = prepare(documents, config.shares(name), source, seed, counts)
    prefixes = tokenizer.encode_batch([document.prefix for document, _ in prepared])
    texts = tokenizer.encode_batch([document.text for document, _ in prepared])
    full = [n for n, ids in enumerate(texts) if len(ids)]
    scores = scored(source.score, [prepared[n][0] for n in full], [texts[n] for n in full], name)
    scores = iter(scores)
    for (document, split), prefix, ids in zip(prepared, prefixes, texts, strict=True):
        if not len(ids):
            counts["skipped: empty"] += 1
            continue
        score = next(scores)
        out = np.all(np.equal(score, -math.inf))
        if out and SPLITS[split] == "train":  # all are measured on the same text
            counts["skipped: deselected"] += 1
            continue
        whole = np.concatenate([prefix, ids]).astype(np.uint32)
        size = len(document.text.encode("utf-8"))
        counts.update(documents=1, tokens=len(whole), bytes=size)
        counts[f"{SPLITS[split]} documents"] += 1
        if document.split:
            counts["documents of a split of their own"] += 1
        marks = marked(document, len(ids), len(prefix), tokenizer, source, name)
        yield Row(document, whole, split, score, len(prefix), marks)


def scored(score: Callable | None, documents: list[Document], tokens: list,
           name: str) -> Sequence[float | np.ndarray]:
    """The score of each document, a number or a vector [k]; NaN without a score function."""
    if not score:
        return [math.nan] * len(documents)
    if "documents" not in parameters(score):
        pairs = zip(documents, tokens, strict=True)
        return [np.asarray(score(document, ids), np.float32) for document, ids in pairs]
    found = []
    for first in range(0, len(documents), GROUP):
        group, ids = (every[first:first + GROUP] for every in (documents, tokens))
        values = np.asarray(score(group, ids), np.float32)
        if values.ndim not in (1, 2) or len(values) != len(group):
            raise InputError(
                f"data.sources.{name}.score gives an array of the shape {values.shape} for "
                f"{len(group)} documents; allowed are ({len(group)},) and ({len(group)}, k)")
        found += list(values)
    return found


def marked(document: Document, tokens: int, prefix: int, tokenizer: Tokenizer, source: Source,
           name: str) -> np.ndarray | None:
    """The tokens [spans 2] that a document's marks mean, counted with its prefix; see `Row`."""
    if document.marks and not source.marks:
        raise InputError(f"document {document.path!r} has marks, but data.sources.{name}.marks is "
                         "false; allowed is true, or a document without")
    if not source.marks:
        return None
    for start, end in document.marks:
        if not 0 <= start <= end <= len(document.text):
            raise InputError(
                f"document {document.path!r} has the mark {(start, end)}; allowed are (start, end) "
                f"with 0 <= start <= end <= {len(document.text)}, the length of its text")
    if not document.marks:
        return np.zeros((0, 2), np.int32)
    return prefix + marked_tokens(tokenizer, document.text, document.marks, tokens)


def prepare(documents: list[Document], shares: tuple[float, float], source: Source, seed: int,
            counts: Counter) -> list[tuple[Document, int]]:
    """[(document, split)] after the source's `prepare`, without what cannot be encoded.

    shares: of documents that their hash holds out, (dev, test).
    """
    prepared = []
    for document in documents:
        split = split_in(document, source, *shares)
        made = document
        if source.prepare and SPLITS[split] == "train":
            rng = np.random.default_rng([seed, path_hash(document.path)])
            made = source.prepare(document, rng)
        prepared += [(one, split) for one in (made if isinstance(made, list) else [made])]
    valid = [pair for pair in prepared if not SURROGATE.search(pair[0].prefix + pair[0].text)]
    if len(valid) < len(prepared):
        counts["skipped: lone surrogates"] += len(prepared) - len(valid)
    return valid


def check_damage(name: str, config, total: Counter, ended: bool):
    """Raise InputError if too many documents are damaged or, at a source's end, none is left."""
    skipped = {key.removeprefix("skipped: "): number for key, number in total.items()
               if key.startswith("skipped: ")}
    damaged = {kind: number for kind, number in skipped.items() if kind not in CHOSEN}
    judged = total["read"] >= JUDGED or (ended and total["documents"])
    lost = sum(damaged.values())
    if judged and lost > config.max_skipped * total["read"]:
        raise InputError(
            f"source {name!r}: {lost:,} of {total['read']:,} documents are damaged, but "
            f"data.max_skipped is {config.max_skipped:g}; mend the source or raise it; it "
            f"{describe_skipped(damaged, config.sources[name])}")
    if ended and not total["documents"]:
        raise InputError(f"source {name!r} gives no document with text in it; it "
                         f"{describe_skipped(skipped, config.sources[name])}")


def scores_of(name: str, rows: list[Row]) -> np.ndarray:
    """The scores of documents, float32 [documents] or [documents k]."""
    shapes = {np.shape(row.score) for row in rows}
    if len(shapes) > 1:
        raise InputError(f"the score of {name} gives documents the shapes "
                         f"{', '.join(map(str, sorted(shapes)))}; allowed is the same for all")
    return np.array([row.score for row in rows], np.float32)


def marks_of(rows: list[Row]) -> dict[str, np.ndarray]:
    """{"marks": see `Shard`} of documents, or {} where their source has none."""
    if not rows or rows[0].marks is None:
        return {}
    numbers = np.repeat(np.arange(len(rows)), [len(row.marks) for row in rows])
    spans = np.concatenate([row.marks for row in rows])
    return {"marks": np.column_stack([numbers, spans]).astype(np.int32)}


def seal(directory: Path, number: int, rows: list[Row], tokenizer: Tokenizer, facts: dict):
    """Write a shard beside its place, force it to disk, and rename it into place."""
    dtype = "uint16" if tokenizer.vocab <= 2**16 else "uint32"
    partial = directory / f"{number:06d}.partial"
    partial.mkdir(parents=True)
    with open(partial / "tokens.bin", "wb") as file:
        for row in rows:
            file.write(row.ids.astype(dtype).tobytes())
    np.savez(
        partial / "index.npz",
        offsets=np.cumsum([0] + [len(row.ids) for row in rows], dtype=np.int64),
        bytes=np.array([len(row.document.text.encode("utf-8")) for row in rows], np.int64),
        split=np.array([row.split for row in rows], np.uint8),
        score=scores_of(directory.name, rows),
        quiet=np.array([row.quiet for row in rows], np.int32),
        texts=np.array([path_hash(row.document.text) for row in rows], np.uint64),
        **marks_of(rows),
    )
    with open(partial / "documents.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            document = dict(path=row.document.path, meta=row.document.meta)
            file.write(json.dumps(document, default=str) + "\n")
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    facts = facts | dict(dtype=dtype, sizes=sizes)
    (partial / "seal.json").write_text(json.dumps(facts, indent=1))
    for path in partial.iterdir():
        with open(path, "rb+") as handle:
            os.fsync(handle.fileno())
    partial.rename(directory / f"{number:06d}")

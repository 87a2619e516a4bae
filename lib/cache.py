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
from typing import Any, NamedTuple

import numpy as np
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lib.bind import parameters
from lib.disk import (
    FORMAT,
    cache_home,
    digest,
    file_hash,
    locked,
    read_checked,
    read_rows,
    sync_directory,
    with_checksum,
    without_checksum,
    write_checked,
)
from lib.errors import InputError
from lib.keys import function_key
from lib.prefetch import prefetch
from lib.seams import PREPARE, SCORE, require_gave
from lib.sources import (
    ODD_KINDS,
    SPLITS,
    SURROGATE,
    Document,
    Skipped,
    Source,
    describe_skipped,
    documents_of,
    is_document,
    path_hash,
    split_in,
)
from lib.tokenizers import Tokenizer, marked_tokens

# Kinds that are skipped, but no damage.
CHOSEN = ("deselected", "duplicate", "near-duplicate", "no text", *ODD_KINDS)
DOUBTFUL = "doubtful: they stand before the break of a damaged archive"
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

    builder: a process that is still at work on it, and its log. mend: builds the shard of a number
    again, where it is not as it was sealed.
    """

    def __init__(self, directory: Path, name: str,
                 builder: tuple[subprocess.Popen, Path] | None = None,
                 mend: Callable[[int], None] | None = None):
        self.directory = directory
        self.name = name
        self.builder = builder
        self.mend = mend
        self.sealed = 0  # shards that were there when it was last looked
        self.checked = set()  # shards whose files were compared with their seal
        self.shard = lru_cache(64)(self.open)
        self.described = lru_cache(16)(lambda number: self.shard(number).documents())

    def wait_for(self, builder: tuple[subprocess.Popen, Path]):
        """Take a process that is at work on it, and its log."""
        self.builder = builder

    def wait(self, shards: float = math.inf) -> int:
        """The number of sealed shards, once there are `shards` or the cache is complete."""
        while True:
            # These two are asked before the shards are counted: what is sealed later is not missed.
            ended = self.builder is None or self.builder[0].poll() is not None
            length = self.length()
            self.sealed = self.count_sealed() if length is None else length
            if self.sealed >= shards or length is not None:
                return self.sealed
            if ended:
                raise InputError(self.why_incomplete())
            time.sleep(0.1)

    def length(self) -> int | None:
        """The number of shards of a cache that is complete; None of one that is not."""
        content = read_checked(self.directory / "complete")
        return None if content is None else int(content)

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
        """A shard's counts, the hashes of its files, and the fingerprint of all shards up to it."""
        directory = self.directory / f"{number:06d}"
        found = read_seal(directory)
        if found is None:
            self.again(number)
            found = read_seal(directory)
        return found

    def again(self, number: int):
        """Build a shard again that is not as it was sealed."""
        directory = self.directory / f"{number:06d}"
        said = f"the token cache {directory} is damaged (not as it was sealed)"
        if self.mend is None:
            raise InputError(f"{said}; delete {self.directory} and it will be built again")
        print(f"{said}; it is built again", flush=True)
        self.mend(number)

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
        """Shard `number`, mapped; `shard` does the same and remembers the last ones.

        The first time, its files are compared with its seal, and built again where they differ.
        """
        directory = self.directory / f"{number:06d}"
        facts = self.facts(number)
        if number not in self.checked and not is_whole(directory):
            self.again(number)
            facts = self.facts(number)
        self.checked.add(number)
        if facts["counts"].get("tokens"):
            mapped = np.memmap(directory / "tokens.bin", dtype=facts["dtype"], mode="r")
            tokens = np.asarray(mapped)  # a slice of it takes a tenth of the time
        else:  # an empty file cannot be mapped
            tokens = np.zeros(0, facts["dtype"])
        index = np.load(directory / "index.npz")
        return Shard(tokens=tokens, directory=directory, **index)


def read_seal(directory: Path) -> dict | None:
    """What a shard's seal says of it; None where it is gone or not as it was written."""
    try:
        return without_checksum(json.loads((directory / "seal.json").read_bytes()))
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def is_whole(directory: Path) -> bool:
    """Whether a shard's seal and files are those that were written."""
    facts = read_seal(directory)
    if facts is None:
        return False
    try:
        return all(file_hash(directory / file) == known for file, known in facts["files"].items())
    except FileNotFoundError:
        return False


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
    cache = open_cache(name, config, tokenizer, seed)
    directory = cache.directory
    if cache.length() is None:
        with locked(directory.with_suffix(".lock")):
            if cache.length() is None:  # another process may have built it meanwhile
                shards = write_shards(directory, name, config, tokenizer, seed)
                write_checked(directory / "complete", b"%d" % shards)
    return cache


def open_cache(name: str, config, tokenizer: Tokenizer, seed: int) -> Cache:
    """The token cache of source `name` as far as it is there; see `Cache`."""
    directory = cache_directory(name, config, tokenizer, seed)
    remake = remaker(directory, name, config, tokenizer, seed)

    def mend(number: int):
        with locked(directory.with_suffix(".lock")):
            remake(number)

    return Cache(directory, name, mend=mend)


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
        self.hash = hashlib.sha256()  # of the documents, and of what the shard says of them

    def add(self, rows: list[Row], counts: Counter):
        """Append a group of documents."""
        self.rows += rows
        self.counts.update(counts)
        for row in rows:
            said = [*astuple(row.document), row.split, row.quiet]
            self.hash.update(json.dumps(said, sort_keys=True, default=str).encode())
            self.hash.update(row.ids.tobytes())
            self.hash.update(np.asarray(row.score, np.float32).tobytes())

    def seal(self, directory: Path, number: int, before: str, tokenizer: Tokenizer) -> str:
        """Write the shard; gives the fingerprint of all shards up to it. before: up to the last."""
        text = self.hash.hexdigest()
        fingerprint = digest([before, text])
        facts = dict(counts=dict(self.counts), text=text, fingerprint=fingerprint)
        seal(directory, number, self.rows, tokenizer, facts)
        return fingerprint


def first_fingerprint(tokenizer: Tokenizer) -> str:
    """The fingerprint of no shards; those after it add text, tokens and what settings made."""
    return digest([tokenizer.vocab, tokenizer.bos, tokenizer.eos])


def unsealed_shards(stream: Iterator[Document | Skipped], config, name: str, tokenizer: Tokenizer,
                    seed: int, total: Counter) -> Iterator[Unsealed]:
    """The shards of a source from the next document on. total: counts of those before, updated."""
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
                yield shard
                shard = Unsealed()
            check_damage(name, config, total, ended)
            if ended:
                break
            show(total)


def write_shards(directory: Path, name: str, config, tokenizer: Tokenizer, seed: int) -> int:
    """Build what is missing of a cache; called with its lock held. Gives the number of shards."""
    remove_partial(directory)
    cache = Cache(directory, name, mend=remaker(directory, name, config, tokenizer, seed))
    number = cache.count_sealed()
    total = cache.counts(number)
    fingerprint = first_fingerprint(tokenizer)
    if number:
        fingerprint = cache.facts(number - 1)["fingerprint"]
    stream = documents_of(config.sources[name])
    for shard in unsealed_shards(stream, config, name, tokenizer, seed, total):
        fingerprint = shard.seal(directory, number, fingerprint, tokenizer)
        number += 1
    return number


def remaker(directory: Path, name: str, config, tokenizer: Tokenizer,
            seed: int) -> Callable[[int], None]:
    """What builds the shard of a number again; called with the cache's lock held.

    It raises InputError where the source gives other documents now.
    """

    def remake(number: int):
        place = directory / f"{number:06d}"
        if is_whole(place):  # another process was faster
            return
        cache = Cache(directory, name, mend=remake)
        before = first_fingerprint(tokenizer)
        if number:
            before = cache.facts(number - 1)["fingerprint"]
        stream = documents_of(config.sources[name])
        shards = unsealed_shards(stream, config, name, tokenizer, seed, cache.counts(number))
        shard = next(shards, Unsealed())
        shards.close()
        after = directory / f"{number + 1:06d}"
        whole = shard.counts["read"] and continues(shard.hash.hexdigest(), before, place, after)
        if not whole:
            raise InputError(
                f"the token cache {place} is damaged, and the source {name!r} gives other text now "
                f"than it was built from; delete {directory} and it will be built from that")
        shard.seal(directory, number, before, tokenizer)

    return remake


def continues(text: str, before: str, place: Path, after: Path) -> bool:
    """Whether a shard of this text, built again, stands between those before and after it."""
    fingerprint = digest([before, text])
    seal, following = read_seal(place), read_seal(after)
    if seal:
        return seal["fingerprint"] == fingerprint
    if following:
        return following["fingerprint"] == digest([fingerprint, following["text"]])
    return True


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
    doubtful = sum(item.doubtful for item in group if isinstance(item, Skipped))
    if doubtful:
        counts[DOUBTFUL] += doubtful
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
        return [as_scores(score(document, ids), score, (0, 1)) for document, ids in pairs]
    found = []
    for first in range(0, len(documents), GROUP):
        group, ids = (every[first:first + GROUP] for every in (documents, tokens))
        values = as_scores(score(group, ids), score, (1, 2))
        n = len(group)
        more = f"; of data.sources.{name}, arrays ({n},) and ({n}, k) of {n} documents"
        require_gave(len(values) == n, SCORE, score, values, more)
        found += list(values)
    return found


def as_scores(value: Any, score: Callable, dimensions: tuple[int, int]) -> np.ndarray:
    """What a score function gave as float32. Raises InputError for what is no number."""
    try:
        found = np.asarray(value, np.float32)
    except (TypeError, ValueError):  # texts, lists of lists of unlike lengths
        found = np.array(math.nan, np.float32)
    fine = found.ndim in dimensions and not np.isnan(found).any()
    require_gave(fine, SCORE, score, value)
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
        every = [document]
        if source.prepare and SPLITS[split] == "train":
            rng = np.random.default_rng([seed, path_hash(document.path)])
            made = source.prepare(document, rng)
            every = made if isinstance(made, list) else [made]
            require_gave(all(map(is_document, every)), PREPARE, source.prepare, made)
        prepared += [(one, split) for one in every]
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


def write_rows(partial: Path, name: str, rows: list[Row], dtype: str):
    """Write the files of a shard of the cache `name`: tokens, index, documents."""
    with open(partial / "tokens.bin", "wb") as file:
        for row in rows:
            file.write(row.ids.astype(dtype).tobytes())
    np.savez(
        partial / "index.npz",
        offsets=np.cumsum([0] + [len(row.ids) for row in rows], dtype=np.int64),
        bytes=np.array([len(row.document.text.encode("utf-8")) for row in rows], np.int64),
        split=np.array([row.split for row in rows], np.uint8),
        score=scores_of(name, rows),
        quiet=np.array([row.quiet for row in rows], np.int32),
        texts=np.array([path_hash(row.document.text) for row in rows], np.uint64),
        **marks_of(rows),
    )
    with open(partial / "documents.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            document = dict(path=row.document.path, meta=row.document.meta)
            file.write(json.dumps(document, default=str) + "\n")


def seal(directory: Path, number: int, rows: list[Row], tokenizer: Tokenizer, facts: dict):
    """Write a shard beside its place, force it to disk, and rename it into place."""
    dtype = "uint16" if tokenizer.vocab <= 2**16 else "uint32"
    partial = directory / f"{number:06d}.partial"
    partial.mkdir(parents=True)
    write_rows(partial, directory.name, rows, dtype)
    files = {path.name: file_hash(path) for path in sorted(partial.iterdir())}
    facts = with_checksum(facts | dict(dtype=dtype, files=files))
    (partial / "seal.json").write_text(json.dumps(facts, indent=1))
    for path in partial.iterdir():
        with open(path, "rb+") as handle:
            os.fsync(handle.fileno())
    place, old = directory / f"{number:06d}", directory / f"{number:06d}.old.partial"
    if place.exists():  # it was damaged
        place.rename(old)
    partial.rename(place)
    sync_directory(directory)
    shutil.rmtree(old, ignore_errors=True)

"""Text to batches: sources, tokenizers, the token cache, packing, mixtures, order, and `batch(step)`.

    source -> documents -> (prepare, score) -> tokenizer -> shards on disk, each sealed once      build()
    shards -> plan: which document pieces make up which row -> permuted rows                      Rows
    rows of several sources, by the counts of a mixture -> objective -> batch(step)               Loader

A batch is a function of (config, seed, step): nothing here keeps a position, so nothing has to be saved.
"""
import contextlib
import fcntl
import hashlib
import heapq
import inspect
import io
import itertools
import json
import math
import os
import queue
import re
import shutil
import sys
import sysconfig
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

FORMAT = 1  # of the cache on disk; part of every key
SPLITS = ("train", "dev", "test")


class InputError(Exception):
    """Something a user can mend; the message is the one sentence that says what and how."""


# ---------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Document:
    """A text with the path that identifies it (its split follows from a hash of this) and other metadata."""

    path: str
    text: str
    meta: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """What a source yields in place of a document that it cannot give; counted by `kind` and reported."""

    path: str
    kind: str


def read(path: Path, name: str) -> Document | Skipped:
    """The UTF-8 file at `path` as a document called `name`, newlines as they stand."""
    try:
        return Document(name, path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        return Skipped(name, "undecodable")
    except OSError:
        return Skipped(name, "unreadable")


def stdlib() -> Iterator[Document | Skipped]:
    """The running Python's standard library: a document per module, by path relative to the library.

    Metadata: `module`, dotted, and `domain`, its top-level package. No tests, encodings, idlelib or lib2to3.
    """
    root = Path(sysconfig.get_path("stdlib"))
    out = {"idlelib", "lib2to3", "encodings", "__pycache__", "site-packages", "dist-packages"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in out or part.startswith("test") for part in parts):
            continue
        document = read(path, "/".join(parts))
        if isinstance(document, Document):
            module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
            document.meta.update(module=module, domain=module.split(".")[0])
        yield document


def text(path: str, separator: str = "") -> Iterator[Document | Skipped]:
    """Text files: one, or all below a directory (hidden ones aside), by path relative to it; a document each.

    With a `separator`, a file is cut after every occurrence of it and each piece is a document `file#number`.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise InputError(f"source path {str(root)!r} does not exist; give a text file or a directory of them")
    files = [root] if root.is_file() else sorted(
        p for p in root.rglob("*") if p.is_file() and not any(q[0] == "." for q in p.relative_to(root).parts))
    for file in files:
        document = read(file, file.name if root.is_file() else file.relative_to(root).as_posix())
        if isinstance(document, Skipped) or not separator:
            yield document
            continue
        pieces = document.text.split(separator)
        pieces = [p + separator for p in pieces[:-1]] + [p for p in pieces[-1:] if p]
        yield from (Document(f"{document.path}#{i}", piece) for i, piece in enumerate(pieces))


@dataclass(frozen=True)
class Source:
    """Where documents come from and what is done to each before packing: functions, set in config files."""

    documents: Callable[[], Iterable[Document | Skipped]]  # stdlib, partial(text, path=...), or your own
    prepare: Callable | None = None  # (document, rng) -> document or list of them; training documents only
    score: Callable | None = None  # (document, tokens) -> float, kept in the cache; -inf leaves it out


@dataclass(frozen=True)
class DataConfig:
    """Sources, tokenizer, splits and cache."""

    sources: dict[str, Source] = field(default_factory=lambda: {"stdlib": Source(stdlib)})  # by name
    tokenizer: str = "bpe"  # "bpe": trained to model.vocab pieces; "bytes"; or a SentencePiece file
    sample_mib: float = 8.0  # the tokenizer is trained on at most this much text
    dev: float = 0.05  # share of documents for steering, tuning and selection
    test: float = 0.05  # share of documents for what is reported
    shard_tokens: int = 4_194_304  # a shard is sealed once it has at least this many
    window: int = 8  # shards within which documents are permuted and packed


def path_hash(path: str) -> int:
    """64 bits that a document's path alone decides."""
    return int.from_bytes(hashlib.blake2b(path.encode("utf-8", "replace"), digest_size=8).digest())


def split_of(path: str, dev: float, test: float) -> int:
    """Index into SPLITS for a document, from the hash of its path."""
    u = path_hash(path) / 2**64
    return 2 if u < test else 1 if u < test + dev else 0


# ------------------------------------------------------------------------------------------------- tokenizers

# SentencePiece decodes U+2581 as a space and drops training texts with U+2585 (its unknown mark): both become
# pairs that begin with U+0010, which is escaped itself, so that every string comes back as it was.
ESCAPES = {"\x10": "\x10e", "\u2581": "\x10b", "\u2585": "\x10c"}
SURROGATE = re.compile("[\ud800-\udfff]")  # a lone half of a character: not text, and no UTF-8
UNESCAPES = {pair: char for char, pair in ESCAPES.items()}


def escape(text: str) -> str:
    """The text as SentencePiece may see it; see ESCAPES."""
    return re.sub("[\x10\u2581\u2585]", lambda m: ESCAPES[m[0]], text)


class SentencePiece:
    """A SentencePiece model behind the escaping that makes it lossless for every string."""

    def __init__(self, model: bytes):
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab, self.bos, self.eos = len(self.processor), self.processor.bos_id(), self.processor.eos_id()
        if self.bos < 0 or self.eos < 0:
            raise InputError("the SentencePiece model has no bos or no eos piece; train it with both")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos."""
        return self.processor.encode(escape(text))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, on all cores."""
        return self.processor.encode([escape(t) for t in texts], num_threads=os.cpu_count())

    def decode(self, ids) -> str:
        """The text of ids; bos and eos are nothing, and a cut character is U+FFFD."""
        return re.sub("\x10[ebc]", lambda m: UNESCAPES[m[0]], self.processor.decode([int(i) for i in ids]))


class Bytes:
    """UTF-8 bytes 0..255, bos 256, eos 257."""

    vocab, bos, eos, model = 258, 256, 257, b"coppice bytes 1\n"

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos."""
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text."""
        return [np.frombuffer(t.encode("utf-8"), np.uint8) for t in texts]

    def decode(self, ids) -> str:
        """The text of ids; bos and eos are nothing, and a cut character is U+FFFD."""
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", "replace")


Tokenizer = SentencePiece | Bytes


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.model` file."""
    try:
        model = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"data.tokenizer is {str(path)!r}, which cannot be read ({error.strerror}); "
                         'allowed are "bpe", "bytes" and the path of a SentencePiece model') from None
    if model == Bytes.model:
        return Bytes()
    try:
        if not model:
            raise RuntimeError
        return SentencePiece(model)
    except RuntimeError:
        raise InputError(f"tokenizer file {str(path)!r} is not a SentencePiece model") from None


def train_bpe(texts: Iterable[str], vocab: int) -> bytes:
    """Train a BPE model with byte fallback and no normalisation; the same bytes for the same texts.

    Pieces may hold spaces, newlines and several scripts, which code wants: 4096 give 3.7 bytes a token on the
    standard library, where pieces that stop at spaces give 3.3.
    """
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(escape(t) for t in texts), model_writer=out, model_type="bpe", unk_id=0,
            bos_id=1, eos_id=2, pad_id=-1, vocab_size=max(vocab, 260), byte_fallback=True,
            add_dummy_prefix=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
            split_by_whitespace=False, allow_whitespace_only_pieces=True, split_by_unicode_script=False,
            character_coverage=0.9995, max_sentence_length=2**30, num_threads=1, minloglevel=2)
    except RuntimeError as error:
        most, least = (re.search(r, str(error)) for r in (r"<= (\d+)", r"required_chars\. \d+ vs (\d+)"))
        problem = "the tokenizer has no text to learn from: the training split is empty"
        if most or least:
            limit = f"can give at most {most[1]}" if most else f"needs at least {least[1]}"
            problem = f"model.vocab is {vocab}, but this corpus {limit} pieces"
        raise InputError(problem) from None
    if vocab < 260:
        raise InputError(f"model.vocab is {vocab}, but 256 bytes and their like need at least 260 pieces")
    return out.getvalue()


def sample(config: DataConfig) -> list[str]:
    """Texts for the tokenizer: of each source, those of lowest path hash within its share of `sample_mib`."""
    share = int(config.sample_mib * 2**20 / len(config.sources))
    texts = []
    for source in config.sources.values():
        heap, held, seen = [], 0, 0  # by falling hash: the largest hash leaves first
        for number, document in enumerate(source.documents()):
            if isinstance(document, Skipped) or split_of(document.path, config.dev, config.test) \
                    or SURROGATE.search(document.text):
                continue
            heapq.heappush(heap, (-path_hash(document.path), number, document.text))
            held, seen = held + len(document.text), seen + len(document.text)
            while held > share and len(heap) > 1:
                held -= len(heapq.heappop(heap)[2])
            if seen > 64 * share:  # so that a corpus without end has a tokenizer too
                break
        texts += [t[:share] for _, _, t in sorted(heap, reverse=True)]
    return texts


def cache_home() -> Path:
    """`$XDG_CACHE_HOME/coppice`, or `~/.cache/coppice`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coppice"


def make_tokenizer(config: DataConfig, vocab: int) -> Tokenizer:
    """The tokenizer that the config names; a "bpe" one of `vocab` pieces is trained once and cached."""
    if config.tokenizer == "bytes":
        return Bytes()
    if config.tokenizer != "bpe":
        return load_tokenizer(Path(config.tokenizer).expanduser())
    if vocab <= 0:
        raise InputError("model.vocab is 0, but a tokenizer that is to be trained needs a number of pieces; "
                         'set model.vocab, or data.tokenizer to "bytes" or a SentencePiece file')
    key = digest([FORMAT, "bpe", vocab, config.sample_mib, config.dev, config.test,
                  [[name, identity(s.documents)] for name, s in config.sources.items()]])
    path = cache_home() / "tokenizers" / f"{key}.model"
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            write(path, train_bpe(sample(config), vocab))
    return load_tokenizer(path)


# -------------------------------------------------------------------------------------------- the token cache


def digest(value: Any) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def identity(function: Callable | None) -> Any:
    """What a function of a config computes, as JSON: its source, its arguments, and the files these name.

    A file stands for its path, size and time of change, so that an edited corpus is read again; the
    interpreter's version stands for the standard library.
    """
    if function is None:
        return None
    arguments = function.keywords if isinstance(function, partial) else {}
    inner = function.func if isinstance(function, partial) else function
    files = []
    for value in arguments.values():
        path = Path(value).expanduser() if isinstance(value, str) else None
        if path and value and os.path.exists(path):
            below = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
            files += [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in below]
    return [inspect.getsource(inner), arguments, files, sys.version]


def write(path: Path, content: bytes | str):
    """Write a file whole or not at all."""
    partly = path.with_name(path.name + ".partial")
    partly.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    partly.rename(path)


@contextlib.contextmanager
def locked(path: Path, busy: str = ""):
    """Hold an exclusive lock on `path`: wait for it or, where `busy` says what it guards, refuse to wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:  # the system drops the lock when the process ends, however it ends
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if busy:
                raise InputError(f"{busy} is being trained by another process; "
                                 "wait for it, or use another --name") from None
            print(f"waiting for another process that is building {path.with_suffix('')}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Shard(NamedTuple):
    """A sealed shard: `tokens` of all documents end to end, document i at offsets[i] to offsets[i + 1]."""

    tokens: np.ndarray  # uint16 or uint32, memory-mapped; no special tokens
    offsets: np.ndarray  # int64 [documents + 1]
    bytes: np.ndarray  # int64 [documents], of the text as tokenized, UTF-8
    split: np.ndarray  # uint8 [documents], index into SPLITS
    score: np.ndarray  # float32 [documents], NaN without a score function
    directory: Path

    def documents(self) -> list[dict]:
        """`path` and `meta` of each document."""
        return [json.loads(s) for s in (self.directory / "documents.jsonl").read_text("utf-8").splitlines()]


class Cache:
    """The sealed shards of one source under one tokenizer, in a directory of the cache."""

    def __init__(self, directory: Path, name: str):
        self.directory, self.name = directory, name
        self.shards: dict[int, Shard] = {}
        try:
            self.total = json.loads((directory / "complete.json").read_text())
        except ValueError:
            raise InputError(f"the token cache {directory} is damaged (complete.json is cut short); "
                             "delete it and it will be built again") from None

    @property
    def fingerprint(self) -> str:
        """Chained over all shards' text, tokens, order, tokenizer and settings."""
        return self.total["fingerprint"]

    def shard(self, number: int) -> Shard:
        """Shard `number`, checked against its seal and mapped."""
        if number not in self.shards:
            directory = self.directory / f"{number:06d}"
            try:
                seal = json.loads((directory / "seal.json").read_text())
                sizes = {file: (directory / file).stat().st_size for file in seal["sizes"]}
            except (OSError, ValueError):
                seal, sizes = {"sizes": None}, {}
            if sizes != seal["sizes"]:
                raise InputError(f"the token cache {directory} is damaged (a file is missing or not of its "
                                 f"sealed size); delete {self.directory} and it will be built again")
            index = np.load(directory / "index.npz")
            tokens = (np.memmap(directory / "tokens.bin", dtype=seal["dtype"], mode="r")
                      if seal["counts"].get("tokens") else np.zeros(0, seal["dtype"]))
            self.shards[number] = Shard(tokens, *(index[k] for k in Shard._fields[1:-1]), directory)
        return self.shards[number]


def build(name: str, config: DataConfig, tokenizer: Tokenizer, seed: int) -> Cache:
    """The token cache of source `name`: found complete, taken up where a build stopped, or built.

    One process builds, others wait. A shard is renamed into its place when all of it is on disk; its
    boundaries depend on the documents alone. Raises InputError when there is nothing to train on.
    """
    source = config.sources[name]
    key = digest([FORMAT, identity(source.documents), identity(source.prepare), identity(source.score),
                  config.dev, config.test, config.shard_tokens, seed if source.prepare else 0,
                  hashlib.sha256(tokenizer.model).hexdigest()])
    directory = cache_home() / "tokens" / f"{name}-{key}"
    if not (directory / "complete.json").exists():
        with locked(directory.with_suffix(".lock")):
            if not (directory / "complete.json").exists():
                write_shards(directory, name, config, tokenizer, seed, key)
    return Cache(directory, name)


def write_shards(directory: Path, name: str, config: DataConfig, tokenizer: Tokenizer, seed: int, key: str):
    """Build what is missing of a cache; called with its lock held."""
    for left in directory.glob("*.partial"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    seals = [json.loads((directory / f"{i:06d}" / "seal.json").read_text())
             for i in itertools.takewhile(lambda i: (directory / f"{i:06d}").exists(), itertools.count())]
    total = sum((Counter(seal["counts"]) for seal in seals), Counter())
    stream = iter(config.sources[name].documents())
    next(itertools.islice(stream, total["read"], total["read"]), None)  # what sealed shards hold already
    shard, number, chain = [], len(seals), seals[-1]["fingerprint"] if seals else key
    counts, text_hash = Counter(), hashlib.sha256()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(f"tokenizing {name}")
        while True:
            group = list(itertools.islice(stream, 256))  # a shard ends with one: a resumed build cuts alike
            counts["read"] += len(group)
            counts.update(f"skipped: {d.kind}" for d in group if isinstance(d, Skipped))
            whole = [d for d in group if isinstance(d, Document)]
            kept = list(tokenize(whole, config, name, tokenizer, seed, counts))
            for d, _, _, _ in kept:
                text_hash.update(json.dumps([d.path, d.text, d.meta], sort_keys=True).encode())
            shard += kept
            if counts["tokens"] >= config.shard_tokens or (not group and counts["read"]):
                chain = digest([chain, text_hash.hexdigest()])
                seal(directory, number, shard, tokenizer, dict(counts=dict(counts), fingerprint=chain))
                total += counts
                shard, number, counts, text_hash = [], number + 1, Counter(), hashlib.sha256()
            if not group:
                break
            now = total + counts
            progress.update(bar, description=f"tokenizing {name}: {now['documents']:,} documents, "
                                             f"{now['bytes'] / 1e6:,.1f} MB, {now['tokens']:,} tokens")
    if not total["documents"]:
        why = ", ".join(f"{n} {kind}" for kind, n in total.items() if kind.startswith("skipped"))
        raise InputError(f"source {name!r} gives no document with text in it" + (f" ({why})" if why else ""))
    done = dict(shards=number, fingerprint=chain, counts=dict(total))
    write(directory / "complete.json", json.dumps(done, indent=1))


def tokenize(documents: list[Document], config: DataConfig, name: str, tokenizer: Tokenizer, seed: int,
             counts: Counter) -> Iterator[tuple[Document, Any, int, float]]:
    """(document, ids, split, score) of documents after `prepare`; empty and deselected ones are counted."""
    source, ready = config.sources[name], []
    for document in documents:
        split = split_of(document.path, config.dev, config.test)
        made = document
        if source.prepare and split == 0:
            rng = np.random.default_rng([seed, path_hash(document.path)])
            made = source.prepare(document, rng)
        ready += [(d, split) for d in (made if isinstance(made, list) else [made])]
    valid = [(d, split) for d, split in ready if not SURROGATE.search(d.text)]
    if len(valid) < len(ready):
        counts["skipped: lone surrogates"] += len(ready) - len(valid)
    for (document, split), ids in zip(valid, tokenizer.encode_batch([d.text for d, _ in valid]), strict=True):
        score = float(source.score(document, ids)) if source.score else math.nan
        if not len(ids) or score == -math.inf:
            counts["skipped: deselected" if len(ids) else "skipped: empty"] += 1
            continue
        counts.update(documents=1, tokens=len(ids), bytes=len(document.text.encode("utf-8")))
        counts[f"{SPLITS[split]} documents"] += 1
        yield document, ids, split, score


def seal(directory: Path, number: int, shard: list, tokenizer: Tokenizer, facts: dict):
    """Write a shard beside its place, force it to disk, and rename it into place."""
    dtype = "uint16" if tokenizer.vocab <= 2**16 else "uint32"
    partly, place = directory / f"{number:06d}.partial", directory / f"{number:06d}"
    partly.mkdir(parents=True)
    with open(partly / "tokens.bin", "wb") as file:
        for _, ids, _, _ in shard:
            file.write(np.asarray(ids, dtype).tobytes())
    np.savez(partly / "index.npz", offsets=np.cumsum([0] + [len(s[1]) for s in shard], dtype=np.int64),
             bytes=np.array([len(d.text.encode("utf-8")) for d, _, _, _ in shard], np.int64),
             split=np.array([split for _, _, split, _ in shard], np.uint8),
             score=np.array([score for _, _, _, score in shard], np.float32))
    lines = (json.dumps(dict(path=d.path, meta=d.meta)) + "\n" for d, _, _, _ in shard)
    (partly / "documents.jsonl").write_text("".join(lines), "utf-8")
    facts |= dict(dtype=dtype, sizes={p.name: p.stat().st_size for p in sorted(partly.iterdir())})
    (partly / "seal.json").write_text(json.dumps(facts, indent=1))
    for file in partly.iterdir():
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
    partly.rename(place)


# ---------------------------------------------------------------------------------------------------- packing
#
# A document of n tokens has n + 1 positions: inputs bos t1 .. tn, targets t1 .. tn eos. So each token and the
# end are predicted once, no target belongs to another document, and a document may be cut anywhere. A plan is
# an integer array [pieces, 6], ordered by row, with these columns; the first QUIET positions carry no loss.

PLAN = ROW, SEGMENT, DOCUMENT, START, LENGTH, QUIET = range(6)


def concat_and_split(lengths: np.ndarray, seq: int) -> np.ndarray:
    """The plain packing: all positions end to end, cut every `seq`; only the last row is padded.

    lengths: positions of each document [n]. Returns a plan; every piece is a segment of its own.
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    cuts = np.unique(np.concatenate([starts, np.arange(0, ends[-1] if len(ends) else 0, seq)]))
    document = np.searchsorted(ends, cuts, side="right")
    row = cuts // seq
    first = np.searchsorted(row, row)  # the first piece of each piece's row
    length = np.diff(np.append(cuts, ends[-1:]))
    return np.stack([row, np.arange(len(cuts)) - first + 1, document, cuts - starts[document], length,
                     np.zeros_like(cuts)], axis=1)


def windows(lengths: np.ndarray, seq: int, overlap: int) -> np.ndarray:
    """The plan of evaluation: each position is predicted once, in a document too long for a row with at least
    `overlap` positions before it (the first row aside). Pieces fill rows in order, one segment each.
    """
    plan, row, used, segment = [], 0, 0, 0
    for document, n in enumerate(lengths):
        for start in [0, *range(seq - overlap, n - overlap, seq - overlap)]:
            length = min(seq, n - start)
            if used + length > seq:
                row, used, segment = row + 1, 0, 0
            segment, used = segment + 1, used + length
            plan.append((row, segment, document, start, length, overlap if start else 0))
    return np.array(plan, np.int64).reshape(-1, 6)


def fill(plan: np.ndarray, rows: np.ndarray, seq: int, tokens_of: Callable, tokenizer: Tokenizer) -> dict:
    """Rows of a plan as arrays [len(rows), seq]: tokens targets segments positions weights document.

    tokens_of(document) gives its ids. Padding is eos in segment 0 with weight 0, as are all rows
    that are not in the plan; positions restart in each segment.
    """
    shape, eos = (len(rows), seq), tokenizer.eos
    out = dict(tokens=np.full(shape, eos, np.int32), targets=np.full(shape, eos, np.int32),
               segments=np.zeros(shape, np.int32), positions=np.zeros(shape, np.int32),
               weights=np.zeros(shape, np.float32), document=np.full(shape, -1, np.int32))
    first, last = np.searchsorted(plan[:, ROW], rows), np.searchsorted(plan[:, ROW], rows, side="right")
    for r in range(len(rows)):
        at, segment_at, before = 0, 0, 0
        for _, segment, document, start, length, quiet in plan[first[r]:last[r]].tolist():
            ids = tokens_of(document)
            to = slice(at, at + length)
            inputs = ids[max(0, start - 1):start + length - 1].astype(np.int32)
            out["tokens"][r, to] = inputs if start else np.insert(inputs, 0, tokenizer.bos)
            out["targets"][r, to] = np.append(ids[start:start + length].astype(np.int32), eos)[:length]
            out["document"][r, to] = document
            segment_at, before = (segment_at, before) if segment == before else (at, segment)
            out["segments"][r, to] = segment
            out["positions"][r, to] = np.arange(at - segment_at, at - segment_at + length)
            out["weights"][r, at + quiet:at + length] = 1
            at += length
    return out


def permute(index, n: int, *key: int) -> np.ndarray:
    """The image of `index` (in 0..n-1) under a pseudo-random permutation of n things that `key` chooses.

    A four-round Feistel network on the next even number of bits, walked until below n: no state, no table.
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    low = np.uint64(2**bits - 1)
    seeds = np.random.SeedSequence((len(key), *key)).generate_state(4, np.uint64)
    out = np.atleast_1d(np.asarray(index, np.uint64)).copy()
    todo = np.ones(len(out), bool)
    while todo.any():
        left, right = out[todo] >> np.uint64(bits), out[todo] & low
        for seed in seeds:
            mixed = (right ^ seed) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & low)
        out[todo] = (left << np.uint64(bits)) | right
        todo = out >= n
    return out.astype(np.int64)


# ----------------------------------------------------------------------------------------- rows of one source


class Window(NamedTuple):
    """The documents of one split in consecutive shards, and the plan that packs them."""

    shard: np.ndarray  # [documents]
    number: np.ndarray  # [documents], within the shard
    positions: np.ndarray  # [documents], tokens + 1
    plan: np.ndarray
    rows: int


class Rows:
    """The training rows of one source under one packing and length, numbered 0, 1, 2, ... for ever.

    Documents are permuted in a window of shards and packed; rows are permuted in the window, anew each epoch.
    """

    def __init__(self, cache: Cache, seq: int, packing: Callable, window: int, tokenizer: Tokenizer, key):
        self.cache, self.seq, self.packing, self.tokenizer, self.key = cache, seq, packing, tokenizer, key
        shards = cache.total["shards"]
        self.windows = [self.plan(range(i, min(i + window, shards)), n)
                        for n, i in enumerate(range(0, shards, window))]
        self.ends = np.cumsum([w.rows for w in self.windows])
        if not self.ends[-1]:
            raise InputError(f"source {cache.name!r} has no document in its train split")

    def plan(self, shards: range, number: int) -> Window:
        """Permute and pack the training documents of some shards."""
        where = [(i, np.flatnonzero(self.cache.shard(i).split == 0)) for i in shards]
        shard = np.concatenate([np.full(len(which), i) for i, which in where])
        numbers = np.concatenate([which for _, which in where])
        positions = np.concatenate([np.diff(self.cache.shard(i).offsets)[which] + 1 for i, which in where])
        order = permute(np.arange(len(numbers)), len(numbers), *self.key, number)
        shard, numbers, positions = shard[order], numbers[order], positions[order]
        plan = self.packing(positions, self.seq)
        return Window(shard, numbers, positions, plan, int(plan[-1, ROW]) + 1 if len(plan) else 0)

    @property
    def epoch(self) -> int:
        """Rows of one pass over the source."""
        return int(self.ends[-1])

    def get(self, rows: np.ndarray) -> tuple[dict, int, int]:
        """(arrays [n, seq] of `fill`, pieces, how many of these end before their document) of rows [n]."""
        parts, pieces, cut = [], 0, 0
        for row in rows.tolist():
            epoch, within = divmod(row, self.epoch)
            number = int(np.searchsorted(self.ends, within, side="right"))
            window = self.windows[number]
            within -= int(self.ends[number]) - window.rows
            place = permute(within, window.rows, *self.key, number, 1 + epoch)
            parts.append(fill(window.plan, place, self.seq, partial(self.ids, window), self.tokenizer))
            first, last = np.searchsorted(window.plan[:, ROW], (place[0], place[0] + 1))
            here = window.plan[first:last]
            pieces += len(here)
            cut += int(np.sum(here[:, START] + here[:, LENGTH] < window.positions[here[:, DOCUMENT]]))
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0] if k != "document"}, pieces, cut

    def ids(self, window: Window, document: int) -> np.ndarray:
        """Token ids of a document of a window."""
        shard, number = self.cache.shard(int(window.shard[document])), int(window.number[document])
        return shard.tokens[shard.offsets[number]:shard.offsets[number + 1]]


# ------------------------------------------------------------------------------ mixtures, objectives, batches


def causal(row: dict, rng: np.random.Generator) -> tuple[dict, dict]:
    """The plain objective: predict each next token. Takes and gives arrays [seq]; an objective may change any
    and add others. The second result is the mask specification, as keyword arguments of `model.Mask`.
    """
    return row, dict(kind="causal", window=0)


class Batch(NamedTuple):
    """One update's rows: arrays [batch, seq], the mask to attend them with, and figures about them."""

    arrays: dict[str, np.ndarray]
    mask: dict
    metrics: dict[str, float]


class Loader:
    """`batch(step)` for all steps of a run, from its caches and phases.

    phases have steps, batch, seq, mixture, packing and objective; mixture is {source: weight}, a function
    (progress within the phase, dev losses) -> {source: weight}, or None for weights by the sources' rows.
    """

    def __init__(self, caches: dict[str, Cache], phases, config: DataConfig, tokenizer: Tokenizer, seed: int):
        self.names, self.phases, self.seed = list(caches), phases, seed
        self.ends = np.cumsum([phase.steps for phase in phases])
        self.counts: list[list[np.ndarray]] = [[np.zeros(len(caches), np.int64)] for _ in phases]
        self.carry = [np.zeros(len(caches)) for _ in phases]
        built, self.rows = {}, []  # phases that pack alike share their plans
        for phase in phases:
            for i, cache in enumerate(caches.values()):
                key = (i, phase.seq, repr(phase.packing))
                if key not in built:
                    built[key] = Rows(cache, phase.seq, phase.packing, config.window, tokenizer, (seed, i))
            self.rows.append([built[i, phase.seq, repr(phase.packing)] for i in range(len(caches))])

    def phase_of(self, step: int) -> int:
        """The phase that takes `step` (1 and up)."""
        return int(np.searchsorted(self.ends, step))

    def weights(self, phase: int, step: int) -> np.ndarray:
        """The mixture at a step of a phase (0 is its first), normalised [sources]."""
        mixture = self.phases[phase].mixture
        if mixture is None:
            mixture = {name: rows.epoch for name, rows in zip(self.names, self.rows[phase], strict=True)}
        elif callable(mixture):
            mixture = mixture(step / self.phases[phase].steps, {})
        finite = all(0 <= w < math.inf for w in mixture.values())
        if mixture.keys() - self.names or not finite or not sum(mixture.values()):
            raise InputError(f"phases.{phase}.mixture gives {mixture}; allowed are weights of 0 and more, "
                             f"not all 0, for the sources {', '.join(self.names)}")
        weights = np.array([mixture.get(name, 0) for name in self.names], float)
        return weights / weights.sum()

    def drawn(self, phase: int, steps: int) -> np.ndarray:
        """Rows drawn from each source in a phase's first `steps`: a recurrence, worked out once and kept."""
        counts = self.counts[phase]
        while len(counts) <= steps:
            self.carry[phase] += self.weights(phase, len(counts) - 1) * self.phases[phase].batch
            owed = self.carry[phase]
            whole = np.floor(np.maximum(owed, 0) + 1e-9).astype(np.int64)
            while left := self.phases[phase].batch - whole.sum():  # largest remainders up, smallest down
                behind = np.where((whole > 0) | (left > 0), (owed - whole) * np.sign(left), -np.inf)
                whole[np.argmax(behind)] += np.sign(left)
            self.carry[phase] -= whole  # the remainders are carried, so that a rare source gets its share
            counts.append(counts[-1] + whole)
        return counts[steps]

    def begin(self, phase: int) -> np.ndarray:
        """The first row of each source in a phase: the positions that earlier phases drew, over its seq."""
        positions = sum((self.drawn(p, self.phases[p].steps) * self.phases[p].seq for p in range(phase)),
                        np.zeros(len(self.names), np.int64))
        return positions // self.phases[phase].seq

    def epochs(self, step: int) -> dict[str, float]:
        """Passes over each source that the first `step` steps make."""
        if step == 0:
            return dict.fromkeys(self.names, 0.0)
        p = self.phase_of(step)
        rows = self.begin(p) + self.drawn(p, step - int(self.ends[p]) + self.phases[p].steps)
        return {name: float(n / r.epoch) for name, n, r in zip(self.names, rows, self.rows[p], strict=True)}

    def batch(self, step: int) -> Batch:
        """The batch of a step (1 and up): a function of (config, seed, step)."""
        p = self.phase_of(step)
        phase, within = self.phases[p], step - 1 - (int(self.ends[p]) - self.phases[p].steps)
        before, after = self.drawn(p, within), self.drawn(p, within + 1)
        parts, pieces, cut = [], 0, 0
        for i, (begin, end) in enumerate(zip(self.begin(p) + before, self.begin(p) + after, strict=True)):
            if begin == end:
                continue
            part, n, m = self.rows[p][i].get(np.arange(begin, end))
            parts.append(part | dict(source=np.full((end - begin, phase.seq), i, np.int32)))
            pieces, cut = pieces + n, cut + m
        rows = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
        waste = 1 - float(np.mean(rows["segments"] > 0))
        made = [phase.objective({k: v[r] for k, v in rows.items()},
                                np.random.default_rng([self.seed, step, r])) for r in range(phase.batch)]
        return Batch({k: np.stack([row[k] for row, _ in made]) for k in made[0][0]}, made[0][1],
                     {"data/waste": waste, "data/truncated": cut / pieces})


def prefetch(make: Callable[[int], Any], steps: range, depth: int = 2) -> Iterator[Any]:
    """make(step) for each step in turn, by a thread up to `depth` ahead; its errors are raised here."""
    ready: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def put(item) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def work():
        try:
            for step in steps:
                if not put((make(step), None)):
                    return
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for _ in steps:
            value, error = ready.get()
            if error is not None:
                raise error
            yield value
    finally:
        stop.set()
        thread.join()


# ----------------------------------------------------------------------------------------- held-out documents


class HeldOut(NamedTuple):
    """Documents of a split as batches: (arrays, document of each position, -1 where none counts)."""

    paths: list[str]
    bytes: np.ndarray  # int64 [documents]
    texts: Callable[[], Iterator[bytes]]  # UTF-8 of each document
    batches: Callable[[], Iterator[tuple[dict, np.ndarray]]]


def held_out(cache: Cache, split: str, tokenizer: Tokenizer, seq: int, batch: int, overlap: int,
             most: int | None = None) -> HeldOut:
    """The documents of a split, all or the first (by path hash) that have at most `most` tokens together."""
    found = []  # (hash, shard, number, positions, bytes)
    for i in range(cache.total["shards"]):
        shard = cache.shard(i)
        which = np.flatnonzero(shard.split == SPLITS.index(split))
        paths = [d["path"] for d in shard.documents()] if len(which) else []
        found += [(digest(paths[n]), paths[n], i, n, shard.offsets[n + 1] - shard.offsets[n] + 1,
                   shard.bytes[n]) for n in which.tolist()]
    found.sort()
    if most is not None:
        found = found[:max(1, int(np.searchsorted(np.cumsum([f[4] for f in found]), most, side="right")))]

    def ids(document: int) -> np.ndarray:
        shard, n = cache.shard(found[document][2]), found[document][3]
        return shard.tokens[shard.offsets[n]:shard.offsets[n + 1]]

    def batches():
        plan = windows(np.array([f[4] for f in found], np.int64), seq, overlap)
        for start in range(0, int(plan[-1, ROW]) + 1 if len(plan) else 0, batch):
            arrays = fill(plan, np.arange(start, start + batch), seq, ids, tokenizer)
            whose = np.where(arrays["weights"] > 0, arrays.pop("document"), -1)
            yield arrays | dict(source=np.zeros((batch, seq), np.int32)), whose

    return HeldOut([f[1] for f in found], np.array([f[5] for f in found], np.int64),
                   lambda: (tokenizer.decode(ids(d)).encode("utf-8") for d in range(len(found))), batches)


def bits_per_byte(losses: Callable, held: HeldOut) -> dict[str, float]:
    """`loss` (nats per token) and `bpb` of held-out documents with the latter's standard error `bpb_se`.

    losses: arrays -> [b, t]. The standard error is that of a ratio of sums over documents.
    """
    nats, tokens = np.zeros(len(held.paths)), 0
    for arrays, document in held.batches():
        counted = document >= 0
        np.add.at(nats, document[counted], np.asarray(losses(arrays), np.float64)[counted])
        tokens += int(counted.sum())
    n, size, bits = len(nats), float(held.bytes.sum()), nats / math.log(2)
    bpb = float(bits.sum()) / size
    spread = float(np.sum((bits - bpb * held.bytes) ** 2))
    return dict(loss=float(nats.sum()) / tokens, bpb=bpb,
                bpb_se=math.sqrt(spread * n / (n - 1)) / size if n > 1 else math.nan)

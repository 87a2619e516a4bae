"""Text to batches: sources, tokenizers, the token cache, packing, mixtures, order, and `batch(step)`.

    source -> documents -> (prepare, score) -> tokenizer -> shards on disk, each sealed once      build()
    shards -> plan: which document pieces make up which row -> permuted rows                      Rows
    rows of several sources, by the counts of a mixture -> objective -> batch(step)               Loader

A batch is a function of (config, seed, step): nothing here keeps a position, so nothing has to be saved.
"""
import ast
import contextlib
import fcntl
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec
import numpy as np
import sentencepiece
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

FORMAT = 2  # of the cache on disk; part of every key
SPLITS = ("train", "dev", "test")
CHOSEN = ("deselected", "duplicate", "near-duplicate")  # kinds that are left out, but are no damage


class InputError(Exception):
    """Something a user can mend; the message is the one sentence that says what and how."""


# ---------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Document:
    """A text with the path that identifies it (its split follows from a hash of this) and other metadata."""

    path: str
    text: str
    meta: dict = field(default_factory=dict)
    group: str = ""  # whose hash gives the split, where it is not the path's
    prefix: str = ""  # read before the text, but not predicted: no loss on it


@dataclass(frozen=True)
class Skipped:
    """What a source yields in place of a document that it cannot give; counted by `kind` and reported."""

    path: str
    kind: str


def files(path: str) -> tuple[Any, list[tuple[str, str]]]:
    """(file system, [(name, path)]) of a file, of all below a directory or of a pattern, no hidden ones."""
    try:
        fs, root = fsspec.url_to_fs(os.path.expanduser(path))
        if not (found := fs.find(root) or fs.glob(root)):
            raise FileNotFoundError("does not exist; give a file, a directory or a pattern like *.txt")
        base = root if fs.isdir(root) else re.split(r"[*?[]", root)[0].rpartition("/")[0]
        found = [p for p in found if fs.isfile(p) and (p == root or "/." not in p[len(base):])]
    except (ImportError, ValueError, OSError) as error:  # a protocol may be unknown, or want a package
        raise InputError(f"source path {path!r} cannot be read: {error}") from None
    return fs, sorted(((p[len(base):].lstrip("/"), p) for p in found), key=lambda file: file[0].split("/"))


def lines(file, longest: int) -> Iterator[bytes | None]:
    """The lines of a binary file, None in place of one over `longest` bytes, which is never held whole."""
    while line := file.readline(longest + 1):
        over = len(line) > longest
        while over and line and line[-1:] != b"\n":
            line = file.readline(longest)
        yield None if over else line


def text(path: str, separator: str = "", longest: int = 2**26) -> Iterator[Document | Skipped]:
    """UTF-8 files, see `files`, .gz and .zst unpacked: a document each or, cut after a `separator`, several,
    `file#number` from 1. Lines are streamed, those of at most `longest` bytes; archives up to their break.
    """
    fs, found = files(path)
    end = re.escape(separator.encode())
    for name, place in found:
        packed = dict(gz="gzip", zst="zstd").get(name.rpartition(".")[2])
        if packed == "zstd" and not hasattr(fsspec.compression.compr.get(packed), "peek"):
            raise InputError(f"{name} needs the package backports.zstd")  # zstandard does not see a break
        try:
            with fs.open(place, compression=packed) as raw:
                file = raw if hasattr(raw, "peek") else io.BufferedReader(raw)
                pieces = lines(file, longest) if separator == "\n" else \
                    re.findall(b"(?s).*?%b|.+$" % end, file.read()) if separator else [file.read()]
                for number, piece in enumerate(pieces, 1):
                    called = f"{name}#{number}" if separator else name
                    try:
                        yield Document(called, piece.decode()) if piece is not None else Skipped(
                            called, "over-long line")
                    except UnicodeDecodeError:
                        yield Skipped(called, "undecodable")
        except Exception as error:  # each file system and each kind of archive has its own
            yield Skipped(name, "truncated archive" if isinstance(error, EOFError) else "unreadable")


def stdlib(unit: str = "module") -> Iterator[Document | Skipped]:
    """The running Python's standard library, by path relative to it: a document per "module" or "definition".

    Metadata: `module`, dotted, and `domain`, its top-level package. No tests, encodings, idlelib or lib2to3.
    """
    if unit not in ("module", "definition"):
        raise InputError(f'stdlib has no unit {unit!r}; allowed are "module" and "definition"')
    root = Path(sysconfig.get_path("stdlib"))
    out = {"idlelib", "lib2to3", "encodings", "__pycache__", "site-packages", "dist-packages"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in out or part.startswith("test") for part in parts):
            continue
        document = replace(next(text(str(path))), path="/".join(parts))
        if isinstance(document, Document):
            module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
            document.meta.update(module=module, domain=module.split(".")[0])
        whole = unit == "module" or isinstance(document, Skipped)
        yield from [document] if whole else definitions(document)


def definitions(module: Document) -> list[Document | Skipped]:
    """A module's functions and classes at top level, decorators too, `path:name`, in the module's split."""
    try:
        body = ast.parse(module.text).body
    except (SyntaxError, ValueError, RecursionError):
        return [Skipped(module.path, "unparsable")]
    rows = list(io.StringIO(module.text, newline=""))
    return [Document(f"{module.path}:{node.name}", "".join(rows[min(
        n.lineno for n in (node, *node.decorator_list)) - 1:node.end_lineno]), module.meta, module.path)
        for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]


@dataclass(frozen=True)
class Source:
    """Where documents come from and what is done to each before packing: functions, set in config files."""

    documents: Callable[[], Iterable[Document | Skipped]]  # stdlib, partial(text, path=...), or your own
    prepare: Callable | None = None  # (document, rng) -> document or list of them; training documents only
    score: Callable | None = None  # (document, tokens) -> float, kept in the cache; -inf leaves it out
    epochs: float = 0.0  # passes that a run may make over it; 0 is any number
    after: Literal["stop", "renormalise"] = "stop"  # then: refuse to go on, or leave its share to the others


@dataclass(frozen=True)
class DataConfig:
    """Sources, tokenizer, splits and cache."""

    sources: dict[str, Source] = field(default_factory=lambda: {"stdlib": Source(stdlib)})  # by name
    tokenizer: str = "bpe"  # "bpe": trained to model.vocab pieces; "bytes"; a SentencePiece file; "hf:DIR"
    sample_mib: float = 8.0  # the tokenizer is trained on at most this much text
    dev: float = 0.05  # share of documents for steering, tuning and selection
    test: float = 0.05  # share of documents for what is reported
    shard_tokens: int = 4_194_304  # a shard is sealed once it has at least this many
    window: int = 8  # shards within which documents are permuted and packed
    stream: bool = False  # train while the rest is tokenized; held-out documents: those of the first window
    max_skipped: float = 0.1  # building stops when more than this share of a source is damaged


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


class HuggingFace:
    """A tokenizer.json of the library tokenizers, as JSON {bos, eos, vocab, tokenizer}; see tools/export.py.

    vocab: rows of the model's embedding, which may be more than there are tokens. Text that spells a special
    token stays text: no document can end another, or open a turn. Other added tokens are found in it, as the
    model knows them. Whether text comes back as it was is up to the tokenizer.
    """

    def __init__(self, model: bytes):
        try:
            import tokenizers
        except ImportError:
            raise InputError("a tokenizer.json needs a package: pip install tokenizers") from None
        self.model, kept = model, json.loads(model)
        self.vocab, self.bos, self.eos = kept["vocab"], kept["bos"], kept["eos"]
        try:
            self.processor = tokenizers.Tokenizer.from_str(json.dumps(kept["tokenizer"]))
        except Exception as error:  # the library has no kind of its own
            raise InputError(f"tokenizer.json cannot be read by the package tokenizers: {error}") from None
        self.processor.no_truncation()
        self.processor.no_padding()
        self.processor.encode_special_tokens = True  # as text
        tokens = 1 + max([self.bos, self.eos, *self.processor.get_vocab().values()])
        if tokens > self.vocab:
            raise InputError(f"the tokenizer has {tokens} tokens, but the model's embedding {self.vocab} "
                             "rows; allowed are as many rows or more")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos."""
        return self.processor.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, on all cores."""
        return [e.ids for e in self.processor.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids) -> str:
        """The text of ids; special tokens and ids of none are nothing, and a cut character is U+FFFD."""
        return self.processor.decode([int(i) for i in ids])


Tokenizer = SentencePiece | Bytes | HuggingFace


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.model` file."""
    try:
        model = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"data.tokenizer is {str(path)!r}, which cannot be read ({error.strerror}); allowed "
                         'are "bpe", "bytes", the path of a SentencePiece model and "hf:DIRECTORY"') from None
    if model == Bytes.model:
        return Bytes()
    if model.startswith(b'{"bos":'):
        return HuggingFace(model)
    try:
        return SentencePiece(model or b"nothing")
    except RuntimeError:
        hint = "; a tokenizer.json is given as hf:DIRECTORY, with what lies beside it" * (model[:1] == b"{")
        raise InputError(f"tokenizer file {str(path)!r} is not a SentencePiece model{hint}") from None


# -------------------------------------------------------------------------------------------- the token cache


def cache_home() -> Path:
    """`$XDG_CACHE_HOME/coppice`, or `~/.cache/coppice`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coppice"


def digest(value: Any) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def identity(function: Callable | None) -> Any:
    """What a function of a config computes, as JSON: its source, and its file's up to the config; arguments;
    names, sizes and times of the files that these name, runs aside; the interpreter."""
    if function is None:
        return None
    inner, arguments, stamps = getattr(function, "func", function), getattr(function, "keywords", {}), []
    for name, value in arguments.items():
        if isinstance(value, str) and value and not Path(value, "checkpoints").expanduser().exists() and (
                name == "path" or Path(value).expanduser().exists()):
            with contextlib.suppress(InputError):
                fs, found = files(value)
                stamps += [[path, fs.ukey(path)] for _, path in found]
    file = "" if inner.__module__ == __name__ else inspect.getsource(inspect.getmodule(inner) or inner)
    above = re.split(r"(?m)^(?:config|arms)\b", file)[0]
    return [inspect.getsource(inner), digest(above), arguments, stamps, sys.version]


def write(path: Path, content: bytes | str):
    """Write a file whole or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partly = path.with_name(f"{path.name}.{os.getpid()}.partial")
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


def place(name: str, config: DataConfig, tokenizer: Tokenizer, seed: int) -> Path:
    """The directory of the token cache of source `name`; its name ends with the key of all it depends on."""
    source = config.sources[name]
    key = digest([FORMAT, identity(source.documents), identity(source.prepare), identity(source.score),
                  config.dev, config.test, config.shard_tokens, seed if source.prepare else 0,
                  hashlib.sha256(tokenizer.model).hexdigest()])
    return cache_home() / "tokens" / f"{name.replace('.', '_')}-{key}"


def build(name: str, config: DataConfig, tokenizer: Tokenizer, seed: int) -> Cache:
    """The token cache of source `name`: found complete, taken up where a build stopped, or built.

    One process builds, others wait. Shard boundaries depend on the documents alone.
    """
    directory = place(name, config, tokenizer, seed)
    if not (directory / "complete").exists():
        with locked(directory.with_suffix(".lock")):
            if not (directory / "complete").exists():
                write_shards(directory, name, config, tokenizer, seed)
    return Cache(directory, name)


def write_shards(directory: Path, name: str, config: DataConfig, tokenizer: Tokenizer, seed: int):
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


def tokenize(documents: list[Document], config: DataConfig, name: str, tokenizer: Tokenizer, seed: int,
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


# ---------------------------------------------------------------------------------------------------- packing
#
# A document of n tokens has n + 1 positions: inputs bos t1 .. tn, targets t1 .. tn eos. So each token and the
# end are predicted once, no target belongs to another document, and a document may be cut anywhere. A plan is
# an integer array [pieces, 6], ordered by row, with these columns; the first QUIET positions carry no loss.

PLAN = ROW, SEGMENT, DOCUMENT, START, LENGTH, QUIET = range(6)


def concat_and_split(lengths: np.ndarray, seq: int) -> np.ndarray:
    """The plain packing: all positions end to end, cut every `seq`; only the last row is padded.

    lengths: positions of each document [n], 0 to leave it out. Returns a plan; every piece is a segment of
    its own. A packing with a third parameter `documents` is told more about them, see `Documents`.
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    cuts = np.unique(np.concatenate([starts[lengths > 0], np.arange(0, lengths.sum(), seq)]))
    document = np.searchsorted(ends, cuts, side="right")
    row = cuts // seq
    first = np.searchsorted(row, row)  # the first piece of each piece's row
    length = np.diff(np.append(cuts, ends[-1:]))
    return np.stack([row, np.arange(len(cuts)) - first + 1, document, cuts - starts[document], length,
                     np.zeros_like(cuts)], axis=1)


def fill(plan: np.ndarray, rows: np.ndarray, seq: int, tokens_of: Callable, tokenizer: Tokenizer) -> dict:
    """Rows of a plan as arrays [len(rows), seq]: tokens targets segments positions weights document.

    tokens_of(document) gives its ids. Padding, and a row that is not in the plan, is eos in segment 0.
    """
    shape, eos = (len(rows), seq), tokenizer.eos
    out = dict(tokens=np.full(shape, eos, np.int32), targets=np.full(shape, eos, np.int32),
               segments=np.zeros(shape, np.int32), positions=np.zeros(shape, np.int32),
               weights=np.zeros(shape, np.float32), document=np.full(shape, -1, np.int32))
    first, last = np.searchsorted(plan[:, ROW], rows), np.searchsorted(plan[:, ROW], rows, side="right")
    for r in range(len(rows)):
        at, segment_at, before = 0, 0, 0
        for _, segment, document, start, length, quiet in plan[first[r]:last[r]].tolist():
            ids, to = tokens_of(document), slice(at, at + length)
            inputs = ids[max(0, start - 1):start + length - 1].astype(np.int32)
            out["tokens"][r, to] = inputs if start else np.insert(inputs, 0, tokenizer.bos)
            out["targets"][r, to] = np.append(ids[start:start + length].astype(np.int32), eos)[:length]
            segment_at, before = (segment_at, before) if segment == before else (at, segment)
            out["segments"][r, to], out["document"][r, to] = segment, document
            out["positions"][r, to] = np.arange(at - segment_at, at - segment_at + length)
            out["weights"][r, at + quiet:at + length] = 1
            at += length
    return out


def permute(index, n: int, *key: int) -> np.ndarray:
    """The image of `index` (in 0..n-1) under a pseudo-random permutation of n things that `key` chooses:
    a four-round Feistel network on the next even number of bits, walked until below n."""
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


class Documents(NamedTuple):
    """The training documents of a window of shards, in their permuted order: what a packing may ask about."""

    cache: Cache
    shard: np.ndarray  # [documents]
    number: np.ndarray  # [documents], within the shard

    def of(self, fact: Callable[[Shard], Any]) -> np.ndarray:
        """A fact of each document, such as `of(lambda shard: shard.score)`, or `of(Shard.documents)`."""
        shards = np.unique(self.shard)
        each = [np.asarray(fact(self.cache.shard(int(i)))) for i in shards]
        starts = np.cumsum([0] + [len(x) for x in each])[np.searchsorted(shards, self.shard)]
        return np.concatenate(each)[starts + self.number] if each else np.zeros(0, np.int64)

    def ids(self, document: int) -> np.ndarray:
        """Token ids of a document, prefix included."""
        shard, number = self.cache.shard(int(self.shard[document])), int(self.number[document])
        return shard.tokens[shard.offsets[number]:shard.offsets[number + 1]]


def shuffled(draw: int, rows: int, progress: float, key: tuple[int, ...]) -> int:
    """The plain order: a permutation of a window's rows, anew each epoch. An order gives the place in the
    plan of the `draw`-th row (from 0, over all epochs) of a window of `rows`; progress is 0 to 1."""
    return int(permute(draw % rows, rows, *key, 1 + draw // rows)[0])


class Rows:
    """The training rows of one source under one packing, length and order, drawn 0, 1, 2, ... for ever.

    Documents are permuted and packed in a window of shards, planned when it is reached: later shards may
    still be on their way. Plans are kept beside the shards.
    """

    def __init__(self, cache: Cache, seq: int, packing: Callable, order: Callable, window: int,
                 tokenizer: Tokenizer, key: tuple[int, ...]):
        self.cache, self.seq, self.packing, self.order = cache, seq, packing, order
        self.size, self.tokenizer, self.key, self.ends = window, tokenizer, key, [0]
        self.plans = cache.directory / "plans" / digest([identity(packing), seq, window, key])
        self.window, self.lock = lru_cache(4)(self.plan), threading.RLock()
        while not self.ends[-1]:
            if not self.grow():
                raise InputError(f"source {cache.name!r} has no document in its train split that is packed")

    def plan(self, number: int) -> tuple[Documents, np.ndarray, np.ndarray]:
        """(documents, positions of each, plan) of a window; `window` remembers the last ones."""
        shards = range(number * self.size, min((number + 1) * self.size, self.cache.sealed))
        where = [(i, np.flatnonzero(self.cache.shard(i).split == 0)) for i in shards]
        shard = np.concatenate([np.full(len(which), i) for i, which in where])
        order = permute(np.arange(len(shard)), len(shard), *self.key, number)
        documents = Documents(self.cache, shard[order], np.concatenate([which for _, which in where])[order])
        lengths = documents.of(lambda shard: np.diff(shard.offsets) + 1)
        file = self.plans / f"{number:06d}.npy"
        if not file.exists():
            takes = inspect.signature(self.packing).parameters
            more = {"documents": documents} if "documents" in takes else {}
            plan = self.packing(lengths, self.seq, **more) if len(lengths) else []
            plan = np.array(plan, np.int64).reshape(-1, len(PLAN))
            quiet = documents.of(lambda shard: shard.quiet)[plan[:, DOCUMENT]] - plan[:, START]
            plan[:, QUIET] = np.clip(quiet, plan[:, QUIET], plan[:, LENGTH])
            content = io.BytesIO()
            np.save(content, plan.astype(np.int32))
            write(file, content.getvalue())
        return documents, lengths, np.load(file).astype(np.int64)

    def grow(self) -> bool:
        """Plan the next window, once its shards are sealed; False where there is none."""
        with self.lock:  # batches are made by another thread than the one that counts epochs
            number = len(self.ends) - 1
            if self.cache.wait((number + 1) * self.size) <= number * self.size:
                return False
            plan = self.window(number)[2]
            self.ends.append(self.ends[-1] + (int(plan[-1, ROW]) + 1 if len(plan) else 0))
            return True

    @property
    def epoch(self) -> int:
        """Rows of one pass over the source; waits until all of it is there."""
        while self.grow():
            pass
        return self.ends[-1]

    def get(self, draws: np.ndarray, progress: float = 0.0) -> tuple[dict, int, int]:
        """(arrays [n, seq] of `fill`, pieces, how many of these end before their document) of draws [n]."""
        parts, pieces, cut = [], 0, 0
        for draw in draws.tolist():
            while draw >= self.ends[-1] and self.grow():
                pass
            epoch, within = divmod(draw, self.ends[-1])
            number = int(np.searchsorted(self.ends, within, side="right")) - 1
            documents, lengths, plan = self.window(number)
            rows = self.ends[number + 1] - self.ends[number]
            row = self.order(epoch * rows + within - self.ends[number], rows, progress, (*self.key, number))
            parts.append(fill(plan, np.array([row]), self.seq, documents.ids, self.tokenizer))
            here = plan[slice(*np.searchsorted(plan[:, ROW], (row, row + 1)))]
            pieces += len(here)
            cut += int(np.sum(here[:, START] + here[:, LENGTH] < lengths[here[:, DOCUMENT]]))
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0] if k != "document"}, pieces, cut


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
    rows: int  # of the whole batch, which may be more than are made here


def batch_lengths(phase) -> tuple[list[int], np.ndarray]:
    """(row lengths of a phase, index of each batch's [steps]): `seq`, or by the weights that `lengths` gives.

    A batch takes the length that is furthest behind its share.
    """
    if phase.lengths is None:
        return [phase.seq], np.zeros(phase.steps, np.int64)
    lengths, picks = list(phase.lengths(0.0)), np.zeros(phase.steps, np.int64)
    behind = np.zeros(len(lengths))
    for step in range(phase.steps):
        weights = phase.lengths(step / phase.steps)
        behind += np.array([weights[n] for n in lengths], float) / sum(weights.values())
        picks[step] = np.argmax(behind)
        behind[picks[step]] -= 1
    return lengths, picks


def apportion(owed: np.ndarray, rows: int, left: np.ndarray) -> np.ndarray:
    """Whole numbers near `owed` [n], none above `left`, that sum to `rows`: largest remainders go up."""
    whole = np.minimum(np.floor(np.maximum(owed, 0) + 1e-9), left).astype(np.int64)
    while short := rows - whole.sum():
        free = whole < left if short > 0 else whole > 0
        whole[np.argmax(np.where(free, (owed - whole) * np.sign(short), -np.inf))] += np.sign(short)
    return whole


class Loader:
    """`batch(step)` for all steps of a run, from its caches and phases (see `train.Phase`).

    mixture: {source: weight}, a function (progress within the phase, log) of these, or None for weights by
    rows. Whoever runs it fills in `log`, for each phase the dev losses {source: nats} at every `steer` of its
    steps so far, and `start`, the positions of each source that another run drew before.
    """

    def __init__(self, caches: dict[str, Cache], phases, config: DataConfig, tokenizer: Tokenizer, seed: int):
        self.names, self.phases, self.seed = list(caches), phases, seed
        self.sources = [config.sources[name] for name in caches]
        self.ends = np.cumsum([phase.steps for phase in phases])
        self.log, self.start, self.lock = [[] for _ in phases], [0] * len(caches), threading.RLock()
        self.lengths, self.picks = zip(*map(batch_lengths, phases), strict=True)
        shapes = [(len(lengths), len(caches)) for lengths in self.lengths]
        self.counts = [np.zeros((p.steps + 1, *s), np.int64) for p, s in zip(phases, shapes, strict=True)]
        self.known, self.carry = [0] * len(phases), [np.zeros(s) for s in shapes]
        self.rows = [[[Rows(cache, seq, phase.packing, phase.order, config.window, tokenizer, (seed, i))
                       for i, cache in enumerate(caches.values())] for seq in lengths]
                     for phase, lengths in zip(phases, self.lengths, strict=True)]

    def phase_of(self, step: int) -> int:
        """The phase that takes `step` (1 and up)."""
        return int(np.searchsorted(self.ends, step))

    def weights(self, phase: int, step: int) -> np.ndarray:
        """The mixture at a step of a phase (0 is its first), normalised [sources]."""
        p, names, mixture = self.phases[phase], self.names, self.phases[phase].mixture
        if mixture is None:
            rows = self.rows[phase][self.picks[phase][step]]
            mixture = {name: r.epoch if len(names) > 1 else 1 for name, r in zip(names, rows, strict=True)}
        elif callable(mixture):
            decided = step // p.steer if p.steer else 0
            if len(self.log[phase]) < decided:
                raise InputError(f"step {step} of phase {phase} is beyond the decisions taken so far")
            mixture = mixture(step / p.steps, self.log[phase][:decided])
        finite = all(0 <= w < math.inf for w in mixture.values())
        if mixture.keys() - names or not finite or not sum(mixture.values()):
            raise InputError(f"phases.{phase}.mixture gives {mixture}; allowed are weights of 0 and more, "
                             f"not all 0, for the sources {', '.join(names)}")
        weights = np.array([mixture.get(name, 0) for name in names], float)
        return weights / weights.sum()

    def drawn(self, phase: int, steps: int) -> np.ndarray:
        """Rows [lengths, sources] drawn in a phase's first `steps`: a recurrence, worked out once."""
        with self.lock:
            for step in range(self.known[phase], steps):
                self.draw(phase, step)
        return self.counts[phase][steps]

    def draw(self, phase: int, step: int):
        """Work out the rows of one more step of a phase."""
        p, at, weights = self.phases[phase], self.picks[phase][step], self.weights(phase, step)
        rows, left = p.batch * p.seq // self.lengths[phase][at], np.full(len(self.names), math.inf)
        if any(source.epochs for source in self.sources):
            limits = [source.epochs * r.epoch if source.epochs else math.inf
                      for source, r in zip(self.sources, self.rows[phase][at], strict=True)]
            left = np.floor(limits - self.begin(phase)[at] - self.counts[phase][step, at])
            left[weights == 0] = 0  # who has no share takes over nothing
        stops = np.array([source.after == "stop" for source in self.sources])
        due = self.carry[phase][at] + weights * rows
        ended = [n for n, out in zip(self.names, stops & (left < np.floor(due + 1e-9)), strict=True) if out]
        if ended or left.sum() < rows:
            raise InputError(f"source {', '.join(ended or self.names)}: no rows left at step {step} of phase "
                             f"{phase}; give fewer steps, more epochs, or after=\"renormalise\"")
        owed = self.carry[phase][at] + (share := weights * (stops | (left > 0))) / share.sum() * rows
        self.counts[phase][step + 1], self.known[phase] = self.counts[phase][step], step + 1
        self.counts[phase][step + 1, at] += (whole := apportion(owed, rows, left))
        self.carry[phase][at] = owed - whole  # carried, so that a rare source gets its share

    def positions(self, step: int) -> np.ndarray:
        """Positions of each source [sources] drawn by the first `step` steps, and before by another run."""
        out = np.array(self.start, np.int64)
        for p, (n, end) in enumerate(zip([p.steps for p in self.phases], self.ends.tolist(), strict=True)):
            out += np.array(self.lengths[p]) @ self.drawn(p, min(n, max(0, step - end + n)))
        return out

    def begin(self, phase: int) -> np.ndarray:
        """The first row [lengths, sources] in a phase: positions that were drawn before, over length."""
        before = self.positions(int(self.ends[phase]) - self.phases[phase].steps)
        return before // (len(self.lengths[phase]) * np.array(self.lengths[phase]))[:, None]

    def epochs(self, step: int) -> dict[str, float]:
        """Passes over each source that the first `step` steps make."""
        p = self.phase_of(max(1, step))
        epoch = np.array(self.lengths[p]) @ np.array([[r.epoch for r in row] for row in self.rows[p]])
        return dict(zip(self.names, (self.positions(step) / epoch).tolist(), strict=True))

    def batch(self, step: int, own: Callable[[int], np.ndarray] = np.arange) -> Batch:
        """The batch of a step (1 and up): a function of (config, seed, step), and of the log where the
        mixture is steered. own: number of its rows -> those that are made here; metrics are of these."""
        p = self.phase_of(step)
        phase, within = self.phases[p], step - 1 - (int(self.ends[p]) - self.phases[p].steps)
        at = self.picks[p][within]
        before, after = (self.begin(p)[at] + self.drawn(p, within + i)[at] for i in (0, 1))
        bounds = np.cumsum([0, *(after - before)])  # rows come source by source
        wanted, made, pieces, cut = own(int(bounds[-1])), [], 0, 0
        for i, rows in enumerate(self.rows[p][at]):
            mine = wanted[(wanted >= bounds[i]) & (wanted < bounds[i + 1])]
            if not len(mine):
                continue
            arrays, n, m = rows.get(mine - bounds[i] + before[i], within / phase.steps)
            arrays["source"], pieces, cut = np.full_like(arrays["tokens"], i), pieces + n, cut + m
            made += [phase.objective({k: v[j] for k, v in arrays.items()},
                                     np.random.default_rng([self.seed, step, r])) for j, r in enumerate(mine)]
        figures = {"data/waste": 1 - float(np.mean([row["segments"] > 0 for row, _ in made])),
                   "data/truncated": cut / pieces, "data/segments": pieces / len(made)}
        drawn = {f"data/{name}/rows": int(n) for name, n in zip(self.names, after - before, strict=True)}
        return Batch({k: np.stack([row[k] for row, _ in made]) for k in made[0][0]}, made[0][1],
                     figures | (drawn if len(self.names) > 1 else {}), int(bounds[-1]))


def prefetch(make: Callable[[int], Any], steps: range, depth: int = 2) -> Iterator[Any]:
    """make(step) for each step in turn, by a thread up to `depth` ahead; its errors are raised here."""
    ahead, pool = deque(), ThreadPoolExecutor(1)
    try:
        for step in steps:
            ahead.append(pool.submit(make, step))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)

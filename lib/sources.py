"""Sources: where documents come from."""
import ast
import gzip
import hashlib
import io
import itertools
import os
import re
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lib.errors import InputError, first_cause
from lib.fields import SURROGATE as SURROGATE
from lib.fields import Count, NotNegative, strict
from lib.seams import DOCUMENTS, PREPARE, SCORE, require_gave

SPLITS = ("train", "dev", "test", "held_out")  # the last is dev and test alike
# The splits, as indices into SPLITS, that documents are in who are read as one of them.
READ_AS = {"train": [0], "dev": [1, 3], "test": [2, 3], "held_out": [3]}
CHUNK = 2**20  # bytes that are read at once
TRIES, PAUSE = 3, 0.5  # how often a file is read that the disk fails to give; first pause, seconds


@dataclass(frozen=True)
class Document:
    """A text, the path that identifies it (its hash decides the split), and other metadata."""

    path: str
    text: str
    meta: dict = field(default_factory=dict)
    group: str = ""  # documents of one group are in one split: its hash decides, not the path's
    prefix: str = ""  # read before the text, but not predicted: no loss on it
    split: str = ""  # one of SPLITS: the split it is in, whatever any hash says
    # (start, end) of spans of the text, in characters: they become row["marks"], where the source
    # says that it has marks. A token is marked if it holds a character of a span.
    marks: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Skipped:
    """What a source yields in place of a document that it cannot give; counted by `kind`."""

    path: str
    kind: str
    detail: str = ""  # what would help to mend it, such as the keys that a record has
    # of a damaged archive: the documents that it gave before its break, which may be wrong
    doubtful: int = field(default=0, compare=False)


@strict
@dataclass(frozen=True)
class Source:
    """Where documents come from and what is done to each before packing, by functions."""

    documents: Annotated[Callable, DOCUMENTS]  # stdlib, partial(text, path=...) ...
    # (document, rng) -> document or list; training documents only
    prepare: Annotated[Callable, PREPARE] | None = None
    # (document, tokens) -> float or vector [k], kept in the cache; with a parameter `documents`
    # (documents, tokens) -> [n] or [n k], for at most 256 at once. -inf, or a vector of it, leaves
    # a training document out; dev and test documents stay, so that runs with and without a score
    # are measured on the same text.
    score: Annotated[Callable, SCORE] | None = None
    # of all its documents; "": by their hashes; "held_out": dev and test alike
    split: Literal["", "train", "dev", "test", "held_out"] = ""
    marks: bool = False  # its documents have marks, which rows then hold; see `Document`
    epochs: NotNegative = 0.0  # passes that a run may make over it; 0 is any number
    after: Literal["stop", "renormalise"] = "stop"  # then: refuse, or leave its share to the others


def documents_of(source: Source) -> Iterator[Document | Skipped]:
    """What a source gives, each looked at. Raises InputError for what is neither of the two."""
    found = source.documents()
    require_gave(isinstance(found, Iterable), DOCUMENTS, source.documents, found)
    for one in found:
        fine = isinstance(one, Skipped) or is_document(one)
        require_gave(fine, DOCUMENTS, source.documents, one, " with texts in its fields")
        yield one


def is_document(value: Any) -> bool:
    """Whether a value is a Document whose fields hold what they may."""
    if not isinstance(value, Document):
        return False
    texts = value.path, value.text, value.group, value.prefix, value.split
    whole = all(isinstance(each, str) for each in texts) and isinstance(value.meta, dict)
    return whole and all(is_span(mark) for mark in value.marks)


def is_span(value: Any) -> bool:
    """Whether a value is a pair of integers."""
    return isinstance(value, tuple | list) and [type(end) for end in value] == [int, int]


def path_hash(path: str) -> int:
    """64 bits that a document's path, or another text, alone decides."""
    encoded = path.encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest())


def split_of(path: str, dev: float, test: float) -> int:
    """Index into SPLITS of a document, from the hash of its path; `dev` and `test` are shares."""
    position = path_hash(path) / 2**64
    if position < test:
        return 2
    if position < test + dev:
        return 1
    return 0


def split_in(document: Document, source: Source, dev: float, test: float) -> int:
    """Index into SPLITS of a source's document: as it says, as the source says, or by its hash."""
    split = document.split or source.split
    if not split:
        return split_of(document.group or document.path, dev, test)
    if split not in SPLITS:
        raise InputError(f"document {document.path!r} has the split {split!r}; allowed are "
                         f'"" and {", ".join(SPLITS)}')
    return SPLITS.index(split)


def nothing(documents: Count = 1) -> Iterator[Document]:
    """Documents of one token or so, for an objective that fills rows itself, from its `rng`.

    They can be encoded by "bytes" and "numbers:N" alike, and all are for training.
    """
    for number in range(documents):
        yield Document(f"nothing/{number}", "0", split="train")


def files(path: str) -> tuple[Any, list[tuple[str, str]]]:
    """(file system, [(name, path)]) of a file, of all files below a directory or of a pattern.

    Names are relative to the directory. Hidden files are left out unless `path` is one, and so is
    what `odd_kind` says.
    """
    fs, found, _ = listing(path)
    return fs, found


def listing(path: str) -> tuple[Any, list[tuple[str, str]], list[Skipped]]:
    """What `files` gives, and what it leaves out, by kind."""
    try:
        fs, base, kinds = seen_in(path)
    except (ImportError, ValueError, OSError) as error:  # a protocol is unknown, or wants a package
        raise InputError(f"source path {path!r} cannot be read: {error}") from None
    except Exception as error:  # of fsspec: without a network each file system has its own
        raise InputError(f"source path {path!r} cannot be read ({first_cause(error)}); is there a "
                         "network, and are you allowed to read it?") from None
    named = [(place[len(base):].lstrip("/"), place) for place in kinds]
    named.sort(key=lambda file: file[0].split("/"))
    odd = [Skipped(name, kinds[place]) for name, place in named if kinds[place]]
    return fs, [(name, place) for name, place in named if not kinds[place]], odd


def seen_in(path: str) -> tuple[Any, str, dict[str, str]]:
    """(file system, directory, {place: "" or why it is left out, see `odd_kind`}) of a path."""
    fs, root = fsspec.url_to_fs(os.path.expanduser(path))
    directory = fs.isdir(root)
    found = fs.find(root)
    if not found and not directory:
        found = fs.glob(root)
    if not found and not directory:
        raise FileNotFoundError("does not exist; give a file, a directory or a pattern like *.txt")
    base = root
    if not directory:
        base = re.split(r"[*?[]", root)[0].rpartition("/")[0]
    kinds = {}
    for place in found:
        if place == root:
            kinds[place] = odd_kind(fs, place, "")
        elif "/." not in place[len(base):]:
            kinds[place] = odd_kind(fs, place, base)
    return fs, base, kinds


# Kinds of what a directory has besides regular files of its own.
ODD_KINDS = ("broken link", "link to a directory", "link out of the directory", "no regular file")


def odd_kind(fs, place: str, base: str) -> str:
    """Why a file is not read, one of ODD_KINDS; "" if it is. base: the directory it must be in.

    A directory that somebody gave away may link to any file of who reads it; a pipe never ends.
    """
    if isinstance(fs, LocalFileSystem) and base and os.path.islink(place):
        target, home = os.path.realpath(place), Path(os.path.realpath(base))
        if not os.path.exists(target):
            return "broken link"
        if os.path.isdir(target):
            return "link to a directory"
        if not any(map(Path(target).is_relative_to, (home, *blobs_of(home)))):
            return "link out of the directory"
    return "" if fs.isfile(place) else "no regular file"


def blobs_of(home: Path) -> list[Path]:
    """Where the files lie that a snapshot of the Hugging Face cache, or a part of one, links to.

    That is REPOSITORY/blobs of REPOSITORY/snapshots/REVISION.
    """
    above = [home, *home.parents]
    return [one.parent.parent / "blobs" for one in above if one.parent.name == "snapshots"]


def text(path: str, separator: str = "", longest: Count = 2**26) -> Iterator[Document | Skipped]:
    """A document for each UTF-8 file that `path` means, see `files`; .gz and .zst are unpacked.

    With a `separator` each file is cut after it; the pieces are documents `file#number`, from 1.
    Files are read piece by piece: a document over `longest` bytes is skipped and never held whole.
    Those before the break of a damaged archive are kept, and counted as doubtful. Raises InputError
    for a file that the disk or the network does not give, tried TRIES times: what it holds is not
    lost, and must not count so.
    """
    fs, found, odd = listing(path)
    yield from odd
    for name, place in found:
        yield from texts_in(fs, name, place, separator, longest)


def texts_in(fs, name: str, place: str, separator: str = "",
            longest: int = 2**26) -> Iterator[Document | Skipped]:
    """The same for one file, see `files`. It is read again where the disk fails to give it."""
    compression, given = compression_of(name), 0
    too_long = "over-long line" if separator == "\n" else "over-long document"
    for again in range(TRIES):
        try:
            with fs.open(place, compression=compression) as raw:
                file = raw if hasattr(raw, "peek") else io.BufferedReader(raw)
                for number, piece in enumerate(cut(file, separator, longest), 1):
                    if number > given:
                        given = number
                        path = f"{name}#{number}" if separator else name
                        yield decode(piece, path, too_long)
            break
        except EOFError:
            yield Skipped(name, "truncated archive", doubtful=given)
            break
        except Exception as error:  # of fsspec and of archives, each of which has its own
            if is_damage(error):
                yield Skipped(name, "unreadable", doubtful=given)
                break
            wait_or_refuse(place, error, again)


def is_damage(error: Exception) -> bool:
    """Whether an error says that an archive is damaged; any other is of the disk or the network."""
    named = type(error).__name__ == "ZstdError"  # of a package that may be missing
    return named or isinstance(error, zlib.error | gzip.BadGzipFile)


def has_no_number(error: Exception) -> bool:
    """Whether an error is none that the system gave for a disk."""
    return not isinstance(error, OSError) or error.errno is None


def retried(read: Callable, place: str, damage: Callable = has_no_number) -> Any:
    """What `read` gives, called again where the disk fails to give it; see `text`.

    damage: error -> whether it says what is in the file. Such an error is raised as it is.
    """
    for again in range(TRIES):
        try:
            return read()
        except Exception as error:  # of fsspec: without a network each file system has its own
            if damage(error):
                raise
            wait_or_refuse(place, error, again)


def wait_or_refuse(place: str, error: Exception, again: int):
    """Wait before a file is read again; raise InputError after the last time."""
    if again + 1 == TRIES:
        why = getattr(error, "strerror", None) or first_cause(error)
        raise InputError(f"source file {place!r} cannot be read ({why}); mend that, or "
                         "move it elsewhere; what was built so far is kept") from None
    time.sleep(PAUSE * 2**again)


def compression_of(name: str) -> str | None:
    """The compression that a file's name stands for, in fsspec's words."""
    compression = {"gz": "gzip", "zst": "zstd"}.get(name.rpartition(".")[2])
    # fsspec takes the package zstandard too, but that one ends at a break as if the file did.
    if compression == "zstd" and not hasattr(fsspec.compression.compr.get("zstd"), "peek"):
        raise InputError(f"{name} needs the package backports.zstd")
    return compression


def cut(file, separator: str, longest: int) -> Iterable[bytes | None]:
    """The content of a binary file, cut after each separator; None for a piece that is too long."""
    if separator == "\n":
        return lines(file, longest)
    if separator:
        return pieces(file, separator.encode(), longest)
    return [whole_of(file, longest)]


def whole_of(file, longest: int) -> bytes | None:
    """The content of a binary file; None for over `longest` bytes, which are never held."""
    chunks, size = [], 0
    while chunk := file.read(CHUNK):
        chunks.append(chunk)
        size += len(chunk)
        if size > longest:
            return None
    return b"".join(chunks)


def pieces(file, end: bytes, longest: int) -> Iterator[bytes | None]:
    """The content of a binary file, cut after each `end`; None for a piece over `longest` bytes."""
    held, too_long = b"", False
    while chunk := file.read(CHUNK):
        *whole, held = (held + chunk).split(end)
        for piece in whole:
            too_long = too_long or len(piece) + len(end) > longest
            yield None if too_long else piece + end
            too_long = False
        if len(held) > longest:
            too_long = True
            held = held[-len(end):]  # the end may stand across two chunks
    if too_long or held:
        yield None if too_long else held


def lines(file, longest: int) -> Iterator[bytes | None]:
    """The lines of a binary file. One over `longest` bytes is never held whole: it gives None."""
    while line := file.readline(longest + 1):
        too_long = len(line) > longest
        while too_long and line and line[-1:] != b"\n":
            line = file.readline(longest)
        yield None if too_long else line


def decode(piece: bytes | None, path: str, too_long: str) -> Document | Skipped:
    """The document of a piece of a file. too_long: the kind of what is skipped for its length."""
    if piece is None:
        return Skipped(path, too_long)
    try:
        return Document(path, piece.decode())
    except UnicodeDecodeError:
        return Skipped(path, "undecodable")

DEFINITIONS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
NOT_STDLIB = {"idlelib", "lib2to3", "encodings", "__pycache__", "site-packages", "dist-packages"}


def stdlib(unit: str = "module") -> Iterator[Document | Skipped]:
    """The running Python's standard library: a document for each "module" or each "definition".

    Paths are relative to the library. Metadata: `module`, its dotted name, and `domain`, the first
    part of this. Left out are tests and the directories NOT_STDLIB.
    """
    if unit not in ("module", "definition"):
        raise InputError(f'stdlib has no unit {unit!r}; allowed are "module" and "definition"')
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in NOT_STDLIB or part.startswith("test") for part in parts):
            continue
        document = replace(next(text(str(path))), path="/".join(parts))
        if isinstance(document, Skipped):
            yield document
            continue
        module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        document.meta.update(module=module, domain=module.split(".")[0])
        if unit == "module":
            yield document
        else:
            yield from definitions(document)


def definitions(module: Document) -> list[Document | Skipped]:
    """The functions and classes at a module's top level, with decorators, each a document.

    Their paths are `path:name`; they are in the split of their module.
    """
    try:
        body = ast.parse(module.text).body
    except (SyntaxError, ValueError, RecursionError):
        return [Skipped(module.path, "unparsable")]
    rows = list(io.StringIO(module.text, newline=""))  # str.splitlines would split at more than ast
    found = []
    for node in body:
        if isinstance(node, DEFINITIONS):
            first = min(part.lineno for part in (node, *node.decorator_list))
            code = "".join(rows[first - 1:node.end_lineno])
            path = f"{module.path}:{node.name}"
            found.append(Document(path, code, module.meta, group=module.path))
    return found


def describe_skipped(counts: dict[str, int], source: Source) -> str:
    """What a source skipped, {kind: how many}, as "skipped 3 missing key (...)".

    In brackets stands the first detail that it gives. Its documents are read again for this, as the
    counts may be those of shards that were sealed long ago.
    """
    if not counts:
        return "skipped nothing"
    words = "skipped " + ", ".join(f"{number:,} {kind}" for kind, number in counts.items())
    for document in itertools.islice(documents_of(source), 1000):
        if isinstance(document, Skipped) and document.detail:
            return f"{words} ({document.path}: {document.detail})"
    return words

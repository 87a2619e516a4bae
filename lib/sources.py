"""Sources: where documents come from."""
import ast
import hashlib
import io
import itertools
import os
import re
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import fsspec

from lib.errors import InputError, first_cause
from lib.fields import SURROGATE as SURROGATE
from lib.fields import Count, NotNegative, strict
from lib.seams import DOCUMENTS, PREPARE, SCORE, require_gave

SPLITS = ("train", "dev", "test", "held_out")  # the last is dev and test alike
# The splits, as indices into SPLITS, that documents are in who are read as one of them.
READ_AS = {"train": [0], "dev": [1, 3], "test": [2, 3], "held_out": [3]}
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

    Names are relative to the directory. Hidden files are left out unless `path` is one.
    """
    try:
        fs, root = fsspec.url_to_fs(os.path.expanduser(path))
        found = fs.find(root) or fs.glob(root)
        if not found:
            raise FileNotFoundError(
                "does not exist; give a file, a directory or a pattern like *.txt")
        base = root
        if not fs.isdir(root):
            base = re.split(r"[*?[]", root)[0].rpartition("/")[0]
        visible = [place for place in found if place == root or "/." not in place[len(base):]]
        places = [place for place in visible if fs.isfile(place)]
    except (ImportError, ValueError, OSError) as error:  # a protocol is unknown, or wants a package
        raise InputError(f"source path {path!r} cannot be read: {error}") from None
    except Exception as error:  # without a network each file system of fsspec has its own
        raise InputError(f"source path {path!r} cannot be read ({first_cause(error)}); is there a "
                         "network, and are you allowed to read it?") from None
    named = [(place[len(base):].lstrip("/"), place) for place in places]
    return fs, sorted(named, key=lambda file: file[0].split("/"))


def text(path: str, separator: str = "", longest: Count = 2**26) -> Iterator[Document | Skipped]:
    """A document for each UTF-8 file that `path` means, see `files`; .gz and .zst are unpacked.

    With a `separator` each file is cut after it; the pieces are documents `file#number`, from 1.
    Where that is a line end, lines are read one by one: those over `longest` bytes are skipped, and
    those before the break of a truncated archive are kept. Raises InputError for a file that the
    disk cannot read, tried again TRIES times: what it holds is not lost, and must not count so.
    """
    fs, found = files(path)
    for name, place in found:
        yield from text_of(fs, name, place, separator, longest)


def text_of(fs, name: str, place: str, separator: str = "",
            longest: int = 2**26) -> Iterator[Document | Skipped]:
    """The same for one file, see `files`. It is read again where the disk fails to give it."""
    compression, given = compression_of(name), 0
    for again in range(TRIES):
        try:
            with fs.open(place, compression=compression) as raw:
                file = raw if hasattr(raw, "peek") else io.BufferedReader(raw)
                for number, piece in enumerate(cut(file, separator, longest), 1):
                    if number > given:
                        given = number
                        yield decode(piece, f"{name}#{number}" if separator else name)
            break
        except EOFError:
            yield Skipped(name, "truncated archive")
            break
        except Exception as error:  # each file system and each kind of archive has its own
            if getattr(error, "errno", None) is None:  # none of the disk's
                yield Skipped(name, "unreadable")
                break
            wait_or_refuse(place, error, again)


def wait_or_refuse(place: str, error: OSError, again: int):
    """Wait before a file is read again; raise InputError after the last time."""
    if again + 1 == TRIES:
        raise InputError(f"source file {place!r} cannot be read ({error.strerror}); mend that, or "
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
    """The content of a binary file, cut after each separator; None for a line that is too long."""
    if separator == "\n":
        return lines(file, longest)
    if separator:
        end = re.escape(separator.encode())
        return re.findall(b"(?s).*?%b|.+$" % end, file.read())
    return [file.read()]


def lines(file, longest: int) -> Iterator[bytes | None]:
    """The lines of a binary file. One over `longest` bytes is never held whole: it gives None."""
    while line := file.readline(longest + 1):
        too_long = len(line) > longest
        while too_long and line and line[-1:] != b"\n":
            line = file.readline(longest)
        yield None if too_long else line


def decode(piece: bytes | None, path: str) -> Document | Skipped:
    """The document of a piece of a file."""
    if piece is None:
        return Skipped(path, "over-long line")
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

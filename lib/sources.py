"""Sources: where documents come from."""
import ast
import hashlib
import io
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import fsspec

from lib.errors import InputError
from lib.fields import NotNegative, strict

SPLITS = ("train", "dev", "test")


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


@strict
@dataclass(frozen=True)
class Source:
    """Where documents come from and what is done to each before packing: functions, set in config files."""

    documents: Callable[[], Iterable[Document | Skipped]]  # stdlib, partial(text, path=...), or your own
    prepare: Callable | None = None  # (document, rng) -> document or list of them; training documents only
    score: Callable | None = None  # (document, tokens) -> float, kept in the cache; -inf leaves it out
    epochs: NotNegative = 0.0  # passes that a run may make over it; 0 is any number
    after: Literal["stop", "renormalise"] = "stop"  # then: refuse to go on, or leave its share to the others


def path_hash(path: str) -> int:
    """64 bits that a document's path alone decides."""
    return int.from_bytes(hashlib.blake2b(path.encode("utf-8", "replace"), digest_size=8).digest())


def split_of(path: str, dev: float, test: float) -> int:
    """Index into SPLITS for a document, from the hash of its path."""
    u = path_hash(path) / 2**64
    return 2 if u < test else 1 if u < test + dev else 0
SURROGATE = re.compile("[\ud800-\udfff]")  # a lone half of a character: not text, and no UTF-8

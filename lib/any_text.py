"""A reader of any text: it goes by what a path holds."""
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

from lib.readers import hugging_face, json_of, jsonl_of, parquet_of
from lib.sources import Document, Skipped, files, listing, texts_in

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
READERS = {"jsonl": jsonl_of, "json": json_of, "parquet": parquet_of}  # of files of records
SEVERAL = "dataset_dict.json"  # what `save_to_disk` writes beside several data sets


class Survey(NamedTuple):
    """What a path holds, and how `any_text` reads it."""

    kind: str  # "text", "jsonl", "json", "parquet" or "hugging_face"
    fs: Any  # file system
    files: list[tuple[str, str]]  # (name, path) of those that are read, see `lib.sources.files`
    bytes: int  # of them, as they lie there
    left_out: Counter  # files that are not read, by the end of their names


def any_text(
    path: str,
    kind: Literal["", "jsonl", "json", "parquet", "text"] = "",
    content: str = "text",
    separator: str | None = None,
    meta: tuple = (),
    key: str = "",
    split: str = "train",
    without: str = "",
) -> Iterator[Document | Skipped]:
    """A document for each record or text of what `path` means, whatever that holds.

    path: a file, a directory or a pattern, here or wherever fsspec reads, or a directory that
    `save_to_disk` wrote. Files are read by the end of their names: .jsonl, .json and .parquet as
    records (see `compose`), any other as text, .gz and .zst unpacked before. Of files of several
    kinds those of one are read: of `kind`, or of the kind that has most bytes. separator: ends a
    document within a text; without it a text is a document, but one that is alone is cut at its
    blank lines, so that there is more than one. split: of several that were saved to disk. without:
    leave out the files that this path means, such as held-out ones among the others.
    """
    seen = survey(path, kind, without)
    yield from listing(path)[2]
    if seen.kind == "hugging_face":
        if SEVERAL not in dict(seen.files):
            split = ""
        yield from hugging_face(path, split, content, meta, key)
    elif seen.kind in READERS:
        read = READERS[seen.kind]
        for name, place in seen.files:
            yield from read(seen.fs, name, place, content, meta, key)
    else:
        yield from texts(seen, separator)


def texts(seen: Survey, separator: str | None) -> Iterator[Document | Skipped]:
    """The documents of files of text; see `any_text`."""
    alone = len(seen.files) == 1
    if separator is None:
        separator = "\n\n" if alone else ""
    for name, place in seen.files:
        for item in texts_in(seen.fs, name, place, separator):
            if not alone and item == Skipped(name, "undecodable"):
                item = Skipped(name, "no text")  # a picture among texts, say
            yield item


def survey(path: str, kind: str = "", without: str = "") -> Survey:
    """What a path holds; see `any_text`. Raises InputError where nothing is there."""
    fs, found = files(path)
    if without:
        _, others = files(without)
        places = {place for _, place in others}
        found = [file for file in found if file[1] not in places]
    saved = {"state.json", SEVERAL} & {name for name, _ in found}
    if saved and not kind:
        size = size_of(fs, found)
        return Survey("hugging_face", fs, found, size, Counter())
    chosen = kind or largest_kind(fs, found)
    read = [file for file in found if kind_of(file[0]) == chosen]
    if not read:  # what `kind` says is true of files by other names too
        read = found
    others = set(found) - set(read)
    left_out = Counter(ending(name) for name, _ in others)
    size = size_of(fs, read)
    return Survey(chosen, fs, read, size, left_out)


def ending(name: str) -> str:
    """The last of the endings of a file's name."""
    return PurePosixPath(name).suffix


def size_of(fs, found: list[tuple[str, str]]) -> int:
    """The bytes of files."""
    total = 0
    for _, place in found:
        total += fs.size(place) or 0  # unknown of some places on the web
    return total


def largest_kind(fs, found: list[tuple[str, str]]) -> str:
    """The kind of file that has most bytes; "text" where there is no file."""
    sizes = Counter(text=0)
    for file in found:
        kind = kind_of(file[0])
        sizes[kind] += size_of(fs, [file])
    return max(sizes, key=sizes.get)


def kind_of(name: str) -> str:
    """The kind of file that the end of a name stands for."""
    plain = name.lower()
    plain = plain.removesuffix(".gz").removesuffix(".zst")
    return KINDS.get(ending(plain), "text")

"""Readers of records: JSON, Parquet, Hugging Face data sets and TensorFlow Datasets."""
import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from lib.disk import user_path
from lib.errors import InputError, user_errors
from lib.sources import Document, Skipped, listing, retried, texts_in

LONG = 640  # digits that Python reads as an integer under any of its limits
SHOWN_KEYS = 20  # of a record that lacks one


class MissingKey(Exception):
    """A record has nothing under a key; the message says what it has."""


def compose(record: dict | str, name: str, content: str, meta: tuple = (),
            key: str = "") -> Document | Skipped:
    """The document of a record, or of a record's JSON.

    `content` is a key, or a template of several such as "{title}: {body.text}"; `meta` are the keys
    to keep as metadata; `key` is the one that holds the path, which is `name` otherwise. A dot
    leads into a nested record. All these keys must be there, and those of `content` must hold text.
    """
    if isinstance(record, str):
        try:
            record = read_json(record)
        except (ValueError, RecursionError):
            return Skipped(name, "malformed JSON" if record.strip() else "empty")
    try:
        whole = fill_in(content, record)
        if whole is None:
            return Skipped(name, "not text")
        path = look_up(record, key) if key else name
        if path is None:
            raise MissingKey(f"null under the key {key!r}")
        return Document(str(path), whole, {at: look_up(record, at) for at in meta})
    except MissingKey as error:
        return Skipped(name, "missing key", str(error))
    except UnicodeDecodeError:
        return Skipped(name, "undecodable")


def read_json(text: str) -> Any:
    """The value of a JSON text. An integer of more digits than Python reads is a float."""
    text = text.removeprefix("\ufeff")
    try:
        return json.loads(text)
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError):
            raise
        return json.loads(text, parse_int=number_of)


def number_of(digits: str) -> int | float:
    """An integer, or a float of about its size where it is too long."""
    return int(digits) if len(digits) < LONG else float(digits)


def fill_in(content: str, record) -> str | None:
    """The text under a key, or a template filled from a record; None if a part is not text."""
    placeholder = "{([^{}]+)}" if "{" in content else "(.+)"
    texts = {at: look_up(record, at) for at in re.findall(placeholder, content)}
    if not all(isinstance(value, str) for value in texts.values()):
        return None
    return re.sub(placeholder, lambda match: texts[match[1]], content)


def look_up(record, at: str) -> Any:
    """The value under a key, or under keys of nested records "a.b"; bytes are decoded as UTF-8."""
    value = record
    for part in at.split("."):
        try:
            value = value[part]
        except (LookupError, TypeError):  # no such key, or no record to look into
            raise MissingKey(f"no key {at!r}; {describe_keys(record)}") from None
    return value.decode() if isinstance(value, bytes) else value


def describe_keys(record) -> str:
    """The keys of a record, in words."""
    if not isinstance(record, dict):
        return f"the record is of type {type(record).__name__} and has no keys"
    keys = ", ".join(repr(key) for key in list(record)[:SHOWN_KEYS])
    return f"the record has the keys {keys or 'none'}"


def jsonl(path: str, content: str = "text", meta: tuple = (), key: str = "",
          longest: int = 2**26) -> Iterator[Document | Skipped]:
    """A document for each line of the files that `path` means (see `files`), by `compose`.

    Its path is `file#line`, from 1, or what stands under `key`. A line over `longest` bytes is
    skipped.
    """
    fs, found, odd = listing(path)
    yield from odd
    for name, place in found:
        yield from jsonl_of(fs, name, place, content, meta, key, longest)


def jsonl_of(fs, name: str, place: str, content: str = "text", meta: tuple = (), key: str = "",
             longest: int = 2**26) -> Iterator[Document | Skipped]:
    """The same for one file, see `files`."""
    for line in texts_in(fs, name, place, "\n", longest):
        if isinstance(line, Document):
            yield compose(line.text, line.path, content, meta, key)
        else:
            yield line


def json_of(fs, name: str, place: str, content: str = "text", meta: tuple = (),
            key: str = "") -> Iterator[Document | Skipped]:
    """A document for each record of a .json file: of a list, one alone, or a record a line.

    Its path is `file#number`, from 1, or what stands under `key`. Memory holds the whole file.
    """
    whole = next(texts_in(fs, name, place, longest=2**40))
    if isinstance(whole, Skipped):
        yield whole
        return
    try:
        found = read_json(whole.text)
    except (ValueError, RecursionError):
        yield from jsonl_of(fs, name, place, content, meta, key)
        return
    records = found if isinstance(found, list) else [found]
    for number, record in enumerate(records, 1):
        given = record if isinstance(record, dict) else json.dumps(record)
        yield compose(given, f"{name}#{number}", content, meta, key)


def parquet(path: str, content: str = "text", meta: tuple = (),
            key: str = "") -> Iterator[Document | Skipped]:
    """A document for each row of the Parquet files that `path` means (see `files`), by `compose`.

    Its path is `file#group.row`, both from 1, or what stands under `key`. Memory holds one row
    group at a time.
    """
    need_pyarrow()
    fs, found, odd = listing(path)
    yield from odd
    for name, place in found:
        yield from parquet_of(fs, name, place, content, meta, key)


def need_pyarrow():
    """Raise InputError where the package is not installed."""
    said = "Parquet files need the package pyarrow: pip install pyarrow"
    with user_errors(ImportError, sentence=said):
        import pyarrow.parquet  # noqa: F401


def parquet_of(fs, name: str, place: str, content: str = "text", meta: tuple = (),
               key: str = "") -> Iterator[Document | Skipped]:
    """The same for one file, see `files`."""
    need_pyarrow()
    import pyarrow.parquet
    def opened():
        return pyarrow.parquet.ParquetFile(fs.open(place), page_checksum_verification=True)

    def damage(error: Exception) -> bool:  # pyarrow raises plain OSErrors for it too
        if isinstance(error, MemoryError):  # pyarrow has one of its own
            return False
        plain = type(error) is OSError and error.errno is None
        return plain or isinstance(error, pyarrow.ArrowException | UnicodeDecodeError)

    def read(group: int):
        file = files[0] if files else opened()
        files.clear()  # it is opened again where this fails
        found = file.read_row_group(group)
        files.append(file)
        return found

    files = []
    try:
        files.append(retried(opened, place, damage))
    except (pyarrow.ArrowException, OSError):  # the index of row groups stands at the end
        yield Skipped(name, "truncated archive")
        return
    for group in range(files[0].num_row_groups):
        try:
            records = retried(partial(read, group), place, damage).to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError):
            yield Skipped(f"{name}#{group + 1}", "unreadable row group")
            continue
        for row, record in enumerate(records, 1):
            yield compose(record, f"{name}#{group + 1}.{row}", content, meta, key)


def hugging_face(path: str, split: str = "", content: str = "text", meta: tuple = (),
                 key: str = "") -> Iterator[Document | Skipped]:
    """A document for each record of a directory that `save_to_disk` wrote, by `compose`.

    Its path is `split#number`, from 1, or what stands under `key`. `split` is one of the data set's
    own, where it has several; ours follows from the path as everywhere.
    """
    said = "Hugging Face data sets need the package datasets: pip install datasets"
    with user_errors(ImportError, sentence=said):
        import datasets
    said = f"source path {path!r} is no directory that save_to_disk wrote: {{error}}"
    with user_errors((OSError, ValueError), sentence=said):
        found = datasets.load_from_disk(str(user_path(path)))
    if isinstance(found, dict):
        if split not in found:
            raise InputError(f"{path!r} has no split {split!r}; allowed are {', '.join(found)}")
        found = found[split]
    for number, record in enumerate(found, 1):
        yield compose(record, f"{split}#{number}", content, meta, key)


def tfds(data_set: str, data_dir: str = "", split: str = "train", content: str = "text",
         meta: tuple = (), key: str = "") -> Iterator[Document | Skipped]:
    """A document for each example of a TensorFlow data set's split, by `compose`.

    Its path is `data set/split#number`, from 1, or what stands under `key`. The split is TFDS's;
    ours follows from the path as everywhere. `data_dir` holds the data set, as ArrayRecord.
    """
    said = ("TensorFlow data sets need the package tensorflow-datasets: "
            "pip install tensorflow-datasets array_record")
    with user_errors(ImportError, sentence=said):
        import tensorflow_datasets
    place = str(user_path(data_dir)) if data_dir else None
    try:
        examples = tensorflow_datasets.data_source(
            data_set, split=split, data_dir=place, download=False)
    except Exception as error:  # of TFDS: a class for each of no data set, no split, no record
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"TFDS cannot open {data_set!r}, split {split!r}, in "
                         f"{data_dir or 'its own directory'} as ArrayRecord: {reason}") from None
    for number in range(len(examples)):
        name = f"{data_set}/{split}#{number + 1}"
        try:
            record = retried(partial(examples.__getitem__, number), data_set)
        except InputError:
            raise
        except Exception:  # of TFDS, whose reader and decoders share no class
            yield Skipped(name, "unreadable")
            continue
        yield compose(without_numpy(record), name, content, meta, key)


def without_numpy(value):
    """A record with Python's numbers and lists for numpy's; bytes are left for `look_up`."""
    if isinstance(value, dict):
        return {key: without_numpy(inner) for key, inner in value.items()}
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return value

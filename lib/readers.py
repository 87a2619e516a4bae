"""Readers of records: JSON Lines, Parquet, Hugging Face data sets and TensorFlow Datasets."""
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lib.errors import InputError
from lib.sources import Document, Skipped, files, text


def jsonl(path: str, content: str = "text", meta: tuple = (), key: str = "",
          longest: int = 2**26) -> Iterator[Document | Skipped]:
    """A document for each line of the files that `path` means, see `data.text`, by `compose`.

    Its path is `file#line`, from 1, or what stands under `key`; a line over `longest` bytes is skipped.
    """
    for line in text(path, "\n", longest):
        yield compose(line.text, line.path, content, meta, key) if isinstance(line, Document) else line


def compose(record: dict | str, name: str, content: str, meta: tuple = (),
            key: str = "") -> Document | Skipped:
    """The document of a record, or of its JSON; used by the other formats of records too.

    `content` is a key, or a template of several such as "{title}: {body.text}"; `meta` are keys to keep as
    metadata; `key` holds the path, which is `name` otherwise. A dot leads into a nested record. All of these
    keys must be there, and those of `content` must hold text.
    """
    def find(at: str):
        value = functools.reduce(lambda inner, part: inner[part], at.split("."), record)
        return value.decode() if isinstance(value, bytes) else value

    braces = "{([^{}]+)}" if "{" in content else "(.+)"
    try:
        record = json.loads(record.removeprefix("\ufeff")) if isinstance(record, str) else record
        found = {at: find(at) for at in re.findall(braces, content)}
        if not all(isinstance(value, str) for value in found.values()):
            return Skipped(name, "not text")
        if key and find(key) is None:
            return Skipped(name, "missing key")
        whole = re.sub(braces, lambda match: found[match[1]], content)
        return Document(str(find(key)) if key else name, whole, {at: find(at) for at in meta})
    except (LookupError, TypeError):
        return Skipped(name, "missing key")
    except (ValueError, RecursionError) as error:
        return Skipped(name, "undecodable" if isinstance(error, UnicodeError) else
                       "malformed JSON" if record.strip() else "empty")


def parquet(path: str, content: str = "text", meta: tuple = (),
            key: str = "") -> Iterator[Document | Skipped]:
    """A document for each row of the files that `path` means (see `data.files`), by `compose`.

    A document's path is `file#group.row`, both from 1, or what the row holds under `key`.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError("configs/parquet.py needs the package pyarrow: pip install pyarrow") from None
    fs, found = files(path)
    for name, place in found:
        try:
            file = pyarrow.parquet.ParquetFile(fs.open(place))
        except (pyarrow.ArrowException, OSError):  # the index of row groups stands at the end
            yield Skipped(name, "truncated archive")
            continue
        for group in range(file.num_row_groups):
            try:
                records = file.read_row_group(group).to_pylist()
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError):
                yield Skipped(f"{name}#{group + 1}", "unreadable row group")
                continue
            for row, record in enumerate(records, 1):
                yield compose(record, f"{name}#{group + 1}.{row}", content, meta, key)


def hugging_face(path: str, split: str = "", content: str = "text", meta: tuple = (),
                 key: str = "") -> Iterator[Document | Skipped]:
    """A document for each record, by `compose`; its path is `split#number`, from 1, or what `key` holds.

    `split` is one of the data set's own, where it has several; ours follows from the path as everywhere.
    """
    try:
        import datasets
    except ImportError:
        raise InputError("configs/hugging_face.py needs the package datasets: pip install datasets") from None
    try:
        found = datasets.load_from_disk(str(Path(path).expanduser()))
    except (OSError, ValueError) as error:
        raise InputError(f"source path {path!r} is no directory that save_to_disk wrote: {error}") from None
    if isinstance(found, dict):
        if split not in found:
            raise InputError(f"{path!r} has no split {split!r}; allowed are {', '.join(found)}")
        found = found[split]
    for number, record in enumerate(found, 1):
        yield compose(record, f"{split}#{number}", content, meta, key)


def tfds(data_set: str, data_dir: str = "", split: str = "train", content: str = "text", meta: tuple = (),
         key: str = "") -> Iterator[Document | Skipped]:
    """A document for each example of a split, by `compose`; its path is `data set/split#number`, from 1.

    The split here is TFDS's; ours follows from the path as everywhere. Numbers and arrays become plain ones.
    """
    try:
        import tensorflow_datasets
    except ImportError:
        raise InputError("configs/tfds.py needs the package tensorflow-datasets: "
                         "pip install tensorflow-datasets array_record") from None
    try:
        place = str(Path(data_dir).expanduser()) if data_dir else None
        examples = tensorflow_datasets.data_source(data_set, split=split, data_dir=place, download=False)
    except Exception as error:  # of many classes: no such data set, no such split, not there, not ArrayRecord
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"TFDS cannot open {data_set!r}, split {split!r}, in "
                         f"{data_dir or 'its own directory'} as ArrayRecord: {reason}") from None
    for number in range(len(examples)):
        name = f"{data_set}/{split}#{number + 1}"
        try:
            record = examples[number]
        except Exception:  # the reader's and the decoder's errors have no class in common
            yield Skipped(name, "unreadable")
            continue
        yield compose(plain(record), name, content, meta, key)


def plain(value):
    """A record with Python's numbers and lists for numpy's; bytes stay for `compose` to decode."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value

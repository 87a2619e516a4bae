"""JSON Lines, as most corpora come: plain, .gz or .zst, here or on gs://, s3:// and their like.

Shows a source over records: text by a key, a nested key or a template, metadata kept, and damage given as
`Skipped`, so that building counts it by kind. Costs some minutes on two CPU cores as it stands.

    python train.py configs/jsonl.py --data.sources.mine.documents.path DIR
    ... --data.sources.mine.documents.content "{title}: {body.text}" --data.sources.mine.documents.key url
"""
import functools
import json
import re
from collections.abc import Iterator
from functools import partial

from data import DataConfig, Document, Skipped, Source, text
from model import ModelConfig
from train import Config, Phase, Schedule


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


config = Config(
    model=ModelConfig(layers=2, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, vocab=2048),
    data=DataConfig(sources={"mine": Source(partial(jsonl, path="~/my_jsonl"))}),
    phases=(Phase(steps=600, batch=8, seq=256),),
    schedule=Schedule(peak=4e-3),
)

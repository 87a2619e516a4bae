"""Mine: a small model on text of yours, which may be JSON Lines, Parquet or plain text.

A file that ends in .jsonl or .parquet has a document in each record. Any other file is plain text,
and a document ends at each blank line. Files may be packed as .gz or .zst. A run takes some minutes
on two CPU cores. docs/data.md shows more formats.

    python train.py configs/mine.py --path FILE
    python train.py configs/mine.py --path DIR --kind jsonl --content "{title}: {body.text}"
"""
from functools import partial
from typing import Literal

from data import DataConfig, Source, text
from lib.readers import jsonl, parquet
from model import ModelConfig
from train import Config, Phase, Schedule


def config(
    path: str,
    kind: Literal["", "jsonl", "parquet", "text"] = "",
    content: str = "text",
    separator: str = "\n\n",
) -> Config:
    """A run on the text in `path`: a file, a directory or a pattern, here or on gs://, s3://.

    kind: how to read it; "" goes by how the path ends. content: the key of a record's text, or a
    template of keys. separator: the end of a document in plain text.
    """
    kind = kind or kind_of(path)
    documents = {
        "jsonl": partial(jsonl, path=path, content=content),
        "parquet": partial(parquet, path=path, content=content),
        "text": partial(text, path=path, separator=separator),
    }
    return Config(
        model=ModelConfig(
            layers=2, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, vocab=2048),
        data=DataConfig(sources={"mine": Source(documents[kind])}),
        phases=(Phase(steps=600, batch=8, seq=256),),
        schedule=Schedule(peak=4e-3),
    )


def kind_of(path: str) -> str:
    """The kind of file that a path's ending stands for."""
    plain = path.removesuffix(".gz").removesuffix(".zst")
    for kind in ("jsonl", "parquet"):
        if plain.endswith(f".{kind}"):
            return kind
    return "text"

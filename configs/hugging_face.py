"""A data set of Hugging Face's `datasets`, from a directory that its `save_to_disk` wrote.

Shows a source over a library that the core does not need. Costs some minutes on two CPU cores as it stands.
Records are read from mapped Arrow files: memory stays small. Needs the package datasets; downloads nothing.

    python train.py configs/hugging_face.py --data.sources.mine.documents.path DIR
    ... --data.sources.mine.documents.content "{title}: {body.text}" --data.sources.mine.documents.split train
"""
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from configs.jsonl import compose
from data import DataConfig, Document, InputError, Skipped, Source
from model import ModelConfig
from train import Config, Phase, Schedule


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


config = Config(
    model=ModelConfig(layers=2, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, vocab=2048),
    data=DataConfig(sources={"mine": Source(partial(hugging_face, path="~/my_data_set"))}),
    phases=(Phase(steps=600, batch=8, seq=256),),
    schedule=Schedule(peak=4e-3),
)

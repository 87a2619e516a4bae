"""A data set of TensorFlow Datasets, by name, read as ArrayRecord without TensorFlow.

Shows a source over records that can be reached at random. Costs some minutes on two CPU cores as it stands,
once the data set is there as ArrayRecord files: it is read from `data_dir` (TFDS's own default if empty), and
never downloaded.

    python train.py configs/tfds.py --data.sources.mine.documents.data_set wikipedia/20230601.simple
    ... --data.sources.mine.documents.data_dir DIR --data.sources.mine.documents.content "{title}: {text}"
"""
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from configs.jsonl import compose
from data import DataConfig, Document, InputError, Skipped, Source
from model import ModelConfig
from train import Config, Phase, Schedule


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


config = Config(
    model=ModelConfig(layers=2, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, vocab=2048),
    data=DataConfig(sources={"mine": Source(partial(tfds, data_set="wikipedia/20230601.simple"))}),
    phases=(Phase(steps=600, batch=8, seq=256),),
    schedule=Schedule(peak=4e-3),
)

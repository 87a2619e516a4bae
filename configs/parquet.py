"""Text in Parquet files: row groups are read one after another, so that memory holds one at a time.

Shows a source of one's own with helpers: `compose` for keys and templates, `Skipped` for damage (a
row group that cannot be read is one). Costs some minutes on two CPU cores as it stands. Needs pyarrow.

    python train.py configs/parquet.py --data.sources.mine.documents.path DIR
    ... --data.sources.mine.documents.content "{title}: {body.text}" --data.sources.mine.documents.key url
"""
from collections.abc import Iterator
from functools import partial

from configs.jsonl import compose
from data import DataConfig, Document, InputError, Skipped, Source, files
from model import ModelConfig
from train import Config, Phase, Schedule


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


config = Config(
    model=ModelConfig(layers=2, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, vocab=2048),
    data=DataConfig(sources={"mine": Source(partial(parquet, path="~/my_parquet"))}),
    phases=(Phase(steps=600, batch=8, seq=256),),
    schedule=Schedule(peak=4e-3),
)

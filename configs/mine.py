"""Any text of yours: JSON Lines, as most corpora come, plain, .gz or .zst, here or on gs://, s3://.

A record's text stands under a key, a nested key or in a template; damage is counted by kind. For
other formats put another reader of lib/readers.py in the place of `jsonl`: `parquet`,
`hugging_face` for a directory that `save_to_disk` wrote, `tfds` for a data set by name; or
`data.text` for text files. docs/data.md shows each. As it stands it takes some minutes on two CPU
cores.

    python train.py configs/mine.py --data.sources.mine.documents.path DIR
    ... --data.sources.mine.documents.content "{title}: {body.text}" --data.sources.mine.documents.key url
"""
from functools import partial

from data import DataConfig, Source
from lib.readers import jsonl
from model import ModelConfig
from train import Config, Phase, Schedule

config = Config(
    model=ModelConfig(layers=2, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, vocab=2048),
    data=DataConfig(sources={"mine": Source(partial(jsonl, path="~/my_jsonl"))}),
    phases=(Phase(steps=600, batch=8, seq=256),),
    schedule=Schedule(peak=4e-3),
)

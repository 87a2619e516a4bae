"""JSON Lines, as most corpora come: plain, .gz or .zst, here or on gs://, s3:// and their like.

Shows a source over records: text by a key, a nested key or a template, metadata kept, and damage given as
`Skipped`, so that building counts it by kind. Costs some minutes on two CPU cores as it stands.

    python train.py configs/jsonl.py --data.sources.mine.documents.path DIR
    ... --data.sources.mine.documents.content "{title}: {body.text}" --data.sources.mine.documents.key url
"""
from functools import partial

from data import DataConfig, Source
from lib.readers import jsonl
from lib.schedule import Schedule
from model import ModelConfig
from train import Config, Phase

config = Config(
    model=ModelConfig(layers=2, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, vocab=2048),
    data=DataConfig(sources={"mine": Source(partial(jsonl, path="~/my_jsonl"))}),
    phases=(Phase(steps=600, batch=8, seq=256),),
    schedule=Schedule(peak=4e-3),
)

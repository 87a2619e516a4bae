"""Text in Parquet files: row groups are read one after another, so that memory holds one at a time.

Shows a source of one's own with helpers: `compose` for keys and templates, `Skipped` for damage (a
row group that cannot be read is one). Costs some minutes on two CPU cores as it stands. Needs pyarrow.

    python train.py configs/parquet.py --data.sources.mine.documents.path DIR
    ... --data.sources.mine.documents.content "{title}: {body.text}" --data.sources.mine.documents.key url
"""
from functools import partial

from data import DataConfig, Source
from lib.readers import parquet
from lib.schedule import Schedule
from model import ModelConfig
from train import Config, Phase

config = Config(
    model=ModelConfig(layers=2, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, vocab=2048),
    data=DataConfig(sources={"mine": Source(partial(parquet, path="~/my_parquet"))}),
    phases=(Phase(steps=600, batch=8, seq=256),),
    schedule=Schedule(peak=4e-3),
)

"""A data set of TensorFlow Datasets, by name, read as ArrayRecord without TensorFlow.

Shows a source over records that can be reached at random. Costs some minutes on two CPU cores as it stands,
once the data set is there as ArrayRecord files: it is read from `data_dir` (TFDS's own default if empty), and
never downloaded.

    python train.py configs/tfds.py --data.sources.mine.documents.data_set wikipedia/20230601.simple
    ... --data.sources.mine.documents.data_dir DIR --data.sources.mine.documents.content "{title}: {text}"
"""
from functools import partial

from data import DataConfig, Source
from lib.readers import tfds
from lib.schedule import Schedule
from model import ModelConfig
from train import Config, Phase

config = Config(
    model=ModelConfig(layers=2, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, vocab=2048),
    data=DataConfig(sources={"mine": Source(partial(tfds, data_set="wikipedia/20230601.simple"))}),
    phases=(Phase(steps=600, batch=8, seq=256),),
    schedule=Schedule(peak=4e-3),
)

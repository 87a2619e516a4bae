"""A data set of Hugging Face's `datasets`, from a directory that its `save_to_disk` wrote.

Shows a source over a library that the core does not need. Costs some minutes on two CPU cores as it stands.
Records are read from mapped Arrow files: memory stays small. Needs the package datasets; downloads nothing.

    python train.py configs/hugging_face.py --data.sources.mine.documents.path DIR
    ... --data.sources.mine.documents.content "{title}: {body.text}" --data.sources.mine.documents.split train
"""
from functools import partial

from data import DataConfig, Source
from lib.readers import hugging_face
from lib.schedule import Schedule
from model import ModelConfig
from train import Config, Phase

config = Config(
    model=ModelConfig(layers=2, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, vocab=2048),
    data=DataConfig(sources={"mine": Source(partial(hugging_face, path="~/my_data_set"))}),
    phases=(Phase(steps=600, batch=8, seq=256),),
    schedule=Schedule(peak=4e-3),
)

"""Quickstart: a small model of Python's standard library, shallow at first, then twice as deep.

Shows growth by stacking within one run. On two CPU cores it trains for about a minute, after a
tokenizer was made and programs compiled: python train.py

It is the strongest model here, a Llama with the parts of configs/baselines/strong.py. On 22
held-out modules it has 1.58 bits per byte. The arm `plain` is the Llama of model.py, which can be
exported. Its 340 steps take about as long and reach 1.80:
python train.py configs/quickstart.py:plain
"""
from dataclasses import replace
from functools import partial

from configs.baselines.strong import on
from data import DataConfig, Source, stdlib
from lib.edits import stack
from lib.schedule import Schedule
from model import ModelConfig
from train import Config, Phase

plain = Config(
    model=ModelConfig(layers=2, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, vocab=2048),
    data=DataConfig(sources={"stdlib": Source(stdlib)}, shard_tokens=1_048_576),
    phases=(
        Phase(steps=150, batch=8, seq=256),
        Phase(steps=190, batch=8, seq=256, edits=(partial(stack, times=2),)),
    ),
    schedule=Schedule(shape="wsd", peak=8e-3, warmup=40, decay=0.4, final=0.05),
    eval_every=80,
    eval_tokens=16_384,
    save_every=80,
    prompts=("def ", "class ", "import os\n"),
    sample_tokens=50,
)
shallow, deep = plain.phases
phases = replace(shallow, steps=80), replace(deep, steps=100)
config = on(replace(plain, phases=phases))
arms = {"plain": plain}

"""Llama, 124M class: 12 layers of 768, 32k pieces, packed rows of 1,024, half a million tokens a step.

The size that GPT-2 made the usual one to try ideas at. 2.5 billion tokens, some 20 a parameter: 1.8e18 FLOPs,
an hour and a quarter of one H200 at 40 % MFU. Text of your own, as JSON Lines, goes in by its path:

    python train.py configs/llama_124m.py --data.sources.mine.documents.path DIR
    python train.py fit configs/llama_124m.py --topology v5e:4x4                  or h100:1: without it
    python train.py launch auto configs/llama_124m.py ...                         on each host of several

`accumulate` is for one GPU of 80 GB (compiled for, not run) or 16 chips of 16; --phases.0.accumulate 1 goes
with more. `llama_350m.py` and `llama_1_3b.py` are its larger sisters.
"""
from functools import partial

from data import DataConfig, Source
from lib.readers import jsonl
from lib.schedule import Schedule
from model import ModelConfig
from train import Config, Phase

config = Config(
    model=ModelConfig(layers=12, embed=768, heads=12, kv_heads=12, head_dim=64, mlp=2048, vocab=32_000,
                      dtype="bfloat16", unroll=1),
    data=DataConfig(sources={"mine": Source(partial(jsonl, path="~/my_jsonl"))}, sample_mib=64.0, stream=True,
                    dev=0.005, test=0.005, shard_tokens=2**25),
    phases=(Phase(steps=4_800, batch=512, seq=1_024, accumulate=16),),
    schedule=Schedule(peak=1e-3, warmup=200),
    eval_every=500,
    eval_tokens=2**20,
    save_every=1_000,
    keep_every=4_000,
)

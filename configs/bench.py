"""The benchmark's model: one phase, an untied head, clipping at 1.0, causal rows of one segment.

Shows the speed of a step on random rows, in ten seconds (--seconds) after compiling. The sizes are those of
the PyTorch peer's defaults; give others as --layers, --embed, --batch and so on.

    python train.py bench --batch 8
"""
from lib.schedule import Schedule
from model import ModelConfig
from train import Config, Phase

config = Config(
    model=ModelConfig(layers=6, embed=384, heads=6, kv_heads=6, head_dim=64, mlp=1024, vocab=4096,
                      tied=False),
    phases=(Phase(steps=1_000, batch=16, seq=256),),
    schedule=Schedule(shape="constant", peak=1e-3),
    overlap=0,
)

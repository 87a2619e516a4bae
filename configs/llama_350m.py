"""Llama, 350M class: 24 layers of 1,024, otherwise as `llama_124m.py`; 7 billion tokens, 1.5e19 FLOPs.

Ten and a half hours of one H200 at 40 % MFU, or three quarters of one of 32 TPU v5p.

    python train.py configs/llama_350m.py --data.sources.mine.documents.path DIR
    python train.py fit configs/llama_350m.py --topology v5p:4x4x2
"""
from dataclasses import replace

from configs.llama_124m import config as small

config = replace(
    small,
    model=replace(small.model, layers=24, embed=1_024, heads=16, kv_heads=16, mlp=2_816, remat="elementwise"),
    phases=(replace(small.phases[0], steps=13_400),),
    schedule=replace(small.schedule, peak=6e-4),
)

"""Llama, 350M class: 24 layers of 1,024, otherwise as `llama_124m.py`.

Paper: none
Method: plain next-token prediction.
Here: 7 billion tokens of JSON Lines of yours.
Cost: 1.5e19 FLOPs; ten and a half hours of one H200 at 40 % MFU, or three quarters of an hour of 32
    TPU v5p.
Run:
    python train.py configs/baselines/llama_350m.py --data.sources.mine.documents.path DIR
    python train.py fit configs/baselines/llama_350m.py --topology v5p:4x4x2
"""
from dataclasses import replace

from configs import base

config = replace(
    base.llama,
    model=replace(base.llama.model, layers=24, embed=1_024, heads=16, kv_heads=16, mlp=2_816,
                  remat="elementwise"),
    phases=(replace(base.llama.phases[0], steps=13_400),),
)

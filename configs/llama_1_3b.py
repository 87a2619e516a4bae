"""Llama, 1.3B class: 24 layers of 2,048, otherwise as `llama_124m.py`; 26 billion tokens, 2.1e20 FLOPs.

Parameters and optimiser are split over all devices (`mesh.fsdp`): 16 bytes a parameter are 20 GB. At 40 % MFU
three hours of 256 TPU v5e.

    python train.py configs/llama_1_3b.py --data.sources.mine.documents.path DIR
    python train.py fit configs/llama_1_3b.py --topology v5e:16x16 --phases.0.accumulate 1
"""
from dataclasses import replace

from configs.llama_124m import config as small
from lib.sharding import MeshConfig

config = replace(
    small,
    model=replace(small.model, layers=24, embed=2_048, heads=16, kv_heads=16, head_dim=128, mlp=5_504,
                  remat="elementwise"),
    phases=(replace(small.phases[0], steps=25_000, batch=1_024, accumulate=32),),
    schedule=replace(small.schedule, peak=4e-4, warmup=500),
    mesh=MeshConfig(data=1, fsdp=-1),
)

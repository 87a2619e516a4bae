"""Llama, 1.3B class: 24 layers of 2,048, otherwise as `llama_124m.py`.

Paper: none
Method: plain next-token prediction; parameters and optimiser are split over all devices
    (`mesh.fsdp`), as 16 bytes a parameter are 22 GB.
Here: 26 billion tokens of JSON Lines of yours.
Cost: 2.1e20 FLOPs; three hours of 256 TPU v5e at 40 % MFU.
Run:
    python train.py configs/baselines/llama_1_3b.py --data.sources.mine.documents.path DIR
    python train.py fit configs/baselines/llama_1_3b.py --topology v5e:16x16 --phases.0.accumulate 1
"""
from dataclasses import replace

from configs import base
from lib.sharding import MeshConfig

config = replace(
    base.llama,
    model=replace(base.llama.model, layers=24, embed=2_048, heads=16, kv_heads=16, head_dim=128,
                  mlp=5_504, remat="elementwise"),
    phases=(replace(base.llama.phases[0], steps=25_000, batch=1_024, accumulate=32),),
    schedule=replace(base.llama.schedule, warmup=500),
    mesh=MeshConfig(data=1, fsdp=-1),
)

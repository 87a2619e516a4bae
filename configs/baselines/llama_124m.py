"""Llama, 124M class: 12 layers of 768, 32k pieces, rows of 1,024, half a million tokens a step.

Paper: none; the size that GPT-2 made the usual one to try ideas at
Method: plain next-token prediction; a Llama's blocks, AdamW, a warm-up and a decay.
Here: 2.5 billion tokens, some 20 a parameter. The text is yours, as JSON Lines. `accumulate` is for
    one GPU of 80 GB (compiled for, not run) or 16 chips of 16; --phases.0.accumulate 1 goes with
    more. `llama_350m.py` and `llama_1_3b.py` are its larger sisters.
Cost: 1.8e18 FLOPs, an hour and a quarter of one H200 at 40 % MFU.
Run:
    python train.py configs/baselines/llama_124m.py --data.sources.mine.documents.path DIR
    python train.py fit configs/baselines/llama_124m.py --topology v5e:4x4      or h100:1: without it
    python train.py launch auto configs/baselines/llama_124m.py ...        on each host of several
"""
from configs import base

config = base.llama

"""Muon: is orthogonalised momentum for the matrices ahead of AdamW at the same steps?

Paper: Muon: An optimizer for hidden layers in neural networks, Jordan et al. 2024;
    Muon is Scalable for LLM Training, Liu et al. 2025 (arXiv 2502.16982)
Method: orthogonalise the momentum of each matrix by a Newton-Schulz iteration. Liu et al. give it
    weight decay and an update of AdamW's size, so that one rate serves all parameters.
Here: AdamW and Muon after equal steps, each at its best rate. Embeddings, gains and an untied head
    keep AdamW. `muon` works for any config: `optimizer=muon`. It is in lib/muon.py.
Cost: not run in full yet: twelve runs of 300 steps, perhaps half an hour on two CPU cores.
Run:
    python train.py study configs/baselines/muon.py --seeds 3 --jobs 2
    python train.py configs/baselines/muon.py:muon                  one arm by hand, two minutes
"""
from dataclasses import replace

from configs import base
from lib.muon import muon
from lib.study import Claim, Paper, Study

adam = replace(base.deep, phases=(replace(base.deep.phases[0], steps=300, seq=128),), overlap=16)
study = Study(
    question="Is orthogonalised momentum for the matrices ahead of AdamW at the same steps?",
    paper=(Paper(title="Muon: An optimizer for hidden layers in neural networks",
                 authors="Jordan et al.", year=2024),
           Paper(title="Muon is Scalable for LLM Training", authors="Liu et al.", year=2025)),
    arms={"adamw": adam, "muon": replace(adam, optimizer=muon)},
    peak_lrs=base.RATES,
    quick=base.quick({"model.layers": 2}),
    claims=(
        Claim(says="Muon is ahead of AdamW after equal steps", arm="muon", below=0.0),
    ),
)

"""Muon: is orthogonalised momentum for the matrices ahead of AdamW at the same steps?

Paper: Muon: An optimizer for hidden layers in neural networks, Jordan et al. 2024;
    Muon is Scalable for LLM Training, Liu et al. 2025 (arXiv 2502.16982)
Method: orthogonalise the momentum of each matrix by a Newton-Schulz iteration. Liu et al. give it
    weight decay and an update of AdamW's size, so that one rate serves all parameters.
Here: AdamW and Muon after equal steps, each at its best rate. Embeddings, gains and an untied head
    keep AdamW. `muon` works for any config: `optimizer=muon`.
Cost: not run in full yet: twelve runs of 300 steps, perhaps half an hour on two CPU cores.
Run:
    python train.py study configs/baselines/muon.py --seeds 3 --jobs 2
    python train.py configs/baselines/muon.py:muon                  one arm by hand, two minutes
"""
import math
from dataclasses import replace

import optax

from configs import base
from lib.optim import adamw
from lib.study import Claim, Paper, Study
from model import Param


def muon(table: dict[str, Param], beta: float = 0.95, rms: float = 0.2, weight_decay: float = 0.1,
         **adam) -> dict[str, optax.GradientTransformation]:
    """Muon (Jordan et al. 2024) for the matrices, AdamW for the rest.

    Each layer's matrix is orthogonalised, with the input and output axes that the table names. The
    update has the root mean square `rms`, about that of AdamW, so that one rate serves all (Liu et
    al. 2025, eq. 4).
    """
    def axes(p: Param) -> optax.contrib.MuonDimensionNumbers:
        first, last = p.axes.index("layers") + 1, len(p.axes) - 1
        split = first + 1 if p.axes[first] == "embed" else last  # inputs stand before outputs
        inputs, outputs = tuple(range(first, split)), tuple(range(split, last + 1))
        return optax.contrib.MuonDimensionNumbers(inputs, outputs)

    numbers = {name: axes(p) for name, p in table.items() if p.group == "matrix"}
    widths = {name: max(math.prod(table[name].shape[i] for i in side) for side in sides)
              for name, sides in numbers.items()}
    scale = optax.stateless(lambda tree, _: {name: rms * math.sqrt(widths[name]) * x
                                             for name, x in tree.items()})
    matrices = optax.chain(
        optax.contrib.scale_by_muon(beta=beta, weight_dimension_numbers=numbers), scale,
        optax.add_decayed_weights(weight_decay))
    return adamw(table, weight_decay=weight_decay, **adam) | {"matrix": matrices}


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

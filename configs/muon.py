"""Muon: orthogonalised momentum for the matrices; is it ahead of AdamW at the same steps?

Jordan et al. 2024 orthogonalise the momentum of each matrix by a Newton-Schulz iteration; Liu et al. 2025
(arXiv 2502.16982) give it weight decay and an update of AdamW's size, so that one rate serves all parameters.
Embeddings, gains and an untied head keep AdamW. `muon` works for any config: `optimizer=muon`.
Not run in full yet: twelve runs of 300 steps, of eight layers, perhaps half an hour on two CPU cores.

    python train.py study configs/muon.py --seeds 3 --jobs 2
    python train.py configs/muon.py                           one arm by hand
"""
import math
from dataclasses import replace

import optax

from configs.stacking import config as stacking
from lib.optim import adamw
from model import Param


def muon(table: dict[str, Param], beta: float = 0.95, rms: float = 0.2, weight_decay: float = 0.1,
         **adam) -> dict[str, optax.GradientTransformation]:
    """Muon (Jordan et al. 2024) for the matrices, AdamW for the rest.

    Each layer's matrix is orthogonalised, with the input and output axes that the table names; the update has
    the root mean square `rms`, about that of AdamW, so that one rate serves all (Liu et al. 2025, eq. 4).
    """
    def axes(p: Param) -> optax.contrib.MuonDimensionNumbers:
        first, last = p.axes.index("layers") + 1, len(p.axes) - 1
        split = first + 1 if p.axes[first] == "embed" else last  # inputs stand before outputs
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, split)), tuple(range(split, last + 1)))

    numbers = {name: axes(p) for name, p in table.items() if p.group == "matrix"}
    widths = {name: max(math.prod(table[name].shape[i] for i in side) for side in sides)
              for name, sides in numbers.items()}
    scale = optax.stateless(lambda tree, _: {n: rms * math.sqrt(widths[n]) * x for n, x in tree.items()})
    return adamw(table, weight_decay=weight_decay, **adam) | {"matrix": optax.chain(
        optax.contrib.scale_by_muon(beta=beta, weight_dimension_numbers=numbers), scale,
        optax.add_decayed_weights(weight_decay))}


adam = replace(stacking, phases=(replace(stacking.phases[0], steps=300, seq=128),), overlap=16)
config = replace(adam, optimizer=muon)
arms = {"adamw": adam, "muon": config}
control = "adamw"
rates = 2e-3, 4e-3, 8e-3
quick = {"phases.*.steps": 4, "phases.*.seq": 64, "overlap": 8, "model.layers": 2, "model.embed": 32,
         "model.mlp": 32, "model.vocab": 258, "model.unroll": 1, "data.tokenizer": "bytes", "data.dev": 0.01,
         "data.test": 0.01, "eval_every": 2, "eval_tokens": 2_000, "sample_tokens": 4}
claims = (dict(says="Muon is ahead of AdamW after equal steps", arm="muon", below=0.0),)

"""Muon: is orthogonalised momentum for the matrices ahead of AdamW at the same steps?

Paper: Muon: An optimizer for hidden layers in neural networks, Jordan et al. 2024;
    Muon is Scalable for LLM Training, Liu et al. 2025 (arXiv 2502.16982)
Method: orthogonalise the momentum of each matrix by a Newton-Schulz iteration. Liu et al. give it
    weight decay and an update of AdamW's size, so that one rate serves all parameters.
Here: AdamW and Muon after equal steps, each at its best rate. Embeddings, gains and an untied head
    keep AdamW. `muon` works for any config: `optimizer=muon`. strong.py has the options on.
Cost: 16 runs of 300 steps for five seeds, 33 minutes on two CPU cores beside other work.
Run:
    python train.py study configs/baselines/muon.py --jobs 2
"""
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from configs import base
from lib.edits import check_options
from lib.fields import Decay, NotNegative, Positive, Whole
from lib.matrices import flat
from lib.optim import adamw
from lib.study import Claim, Paper, Study
from model import Param

# (a, b, c) of x -> (a + b x x' + c x x' x x') x, in turn. The first, five times, sends singular
# values from 2e-3 on to between 0.6 and 1.3. Those of Polar Express (Amsel et al. 2025, arXiv
# 2505.16932) send all from 1e-3 on to within 0.15 of 1; they are modded-nanogpt's, for a safety
# factor of 2e-2 and a cushion of 2.
COEFFICIENTS = dict(newton_schulz=((3.4445, -4.7750, 2.0315),) * 5, polar_express=(
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)))


def muon(table: dict[str, Param], beta: Decay = 0.95, rms: Positive = 0.2,
         iteration: Literal["newton_schulz", "polar_express"] = "newton_schulz",
         outputs: Literal["plain", "equal", "normal"] = "plain", beta2: Decay = 0.95,
         weight_decay: NotNegative = 0.1, b1: Decay = 0.9, b2: Decay = 0.95, eps: Positive = 1e-8,
         frozen: tuple[str, ...] = (), embed_lr: Positive = 10.0, base_width: Whole = 64) -> dict:
    """{group: transformation}: Muon (Jordan et al. 2024) for matrices, `adamw` for the rest.

    Each layer's matrix is orthogonalised, with the input and output axes that the table names. The
    update has the root mean square `rms`, about that of AdamW, so that one rate serves all (Liu et
    al. 2025, eq. 4). outputs: "equal" gives them equal norms before that (MuonEq, arXiv
    2603.28254); "normal" divides each after it by its root mean square over past steps, of decay
    beta2 (NorMuon, Li et al. 2025, arXiv 2510.05491), a state that growth can only reset.
    """
    check_options(muon, iteration=iteration, outputs=outputs)
    rows = {name: row for name, row in table.items() if row.group == "matrix"}
    alone = [name for name, row in rows.items() if not row.layered]
    if alone:
        raise ValueError(f"muon: {', '.join(alone)} is no matrix of a block; allowed are those "
                         "with an axis of layers in front, and groups other than matrix")

    def directed(x):
        x = x / rms_of(x, 1) if outputs == "equal" else x
        return orthogonal(x, COEFFICIENTS[iteration]) * math.sqrt(max(x.shape[1:]))

    more = [normal_outputs(rows, beta2)] if outputs == "normal" else []
    matrices = optax.chain(optax.trace(beta, nesterov=True), each(rows, directed), *more,
                           optax.scale(rms), optax.add_decayed_weights(weight_decay))
    rest = adamw(table, b1, b2, eps, weight_decay, frozen, embed_lr, base_width)
    return rest | {"matrix": matrices}


def each(rows: dict[str, Param], change: Callable) -> optax.GradientTransformation:
    """Change updates as matrices [layers inputs outputs]."""
    return optax.stateless(lambda tree, _: {
        name: change(flat(x, rows[name])).reshape(x.shape) for name, x in tree.items()})


def rms_of(x, axes) -> jax.Array:
    """Root mean square over axes, which stay; never 0."""
    return jnp.sqrt(jnp.mean(jnp.square(x), axes, keepdims=True)) + 1e-12


def orthogonal(x, coefficients) -> jax.Array:
    """Matrices [l i o] with their singular values sent to about 1."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.swapaxes(1, 2), coefficients).swapaxes(1, 2)
    x = x / (1.02 * math.sqrt(math.prod(x.shape[1:])) * rms_of(x, (1, 2)))  # none is above 1
    for a, b, c in coefficients:
        square = x @ x.swapaxes(1, 2)
        x = a * x + (b * square + c * square @ square) @ x
    return x


def normal_outputs(rows: dict[str, Param], beta2: float) -> optax.GradientTransformation:
    """Each output divided by its root mean square over past steps; the whole has one of 1."""
    def update(tree, state, params=None):
        found = {name: flat(x, rows[name]) for name, x in tree.items()}
        state = {name: beta2 * state[name] + (1 - beta2) * rms_of(x, 1)[:, 0]**2
                 for name, x in found.items()}
        found = {name: x / jnp.sqrt(state[name])[:, None] for name, x in found.items()}
        return {name: (x / rms_of(x, (1, 2))).reshape(tree[name].shape)
                for name, x in found.items()}, state
    return optax.GradientTransformation(lambda params: {
        name: 0 * flat(x, rows[name])[:, 0] for name, x in params.items()}, update)


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

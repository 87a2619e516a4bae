"""nanochat's optimiser: Muon for matrices and AdamW for the rest, as nanochat has them.

Paper: none; nanochat (Karpathy 2025), optim.py and base_train.py of commit 0e4b3fa; its parts are
    from Polar Express (Amsel et al. 2025), MuonEq (arXiv 2603.28254), Muon+ (arXiv 2602.21545) and
    NorMuon (Li et al. 2025)
Method: A matrix moves along its momentum. Its outputs get equal norms, it is orthogonalised, and it
    gets the norm of an orthogonal matrix. Each output is then divided by its root mean square over
    past steps; if there are more inputs than outputs, each input is. A weight decays only where the
    update makes it smaller too. The decay falls to 0. Each other group has a rate and betas.
Here: The peak rate is that of matrices. All others have the ratio to it of nanochat's command line.
    Nanochat also sets rates by the batch, and the decay by batch and size; we do not. Gains, which
    it has not, learn as its residual scalars do. Momentum rises for 400 steps, as there: in a
    short run it does not reach its height. `steps` has to be the run's: --phases.0.steps N goes
    with --optimizer.steps N.
Cost: about a minute on two CPU cores that do nothing else, an estimate.
Run:
    python train.py configs/baselines/nanochat_muon.py
"""
import math
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import optax

from configs import base
from configs.baselines.muon import COEFFICIENTS, orthogonal, rms_of
from lib.matrices import flat
from model import Param

# Of groups: the rate over that of matrices, whether it falls with the width, beta1, beta2, decay.
ADAM = {
    "embed": (15.0, True, 0.8, 0.995, 0.001), "values": (7.5, True, 0.8, 0.995, 0.01),
    "head": (0.4, True, 0.8, 0.96, 0.01), "vector": (0.25, False, 0.8, 0.95, 0.05),
    "again": (25.0, False, 0.96, 0.95, 0.0), "smear": (10.0, False, 0.8, 0.95, 0.0),
}
COOL = 0.65  # share of the steps in which the rate and the momentum fall


def nanochat_muon(
        table: dict[str, Param], steps: int, decay: float = 0.28
        ) -> dict[str, optax.GradientTransformation]:
    """Muon for matrices, over a run of so many steps, and AdamW for the rest."""
    groups = dict.fromkeys(row.group for row in table.values() if row.group != "matrix")
    if groups.keys() - ADAM.keys():
        raise ValueError(f"nanochat_muon: the groups of the model are {', '.join(groups)}; allowed "
                         f"are matrix, {', '.join(ADAM)}")
    shrink = (table["embed"].shape[1] / 768) ** -0.5
    found = {}
    for group in groups:
        rate, by_width, b1, b2, own_decay = ADAM[group]
        found[group] = optax.chain(optax.scale_by_adam(b1, b2, 1e-10),
                                   optax.add_decayed_weights(own_decay),
                                   optax.scale(rate * shrink if by_width else rate))
    rows = {name: row for name, row in table.items() if row.group == "matrix"}
    return found | {"matrix": matrices(rows, steps, decay)}


def momentum(step, steps: int):
    """It rises from 0.85 for 400 steps, is 0.97, and falls to 0.9 in the last steps of a run."""
    fall = round(COOL * steps)
    down = 0.97 - 0.07 * jnp.clip((step - (steps - fall)) / fall, 0, 1)
    return jnp.where(step < 400, 0.85 + 0.12 * step / 400, down)


def matrices(
        rows: dict[str, Param], steps: int, decay: float, beta2: float = 0.9
        ) -> optax.GradientTransformation:
    """Muon of matrices. Their decay is part of the update."""
    def begin(params):
        mean = {name: 0 * x for name, x in params.items()}
        size = {name: sizes(flat(x, rows[name])) for name, x in mean.items()}
        return jnp.int32(0), mean, size

    def update(grads, state, params):
        step, mean, size = state
        beta, through = momentum(step, steps), jnp.minimum(step / steps, 1)
        shrinks = decay * (1 + jnp.cos(math.pi * through)) / 2
        mean = {name: beta * mean[name] + (1 - beta) * x for name, x in grads.items()}
        found, now = {}, {}
        for name, param in params.items():
            x = flat(beta * mean[name] + (1 - beta) * grads[name], rows[name])
            x = orthogonal(x / rms_of(x, 1), COEFFICIENTS["polar_express"])
            x = x / rms_of(x, (1, 2)) / math.sqrt(max(x.shape[1:]))
            now[name] = beta2 * size[name] + (1 - beta2) * sizes(x)
            even = x / jnp.sqrt(jnp.maximum(now[name], 1e-10))
            x = even * rms_of(x, (1, 2)) / rms_of(even, (1, 2))
            rate = math.sqrt(max(1, x.shape[2] / x.shape[1]))
            x = x.reshape(param.shape)
            found[name] = rate * (x + shrinks * param * (x * param >= 0))
        return found, (step + 1, mean, now)

    return optax.GradientTransformation(begin, update)


def sizes(x):
    """Mean squares [l i 1] of matrices [l i o] with more inputs than outputs, of others [l 1 o]."""
    return rms_of(x, 2 if x.shape[1] > x.shape[2] else 1) ** 2


config = replace(base.small, optimizer=partial(nanochat_muon, steps=base.small.phases[0].steps),
                 schedule=replace(base.small.schedule, peak=0.02, decay=COOL), clip=0.0)

"""Mixers: what is lost where a diagonal state space or a GRU takes the place of attention?

Paper: On the Parameterization and Initialization of Diagonal State Space Models, Gu et al. 2022
    (003:10)
Method: in each block a recurrence in place of attention: S4D, see s4d.py, or a GRU (Cho et al.
    2014), whose reset gate acts after the product, as in cuDNN.
Here: bytes of Python's library; the MLP stays. The GRU has two thirds of the width, which makes its
    parameters those of attention exactly; S4D has two thirds of these. S4D's product out is drawn,
    that of the others begins as 0. Segments reset the GRU. Matrices of a mixer's own learn at the
    whole rate, those of attention at two thirds of it, so each arm's rate is tuned. Compared at
    equal steps; what each step costs is charged. S4D's best rate is the highest that was tried. The
    order is undecided, by intervals of 0.12 to 0.26 bits on each side. bursty.py compares attention
    with this GRU.
Cost: 9 runs and 11 to tune them, 4 minutes on two CPU cores.
Run:
    python train.py study configs/understanding/mixers.py --jobs 2
    python train.py configs/understanding/mixers.py:gru          one arm by hand
"""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from configs import base
from configs.understanding.s4d import arm, flops, mixed
from lib.study import Claim, Paper, Study
from model import ModelConfig, Param


def gru_rows(config: ModelConfig, rows: dict) -> dict:
    """`rows`: two gates and a candidate from the input and from the state, and a product out."""
    layers, embed, width = config.layers, config.embed, 2 * config.embed // 3
    own = {
        "of_x": Param(("layers", "embed", "out"), (layers, embed, 3 * width), embed**-0.5),
        "of_h": Param(("layers", "in", "out"), (layers, width, 3 * width), width**-0.5),
        "of_state": Param(("layers", "in", "embed"), (layers, width, embed), rows["o"].init),
    }
    return {name: row for name, row in rows.items() if name not in ("q", "k", "v", "o")} | own


def gru(x, w, times, positions):
    """A mixer: a gated recurrence whose state is 0 at each segment's first position.

    x [b t d]. z and r are the update and the reset gate:
    h = z h + (1 - z) tanh(W x + r U h).
    """

    def step(h, now):
        inputs, first = now
        h = jnp.where(first[:, None], 0, h)
        update, reset, new = jnp.split(inputs, 3, -1)
        update_h, reset_h, new_h = jnp.split(h @ w["of_h"].astype(h.dtype), 3, -1)
        z = jax.nn.sigmoid(update + update_h)
        r = jax.nn.sigmoid(reset + reset_h)
        h = z * h + (1 - z) * jnp.tanh(new + r * new_h)
        return h, h

    start = jnp.zeros((len(x), w["of_h"].shape[0]), x.dtype)
    inputs = jnp.moveaxis(times(x, "of_x"), 1, 0)
    first = jnp.moveaxis(positions == 0, 1, 0)
    _, states = lax.scan(step, start, (inputs, first))
    return times(jnp.moveaxis(states, 0, 1), "of_state"), None


def with_gru(params, batch, mask, config: ModelConfig):
    """A `forward` with a GRU for attention."""
    mixer = partial(gru, positions=batch["positions"])
    return mixed(params, batch, mask, config, mixer)


attention = replace(arm("lin"), model=base.shape(3, 96, 0), phases=base.small.phases)
recurrent = replace(attention.model, rows=gru_rows, forward=with_gru,
                    flops=partial(flops, transforms=0))
study = Study(
    question="What is lost where a state space or a GRU takes the place of attention?",
    paper=Paper(title="On the Parameterization and Initialization of Diagonal State Space Models",
                authors="Gu et al.", year=2022, seeds=("003:10",)),
    arms={"attention": attention, "s4d": arm("lin"), "gru": replace(attention, model=recurrent)},
    peak_lrs=base.RATES, quick=base.quick({"model.embed": 48}),
    claims=(
        Claim(says="S4D is behind attention", arm="s4d", above=0.0),
        Claim(says="a GRU is behind attention", arm="gru", above=0.0),
        Claim(says="S4D is ahead of a GRU", arm="s4d", control="gru", below=0.0),
    ),
    seeds=3,
)

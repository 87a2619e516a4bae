"""Meta-experience replay: does a step back towards where weights were keep what old text taught?

Paper: Revisiting Replay and Gradient Alignment for Continual Pre-Training of Large Language Models,
    Abbes et al. 2025 (002:17)
Method: rows of old text among the new ones (replay), and every k updates a Reptile step, theta <-
    theta' + beta (theta - theta'), where theta' is what the last such step gave. Over k updates
    this favours directions in which the gradients of the batches agree, those of old and new text
    among them, and costs one copy of the parameters.
Here: as in `rewarm`, from functions and classes of Python's library to the same in another
    alphabet. none, replay_10, replay_25: that share of old rows. `_mer`: each with a Reptile step
    of beta 0.5 every 20 updates. The code of the paper has beta 0.01 every 500, at which the
    weights hardly move.
    The moments of AdamW are not interpolated. With beta 1 it is plain replay, bit for bit. "old"
    and "new" are bits per byte on test. The rate is the same in all arms.
Cost: six arms and a base, 21 runs of a quarter of a minute, five minutes on two CPU cores.
Run:
    python train.py study configs/continual/meta_replay.py --jobs 2
    python train.py configs/continual/meta_replay.py:base           the run that arms start from
"""
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from configs import base as shared
from configs.continual.rewarm import base, continued, sources
from lib.optim import adamw
from lib.study import Claim, Paper, Study


class Reptile(NamedTuple):
    """What a Reptile step needs besides the state of the optimiser within."""

    inner: optax.OptState
    slow: dict  # {name: parameter} that the last step gave
    count: jax.Array  # int32, updates so far


def interpolated(inner: optax.GradientTransformation, beta: float, every: int):
    """An optimiser whose every `every`-th update ends a share beta of the way from `slow`."""

    def init(params):
        return Reptile(inner.init(params), jax.tree.map(jnp.copy, params), jnp.int32(0))

    def update(grads, state, params, rate, **more):
        ahead, after = inner.update(grads, state.inner, params)
        count = state.count + 1

        def back():
            """Directions that end between, and where that is; the step multiplies by the rate."""
            scale = (1 - beta) / jnp.maximum(rate, 1e-12)
            back = {n: beta * ahead[n] + scale * (x - state.slow[n]) for n, x in params.items()}
            return back, {n: x - rate * back[n] for n, x in params.items()}

        directions, slow = lax.cond(count % every == 0, back, lambda: (ahead, state.slow))
        return directions, Reptile(after, slow, count)

    return optax.GradientTransformationExtraArgs(init, update)


def reptile(table, beta: float = 0.5, every: int = 20) -> dict:
    """An `optimizer`: AdamW with a Reptile step after each `every` updates of a run.

    A rate below 1e-12 at such an update takes no step back.
    """
    return {group: interpolated(inner, beta, every) for group, inner in adamw(table).items()}


plain = {"none": continued(), "replay_10": continued(replay=0.1),
         "replay_25": continued(replay=0.25)}
meta = {f"{name}_mer": replace(config, optimizer=partial(reptile, beta=0.5, every=20))
        for name, config in plain.items()}
study = Study(
    question="Does a step back towards where weights were keep what old text taught?",
    paper=Paper(title="Revisiting Replay and Gradient Alignment for Continual Pre-Training of "
                "Large Language Models", authors="Abbes et al.", year=2025, seeds=("002:17",)),
    arms=plain | meta,
    needs={"base": base},
    measures={name: f"eval/{name}.test/bpb" for name in sources},
    quick=shared.quick(keep=("data.test",)),
    claims=(
        Claim(says="a tenth of replay forgets less than none", arm="replay_10", measure="old",
              below=0.0),
        Claim(says="a quarter forgets still less", arm="replay_25", control="replay_10",
              measure="old", below=0.0),
        Claim(says="without replay, the step back forgets less", arm="none_mer", measure="old",
              below=0.0),
        Claim(says="with replay too", arm="replay_10_mer", control="replay_10", measure="old",
              below=0.0),
        Claim(says="it is not 0.1 behind on the new text", arm="replay_10_mer",
              control="replay_10", measure="new", below=0.1),
        Claim(says="over both texts, replay with it is ahead of replay", arm="replay_10_mer",
              control="replay_10", below=0.0),
    ),
    seeds=3,
)

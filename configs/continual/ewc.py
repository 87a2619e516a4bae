"""EWC: do parameters, or an old model, that hold on to old APIs keep them while new ones are read?

Paper: On the Usage of Continual Learning for Out-of-Distribution Generalization in Pre-trained
    Language Models of Code, Weyssow et al. 2023 (000:33, 003:60)
Method: regularisers pull each parameter back to where the last task left it, by how much it
    mattered: EWC (Kirkpatrick et al. 2017) takes the mean square of its gradients at the end of a
    task, SI (Zenke et al. 2017) what its path through the task did for the loss. LwF (Li & Hoiem
    2016) adds the divergence from the model of before on the new rows. The paper finds that they
    forget less than a model that is just trained on (`naive`), and more than replay.
Here: the stream and the measures of `agem`. EWC squares the gradients of batches, clipped, and adds
    up over tasks about the last anchor (online EWC). LwF pays for the old model's forward pass.
    Left out: RWalk, and accuracy on calls of an API.
Cost: four arms, 12 runs of half a minute, five minutes on two CPU cores.
Run:
    python train.py study configs/continual/ewc.py --jobs 2
"""
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from configs import base as shared
from configs.continual.agem import ENDS, measures, naive
from lib.optim import adamw
from lib.study import Claim, Paper, Study
from lib.teacher import adopt_self, divergence, release
from model import cross_entropy


class Anchored(NamedTuple):
    """What holds parameters to where the last task left them, by name but for `inner`."""

    inner: optax.OptState
    anchor: dict  # parameters then
    weight: dict  # how much each one mattered so far
    gathered: dict  # of the present task
    count: jax.Array  # int32, updates so far


def anchored(inner, strength: float, ends: list, by: str, last: int):
    """An optimiser whose gradient g becomes g + strength weight (x - anchor)."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Anchored(inner.init(params), zeros, zeros, zeros, jnp.int32(0))

    def update(grads, state, params, rate, **more):
        first = state.count == 0
        anchor = jax.tree.map(lambda a, x: jnp.where(first, x, a), state.anchor, params)
        pulled = jax.tree.map(lambda g, w, x, a: g + strength * w * (x - a),
                              grads, state.weight, params, anchor)
        directions, after = inner.update(pulled, state.inner, params)
        count, tasks = state.count + 1, jnp.array(ends, jnp.int32)
        ended, near = jnp.any(count == tasks), jnp.any((count <= tasks) & (count > tasks - last))
        kept = {}, {}, {}
        for name, g in grads.items():
            now = params[name] - rate * directions[name]
            gathered = state.gathered[name] + jnp.where(near, jnp.square(g) / last, 0)
            mattered = gathered
            if by == "path":  # what the steps took off the loss
                gathered = state.gathered[name] + rate * g * directions[name]
                far = jnp.square(now - anchor[name])
                mattered = jnp.maximum(gathered, 0) / (far + 1e-3)
            new = now, state.weight[name] + mattered, jnp.zeros_like(g)
            old = anchor[name], state.weight[name], gathered
            for tree, x, y in zip(kept, new, old, strict=True):
                tree[name] = jnp.where(ended, x, y)
        return directions, Anchored(after, *kept, count)

    return optax.GradientTransformationExtraArgs(init, update)


def regularised(table, strength: float = 1.0, ends: list | None = None,
                by: Literal["fisher", "path"] = "fisher", last: int = 30) -> dict:
    """An `optimizer`: AdamW under EWC ("fisher", of a task's `last` updates) or SI ("path")."""
    every = adamw(table).items()
    return {group: anchored(each, strength, ends or [], by, last) for group, each in every}


def without_forgetting(logits, batch, extras, weight: float = 1.0):
    """A `token_loss`: the plain one, and the divergence from the model of before (LwF)."""
    return cross_entropy(logits, batch, extras) + weight * divergence(logits, batch, extras)


def with_old_model():
    """The stream with the model as it was before each phase but the first."""
    begin, *later = naive.phases
    taught = [replace(phase, edits=(release, adopt_self)) for phase in later]
    taught[0] = replace(taught[0], edits=(adopt_self,))
    phases = [replace(phase, token_loss=partial(without_forgetting, weight=1.0))
              for phase in taught]
    return replace(naive, phases=(begin, *phases),
                   optimizer=partial(adamw, frozen=("teacher",)))


pull = partial(regularised, ends=ENDS)
study = Study(
    question="Does holding on to parameters or to an old model keep old APIs?",
    paper=Paper(title="On the Usage of Continual Learning for Out-of-Distribution Generalization "
                "in Pre-trained Language Models of Code", authors="Weyssow et al.", year=2023,
                seeds=("000:33", "003:60")),
    arms={"naive": naive,
          "ewc": replace(naive, optimizer=partial(pull, strength=1e4, by="fisher", last=30)),
          "si": replace(naive, optimizer=partial(pull, strength=1.0, by="path")),
          "lwf": with_old_model()},
    measures=measures, seeds=3,
    quick=shared.quick(keep=("data.dev", "data.test")) | {"model.layers": 1},
    claims=(
        Claim(says="EWC forgets less", arm="ewc", measure="forgotten", below=0.0),
        Claim(says="so does SI", arm="si", measure="forgotten", below=0.0),
        Claim(says="so does LwF", arm="lwf", measure="forgotten", below=0.0),
        Claim(says="EWC learns new APIs less well", arm="ewc", measure="learnt", above=0.0),
        Claim(says="over all texts, EWC is ahead", arm="ewc", below=0.0),
    ),
)

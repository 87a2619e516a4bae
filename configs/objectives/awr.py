"""Advantage-weighted regression: should a line count by how much better it is than was expected?

Paper: Pretraining Language Models with Human Preferences, Korbak et al. 2023
    (000:5, 001:73, 002:38)
Method: likelihood times exp((R - V) / beta), where R is a line's reward and V a value of what came
    before, regressed on R. So where a bad line was likely a good one counts the more. rwr has no V.
    The loss is alpha times this and 1 - alpha times the squared error of V.
Here: lines and rewards as in preferences.py. V is linear in the final states. Its gradient ends
    there, so that the policy is weighted likelihood alone; the paper shares the trunk. alpha is
    0.5, weights are at most 1,000, as in the paper; beta is 0.5.
Cost: 9 runs of half a minute, 5 minutes on two CPU cores.
Run:
    python train.py study configs/objectives/awr.py --jobs 2
"""
from dataclasses import replace

import jax.numpy as jnp
from jax import lax

from configs import base
from configs.objectives.preferences import mle, rwr
from lib.study import Claim, Paper, Study
from model import Param, cross_entropy, llama, weighted_mean


def value_rows(config, rows: dict[str, Param]) -> dict[str, Param]:
    """The plain rows, and a value that is linear in the final states."""
    weight = Param(("embed",), rows["norm"].shape, 0.0)
    return rows | {"value": weight, "value_bias": Param(("out",), (1,), 0.0)}


def with_value(params, batch, mask, config):
    """The plain states, and the value [b t] of each; no gradient of it reaches the states."""
    states = llama(params, batch, mask, config)
    apart = lax.stop_gradient(states).astype(jnp.float32)
    return states, {"value": apart @ params["value"] + params["value_bias"]}


def awr(logits, batch, extras, alpha: float = 0.5, beta: float = 0.5, most: float = 1000.0):
    """Likelihood weighted by exp((R - V) / beta), `most` at most, and the squared error of V."""
    reward, value = -batch["marks"].astype(jnp.float32), extras["value"]
    weight = jnp.minimum(jnp.exp((reward - lax.stop_gradient(value)) / beta), most)
    policy = weight * cross_entropy(logits, batch, extras)
    return alpha * policy + (1 - alpha) * jnp.square(value - reward)


def value_error(losses, batch, extras):
    """A `reduce`: the weighted mean, and the squared error of the value as `value_error`."""
    (numerator, denominator), _ = weighted_mean(losses, batch)
    wrong = jnp.square(extras["value"] + batch["marks"])
    mean = jnp.sum(wrong * batch["weights"]) / jnp.maximum(denominator, 1)
    return (numerator, denominator), {"value_error": mean}


valued = replace(mle.model, rows=value_rows, forward=with_value)
study = Study(
    question="Should a line count by how much better it is than was expected?",
    paper=Paper(title="Pretraining Language Models with Human Preferences",
                authors="Korbak et al.", year=2023, seeds=("000:5", "001:73", "002:38")),
    arms={"mle": mle, "rwr": replace(mle, token_loss=rwr),
          "awr": replace(mle, model=valued, token_loss=awr, reduce=value_error)},
    quick=base.quick({"eval_every": 4, "evals.0.n": 4}),
    claims=(
        Claim(says="advantages make bad lines fewer", arm="awr", measure="own/bad", below=0.0),
        Claim(says="and fewer than rewards do", arm="awr", control="rwr", measure="own/bad",
              below=0.0),
        Claim(says="at a cost below 0.1 bits a byte", arm="awr", below=0.1),
    ), seeds=3)

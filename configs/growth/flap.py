"""FLAP: does what fluctuates least, with its mean made up for, cost least to cut, untrained?

Paper: Fluctuation-based Adaptive Structured Pruning for Large Language Models, An et al. 2024
    (002:4)
Method: what is cut and not retrained can be replaced by its mean. So a channel matters by the
    variance of an input over a few batches times the squared norm of what reads it. Scores are
    standardised in each layer's attention and MLP apart, so that one threshold decides how much
    each of them loses. The mean of what goes becomes a bias.
Here: a fifth of heads and MLP units, by parameters, is set to 0, as unlike layers cannot be
    stacked; its FLOPs are counted still. Nothing is trained after that. magnitude: by the squared
    norm of weights. norm: times the mean square of the input, as Wanda. no_bias: by fluctuation,
    like these without a bias. flap: with it. uncut: nothing goes.
Cost: three runs of half a minute, perp.py's too, and 15 of one step; three minutes on two cores.
Run:
    python train.py study configs/growth/flap.py --jobs 2
"""
from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from configs import base
from lib.biases import WRITERS, biased, biases
from lib.edits import check_options
from lib.optim import adamw
from lib.prune import each_layer
from lib.study import Claim, Paper, Study
from model import Context, Edited, Model, ModelConfig, groups, plain_table

READER = dict(zip(("kv_heads", "mlp"), WRITERS, strict=True))  # what reads units of an axis


@partial(jax.jit, static_argnums=2)
def powers(params, batch, config: ModelConfig) -> dict:
    """{o, down: (mean, mean square) of the inputs [layers, k g h] and [layers, f] on a batch}."""
    def summary(before, after, *inputs):
        flat = (x.reshape(*x.shape[:2], -1) for x in inputs)
        means = ((jnp.mean(x, (0, 1)), jnp.mean(x * x, (0, 1))) for x in flat)
        return dict(zip(WRITERS, means, strict=True))
    return each_layer(params, batch, config, summary)


def unit_scores(params, found: dict, config: ModelConfig, by: str) -> dict:
    """{axis: scores of units [layers, n]}, with mean 0 and deviation 1 in each layer."""
    scores = {}
    for axis, name in READER.items():
        mean, square = found[name]
        size = dict(magnitude=1.0, norm=square, fluctuation=square - jnp.square(mean))[by]
        weights = params[name].reshape(*mean.shape, -1)
        channels = (size * jnp.sum(jnp.square(weights), -1)).reshape(*params[name].shape[:2], -1)
        scores[axis] = jax.nn.standardize(jnp.mean(channels, -1), axis=1, epsilon=1e-24)
    return scores


def kept_units(scores: dict, config: ModelConfig, share: float) -> dict:
    """{axis: 1 for what stays, 0 for what goes [layers, n]}: the least go, of all parameters."""
    head = 2 * config.head_dim * (1 + config.heads // config.kv_heads)
    costs = jax.tree.map(jnp.full_like, scores, {"kv_heads": head, "mlp": 3})
    (flat, unflat), (costs, _) = ravel_pytree(scores), ravel_pytree(costs)
    order = jnp.argsort(flat, stable=True)
    stays = jnp.cumsum(costs[order]) > share * jnp.sum(costs)
    return unflat(jnp.zeros(flat.shape).at[order].set(stays.astype(flat.dtype)))


def without(params, config: ModelConfig, kept: dict, found: dict, bias: bool = True) -> dict:
    """Parameters in which what is not kept is 0, and its mean, as `powers` has it, a bias."""
    new = dict(params)
    for axis, name in READER.items():
        mean, stays = found[name][0], kept[axis]
        gone = bias * jnp.repeat(1 - stays, mean.shape[1] // stays.shape[1], 1)
        weights = params[name].reshape(*mean.shape, -1)
        new[f"{name}_bias"] = jnp.einsum("ln,lnd->ld", gone * mean, weights, precision="highest")
        for other, row in plain_table(config).items():
            if axis in row.axes:
                others = [i for i, own in enumerate(row.axes) if own not in ("layers", axis)]
                new[other] = params[other] * jnp.expand_dims(stays, others)
    return new


def flap(model: Model, context: Context, share: float = 0.2, bias: bool = True, batches: int = 8,
         by: Literal["fluctuation", "norm", "magnitude"] = "fluctuation") -> Edited:
    """Zero this share of the parameters of heads and MLP units of a plain Llama."""
    check_options(flap, by=by)
    config = replace(model.config, rows=biases, forward=biased)
    each = [powers(model.params, batch, model.config) for batch in context.batches(batches)]
    found = jax.tree.map(lambda *x: sum(x) / len(x), *each)
    kept = kept_units(unit_scores(model.params, found, config, by), config, share)
    params = without(model.params, config, kept, found, bias)
    return Edited(Model(config, params), dict.fromkeys(groups(config), "reset"), preserves=False)


trained = base.scaled(replace(base.small, model=replace(base.shape(), tied=False)), 200)


def arm(**how):
    """A run that cuts the trained model and trains nothing."""
    phase = replace(trained.phases[0], steps=1, edits=(partial(flap, **how),))
    untrained = partial(adamw, frozen=("embed", "head", "matrix", "vector", "bias"))
    return replace(trained, init_from="needs:trained", phases=(phase,), optimizer=untrained)


study = Study(
    question="Does what fluctuates least, its mean made up for, cost least to cut, untrained?",
    paper=Paper(title="Fluctuation-based Adaptive Structured Pruning for Large Language Models",
                authors="An et al.", year=2024, seeds=("002:4",)),
    needs={"trained": trained},
    arms={"magnitude": arm(by="magnitude", bias=False), "norm": arm(by="norm", bias=False),
          "no_bias": arm(bias=False), "flap": arm(), "uncut": arm(share=0.0)},
    quick=base.quick(),
    claims=(
        Claim(says="the paper's method loses less than weights do", arm="flap", below=0.0),
        Claim(says="and less than without a bias", arm="flap", control="no_bias", below=0.0),
        Claim(says="fluctuation, rather than norms", arm="no_bias", control="norm", below=0.0),
        Claim(says="a fifth costs under 0.1 bits", arm="flap", control="uncut", below=0.1),
    ),
    seeds=3,
)

"""What the tests of edits share: a context, parameters in which everything matters, what they compute."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import model
from lib.kernels import Mask
from model import Context, Edited, Model, ModelConfig

IDS = np.random.default_rng(0).integers(0, 258, (2, 12), np.int32)


def context(seed=0, **fields) -> Context:
    """An edit's context with no more than a key, and with these fields."""
    key = jax.random.key(seed)
    bare = Context(key, 10, None, None, None)
    return bare._replace(**fields)


def random_params(config: ModelConfig, seed=1) -> dict[str, jax.Array]:
    """Parameters in which gains and blocks matter more than in the table's draw."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, row in model.table(config).items():
        if row.init is None:
            draws = rng.uniform(0.5, 1.5, row.shape)
        else:
            draws = rng.normal(size=row.shape) * max(row.init, config.embed**-0.5)
        params[name] = jnp.asarray(draws, config.param_dtype)
    return params


def random_model(config: ModelConfig, tied: bool, dtype: str = "float32") -> Model:
    """A model of random parameters, computed in `dtype`."""
    config = replace(config, tied=tied, dtype=dtype, param_dtype=dtype)
    return Model(config, random_params(config))


def block_names(config: ModelConfig) -> set[str]:
    """The parameters of the blocks: those with an axis of layers in front."""
    rows = model.table(config)
    return {name for name in rows if rows[name].axes[0] == "layers"}


def shapes(arrays: dict) -> dict[str, tuple[int, ...]]:
    """{name: shape} of parameters, or of the rows of a table."""
    return {name: each.shape for name, each in arrays.items()}


@partial(jax.jit, static_argnames="config")
def logits(params, config: ModelConfig) -> jax.Array:
    """Logits at IDS."""
    return model.apply(params, IDS, replace(config, unroll=1))


def largest_change(edited: Edited, before: Model) -> float:
    """How far the logits moved; the edited parameters must have the shapes of the table."""
    after = edited.model
    assert shapes(after.params) == shapes(model.table(after.config))
    dtypes = {x.dtype for x in after.params.values()}
    assert dtypes == {x.dtype for x in before.params.values()}
    change = logits(after.params, after.config) - logits(before.params, before.config)
    return float(jnp.max(jnp.abs(change)))


def loss(params, config: ModelConfig) -> jax.Array:
    """The mean loss on IDS."""
    tokens, targets = IDS[:, :-1], IDS[:, 1:]
    rows = dict(
        tokens=tokens,
        targets=targets,
        segments=np.ones((2, 11), np.int32),
        positions=np.arange(11)[None].repeat(2, 0),
        weights=np.ones((2, 11)),
    )
    losses = model.losses(params, rows, Mask("causal", 0), replace(config, unroll=1))
    return jnp.mean(losses)


gradient = jax.jit(jax.grad(loss), static_argnums=1)

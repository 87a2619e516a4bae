"""What the tests of edits share: a context, parameters in which everything matters, what they compute."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import model
from lib.kernels import Mask
from model import Context, Model

IDS = np.random.default_rng(0).integers(0, 258, (2, 12), np.int32)


def context(seed=0, **fields):
    """An edit's context with no more than a key."""
    return Context(jax.random.key(seed), 10, None, None, None)._replace(**fields)


def some(config, seed=1):
    """Parameters in which gains and blocks matter more than in the table's draw."""
    rng, out = np.random.default_rng(seed), {}
    for name, p in model.table(config).items():
        draws = rng.uniform(0.5, 1.5, p.shape) if p.init is None else rng.normal(size=p.shape)
        size = 1 if p.init is None else max(p.init, config.embed**-0.5)
        out[name] = jnp.asarray(draws * size, config.param_dtype)
    return out


@partial(jax.jit, static_argnames="config")
def scores(params, config):
    """Logits at IDS."""
    return model.apply(params, IDS, replace(config, unroll=1))


def apart(edited, before) -> float:
    """How far the logits moved; the edited parameters must have the shapes of the table."""
    assert {n: x.shape for n, x in edited.model.params.items()} == {
        n: p.shape for n, p in model.table(edited.model.config).items()}
    assert {x.dtype for x in edited.model.params.values()} == {x.dtype for x in before.params.values()}
    return float(jnp.max(jnp.abs(scores(edited.model.params, edited.model.config)
                         - scores(before.params, before.config))))


def wider(dtype: str, tiny, tied: bool):
    config = replace(tiny, tied=tied, dtype=dtype, param_dtype=dtype)
    return Model(config, some(config))


def loss(params, config):
    rows = dict(tokens=IDS[:, :-1], targets=IDS[:, 1:], segments=np.ones((2, 11), np.int32),
                positions=np.arange(11)[None].repeat(2, 0), weights=np.ones((2, 11)))
    return jnp.mean(model.losses(params, rows, Mask("causal", 0), replace(config, unroll=1)))


gradient = jax.jit(jax.grad(loss), static_argnums=1)

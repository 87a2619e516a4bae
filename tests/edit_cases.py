"""What the tests of edits share: a context, and parameters in which everything matters."""
import jax
import jax.numpy as jnp
import numpy as np

import model
from model import Context


def context(seed=0, **fields):
    """An edit's context with no more than a key."""
    return Context(jax.random.key(seed), 10, None, None, None)._replace(**fields)


def some(config, seed=1):
    """Parameters in which gains and blocks matter more than in the table's draw."""
    rng, out = np.random.default_rng(seed), {}
    for name, p in model.table(config).items():
        draws = rng.uniform(0.5, 1.5, p.shape) if p.std is None else rng.normal(size=p.shape)
        size = 1 if p.std is None else max(p.std, config.embed**-0.5)
        out[name] = jnp.asarray(draws * size, config.param_dtype)
    return out

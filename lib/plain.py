"""What a model promises to those who sample, measure and export it."""
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from model import ModelConfig, apply, dtype_of, head_logits, llama, reparametrised, table, whole


def computes_llama(config: ModelConfig) -> bool:
    """Whether a model computes what the plain Llama does, from the parameters that it uses."""
    return config.forward == llama and config.outputs == head_logits


@functools.lru_cache(maxsize=64)
def predicts_pieces(reparam: Callable | None, config: ModelConfig, seq: int) -> bool:
    """Whether a model gives logits over the vocabulary for rows of `seq` tokens and nothing else.

    Without them there are no bits per byte, and nothing can be sampled. reparam: the config's own,
    or None.
    """
    if computes_llama(config):
        return True
    params = {}
    for name, param in table(config).items():
        params[name] = jax.ShapeDtypeStruct(param.shape, dtype_of(param, config))
    ids = jax.ShapeDtypeStruct((1, seq), jnp.int32)

    def logits(params, ids):
        batch = whole(ids)
        used = reparametrised(reparam, params, jnp.int32(0), batch, config)
        return apply(used, batch, config)

    try:
        found = jax.eval_shape(logits, params, ids)
    except KeyError:  # an array that only an objective makes
        return False
    return found.shape == (1, seq, config.vocab)

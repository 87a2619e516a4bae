"""Text from a run's checkpoint."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

import model
import train


def decode(params, tokens, cache, start, config: model.ModelConfig):
    """Logits [b t v] of tokens [b t] at positions start.., given keys and values of what came before.

    `cache` is a pair [l b s k h] of which the first `start` positions are filled; it comes back with t more.
    """
    b, t = tokens.shape
    index = start + jnp.arange(t)
    angles = model.rope(jnp.broadcast_to(index, (b, t)), config)
    see = jnp.broadcast_to(jnp.arange(cache[0].shape[2]) <= index[:, None], (b, t, cache[0].shape[2]))

    def layer(x, xs):
        w, k_cache, v_cache = xs

        def cached(q, k, v):
            keys = lax.dynamic_update_slice_in_dim(k_cache, k, start, axis=1)
            values = lax.dynamic_update_slice_in_dim(v_cache, v, start, axis=1)
            return model.attend(q, keys, values, see), (keys, values)

        return model.block(x, w, angles, cached, config)

    x = params["embed"][tokens].astype(config.dtype)
    x, cache = lax.scan(layer, x, (model.blocks(params, config), *cache))
    return model.logits(params, model.rms_norm(x, params["norm"], config.norm_eps), config), cache


@partial(jax.jit, static_argnames=("config", "length"))
def generate(params, prompt, prompt_length, length: int, temperature, key, config: model.ModelConfig):
    """Sample ids [b, length] after prompt [b, p], of which the first `prompt_length` ids count.

    temperature 0 takes the likeliest piece. One executable serves every prompt of the same padded length.
    """
    b, p = prompt.shape
    cache = (jnp.zeros((config.layers, b, p + length, config.kv_heads, config.head_dim), config.dtype),) * 2

    def pick(scores, i):
        drawn = jax.random.categorical(jax.random.fold_in(key, i), scores / jnp.maximum(temperature, 1e-6))
        return jnp.where(temperature > 0, drawn, jnp.argmax(scores, -1))

    scores, cache = decode(params, prompt, cache, 0, config)  # padding is overwritten before anything sees it
    first = pick(jnp.take(scores, prompt_length - 1, axis=1), 0)

    def step(carry, i):
        last, cache = carry
        scores, cache = decode(params, last[:, None], cache, prompt_length + i - 1, config)
        return (pick(scores[:, 0], i), cache), last

    (last, _), out = lax.scan(step, (first, cache), jnp.arange(1, length))
    return jnp.concatenate([out.T.reshape(b, length - 1), last[:, None]], axis=1)


def continuation(params, config: train.Config, tokenizer, prompt: str, tokens: int, temperature: float,
                 seed: int, step: int) -> str:
    """A prompt's continuation, up to the end of the document or `tokens` tokens; step: of the checkpoint."""
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    padded = np.full((1, max(32, 1 << (len(ids) - 1).bit_length())), tokenizer.eos, np.int32)
    padded[0, :len(ids)] = ids
    params = model.effective(config.weights, params, step, dict(tokens=padded))
    key = jax.random.key(seed)
    made = generate(params, padded, len(ids), tokens, temperature, key, config.model)
    out = multihost_utils.process_allgather(made, tiled=True)[0]
    ended = np.flatnonzero(out == tokenizer.eos)
    return tokenizer.decode(out[:ended[0]] if len(ended) else out)


def main(arguments: list[str]) -> str:
    """Command line; gives the text that it prints."""
    parser = train.Arguments("sample", __doc__)
    parser.add_argument("run", help="run directory")
    parser.add_argument("--prompt", help="text to continue; the config's prompts by default")
    parser.add_argument("--tokens", type=int, help="how many at most; the config's by default")
    parser.add_argument("--temperature", type=float, help="0: the likeliest token; the config's by default")
    parser.add_argument("--step", type=int, help="checkpoint; the newest by default")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    a = parser.parse_args(arguments)
    step = train.find(a.run, a.step)[1]
    params, config, tokenizer, _ = train.load(a.run, step)
    tokens = config.sample_tokens if a.tokens is None else a.tokens
    temperature = config.sample_temperature if a.temperature is None else a.temperature
    if tokens < 1 or temperature < 0:
        parser.error(f"--tokens is {tokens} and --temperature {temperature}; "
                     "allowed are 1 and more, and 0 and more")
    texts = [prompt + continuation(params, config, tokenizer, prompt, tokens, temperature, a.seed + i, step)
             for i, prompt in enumerate(config.prompts if a.prompt is None else [a.prompt])]
    text = "\n\n----\n\n".join(texts) + "\n"
    print(f"sample of {a.run}, temperature {temperature}:\n{text}", flush=True)
    return text

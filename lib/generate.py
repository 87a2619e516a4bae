"""Generation: continuations of prompts, with a cache of keys and values."""
import math
import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import get_abstract_mesh

from lib.kernels import Mask, attention
from lib.sharding import ROWS, RULES, constrain
from model import ModelConfig, block, blocks, dense, rms_norm, rope, table

CHUNK = 16  # tokens that the devices make between two looks of the host at them
ROOM = 256  # places of a cache that begins to grow


class Sampling(NamedTuple):
    """How a token is drawn; infinity (of top_k, top_p) leaves out none."""

    temperature: float = 1.0  # 0 takes the likeliest
    top_k: float = math.inf  # of so many likeliest tokens
    top_p: float = math.inf  # of the fewest that have this share of what is left (Holtzman et al. 2020)


def prepare(params, config: ModelConfig):
    """Parameters as generation reads them, placed by the table's rules: (others, [of each block]).

    In the dtype of the computation, once; each block's apart, as XLA on CPU would copy a slice of the stack
    for each token; and a matrix in parts of its outputs, as there one core alone multiplies a row with a
    matrix, but several cores several of them. The head is [v d], as a tied one is: no need to transpose.
    """
    mesh = get_abstract_mesh()
    cores = min(8, os.cpu_count()) if jax.default_backend() == "cpu" and (mesh.empty or mesh.size == 1) else 1

    def placed(x, axes):
        return constrain(x.astype(config.dtype), *(RULES[a] for a in axes))

    def parts(x, axis):
        return jnp.split(x, max(n for n in range(1, cores + 1) if x.shape[axis] % n == 0), axis)

    def parted(x, axes):
        return parts(placed(x, axes), 1 if axes[0] == "embed" else -1) if len(axes) > 1 else placed(x, axes)

    rows = table(config)
    others = {n: placed(params[n], rows[n].axes) for n in ("embed", "norm")}
    if not config.tied or cores > 1:  # else the table itself is the head
        head = others["embed"] if config.tied else placed(params["head"].T, ("vocab", "embed"))
        others["head"] = parts(head, 0)
    return others, [{n: parted(x[i], rows[n].axes[1:]) for n, x in blocks(params, config).items()}
                    for i in range(config.layers)]


def split_dense(x, w: list, axes: tuple[str, ...]):
    """`model.dense` by a matrix in parts."""
    return jnp.concatenate([dense(x, part, axes) for part in w], 2)


def forward_blocks(weights, tokens, positions, attends, config: ModelConfig):
    """(final states [b t d] of tokens [b t], [what each block's `attend(q, k, v)` gives besides])."""
    others, layers = weights
    angles, kept = rope(positions, config), []
    x = constrain(constrain(others["embed"], RULES["vocab"], None)[tokens], ROWS)
    for w, attend in zip(layers, attends, strict=True):
        x, aux = block(x, w, angles, attend, config, split_dense)
        kept.append(aux)
    return rms_norm(x, others["norm"], config.norm_eps), kept


def next_logits(others, states, config: ModelConfig):
    """Logits [b v] in float32 or wider, from final states [b d]."""
    wide = jnp.promote_types(config.dtype, jnp.float32)
    heads = [constrain(part, RULES["vocab"]) for part in others.get("head", [others["embed"]])]
    return jnp.concatenate([jnp.einsum("bd,vd->bv", states, part, preferred_element_type=wide)
                            for part in heads], -1)


def place_cache(x):
    """Keys or values [n s h] where rows and heads live; n = b k, if all devices divide that, or heads alone.

    One axis, as XLA on CPU makes one of b and k for its products, and a cache of two shapes would be copied.
    """
    mesh, heads = get_abstract_mesh(), RULES["kv_heads"]
    return constrain(x, heads if mesh.empty or x.shape[0] % mesh.size else (*ROWS, heads))


@partial(jax.jit, static_argnames=("size", "config"))
def prefill(weights, tokens, pad, size: int, config: ModelConfig):
    """Keys and values [n size h] of each block for tokens [b p], the first `pad` [b] of them padding."""
    (b, p), kv = tokens.shape, config.kv_heads
    index = jnp.arange(p) - pad[:, None]

    def attend(q, k, v):
        out = attention(q, k, v, Mask("causal", 0), (index >= 0).astype(jnp.int32))
        flat = [x.transpose(0, 2, 1, 3).reshape(b * kv, p, -1) for x in (k, v)]
        return out, [place_cache(jnp.pad(x, ((0, 0), (0, size - p), (0, 0)))) for x in flat]

    return forward_blocks(weights, tokens, jnp.maximum(index, 0), [attend] * config.layers, config)[1]


def decode(weights, cache, last, slot, pad, config: ModelConfig):
    """(logits [b v] after the ids `last` [b], the cache with these in its place `slot`, one for all rows)."""
    index, wide = jnp.arange(cache[0][0].shape[1]), jnp.promote_types(config.dtype, jnp.float32)
    see = jnp.repeat((index >= pad[:, None]) & (index <= slot), config.kv_heads, 0)[:, None]  # [n 1 s]

    def attend(held, q, k, v):
        keys, values = held = [place_cache(lax.dynamic_update_slice_in_dim(x, new.reshape(len(x), 1, -1), slot, 1))
                               for x, new in zip(held, (k, v), strict=True)]
        own = q.reshape(len(keys), -1, q.shape[-1]) * q.shape[-1]**-0.5  # [n g h]
        scores = jnp.einsum("ngh,nsh->ngs", own, keys, preferred_element_type=wide)
        share = jax.nn.softmax(jnp.where(see, scores, jnp.finfo(wide).min)).astype(values.dtype)
        return jnp.einsum("ngs,nsh->ngh", share, values).reshape(q.shape), held

    states, cache = forward_blocks(weights, last[:, None], (slot - pad)[:, None],
                            [partial(attend, held) for held in cache], config)
    return next_logits(weights[0], states[:, 0], config), cache


def narrow(scores, top_k, top_p):
    """Scores [b v], -inf for all but the `top_k` largest, and of these for all but the fewest that have
    `top_p` of their probability; what is as likely as the last of them stays too.
    """
    def least(share, weight, enough):
        """[b 1], the largest x for which the weights where share >= x come to `enough`; 0 if they never do.

        By bisection over the bits of float32, ordered as the numbers are: XLA on CPU is slow to sort.
        """
        bits = lax.bitcast_convert_type(share, jnp.int32)

        def halve(_, ends):
            low, high = ends
            middle = (low + high + 1) // 2
            fits = jnp.sum(jnp.where(bits >= middle, weight, 0), -1, keepdims=True) >= enough
            return jnp.where(fits, middle, low), jnp.where(fits, high, middle - 1)

        ends = jnp.zeros_like(bits[:, :1]), jnp.full_like(bits[:, :1], 0x3F800000)  # the bits of 0 and 1
        return lax.bitcast_convert_type(lax.fori_loop(0, 30, halve, ends)[0], jnp.float32)

    share = jax.nn.softmax(scores).astype(jnp.float32)
    share = jnp.where(share >= least(share, jnp.ones_like(share), top_k), share, 0)
    share /= jnp.sum(share, -1, keepdims=True)
    return jnp.where((share > 0) & (share >= least(share, share, top_p)), scores, -jnp.inf)


def pick(scores, keys, number, how: Sampling):
    """Ids [b] by logits [b v]; a row's draw is a function of its key (data [b 2]) and the token's number."""
    def draw(scores):
        scores = scores / jnp.maximum(how.temperature, 1e-6)
        few = (how.top_k < scores.shape[1]) | (how.top_p < 1)
        scores = lax.cond(few, partial(narrow, top_k=how.top_k, top_p=how.top_p), lambda x: x, scores)
        own = jax.vmap(jax.random.fold_in, (0, None))(jax.random.wrap_key_data(keys), number)
        return jax.vmap(jax.random.categorical)(own, scores)

    scores = constrain(scores, ROWS, None)
    return lax.cond(how.temperature > 0, draw, lambda x: jnp.argmax(x, -1), scores).astype(jnp.int32)


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def extend(weights, cache, last, done, pad, keys, width, made, n, how: Sampling, eos, config: ModelConfig):
    """Up to n <= CHUNK more tokens after the ids `last` [b]: (ids [b CHUNK], cache), eos for rows [b] `done`.

    width: places of the cache that prompts take but for `last`; made: how many tokens there were before. The
    cache is carried by a while loop, where XLA writes one place of it; as a scan's output it would be copied.
    """
    def more(carry):
        i, done = carry[0], carry[-1]
        return (i < n) & ~jnp.all(done)

    def step(carry):
        i, out, cache, last, done = carry
        scores, cache = decode(weights, cache, last, width + made + i, pad, config)
        last = jnp.where(done, eos, pick(scores, keys, made + i, how))
        return i + 1, out.at[:, i].set(last), cache, last, done | (last == eos)

    out = jnp.full((len(last), CHUNK), eos, jnp.int32)
    _, out, cache, _, _ = lax.while_loop(more, step, (0, out, cache, last, done))
    return constrain(out), cache


@partial(jax.jit, static_argnames="size")
def grow(cache, size: int):
    """The cache with room for `size` positions."""
    return jax.tree.map(lambda x: place_cache(jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0)))), cache)


def padded(prompts: list, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids [b width + 1] of prompts, as many `fill`s in front as it takes, of how many [b]); width: 2^n."""
    long = max(map(len, prompts))
    width = max(32, 1 << (long - 2).bit_length())
    pad = np.array([width + 1 - len(ids) for ids in prompts], np.int32)
    return np.stack([np.pad(ids, (n, 0), constant_values=fill) for ids, n in zip(prompts, pad, strict=True)]
                    ).astype(np.int32), pad


def generate(weights, prompts: list, tokens: int, seeds: list[int], how: Sampling, eos: int,
             config: ModelConfig, heed: Callable | None = None, pace: int = CHUNK) -> np.ndarray:
    """At most `tokens` ids [b, n] after each of `prompts`, lists of one id and more; eos after a row's end.

    seeds: of each row's draws. heed: gets the ids [b, n] so far, each `pace` of them, and gives the rows [b]
    that shall end there. The cache grows by powers of two, since all of it is read for each token.
    """
    ids, pad = padded(prompts, eos)
    width, made, done = ids.shape[1] - 1, 0, np.zeros(len(ids), bool)
    keys = np.stack([jax.random.key_data(jax.random.key(seed)) for seed in seeds])
    size = 1 << (width + min(tokens, max(ROOM - width, CHUNK)) - 1).bit_length()
    cache = prefill(weights, ids[:, :-1], pad, size, config)
    while made < tokens and not done.all():
        n = min(pace, tokens - made)
        if width + made + n > size:
            cache = grow(cache, size := 2 * size)
        out, cache = extend(weights, cache, ids[:, -1], done, pad, keys, np.int32(width), np.int32(made),
                            np.int32(n), how, np.int32(eos), config)
        ids, made = np.concatenate([ids, np.asarray(out)[:, :n]], 1), made + n
        done = (ids[:, -1] == eos) | (heed(ids[:, width + 1:]) if heed else False)
    return ids[:, width + 1:]


def read_text(ids, tokenizer, stops: list[str]) -> tuple[str, str]:
    """The text of ids up to the first eos or stop string, and what ended it: "eos", "stop" or "length"."""
    ends = np.flatnonzero(ids == tokenizer.eos)
    text = tokenizer.decode(ids[:ends[0]] if len(ends) else ids)
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[:min(found)], "stop") if found else (text, "eos" if len(ends) else "length")


def settled(text: str, stops: list[str]) -> str:
    """What of a text stays, whatever follows: not a cut character or escape, nor what may begin a stop."""
    text = text.rstrip("\ufffd\x10")
    held = [n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])]
    return text[:len(text) - max(held, default=0)]

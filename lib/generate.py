"""Generation: ids that continue the ids of prompts.

A model that computes the plain Llama keeps a cache of keys and values. Of another one, all of a row
is computed again for each token, which is right for causal models.

Axis letters as in model.py, and: p position of a prompt, s place in the cache, n = b k.
"""
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
from lib.plain import computes_llama
from lib.products import float32_or_wider, product
from lib.sharding import ROWS, RULES, constrain
from model import (
    ModelConfig,
    apply,
    block,
    dense,
    plain_table,
    rms_norm,
    rope,
)

CHUNK = 16  # tokens that the devices make between two looks of the host at them
ROOM = 256  # places of a cache that begins to grow
SHORTEST = 32  # places that the shortest prompts get
MOST_PARTS = 8  # of a matrix on a CPU


class Sampling(NamedTuple):
    """How a token is drawn; each may be an array, so that another value needs no compilation."""

    temperature: float = 1.0  # 0: the likeliest token
    top_k: float = math.inf  # only of so many likeliest tokens; infinity: of all
    top_p: float = math.inf  # only of the fewest with this part of the rest (Holtzman et al. 2020)


def sampling(temperature: float, top_k: int = 0, top_p: float = 1.0) -> Sampling:
    """How a token is drawn, as float32; a top_k of 0 and a top_p of 1 leave out no token."""
    few = top_k if top_k else math.inf
    part = top_p if top_p < 1 else math.inf
    return Sampling(*map(np.float32, (temperature, few, part)))


# ------------------------------------------------------------------------------------ the weights


def cpu_parts() -> int:
    """How many parts a matrix is cut into at most: on one CPU device its cores, otherwise 1."""
    mesh = get_abstract_mesh()
    one_device = mesh.empty or mesh.size == 1
    if jax.default_backend() == "cpu" and one_device:
        return min(MOST_PARTS, os.cpu_count())
    return 1


def split_even(x, axis: int, most: int) -> list:
    """x cut along an axis into equal parts, at most so many."""
    size = x.shape[axis]
    parts = most
    while size % parts:
        parts -= 1
    return jnp.split(x, parts, axis)


def prepare(params, config: ModelConfig):
    """Parameters as generation reads them: those of a model that keeps no cache as they are."""
    if computes_llama(config):
        return prepare_llama(params, config)
    return params


def prepare_llama(params, config: ModelConfig) -> tuple[dict, list[dict]]:
    """Parameters of the plain Llama: (embedding, norm and head; a dictionary for each block).

    They are in the dtype of the computation and placed by the table's rules. Each block has arrays
    of its own, since XLA on CPU would copy a slice of the stack for each token. There a matrix is a
    list of parts of its outputs: one core alone multiplies a row with a matrix, but several cores
    several matrices. The head is [v d], as a tied one is, so that none has to be transposed.
    """
    rows = plain_table(config)
    most = cpu_parts()

    def placed(x, axes):
        on = [RULES[axis] for axis in axes]
        return constrain(x.astype(config.dtype), *on)

    def parts(x, axes):
        x = placed(x, axes)
        if len(axes) == 1:
            return x
        outputs = 1 if axes[0] == "embed" else -1
        return split_even(x, outputs, most)

    others = {}
    for name in ("embed", "norm"):
        others[name] = placed(params[name], rows[name].axes)
    if not config.tied:
        head = params["head"].T
        head = placed(head, ("vocab", "embed"))
        others["head"] = split_even(head, 0, most)
    elif most > 1:  # otherwise the embedding itself is the head
        others["head"] = split_even(others["embed"], 0, most)
    stacked = [name for name in rows if rows[name].layered]
    layers = []
    for layer in range(config.layers):
        own = {}
        for name in stacked:
            axes = rows[name].axes[1:]  # without "layers"
            own[name] = parts(params[name][layer], axes)
        layers.append(own)
    return others, layers


# ------------------------------------------------------------------------------- the forward pass


def split_dense(x, parts: list, axes: tuple[str, ...]):
    """`model.dense` by a matrix in parts."""
    outputs = [dense(x, part, axes) for part in parts]
    return jnp.concatenate(outputs, 2)


def forward_blocks(
    weights,
    tokens,
    positions,
    attends: list[Callable],
    config: ModelConfig,
):
    """The final states [b t d] of tokens [b t], and what each block's attention gives besides.

    attends: for each block, attend(q, k, v) -> (output, what it gives besides).
    """
    others, layers = weights
    angles = rope(positions, config)
    embed = constrain(others["embed"], RULES["vocab"], None)
    x = constrain(embed[tokens], ROWS)
    besides = []
    for w, attend in zip(layers, attends, strict=True):
        x, aux = block(x, w, angles, attend, config, split_dense)
        besides.append(aux)
    return rms_norm(x, others["norm"], config.norm_eps), besides


def next_logits(others, states, config: ModelConfig):
    """Logits [b v] in float32 or wider, from final states [b d]."""
    wide = float32_or_wider(config.dtype)
    logits = []
    parts = others.get("head", [others["embed"]])
    for part in parts:
        part = constrain(part, RULES["vocab"])
        own = product("bd,vd->bv", states, part, wide)
        logits.append(own)
    return jnp.concatenate(logits, -1)


# ---------------------------------------------------------------------------------------- the cache


def place_cache(x):
    """Keys or values [n s h], placed where rows and heads live.

    Where the devices do not divide n, only heads are spread.
    Rows and heads share one axis, as XLA on CPU makes one of them for its products: with two shapes
    the cache would be copied.
    """
    mesh = get_abstract_mesh()
    heads = RULES["kv_heads"]
    if mesh.empty or x.shape[0] % mesh.size:
        return constrain(x, heads)
    return constrain(x, (*ROWS, heads))


def pad_cache(x, size: int):
    """Keys or values [n s h] with room for `size` places."""
    missing = size - x.shape[1]
    whole = (0, 0)
    x = jnp.pad(x, (whole, (0, missing), whole))
    return place_cache(x)


@partial(jax.jit, static_argnames=("size", "config"))
def prefill(weights, tokens, pad, size: int, config: ModelConfig):
    """The cache of tokens [b p]: keys and values [n size h] of each block.

    pad [b]: how many of a row's first tokens are padding.
    """
    b, p = tokens.shape
    n = b * config.kv_heads
    index = jnp.arange(p) - pad[:, None]
    segments = (index >= 0).astype(jnp.int32)

    def cached(x):  # [b p k h] -> [n size h]
        x = x.transpose(0, 2, 1, 3)
        return pad_cache(x.reshape(n, p, -1), size)

    def attend(q, k, v):
        mask = Mask("causal", 0)
        out = attention(q, k, v, mask, segments)
        return out, [cached(k), cached(v)]

    positions = jnp.maximum(index, 0)
    attends = [attend] * config.layers
    _, cache = forward_blocks(weights, tokens, positions, attends, config)
    return cache


def decode(weights, cache, last, slot, pad, config: ModelConfig):
    """Logits [b v] after the ids `last` [b], and the cache with these in its place `slot`."""
    wide = float32_or_wider(config.dtype)
    keys, _ = cache[0]
    index = jnp.arange(keys.shape[1])
    seen = (index >= pad[:, None]) & (index <= slot)  # [b s]
    mask = jnp.repeat(seen, config.kv_heads, 0)
    mask = mask[:, None]  # [n 1 s]

    def written(old, new):
        new = new.reshape(len(old), 1, -1)
        held = lax.dynamic_update_slice_in_dim(old, new, slot, 1)
        return place_cache(held)

    def attend(held, q, k, v):
        keys = written(held[0], k)
        values = written(held[1], v)
        head_dim = q.shape[-1]
        queries = q.reshape(len(keys), -1, head_dim)  # [n g h]
        queries = queries * head_dim**-0.5
        scores = product("ngh,nsh->ngs", queries, keys, wide)
        scores = jnp.where(mask, scores, jnp.finfo(wide).min)
        probs = jax.nn.softmax(scores)
        probs = probs.astype(values.dtype)
        out = product("ngs,nsh->ngh", probs, values, values.dtype)
        return out.reshape(q.shape), [keys, values]

    attends = [partial(attend, held) for held in cache]
    tokens = last[:, None]
    positions = (slot - pad)[:, None]
    states, cache = forward_blocks(weights, tokens, positions, attends, config)
    others, _ = weights
    logits = next_logits(others, states[:, 0], config)
    return logits, cache


@partial(jax.jit, static_argnames="size")
def grow(cache, size: int):
    """The cache with room for `size` places."""
    pad = partial(pad_cache, size=size)
    return jax.tree.map(pad, cache)


# --------------------------------------------------------------------------------- drawing a token


def threshold(probs, weight, enough):
    """The largest x [b 1] for which the weights [b v] where probs >= x sum to `enough`; or else 0.

    By bisection over the bits of float32, which are ordered as the numbers are: XLA on CPU sorts
    slowly.
    """
    bits = lax.bitcast_convert_type(probs, jnp.int32)
    zero = jnp.zeros_like(bits[:, :1])
    one = jnp.full_like(zero, 0x3F800000)  # the bits of 1.0

    def halve(_, ends):
        low, high = ends
        middle = (low + high + 1) // 2
        above = jnp.where(bits >= middle, weight, 0)
        total = jnp.sum(above, -1, keepdims=True)
        fits = total >= enough
        low = jnp.where(fits, middle, low)
        high = jnp.where(fits, high, middle - 1)
        return low, high

    low, _ = lax.fori_loop(0, 30, halve, (zero, one))
    return lax.bitcast_convert_type(low, jnp.float32)


def narrow(scores, top_k, top_p):
    """Scores [b v], -inf for tokens that are left out.

    The `top_k` largest stay, and of these the fewest that have `top_p` of their probability. A
    token that is as likely as the last of them stays too.
    """
    probs = jax.nn.softmax(scores).astype(jnp.float32)
    least = threshold(probs, jnp.ones_like(probs), top_k)
    probs = jnp.where(probs >= least, probs, 0)
    probs /= jnp.sum(probs, -1, keepdims=True)
    least = threshold(probs, probs, top_p)
    stays = (probs > 0) & (probs >= least)
    return jnp.where(stays, scores, -jnp.inf)


def pick(scores, keys, number, how: Sampling):
    """Ids [b] by logits [b v]; a draw depends on its row's key ([b 2]) and the token's number."""

    def narrowed(scores):
        return narrow(scores, how.top_k, how.top_p)

    def unchanged(scores):
        return scores

    def draw(scores):
        scores = scores / jnp.maximum(how.temperature, 1e-6)
        vocab = scores.shape[1]
        few = (how.top_k < vocab) | (how.top_p < 1)
        scores = lax.cond(few, narrowed, unchanged, scores)
        row_keys = jax.random.wrap_key_data(keys)
        fold_in = jax.vmap(jax.random.fold_in, (0, None))
        categorical = jax.vmap(jax.random.categorical)
        return categorical(fold_in(row_keys, number), scores)

    def likeliest(scores):
        return jnp.argmax(scores, -1)

    scores = constrain(scores, ROWS, None)
    ids = lax.cond(how.temperature > 0, draw, likeliest, scores)
    return ids.astype(jnp.int32)


# -------------------------------------------------------------------------------- generating ids


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def extend(
    weights, cache, last, done, pad, keys, width, made, n, how: Sampling, eos, config: ModelConfig
):
    """Up to n <= CHUNK more tokens after the ids `last` [b]: (ids [b CHUNK], cache).

    done [b]: rows that have ended, which get eos. width: places of the cache that prompts take,
    without `last`. made: how many tokens there were before. The cache is carried by a while loop,
    where XLA writes one place of it. As the output of a scan it would be copied.
    """

    def more(carry):
        i, *_, done = carry
        return (i < n) & ~jnp.all(done)

    def step(carry):
        i, out, cache, last, done = carry
        slot = width + made + i
        scores, cache = decode(weights, cache, last, slot, pad, config)
        drawn = pick(scores, keys, made + i, how)
        last = jnp.where(done, eos, drawn)
        out = out.at[:, i].set(last)
        done = done | (last == eos)
        return i + 1, out, cache, last, done

    out = jnp.full((len(last), CHUNK), eos, jnp.int32)
    begin = (0, out, cache, last, done)
    _, out, cache, *_ = lax.while_loop(more, step, begin)
    return constrain(out), cache


def power_of_two(n: int) -> int:
    """The smallest power of two that is not less than n."""
    return 1 << (n - 1).bit_length()


def padded(
    prompts: list[list[int]],
    fill: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as ids [b width + 1] with `fill` in front, and how many of them there are [b].

    The width is a power of two, so that few shapes are compiled.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    width = max(SHORTEST, power_of_two(longest - 1))
    pad = (width + 1 - lengths).astype(np.int32)
    shape = (len(prompts), width + 1)
    ids = np.full(shape, fill, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, pad[row]:] = prompt
    return ids, pad


def key_data(seed: int) -> np.ndarray:
    """The numbers that make up a seed's key."""
    key = jax.random.key(seed)
    return np.asarray(jax.random.key_data(key))


class WithCache:
    """Rows of ids that grow by a cache, which grows by powers of two: all of it is read each time.

    weights: of `prepare`. prompts: lists of one id or more. tokens: at most made. keys [b 2]: of
    each row's draws.
    """

    def __init__(self, weights, prompts, tokens: int, keys, how: Sampling, eos: int, config):
        ids, self.pad = padded(prompts, eos)
        self.weights = weights
        self.keys = keys
        self.how = how
        self.config = config
        self.eos = np.int32(eos)
        self.last = ids[:, -1]
        self.width = ids.shape[1] - 1
        room = min(tokens, max(ROOM - self.width, CHUNK))
        self.size = power_of_two(self.width + room)
        self.cache = prefill(weights, ids[:, :-1], self.pad, self.size, config)

    def extend(self, done, made: int, n: int) -> np.ndarray:
        """The next n <= CHUNK ids [b n] after `made`; eos in rows that are `done` [b]."""
        if self.width + made + n > self.size:
            self.size *= 2
            self.cache = grow(self.cache, self.size)
        counts = map(np.int32, (self.width, made, n))
        rows = self.last, done, self.pad, self.keys
        out, self.cache = extend(
            self.weights,
            self.cache,
            *rows,
            *counts,
            self.how,
            self.eos,
            self.config,
        )
        out = np.asarray(out)[:, :n]
        self.last = out[:, -1]
        return out


@partial(jax.jit, static_argnames="config")
def extend_whole(params, ids, ends, done, keys, made, n, how, eos, config: ModelConfig):
    """`extend` without a cache: ids [b s], of whose rows the first `ends` [b] are there.

    What stands behind them is not read by a causal model.
    """
    rows = jnp.arange(len(ids))

    def more(carry):
        i, _, done = carry
        return (i < n) & ~jnp.all(done)

    def step(carry):
        i, ids, done = carry
        logits = apply(params, ids, config)
        drawn = pick(logits[rows, ends + i - 1], keys, made + i, how)
        last = jnp.where(done, eos, drawn)
        ids = ids.at[rows, ends + i].set(last)
        return i + 1, ids, done | (last == eos)

    _, ids, _ = lax.while_loop(more, step, (0, ids, done))
    return constrain(ids)


class WithoutCache:
    """Rows of ids that grow by a model that computes all of them for each token.

    See `WithCache`. Prompts begin at the first position, and eos fills up the rows. Their length is
    a power of two, so that few shapes are compiled.
    """

    def __init__(self, weights, prompts, tokens: int, keys, how: Sampling, eos: int, config):
        self.weights = weights
        self.keys = keys
        self.how = how
        self.config = config
        self.eos = np.int32(eos)
        self.ends = np.array([len(prompt) for prompt in prompts], np.int32)
        longest = int(self.ends.max())
        self.ids = np.full((len(prompts), longest), eos, np.int32)
        for row, prompt in enumerate(prompts):
            self.ids[row, :len(prompt)] = prompt

    def extend(self, done, made: int, n: int) -> np.ndarray:
        """The next n <= CHUNK ids [b n] after `made`; eos in rows that are `done` [b]."""
        needed = int(self.ends.max()) + n
        size = max(SHORTEST, power_of_two(needed))
        missing = max(0, size - self.ids.shape[1])
        room = (0, 0), (0, missing)
        ids = np.pad(self.ids, room, constant_values=self.eos)
        counts = map(np.int32, (made, n))
        rows = ids, self.ends, done, self.keys
        ids = extend_whole(
            self.weights,
            *rows,
            *counts,
            self.how,
            self.eos,
            self.config,
        )
        self.ids = np.asarray(ids)
        new = self.ends[:, None] + np.arange(n)
        self.ends = self.ends + n
        return np.take_along_axis(self.ids, new, 1)


def generate(
    weights,
    prompts: list[list[int]],
    tokens: int,
    seeds: list[int],
    how: Sampling,
    eos: int,
    config: ModelConfig,
    heed: Callable | None = None,
    pace: int = CHUNK,
) -> np.ndarray:
    """At most `tokens` ids [b n] after each of `prompts`, of one id or more; eos after an end.

    weights: of `prepare`. seeds: one for each row's draws. heed: called with the ids [b n] so far,
    each `pace` of them; returns which rows [b] end there.
    """
    way = WithCache if computes_llama(config) else WithoutCache
    keys = np.stack([key_data(seed) for seed in seeds])
    rows = way(weights, prompts, tokens, keys, how, eos, config)
    ids = np.zeros((len(prompts), 0), np.int32)
    done = np.zeros(len(prompts), bool)
    while ids.shape[1] < tokens and not done.all():
        made = ids.shape[1]
        out = rows.extend(done, made, min(pace, tokens - made))
        ids = np.concatenate([ids, out], 1)
        done = ids[:, -1] == eos
        if heed:
            done = done | heed(ids)
    return ids

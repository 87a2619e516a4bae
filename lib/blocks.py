"""Attention in blocks of queries and keys, for long rows, in operations of XLA.

FlashAttention (Dao et al. 2022): no square of scores is ever held, and the backward pass makes them
again. One loop goes over the pairs of blocks that the mask lets see each other, so that the program
is as large for any length.

Letters of axes: b batch, k key-value head, h head_dim, s position of a key, r query of a key-value
head: block after block, within a block query head after query head.
"""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lib.masks import Mask, allowed


def in_blocks(
    q,
    k,
    v,
    mask: Mask,
    segments,
    prefix,
    size: int,
) -> jax.Array:
    """`lib.kernels.attention` by blocks of so many positions, of which a row is a multiple."""
    b, t, kv, g, h = q.shape
    q = q.reshape(b, t // size, size, kv, g, h) * h**-0.5
    q = jnp.transpose(q, (0, 3, 1, 4, 2, 5))
    q = q.reshape(b, kv, g * t, h)
    k = jnp.moveaxis(k, 1, 2)
    v = jnp.moveaxis(v, 1, 2)
    out = mix(q, k, v, segments, prefix, mask, size)
    out = out.reshape(b, kv, t // size, g, size, h)
    out = jnp.transpose(out, (0, 2, 4, 1, 3, 5))
    return out.reshape(b, t, kv, g, h)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def mix(q, k, v, segments, prefix, mask, size):
    """softmax(q kᵀ where the mask allows it) v [b k r h], for q [b k r h], k and v [b k s h].

    Scores and sums are in float32 or wider; the gradient is its own. Each query sees itself.
    """
    return mix_forward(q, k, v, segments, prefix, mask, size)[0]


def mix_forward(q, k, v, segments, prefix, mask, size):
    """(out, residuals) of `mix`: with the logarithm of each query's sum [b k r]."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    least = jnp.finfo(wide).min  # not -inf: within a block a query may see nothing
    rows = size * q.shape[2] // k.shape[2]

    def add(found, pair):
        i, j = pair
        before, top, total = (part(x, i, rows) for x in found)
        keys, values = part(k, j, size), part(v, j, size)
        scores = jnp.einsum("bkrh,bksh->bkrs", part(q, i, rows), keys, preferred_element_type=wide)
        visible = seen(mask, segments, prefix, pair, size)
        visible = jnp.tile(visible[:, None], (1, 1, rows // size, 1))
        scores = jnp.where(visible, scores, least)
        highest = jnp.maximum(top, jnp.max(scores, -1))
        probs = jnp.exp(scores - highest[..., None])
        fade = jnp.exp(top - highest)
        own = jnp.einsum("bkrs,bksh->bkrh", probs.astype(v.dtype), values, preferred_element_type=wide)
        now = before * fade[..., None] + own, highest, total * fade + jnp.sum(probs, -1)
        return tuple(put(x, one, i) for x, one in zip(found, now, strict=True)), None

    zeros = jnp.zeros(q.shape, wide)
    begun = zeros, zeros[..., 0] + least, zeros[..., 0]
    (out, top, total), _ = lax.scan(add, begun, pairs(mask, k.shape[2] // size, size))
    out = checkpoint_name((out / total[..., None]).astype(v.dtype), "attention")
    sums = checkpoint_name(top + jnp.log(total), "attention")
    return out, (q, k, v, segments, prefix, out, sums)


def mix_backward(mask, size, residuals, d_out):
    """Gradients of the arguments of `mix`.

    Scores are made as [b k s r], and the gradient of q as [b k h r]. So no product transposes what
    is as large as scores.
    """
    q, k, v, segments, prefix, out, sums = residuals
    wide = sums.dtype
    rows = size * q.shape[2] // k.shape[2]
    turned = jnp.swapaxes(k, 2, 3)
    product_sums = jnp.sum((d_out * out).astype(wide), -1)
    product = partial(jnp.einsum, preferred_element_type=wide)

    def add(found, pair):
        i, j = pair
        d_q, d_k, d_v = found
        queries, d_mixed, own_sums, own_products = (
            part(x, i, rows) for x in (q, d_out, sums, product_sums)
        )
        keys, values = part(k, j, size), part(v, j, size)
        scores = product("bksh,bkrh->bksr", keys, queries)
        visible = seen(mask, segments, prefix, pair, size)
        visible = jnp.tile(jnp.swapaxes(visible, 1, 2)[:, None], (1, 1, 1, rows // size))
        scores = jnp.where(visible, scores, jnp.finfo(wide).min)
        probs = jnp.exp(scores - own_sums[:, :, None])
        d_probs = product("bksh,bkrh->bksr", values, d_mixed)
        d_scores = (probs * (d_probs - own_products[:, :, None])).astype(q.dtype)
        d_v = plus(d_v, product("bksr,bkrh->bksh", probs.astype(q.dtype), d_mixed), j)
        d_k = plus(d_k, product("bksr,bkrh->bksh", d_scores, queries), j)
        d_q = plus(d_q, product("bkhs,bksr->bkhr", part(turned, j, size, 3), d_scores), i, 3)
        return (d_q, d_k, d_v), None

    begun = [jnp.zeros(x.shape, wide) for x in (jnp.swapaxes(q, 2, 3), k, v)]
    found, _ = lax.scan(add, tuple(begun), pairs(mask, k.shape[2] // size, size))
    d_q, d_k, d_v = (x.astype(q.dtype) for x in found)
    return jnp.swapaxes(d_q, 2, 3), d_k, d_v, None, None


mix.defvjp(mix_forward, mix_backward)


def pairs(mask: Mask, blocks: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The blocks of queries and, beside each, those of keys that some query in it may see."""
    index = np.arange(blocks)
    ahead = index[None, :] - index[:, None]
    visible = (ahead <= 0) | (mask.kind != "causal")
    if mask.window:
        nearest = (abs(ahead) - 1) * size + 1
        visible &= nearest < mask.window
    queries, keys = np.nonzero(visible)
    return queries.astype(np.int32), keys.astype(np.int32)


def seen(mask: Mask, segments, prefix, pair, size: int) -> jax.Array:
    """bool [b size size]: which keys of a block each position of a block sees, see `allowed`."""
    i, j = pair
    index = jnp.arange(size)
    marks = part(prefix, j, size, 1) if mask.kind == "prefix" else None
    return allowed(
        mask,
        i * size + index,
        j * size + index,
        part(segments, i, size, 1),
        part(segments, j, size, 1),
        marks,
    )


def part(x, number, size: int, axis: int = 2) -> jax.Array:
    """Block `number` of x along an axis, which has blocks of this size."""
    return lax.dynamic_slice_in_dim(x, number * size, size, axis)


def put(x, block, number, axis: int = 2) -> jax.Array:
    """x with this as its block `number`."""
    return lax.dynamic_update_slice_in_dim(x, block, number * block.shape[axis], axis)


def plus(x, block, number, axis: int = 2) -> jax.Array:
    """x with this added to its block `number`."""
    before = part(x, number, block.shape[axis], axis)
    return put(x, before + block, number, axis)

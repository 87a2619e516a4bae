"""Attention in blocks of queries and keys, for long rows, in operations of XLA.

FlashAttention (Dao et al. 2022): no square of scores is ever held, and the backward pass makes them
again. One loop goes over the pairs of blocks that the mask lets see each other, so that the program
is as large for any length.

Letters of axes: b batch, k key-value head, h head_dim, s position of a key, r query of a key-value
head: block after block, within a block query head after query head.
"""
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lib.masks import Mask, allowed
from lib.products import float32_or_wider, product


class Marks(NamedTuple):
    """What a mask reads of the positions of a row."""

    segments: jax.Array  # [b s]
    prefix: jax.Array | None  # [b s], of a prefix mask


class Blocks(NamedTuple):
    """How the scores are cut up."""

    mask: Mask
    size: int  # positions of a block
    rows: int  # queries of a key-value head in it


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
    q = q * h**-0.5
    q = q.reshape(b, t // size, size, kv, g, h)
    q = jnp.transpose(q, (0, 3, 1, 4, 2, 5))
    q = q.reshape(b, kv, g * t, h)
    k = jnp.moveaxis(k, 1, 2)
    v = jnp.moveaxis(v, 1, 2)
    marks = Marks(segments, prefix)
    blocks = Blocks(mask, size, g * size)
    out = mix(q, k, v, marks, blocks)
    out = out.reshape(b, kv, t // size, g, size, h)
    out = jnp.transpose(out, (0, 2, 4, 1, 3, 5))
    return out.reshape(b, t, kv, g, h)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def mix(
    q,
    k,
    v,
    marks: Marks,
    blocks: Blocks,
) -> jax.Array:
    """softmax(q kᵀ where the mask allows it) v [b k r h], for q [b k r h], k and v [b k s h].

    Scores and sums are in float32 or wider; the gradient is its own. Each query sees itself.
    """
    out, _ = mix_forward(q, k, v, marks, blocks)
    return out


def mix_forward(q, k, v, marks, blocks):
    """(out, residuals) of `mix`, of which one is the logarithm of each query's sum [b k r]."""
    _, size, rows = blocks

    def add(found, pair):
        i, j = pair
        out, top, total = found
        scores = scores_of(q, k, marks, blocks, pair)
        before = part(top, i, rows)
        now = jnp.maximum(before, jnp.max(scores, -1))
        fade = jnp.exp(before - now)
        probs = jnp.exp(scores - now[..., None])
        sums = part(total, i, rows) * fade
        sums += jnp.sum(probs, -1)
        own = part(out, i, rows)
        own *= fade[..., None]
        shares = probs.astype(v.dtype)
        own += wide_product("bkrs,bksh->bkrh", shares, part(v, j, size))
        out = put(out, own, i)
        top = put(top, now, i)
        total = put(total, sums, i)
        return (out, top, total), None

    out = jnp.zeros_like(q, float32_or_wider(q.dtype))
    total = out[..., 0]
    top = total + jnp.finfo(total.dtype).min
    visible = pairs(blocks, k.shape[2])
    found, _ = lax.scan(add, (out, top, total), visible)
    out, top, total = found
    out /= total[..., None]
    out = checkpoint_name(out.astype(v.dtype), "attention")
    sums = checkpoint_name(top + jnp.log(total), "attention")
    return out, (q, k, v, marks, out, sums)


def mix_backward(blocks, residuals, d_out):
    """Gradients of the arguments of `mix`.

    Scores are made as [b k s r], and d_q as [b k h r]: no product has to turn scores round.
    """
    q, k, v, marks, out, sums = residuals
    keys = jnp.swapaxes(k, 2, 3)
    _, size, rows = blocks
    products = (d_out * out).astype(sums.dtype)
    products = jnp.sum(products, -1)

    def add(found, pair):
        i, j = pair
        d_q, d_k, d_v = found
        d_mixed = part(d_out, i, rows)
        normaliser = part(sums, i, rows)
        row_sums = part(products, i, rows)
        scores = scores_of(q, k, marks, blocks, pair, "bksr")
        probs = jnp.exp(scores - normaliser[:, :, None])
        seen = part(v, j, size)
        d_probs = wide_product("bksh,bkrh->bksr", seen, d_mixed)
        d_scores = probs * (d_probs - row_sums[:, :, None])
        d_scores = d_scores.astype(q.dtype)
        probs = probs.astype(q.dtype)
        turned = part(keys, j, size, 3)
        own_q = wide_product("bkhs,bksr->bkhr", turned, d_scores)
        own_k = wide_product("bksr,bkrh->bksh", d_scores, part(q, i, rows))
        own_v = wide_product("bksr,bkrh->bksh", probs, d_mixed)
        d_q = plus(d_q, own_q, i, 3)
        d_k = plus(d_k, own_k, j)
        d_v = plus(d_v, own_v, j)
        return (d_q, d_k, d_v), None

    d_q = jnp.zeros_like(q, sums.dtype)
    d_q = jnp.swapaxes(d_q, 2, 3)
    d_k = jnp.zeros_like(k, sums.dtype)
    visible = pairs(blocks, k.shape[2])
    found, _ = lax.scan(add, (d_q, d_k, d_k), visible)
    d_q, d_k, d_v = (x.astype(q.dtype) for x in found)
    return jnp.swapaxes(d_q, 2, 3), d_k, d_v, None


mix.defvjp(mix_forward, mix_backward)


def scores_of(
    q,
    k,
    marks: Marks,
    blocks: Blocks,
    pair,
    axes: str = "bkrs",
) -> jax.Array:
    """The scores of a pair of blocks, and the least number where nothing is seen.

    Not -inf: within a block a query may see nothing.
    """
    i, j = pair
    mask, size, rows = blocks
    scores = wide_product(f"bkrh,bksh->{axes}", part(q, i, rows), part(k, j, size))
    index = jnp.arange(size)
    prefix = None
    if mask.kind == "prefix":
        prefix = part(marks.prefix, j, size, 1)
    visible = allowed(
        mask,
        i * size + index,
        j * size + index,
        part(marks.segments, i, size, 1),
        part(marks.segments, j, size, 1),
        prefix,
    )
    visible = jnp.tile(visible, (1, rows // size, 1))
    if axes == "bksr":
        visible = jnp.swapaxes(visible, 1, 2)
    least = jnp.finfo(scores.dtype).min
    return jnp.where(visible[:, None], scores, least)


def pairs(blocks: Blocks, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The blocks of queries and, beside each, those of keys that some query in it may see."""
    mask, size, _ = blocks
    index = np.arange(length // size)
    ahead = index[None, :] - index[:, None]
    visible = np.ones_like(ahead, bool)
    if mask.kind == "causal":
        visible = ahead <= 0
    if mask.window:
        nearest = (abs(ahead) - 1) * size + 1
        visible &= nearest < mask.window
    return np.nonzero(visible)


def wide_product(axes: str, x, y) -> jax.Array:
    """`product` in float32 or wider."""
    return product(axes, x, y, float32_or_wider(x.dtype))


def part(x, number, size: int, axis: int = 2) -> jax.Array:
    """Block `number` of x along an axis, which has blocks of this size."""
    return lax.dynamic_slice_in_dim(x, number * size, size, axis)


def put(x, block, number, axis: int = 2) -> jax.Array:
    """x with this as its block `number`."""
    start = number * block.shape[axis]
    return lax.dynamic_update_slice_in_dim(x, block, start, axis)


def plus(x, block, number, axis: int = 2) -> jax.Array:
    """x with this added to its block `number`."""
    before = part(x, number, block.shape[axis], axis)
    return put(x, before + block, number, axis)

"""Attention by kernels that the makers of TPUs and GPUs wrote, and where each of them can be had.

All of them compute `lib.kernels.attention`, for the rows and heads of one device. Letters of axes
are those of lib/kernels.py.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lib.hardware import AMPERE, HOPPER
from lib.masks import Mask, allowed

LEAST = 8  # segments that cuDNN's packed layout is told of at least: jax takes one for no layout
MOST = 128  # and at most: cuDNN's float32 sums are as many times as large
# Splash's fused backward kernel makes scores once where two kernels make them twice, 5 products in
# place of 7. But it writes gradients of the queries for each block of keys, which are summed after.
# Compiled for a v5e it accesses 0.81 of their bytes and holds 0.75 of their scratch in rows of
# 1,024 with heads of 64, 0.98 and 0.84 in 2,048 of 128 (of 256: 1.22 of the bytes), 1.14 and 7.0
# in 4,096, 1.47 and 5.6 in 8,192. So it is taken up to so many blocks.
PARTS = 4


class Case(NamedTuple):
    """What an implementation is asked for."""

    mask: Mask
    length: int  # positions of a row
    head_dim: int
    dtype: jnp.dtype
    platform: str  # cpu, gpu or tpu
    capability: tuple[int, int]  # of a GPU by NVIDIA; (0, 0) for others


# --------------------------------------------------------------------------------------------- TPUs


def splash(
    q,
    k,
    v,
    mask,
    segments,
    prefix=None,
    interpret=False,
):
    """Attention by the Pallas kernel for TPUs of that name, which skips blocks nobody sees."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    b, t, kv, g, h = q.shape
    size = next(size for size in (512, 256, 128) if t % size == 0)
    fused = t <= PARTS * size
    number = 6 if fused else 8
    visible = masks.CausalMask((t, t))
    if mask.window:
        visible = masks.LocalMask((t, t), (mask.window - 1, 0), 0)
    of_heads = kernel.make_splash_mqa_single_device(
        masks.MultiHeadMask([visible] * g),
        block_sizes=kernel.BlockSizes(*[size] * number, use_fused_bwd_kernel=fused),
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    of_groups = jax.vmap(of_heads, (0, 0, 0, None))
    of_rows = jax.vmap(of_groups)
    q = q * h**-0.5
    q = jnp.moveaxis(q, 1, 3)
    k = jnp.moveaxis(k, 1, 2)
    v = jnp.moveaxis(v, 1, 2)
    ids = kernel.SegmentIds(segments, segments)
    out = of_rows(q, k, v, ids)
    return jnp.moveaxis(out, 3, 1)


def splash_able(case: Case) -> bool:
    """On TPUs, causal rows of whole blocks."""
    causal = case.mask.kind == "causal"
    return case.platform == "tpu" and causal and case.length % 128 == 0


# --------------------------------------------------------------------------------------------- GPUs


def cudnn(q, k, v, mask, segments, prefix):
    """Attention by NVIDIA's flash attention, under a mask that is read as an array."""
    index = jnp.arange(q.shape[1])
    visible = allowed(mask, index, index, segments, segments, prefix)
    causal = mask.kind == "causal"
    return by_cudnn(q, k, v, mask=visible[:, None], is_causal=causal)


def cudnn_able(case: Case) -> bool:
    """On NVIDIA's GPUs from Ampere on, in a dtype of 16 bits, where heads and rows fit."""
    widest = 256 if case.capability >= HOPPER else 128
    heads_fit = case.head_dim % 8 == 0 and case.head_dim <= widest
    rows_fit = case.length % 2 == 0
    there = case.platform == "gpu" and case.capability >= AMPERE
    return there and case.dtype.itemsize == 2 and heads_fit and rows_fit


def cudnn_causal(q, k, v, mask, segments, prefix):
    """Attention by NVIDIA's flash attention where each row is one causal segment."""
    return by_cudnn(q, k, v, is_causal=True)


def cudnn_causal_able(case: Case) -> bool:
    """Where cuDNN is, and each row is known to be one segment."""
    return cudnn_able(case) and plainly_causal(case.mask) and case.mask.segments == 1


def cudnn_packed(q, k, v, mask, segments, prefix):
    """Attention by NVIDIA's flash attention, told where each segment begins and how long it is.

    It makes the causal mask within segments by itself, so that none is read.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    b, t, kv, g, h = q.shape
    if g > 1:  # jax 0.10 takes the queries' heads for the keys' where it works out offsets
        k = jnp.repeat(k, g, axis=2)
        v = jnp.repeat(v, g, axis=2)
    most = max(LEAST, mask.segments)
    offsets, lengths = segments_at(segments, most)
    out = dot_product_attention(
        q.reshape(b, t, kv * g, h),
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=h**-0.5,
        mask_type=MaskType.PADDING_CAUSAL,
    )
    return out.reshape(q.shape)


def cudnn_packed_able(case: Case) -> bool:
    """Where cuDNN is, from Hopper on, and no row has more segments than are told."""
    known = 1 <= case.mask.segments <= MOST
    hopper = case.capability >= HOPPER
    return cudnn_able(case) and hopper and plainly_causal(case.mask) and known


def plainly_causal(mask: Mask) -> bool:
    """Whether a query sees all that is at or before it in its segment."""
    return mask.kind == "causal" and not mask.window


def by_cudnn(q, k, v, **how):
    """`jax.nn.dot_product_attention` of grouped heads, by cuDNN."""
    b, t, kv, g, h = q.shape
    flat = q.reshape(b, t, kv * g, h)
    out = jax.nn.dot_product_attention(flat, k, v, implementation="cudnn", **how)
    return out.reshape(q.shape)


def segments_at(segments, most: int) -> tuple[jax.Array, jax.Array]:
    """(offsets [b most+1], lengths [b most]), int32, of the segments [b t] of each row in turn.

    Each lies together, and a row has at most `most` of them. -1 stands where there are no more,
    and always as the last offset.
    """
    begins = jnp.diff(segments, axis=1) != 0
    number = jnp.cumsum(begins, axis=1)
    number = jnp.pad(number, ((0, 0), (1, 0)))  # the first position is of segment 0
    each = jnp.arange(most)
    own = number[:, None] == each[:, None]  # [b most t]
    lengths = jnp.sum(own, axis=2, dtype=jnp.int32)
    ends = jnp.cumsum(lengths, axis=1, dtype=jnp.int32)
    there = lengths > 0
    starts = jnp.where(there, ends - lengths, -1)
    lengths = jnp.where(there, lengths, -1)
    none = jnp.full_like(starts[:, :1], -1)
    offsets = jnp.concatenate([starts, none], axis=1)
    return offsets, lengths

"""Encoder-decoders: a second stack that reads a source, and cross-attention to it in every block.

A row [t] is a source of a fixed length, then a target. The encoder reads the source in both
directions. The decoder reads the target from left to right, and hears the encoder's states of its
own segment by cross-attention, which stands between self-attention and MLP and has no rotary
positions (T5, Raffel et al. 2020; Encoder-Decoder Gemma, Zhang et al. 2025).

    replace(config, **paired(source=64))      the shape of such a model, each stack of this shape
"""
from dataclasses import replace
from functools import partial

import jax.numpy as jnp

from lib.kernels import Mask, attend
from lib.teacher import part
from model import (
    ModelConfig,
    Param,
    Params,
    attention_mixer,
    embedded,
    plain_attend,
    plain_table,
    rms_norm,
    rope,
    stream,
)

CROSS = "attn_norm", "q", "k", "v", "o"  # rows of self-attention, which cross-attention has too


def paired(source: int) -> dict:
    """The fields of a `ModelConfig` that make it a pair, whose sources have so many positions."""
    return dict(
        rows=paired_rows,
        forward=partial(seq2seq, source=source),
        flops=partial(paired_flops, source=source),
    )


def paired_rows(config: ModelConfig, plain: dict[str, Param]) -> dict[str, Param]:
    """A model's `rows`: a decoder's, an encoder's ("encoder/q"), cross-attention's ("cross_q").

    Cross-attention is the optimiser group "cross".
    """
    found = dict(plain)
    for name in CROSS:
        found[f"cross_{name}"] = replace(plain[name], group="cross")
    for name, param in plain.items():
        if name != "head":
            axes = tuple(f"encoder/{axis}" for axis in param.axes)
            found[f"encoder/{name}"] = replace(param, axes=axes)
    return found


def encoded(params: Params, batch, config: ModelConfig):
    """The encoder's normalised states [b s d] of a source, each segment of which sees all of it."""
    own = part(params, "encoder")
    x = embedded(own, batch, config)
    x, _ = stream(own, x, batch, Mask("bidirectional", 0), config)
    return rms_norm(x, own["norm"], config.norm_eps)


def seq2seq(params: Params, batch, mask: Mask, config: ModelConfig, source: int):
    """A `forward`: states [b t d] of the target, from position `source` on; before it they are 0.

    The kind of the mask is not asked for. A target whose segment has no source hears nothing.
    """
    given = {name: x[:, :source] for name, x in batch.items()}
    own = {name: x[:, source:] for name, x in batch.items()}
    memory = encoded(params, given, config)
    sources = given["segments"][:, None, :]
    targets = own["segments"][:, :, None]
    see = targets == sources
    any_source = jnp.any(see, -1, keepdims=True)
    angles = rope(own["positions"], config)
    causal = plain_attend(own, Mask("causal", 0), config)

    def mixer(n, w, times, before):
        x, _ = attention_mixer(n, w, times, angles, causal, config)
        x_before = before + x
        n = rms_norm(x_before, w["cross_attn_norm"], config.norm_eps)
        q = times(n, "cross_q")
        k = times(memory, "cross_k")
        v = times(memory, "cross_v")
        means = attend(q, k, v, see)
        heard = times(means, "cross_o")
        heard = jnp.where(any_source, heard, 0)
        return x + heard, None

    x = embedded(params, own, config)
    x, _ = stream(params, x, own, mask, config, mixer=mixer)
    states = rms_norm(x, params["norm"], config.norm_eps)
    whole = (0, 0)
    return jnp.pad(states, (whole, (source, 0), whole))


def paired_flops(config: ModelConfig, seq: int, source: int) -> float:
    """FLOPs of training on a token: each position goes through one stack, the head is for all.

    Counted as `model.flops_per_token` does. The encoder's square of attention is a whole one.
    """
    rows = plain_table(config)
    target = seq - source
    stack = sum(param.size for param in rows.values() if param.group == "matrix")
    head = config.vocab * config.embed
    products = (stack + head) * seq
    products += 2 * rows["q"].size * target  # with "o", of cross-attention
    products += 2 * rows["k"].size * source  # with "v"
    pairs = 2 * source**2
    pairs += target**2
    pairs += 2 * source * target
    attended = config.layers * config.heads * config.head_dim * pairs
    return 6 * (products + attended) / seq

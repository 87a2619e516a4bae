"""Strong: what is each part of the best small model worth, that the seams give?

Paper: none; parts are from nanochat (Karpathy 2025) and records of modded-nanogpt (Jordan et al.
    2024), value embeddings from Zhou et al. 2024 (arXiv 2410.17897), the cap from Gemma 2
Method: Muon by Polar Express with equal outputs; embeddings drawn with 0.8 and trained at 40 times
    the rate, a head drawn with 0.001, output projections of 0; norms without gains, of embeddings,
    queries and keys too; squared ReLU. Tables of values in each layer, and of pairs of tokens, cost
    memory and no FLOPs. Half of each key is the one before (modded-nanogpt's key offset), and the
    embedding before is mixed in by a gate (smear). Heads and values are gated.
Here: arms leave out one part each, at equal rows, steps and rate. Residual scalars with the
    embedding fed again are not in it: they cost 0.01 bits per byte here.
Cost: x
Run:
    python train.py study configs/baselines/strong.py --jobs 2
    python train.py configs/baselines/strong.py:strong          one arm by hand
"""
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from configs import base
from configs.baselines.muon import muon
from lib.kernels import lookup
from model import (
    ModelConfig,
    Param,
    attention_mixer,
    embedded,
    head_logits,
    plain_attend,
    plain_table,
    rms_norm,
    rope,
    stream,
    swiglu,
    table,
)


def parts(config: ModelConfig, rows: dict, embed: float = 0.8, head: float = 0.001,
          silent: bool = True, gains: bool = False, gated: bool = False, values: bool = True,
          gates: bool = True, smear: bool = True, pairs: int = 8192) -> dict:
    """`rows`, those of each part. embed, head: deviation of the draw, 0 as it was. silent: output
    projections of 0. gated: a SwiGLU. pairs: entries of the table.
    """
    drawn = {name: draw for name, draw in dict(embed=embed, head=head).items() if draw}
    drawn |= dict.fromkeys(("o", "down"), 0.0) if silent else {}
    kept = {name: replace(row, init=drawn.get(name, row.init)) for name, row in rows.items()
            if (gains or row.init is not None) and (gated or name != "gate")}
    layers, width, heads, h = rows["k"].shape
    own = {}
    if values:
        axes, shape = ("layers", "vocab", "kv_heads", "head_dim"), (layers, config.vocab, heads, h)
        own["values"] = Param(axes, shape, width**-0.5, "embed")
        own["value_gates"] = Param(rows["k"].axes[:3], rows["k"].shape[:3], 0.0, "vector")
    if gates:
        own["gates"] = Param(rows["q"].axes[:4], rows["q"].shape[:4], 0.0, "vector")
    if smear:
        own |= dict.fromkeys(("smear", "smear_gate"), Param(("embed",), (width,), 0.0))
    if pairs:
        own["pairs"] = Param(("in", "embed"), (pairs, width), 0.0, "embed")
    return kept | own


def past(x, segments):
    """x [b t ...] of one position before in the segment, 0 at its first."""
    same = segments[:, 1:] == segments[:, :-1]
    kept = jnp.where(same.reshape(*same.shape, *[1] * (x.ndim - 2)), x[:, :-1], 0)
    return jnp.concatenate([jnp.zeros_like(x[:, :1]), kept], 1)


def strong(params, batch, mask, config: ModelConfig, normed: bool = True, shift: bool = True,
           largest: float = 16.0):
    """`forward`, with those parts whose rows are there. largest: the most of attention scores."""
    ids, before = batch["tokens"], partial(past, segments=batch["segments"])
    sizes = dict.fromkeys(("q_norm", "k_norm"), math.sqrt(largest) / config.head_dim**0.25)
    ones = {name: jnp.full(row.shape, sizes.get(name, 1.0), config.dtype)
            for name, row in plain_table(config).items() if row.init is None}
    params = ones | params
    x = embedded(params, batch, config)
    if "smear" in params:
        gate = jax.nn.sigmoid(x @ params["smear_gate"])[..., None]
        x = x + gate * params["smear"] * before(x)
    if "pairs" in params:
        pair = (before(ids + 1) * 3 * config.vocab + ids * 7919) % len(params["pairs"])
        x = x + lookup(params["pairs"], pair, x.dtype)
    x = rms_norm(x, jnp.ones(()), config.norm_eps) if normed else x
    angles, attend = rope(batch["positions"], config), plain_attend(batch, mask, config)
    slow = jnp.arange(config.head_dim) % (config.head_dim // 2) >= config.head_dim // 4

    def mixer(x, w, times):
        def product(x, name):
            y = times(x, name)
            if name != "v" or "values" not in w:
                return y
            gate = 2 * jax.nn.sigmoid(times(x, "value_gates"))
            return y + gate[..., None] * lookup(w["values"], ids, x.dtype)

        def heads(q, k, v):
            mixed, kept = attend(q, jnp.where(slow, before(k), k) if shift else k, v)
            gate = 2 * jax.nn.sigmoid(times(x, "gates")) if "gates" in w else jnp.ones(())
            return mixed * gate[..., None], kept

        return attention_mixer(x, w, product, angles, heads, config)

    def squared(x, w, times):
        return times(jnp.square(jax.nn.relu(times(x, "up"))), "down")

    mlp = swiglu if "gate" in params else squared
    x, _ = stream(params, x, batch, mask, config, mixer=mixer, mlp=mlp)
    return rms_norm(x, params["norm"], config.norm_eps)


def capped(params, states, batch, config: ModelConfig, cap: float = 15.0):
    """`outputs`: logits within ± cap; 0 is off."""
    logits = head_logits(params, states, batch, config)
    return cap * jnp.tanh(logits / cap) if cap else logits


def flops(config: ModelConfig, seq: int) -> int:
    """`flops`: as for the plain Llama, of the products that are there."""
    used = sum(row.size for name, row in table(config).items()
               if row.group in ("matrix", "head") or "gate" in name)
    tied = config.tied * config.vocab * config.embed
    return 6 * (used + tied + config.layers * config.heads * config.head_dim * seq)


plain = replace(base.small, phases=(replace(base.small.phases[0], steps=500, seq=256),),
                schedule=replace(base.small.schedule, peak=4e-3), overlap=64, eval_tokens=32_768)
strong_run = replace(
    plain, schedule=base.small.schedule, phases=(replace(plain.phases[0], lr={"embed": 40.0, "head": 2.0}),),
    optimizer=partial(muon, iteration="polar_express", outputs="equal"),
    model=replace(base.shape(), mlp=512, tied=False, qk_norm=True, rows=parts, forward=strong,
                  outputs=capped, flops=flops))

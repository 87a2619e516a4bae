"""Strong: what is each part of the best small model worth, that the seams give?

Paper: none; the parts are those of nanochat (Karpathy 2025) and of modded-nanogpt's records (Jordan
    et al. 2024). Value embeddings: Zhou et al. 2024 (arXiv 2410.17897)
Method: Muon by Polar Express with equal outputs (lib/muon.py); embeddings drawn wide and trained at
    20 times the rate, a head drawn small, output projections of zero; no gains; queries and keys
    normed; squared ReLU. Tables of values, one for each layer, and of pairs of tokens, which cost
    memory and no FLOPs. The token before reaches a token by a gate, and the keys by a shift.
Here: arms leave out one part each, at equal FLOPs, rows and rate.
Cost: x
Run:
    python train.py study configs/baselines/strong.py
    python train.py configs/baselines/strong.py:strong          one arm by hand
"""
import math
from dataclasses import replace

import jax
import jax.numpy as jnp

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
          again: bool = True, smear: bool = True, pairs: int = 8192, gates: bool = True) -> dict:
    """`rows`: those of the parts. embed, head: deviations of the draw; 0 leaves them.

    silent: output projections of zero. gated: a SwiGLU. pairs: the table's size.
    """
    draws = {name: draw for name, draw in dict(embed=embed, head=head).items() if draw}
    draws |= dict.fromkeys(("o", "down"), 0.0) if silent else {}
    rows = {name: replace(row, init=draws.get(name, row.init)) for name, row in rows.items()
            if (gains or row.init is not None) and (gated or name != "gate")}
    layers, width, heads, h = rows["k"].shape

    def own(axes: str, *shape: int, init=0.0, group="vector"):
        return Param(tuple(axes.split()), shape, init, group)

    new = {}
    if values:
        new["values"] = own("layers vocab kv_heads head_dim", layers, config.vocab, heads, h,
                            init=width**-0.5, group="embed")
        new["value_gate"] = own("layers embed kv_heads", layers, width, heads)
    if gates:
        new["gates"] = own("layers embed kv_heads q_per_kv", *rows["q"].shape[:-1])
    if again:
        new |= {"keep": own("layers", layers, init=None), "again": own("layers", layers)}
    if smear:
        new |= {"smear": own("embed", width), "smear_gate": own("embed", width)}
    if pairs:
        new["pairs"] = own("in embed", pairs, width, group="embed")
    return rows | new


def strong(params, batch, mask, config: ModelConfig, normed: bool = True, shift: bool = True,
           sharp: float = 16.0):
    """`forward`: the parts whose rows are there. sharp: the largest attention score."""
    ids, same = batch["tokens"], batch["segments"][:, 1:] == batch["segments"][:, :-1]

    def past(x):  # what stood one position before in the segment, or 0
        kept = jnp.where(same.reshape(*same.shape, *[1] * (x.ndim - 2)), x[:, :-1], 0)
        return jnp.concatenate([jnp.zeros_like(x[:, :1]), kept], 1)

    sizes = dict.fromkeys(("q_norm", "k_norm"), math.sqrt(sharp / math.sqrt(config.head_dim)))
    ones = {name: jnp.full(row.shape, sizes.get(name, 1.0), config.dtype)
            for name, row in plain_table(config).items() if row.init is None}
    params = ones | params
    x = embedded(params, batch, config)
    if "smear" in params:
        gate = jax.nn.sigmoid(x @ params["smear_gate"])[..., None]
        x = x + gate * params["smear"] * past(x)
    if "pairs" in params:
        pair = (past(ids + 1) * 3 * config.vocab + ids * 7919) % len(params["pairs"])
        x = x + lookup(params["pairs"], pair, x.dtype)
    x = first = rms_norm(x, jnp.ones(()), config.norm_eps) if normed else x
    angles, attend = rope(batch["positions"], config), plain_attend(batch, mask, config)
    slow = jnp.arange(config.head_dim) % (config.head_dim // 2) >= config.head_dim // 4

    def mixer(x, w, times):
        def product(x, name):
            y = times(x, name)
            if name == "v" and "values" in w:
                gate = 2 * jax.nn.sigmoid(times(x, "value_gate"))
                y = y + gate[..., None] * lookup(w["values"], ids, x.dtype)
            return y

        def attending(q, k, v):
            mixed, kept = attend(q, jnp.where(slow, past(k), k) if shift else k, v)
            if "gates" in w:
                mixed = mixed * 2 * jax.nn.sigmoid(times(x, "gates"))[..., None]
            return mixed, kept

        return attention_mixer(x, w, product, angles, attending, config)

    def visit(x, layer, w):
        return x * w["keep"] + first * w["again"], None

    def squared(x, w, times):
        return times(jnp.square(jax.nn.relu(times(x, "up"))), "down")

    x, _ = stream(params, x, batch, mask, config, mixer=mixer,
                  mlp=swiglu if "gate" in params else squared,
                  visit=visit if "keep" in params else None)
    return rms_norm(x, params["norm"], config.norm_eps)


def capped(params, states, batch, config: ModelConfig, cap: float = 15.0):
    """`outputs`: logits within ± cap (Gemma 2); 0 is off."""
    logits = head_logits(params, states, batch, config)
    return cap * jnp.tanh(logits / cap) if cap else logits


def flops(config: ModelConfig, seq: int) -> int:
    """`flops`: as the plain count, of the products that are there."""
    rows = table(config)
    used = [row.size for name, row in rows.items() if row.group in ("matrix", "head") or "gate" in name]
    tied = config.tied * config.vocab * config.embed
    return 6 * (sum(used) + tied + config.layers * config.heads * config.head_dim * seq)

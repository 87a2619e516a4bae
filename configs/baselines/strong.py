"""Strong: the best small model that the seams give, and what each of its parts is worth.

Paper: none
Method: x
Here: x
Cost: x
Run:
    python train.py configs/baselines/strong.py
"""
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import optax

from configs import base
from lib.kernels import lookup
from lib.muon import muon
from lib.optim import adamw
from model import (ModelConfig, Param, attention_mixer, embedded, head_logits, plain_attend,
                   plain_table, rms_norm, rope, stream, swiglu, table)


def parts(config: ModelConfig, rows: dict, embed: float = 0.8, head: float = 0.001,
          silent: bool = True, gains: bool = False, gated: bool = False, values: bool = True,
          again: bool = True, smear: bool = True, pairs: int = 8192, gates: bool = True) -> dict:
    layers, width, kv, h = config.layers, config.embed, config.kv_heads, config.head_dim
    group = config.heads // kv
    draws = {"embed": embed, "head": head} | (dict.fromkeys(("o", "down"), 0.0) if silent else {})
    draws = {name: draw for name, draw in draws.items() if draw or name not in ("embed", "head")}
    rows = {name: replace(row, init=draws.get(name, row.init)) for name, row in rows.items()
            if (gains or row.init is not None) and (gated or name != "gate")}
    if values:
        rows["values"] = Param(("layers", "vocab", "kv_heads", "head_dim"), (layers, config.vocab, kv, h), width**-0.5, "value")
        rows["value_gate"] = Param(("layers", "embed", "kv_heads"), (layers, width, kv), 0.0, "gate")
    if gates:
        rows["gates"] = Param(("layers", "embed", "kv_heads", "q_per_kv"), (layers, width, kv, group), 0.0, "gate")
    if again:
        rows["keep"] = Param(("layers",), (layers,), None, "scalar")
        rows["again"] = Param(("layers",), (layers,), 0.0, "scalar")
    if smear:
        rows["smear"] = Param(("embed",), (width,), 0.0, "scalar")
        rows["smear_gate"] = Param(("embed",), (width,), 0.0, "scalar")
    if pairs:
        rows["pairs"] = Param(("in", "embed"), (pairs, width), 0.0, "pair")
    return rows


def strong(params, batch, mask, config: ModelConfig, normed: bool = True, shift: bool = True,
           sharp: float = 16.0):
    ids, segments = batch["tokens"], batch["segments"]
    same = segments[:, 1:] == segments[:, :-1]

    def past(x):
        kept = jnp.where(same.reshape(*same.shape, *[1] * (x.ndim - 2)), x[:, :-1], 0)
        return jnp.pad(kept, [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))

    for name, row in plain_table(config).items():
        if name not in params and row.init is None:
            size = math.sqrt(sharp / math.sqrt(config.head_dim)) if name in ("q_norm", "k_norm") else 1.0
            params = params | {name: jnp.full(row.shape, size, config.param_dtype)}
    x = embedded(params, batch, config)
    if "smear" in params:
        gate = jax.nn.sigmoid(x @ params["smear_gate"])[..., None]
        x = x + gate * params["smear"] * past(x)
    if "pairs" in params:
        key = (past(ids + 1) * config.vocab * 3 + ids * 7919) % len(params["pairs"])
        x = x + lookup(params["pairs"], key, x.dtype)
    if normed:
        x = rms_norm(x, jnp.ones(()), config.norm_eps)
    first, angles, attend = x, rope(batch["positions"], config), plain_attend(batch, mask, config)
    late = jnp.arange(config.head_dim) % (config.head_dim // 2) >= config.head_dim // 4

    def mixer(x, w, times):
        def product(x, name):
            y = times(x, name)
            if name == "v" and "values" in w:
                gate = 2 * jax.nn.sigmoid(times(x, "value_gate"))[..., None]
                y = y + gate * lookup(w["values"], ids, x.dtype)
            return y

        def attending(q, k, v):
            k = jnp.where(late, past(k), k) if shift else k
            mixed, kept = attend(q, k, v)
            if "gates" in w:
                mixed = mixed * 2 * jax.nn.sigmoid(times(x, "gates"))[..., None]
            return mixed, kept

        return attention_mixer(x, w, product, angles, attending, config)

    def visit(x, layer, w):
        return x * w["keep"] + first * w["again"], None

    def squared(x, w, times):
        return times(jnp.square(jax.nn.relu(times(x, "up"))), "down")

    mlp = swiglu if "gate" in params else squared
    x, _ = stream(params, x, batch, mask, config, mixer=mixer, mlp=mlp,
                  visit=visit if "keep" in params else None)
    return rms_norm(x, params["norm"], config.norm_eps)


def capped(params, states, batch, config: ModelConfig, cap: float = 15.0):
    logits = head_logits(params, states, batch, config)
    return cap * jnp.tanh(logits / cap) if cap else logits


def flops(config: ModelConfig, seq: int) -> int:
    used = [row.size for row in table(config).values() if row.group in ("matrix", "head", "gate")]
    tied = config.tied * config.vocab * config.embed
    return 6 * (sum(used) + tied + config.layers * config.heads * config.head_dim * seq)


def by_group(table: dict[str, Param], embed: float = 20.0, value: float = 20.0, pair: float = 20.0, head: float = 2.0, gate: float = 1.0,
             scalar: float = 2.0, orthogonal: bool = True, iteration: str = "polar_express", units: str = "equal", **adam):
    found = muon(table, iteration=iteration, units=units, **adam) if orthogonal else adamw(table, **adam)
    factors = dict(embed=embed, value=value, pair=pair, head=head, gate=gate, scalar=scalar)
    return {group: optax.chain(each, optax.scale(factors.get(group, 1.0)))
            for group, each in found.items()}


plain = replace(base.small, phases=(replace(base.small.phases[0], steps=500, batch=8, seq=256),),
                 eval_every=100, eval_tokens=32768, overlap=64, save_every=1000)
shape = replace(base.shape(), mlp=512, tied=False, qk_norm=True, rows=parts, forward=strong, outputs=capped, flops=flops)
config = replace(plain, model=shape, optimizer=by_group)

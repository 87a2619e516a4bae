"""Strong: the best small model that the seams give, a baseline for what a method is worth.

Paper: none; nanochat (Karpathy 2025) and records of modded-nanogpt (Jordan et al. 2024)
Method: Muon by Polar Express with equal outputs; embeddings and head at twice the plain Llama's
    rates; norms of queries and keys; gates of heads. Tables of values in each layer, gated, and of
    pairs of tokens cost memory and no FLOPs. Half of a key is that of the token before, and its
    embedding is mixed in by a gate (smear). Logits are capped.
Here: each part is an argument; strong_parts.py measures what each is worth. By its tables it is
    three and a half times as large as the plain Llama. Gates of heads, smear and the cap are
    worth little at this size. nanochat.py compares it with the recipe that it began from.
Cost: a minute and a half on two CPU cores that do nothing else.
Run:
    python train.py configs/baselines/strong.py
"""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

import model
from configs import base
from configs.baselines.muon import muon
from lib.kernels import lookup
from model import ModelConfig, Param, plain_attend, rms_norm, stream
from train import Config

GROUP_RATES = {"embed": 2.0, "head": 2.0}  # of groups, times the plain Llama's


def parts(config: ModelConfig, rows: dict, gains: bool = True, gated: bool = True,
          values: bool = True, gates: bool = True, smear: bool = True, pairs: int = 16_384) -> dict:
    """`rows`. gated: a SwiGLU, or else squared ReLU."""
    rows = {name: row for name, row in rows.items()
            if (gains or row.init is not None) and (gated or name != "gate")}
    (q, k), width, own = (rows["q"], rows["k"]), config.embed, {}
    if values:
        axes, shape = ("layers", "vocab", *k.axes[2:]), (config.layers, config.vocab, *k.shape[2:])
        own["values"] = Param(axes, shape, width**-0.5, "embed")
        own["value_gates"] = Param(k.axes[:3], k.shape[:3], 0.0, "vector")
    if gates:
        own["gates"] = Param(q.axes[:4], q.shape[:4], 0.0, "vector")
    if smear:
        own |= dict.fromkeys(("smear", "smear_gate"), Param(("embed",), (width,), 0.0))
    if pairs:
        own["pairs"] = Param(("in", "embed"), (pairs, width), 0.0, "embed")
    return rows | own


def past(x, segments):
    """x [b t ...] at the position before in the segment, 0 at its first."""
    same = segments[:, 1:] == segments[:, :-1]
    kept = jnp.where(same.reshape(*same.shape, *[1] * (x.ndim - 2)), x[:, :-1], 0)
    return jnp.concatenate([jnp.zeros_like(x[:, :1]), kept], 1)


def strong(params, batch, mask, config: ModelConfig, shift: bool = True):
    """`forward`, with the parts whose rows are there; a gain without a row is 1."""
    ids, before = batch["tokens"], partial(past, segments=batch["segments"])
    ones = {name: jnp.ones(row.shape, config.dtype)
            for name, row in model.plain_table(config).items() if row.init is None}
    params = ones | params
    x = model.embedded(params, batch, config)
    if "smear" in params:
        share, gate = (params[name].astype(x.dtype) for name in ("smear", "smear_gate"))
        x = x + jax.nn.sigmoid(x @ gate)[..., None] * share * before(x)
    if "pairs" in params:
        pair = (before(ids + 1) * 36313 ^ ids * 27191) % len(params["pairs"])
        x = x + lookup(params["pairs"], pair, x.dtype)
    angles, attend = model.rope(batch["positions"], config), plain_attend(batch, mask, config)
    slow = jnp.arange(config.head_dim) % (config.head_dim // 2) >= config.head_dim // 4

    def mixer(x, w, times):
        def product(x, name):
            if name != "v" or "values" not in w:
                return times(x, name)
            gate = 2 * jax.nn.sigmoid(times(x, "value_gates"))[..., None]
            return times(x, name) + gate * lookup(w["values"], ids, x.dtype)

        def heads(q, k, v):
            mixed, kept = attend(q, jnp.where(slow, before(k), k) if shift else k, v)
            gate = 2 * jax.nn.sigmoid(times(x, "gates"))[..., None] if "gates" in w else 1
            return mixed * gate, kept

        return model.attention_mixer(x, w, product, angles, heads, config)

    def squared(x, w, times):
        return times(jnp.square(jax.nn.relu(times(x, "up"))), "down")

    x, _ = stream(params, x, batch, mask, config, mixer=mixer,
                  mlp=model.gated_mlp if "gate" in params else squared)
    return rms_norm(x, params["norm"], config.norm_eps)


def capped(params, states, batch, config: ModelConfig, cap: float = 15.0):
    """`outputs`: logits within ± cap; 0 is off."""
    logits = model.head_logits(params, states, batch, config)
    return cap * jnp.tanh(logits / cap) if cap else logits


def flops(config: ModelConfig, seq: int) -> int:
    """`flops`, counted as the plain Llama's, of the products that are there."""
    used = [row.size for name, row in model.table(config).items() if row.group in
            ("matrix", "head") or "gate" in name or (name == "embed" and config.tied)]
    return 6 * (sum(used) + config.layers * config.heads * config.head_dim * seq)


def on(config: Config, rates: dict[str, float] = GROUP_RATES) -> Config:
    """A config with the strong model, its optimiser and its rates in place of the plain ones."""
    made = replace(config.model, qk_norm=True, rows=parts, forward=strong, outputs=capped,
                   flops=flops)
    phases = tuple(replace(phase, lr=rates | phase.lr) for phase in config.phases)
    return replace(config, model=made, phases=phases,
                   optimizer=partial(muon, iteration="polar_express", outputs="equal"))


phase = replace(base.small.phases[0], steps=500, seq=256)
config = on(replace(base.small, phases=(phase,), eval_tokens=32_768, overlap=64, eval_every=100))

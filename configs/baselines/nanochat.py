"""nanochat: is the strong baseline ahead of nanochat's recipe, at two sizes?

Paper: none; nanochat (Karpathy 2025), its gpt.py as of 2026
Method: norms without gains, queries and keys of norm 1.2, squared ReLU, a table of values in every
    other layer, residual scalars, smear, backout, logits within 15, its draws, and its optimiser.
Here: each layer attends to the whole row (its `--window-pattern L`).
Cost: TODO
Run:
    python train.py study configs/baselines/nanochat.py --jobs 2
    python train.py configs/baselines/nanochat.py:nanochat          one arm by hand, two minutes
"""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

import model
from configs import base
from configs.baselines.nanochat_muon import COOL, nanochat_muon
from configs.baselines.strong import capped, flops, on, past
from lib.kernels import lookup
from lib.study import Claim, Study
from model import ModelConfig, Param, plain_attend, rms_norm
from train import Config


def between(key, shape, dtype, low: float, high: float):
    """A draw: uniform."""
    return jax.random.uniform(key, shape, dtype, low, high)


def falling(key, shape, dtype, first: float, last: float):
    """A draw: evenly from the first layer to the last."""
    return jnp.linspace(first, last, *shape, dtype=dtype)


def parts(config: ModelConfig, rows: dict, scalars: bool = True, values: bool = True) -> dict:
    """`rows`. scalars: those of the residual stream, smear and backout."""
    layers, own = config.layers, {}
    high = (3 / config.embed) ** 0.5
    draws = dict.fromkeys("qkv", partial(between, low=-high, high=high))
    draws["up"] = partial(between, low=-0.4 * high, high=0.4 * high)
    gate = partial(between, low=0.0, high=0.02)
    for name, row in rows.items():
        if row.init is not None and name != "gate":
            own[name] = replace(row, init=draws.get(name, row.init))
    if scalars:
        of_layers = partial(Param, ("layers",), (layers,))
        own["residual"] = of_layers(partial(falling, first=1.15, last=1.05))
        own["again"] = of_layers(partial(falling, first=0.2, last=0.05), "again")
        own["smear_gate"] = Param(("in",), (min(24, config.embed),), gate, "smear")
        own["smear"] = Param(("out",), (1,), 0.0, "smear")
        own["backout"] = Param(("out",), (1,), partial(between, low=0.2, high=0.2), "smear")
    if values:
        tables, heads = (layers + 1) // 2, rows["v"].shape[2:]
        own["values"] = Param(("state", "vocab", "kv_heads", "head_dim"),
                              (tables, config.vocab, *heads), draws["v"], "values")
        own["value_gates"] = Param(("layers", "in", "kv_heads"), (layers, 12, heads[0]), gate)
    return own


def nanochat(params, batch, mask, config: ModelConfig):
    """`forward`."""
    angles, attend = model.rope(batch["positions"], config), plain_attend(batch, mask, config)
    gains = {name: jnp.full(row.shape, 1.2 if name in ("q_norm", "k_norm") else 1.0)
             for name, row in model.plain_table(config).items() if row.init is None}
    params = {name: x.astype(config.dtype) for name, x in (gains | params).items()}

    def normed(x):
        return rms_norm(x, params["norm"], config.norm_eps)

    def mixer(x, w, times, table):
        def product(x, name):
            if name != "v" or table is None:
                return times(x, name)
            gate = 3 * jax.nn.sigmoid(times(x[..., :12], "value_gates"))[..., None]
            return times(x, name) + gate * lookup(table, batch["tokens"], x.dtype)
        return model.attention_mixer(x, w, product, angles, attend, config)

    def mlp(x, w, times):
        return times(jnp.square(jax.nn.relu(times(x, "up"))), "down")

    x = normed(model.embedded(params, batch, config))
    if "smear" in params:
        gate = jax.nn.sigmoid(x[..., :24] @ params["smear_gate"])[..., None]
        x = x + params["smear"] * gate * past(x, batch["segments"])
    first = x
    for layer in range(config.layers):
        if "again" in params:
            x = params["residual"][layer] * x + params["again"][layer] * first
        has_table = "values" in params and (config.layers - layer) % 2
        table = params["values"][layer // 2] if has_table else None
        x, _ = model.stream(params, x, batch, mask, config, layer, layer + 1,
                            mixer=partial(mixer, table=table), mlp=mlp)
        if layer == config.layers // 2:
            middle = x
    return normed(x - params["backout"] * middle if "backout" in params else x)


def by_nanochat(config: Config, peak: float, decay: float = 0.28, **off: bool) -> Config:
    """A config with nanochat's model and optimiser in place of the plain ones."""
    shape = replace(config.model, mlp=4 * config.model.embed, qk_norm=True, rope_theta=1e5,
                    rows=partial(parts, **off), forward=nanochat, outputs=capped, flops=flops)
    return replace(config, model=shape,
                   schedule=replace(config.schedule, peak=peak, warmup=40, decay=COOL, final=0.05),
                   optimizer=partial(nanochat_muon, steps=config.phases[0].steps, decay=decay))


PEAK = 0.02
phase = replace(base.small.phases[0], steps=500, seq=256)
plain = replace(base.small, phases=(phase,), eval_tokens=32_768, overlap=64, eval_every=100)
wide = replace(base.scaled(plain, 250), model=base.shape(8, 256))
fewer = partial(by_nanochat, scalars=False)
study = Study(
    question="Is the strong baseline ahead of nanochat's recipe, at two sizes?",
    arms={"nanochat": by_nanochat(plain, PEAK), "fewer": fewer(plain, PEAK), "strong": on(plain),
          "wide_nanochat": by_nanochat(wide, PEAK), "wide_strong": on(wide)},
    quick=base.quick({"model.layers": 2}),
    claims=(
        Claim(says="the strong model is 0.1 and more ahead", arm="strong", below=-0.1),
        Claim(says="also without residual scalars, smear and backout", arm="strong",
              control="fewer", below=-0.1),
        Claim(says="the scalars, smear and backout cost something here", arm="fewer", below=0.0),
        Claim(says="twice as wide and as deep it is 0.1 and more ahead", arm="wide_strong",
              control="wide_nanochat", below=-0.1),
    ),
    seeds=3,
)

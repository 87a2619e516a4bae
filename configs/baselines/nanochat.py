"""nanochat: is the strong baseline ahead of nanochat's recipe, at two sizes?

Paper: none; nanochat, Karpathy 2025, gpt.py of commit 0e4b3fa
Method: Norms have no gains. Queries and keys are normed, then 1.2 times that. The MLP is squared
    ReLU. Every other layer, the last too, has a gated table of values. Each layer adds the first
    state to the stream, both with a weight. Each embedding gets a share of the one before (smear).
    The last state loses a share of a middle one (backout). Logits stay within 15.
Here: Equal rows and steps, FLOPs within 1 %; strong.py's tables are larger. A document sees all of
    itself and no other. Rates are its command line's: 2e-2 was the best of four (one seed).
Cost: 15 runs, 18 minutes on two CPU cores that do nothing else, by their CPU time.
Run:
    python train.py study configs/baselines/nanochat.py --jobs 2
    python train.py configs/baselines/nanochat.py:nanochat --phases.0.steps 99 --optimizer.steps 99
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
from model import ModelConfig, Param
from train import Config


def between(key, shape, dtype, low: float, high: float):
    """A draw, uniform."""
    return jax.random.uniform(key, shape, dtype, low, high)


def evenly(key, shape, dtype, first: float, last: float):
    """A draw, evenly from the first entry to the last."""
    return jnp.linspace(first, last, *shape, dtype=dtype)


def parts(config: ModelConfig, rows: dict, scalars: bool = True) -> dict:
    """`rows`. scalars: those of the stream, smear and backout."""
    layers, high, heads = config.layers, (3 / config.embed) ** 0.5, rows["v"].shape[2:]
    reads, gate = partial(between, low=-high, high=high), partial(between, low=0.0, high=0.02)
    draws = dict(q=reads, k=reads, v=reads, up=partial(between, low=-0.4 * high, high=0.4 * high))
    own = {name: replace(row, init=draws.get(name, row.init)) for name, row in rows.items()
           if row.init is not None and name != "gate"}
    axes, shape = ("state", "vocab", *rows["v"].axes[2:]), ((layers + 1) // 2, config.vocab, *heads)
    own["values"] = Param(axes, shape, reads, "values")
    own["value_gates"] = Param(("layers", "in", "kv_heads"), (layers, 12, heads[0]), gate)
    if scalars:
        of_layers = partial(Param, ("layers",), (layers,))
        own["residual"] = of_layers(partial(evenly, first=1.15, last=1.05))
        own["again"] = of_layers(partial(evenly, first=0.2, last=0.05), "again")
        own["smear_gate"] = Param(("in",), (min(24, config.embed),), gate, "smear")
        own["smear"] = Param(("out",), (1,), 0.0, "smear")
        own["backout"] = Param(("out",), (1,), partial(evenly, first=0.2, last=0.2), "smear")
    return own


def nanochat(params, batch, mask, config: ModelConfig):
    """`forward`."""
    angles, attend = model.rope(batch["positions"], config), model.plain_attend(batch, mask, config)
    gains = {name: jnp.full(row.shape, 1.2 if name in ("q_norm", "k_norm") else 1.0)
             for name, row in model.plain_table(config).items() if row.init is None}
    params = {name: x.astype(config.dtype) for name, x in (gains | params).items()}

    def normed(x):
        return model.rms_norm(x, params["norm"], config.norm_eps)

    def mixer(x, w, times, table):
        def product(x, name):
            if name != "v" or table is None:
                return times(x, name)
            gate = 3 * jax.nn.sigmoid(times(x[..., :12], "value_gates"))[..., None]
            return times(x, name) + gate * lookup(table, batch["tokens"], x.dtype)
        return model.attention_mixer(x, w, product, angles, attend, config)

    def mlp(x, w, times):
        return times(jnp.square(jax.nn.relu(times(x, "up"))), "down")

    first = x = normed(model.embedded(params, batch, config))
    if "smear" in params:
        gate = jax.nn.sigmoid(x[..., :24] @ params["smear_gate"])[..., None]
        first = x = x + params["smear"] * gate * past(x, batch["segments"])
    for layer in range(config.layers):
        if "again" in params:
            x = params["residual"][layer] * x + params["again"][layer] * first
        table = params["values"][layer // 2] if (config.layers - layer) % 2 else None
        x, _ = model.stream(params, x, batch, mask, config, layer, layer + 1,
                            mixer=partial(mixer, table=table), mlp=mlp)
        if layer == config.layers // 2:
            middle = x
    return normed(x - params["backout"] * middle if "backout" in params else x)


def by_nanochat(config: Config, **which: bool) -> Config:
    """A config with nanochat's model, optimiser and schedule. which: see `parts`."""
    shape = replace(config.model, mlp=4 * config.model.embed, qk_norm=True, rope_theta=1e5,
                    rows=partial(parts, **which), forward=nanochat, outputs=capped, flops=flops)
    rates = replace(config.schedule, peak=0.02, warmup=40, decay=COOL, final=0.05)
    by = partial(nanochat_muon, steps=config.phases[0].steps)
    return replace(config, model=shape, schedule=rates, clip=0.0, optimizer=by)


plain = replace(base.small, phases=(replace(base.small.phases[0], steps=500, seq=256),), overlap=64,
                eval_tokens=32_768, eval_every=100)
wide = replace(base.scaled(plain, 250), model=base.shape(8, 256))
study = Study(
    question="Is the strong baseline ahead of nanochat's recipe, at two sizes?",
    arms={"nanochat": by_nanochat(plain), "fewer": by_nanochat(plain, scalars=False),
          "strong": on(plain), "wide_nanochat": by_nanochat(wide), "wide_strong": on(wide)},
    quick=base.quick({"model.layers": 2}), seeds=3,
    claims=(
        Claim(says="the strong model is 0.1 ahead", arm="strong", below=-0.1),
        Claim(says="also of it without scalars", arm="strong", control="fewer", below=-0.1),
        Claim(says="scalars, smear and backout cost something here", arm="fewer", below=0.0),
        Claim(says="also at 8 x 256", arm="wide_strong", control="wide_nanochat", below=-0.1),
    ),
)

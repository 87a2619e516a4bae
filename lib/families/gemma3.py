"""Gemma 3, its text model: windows in most layers, two thetas, four norms, scaled embeddings.

Its file has a gain less one. Here a gain is itself, as everywhere else.
"""
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lib.families.family import (
    NAMES,
    QK_NORM,
    Family,
    kinds_of_layers,
    period,
    write_rope,
)
from lib.families.llama import narrowed
from lib.kernels import residual
from model import (
    ModelConfig,
    Param,
    attention_mixer,
    embedded,
    gated_mlp,
    plain_attend,
    rms_norm,
    rope,
    stream,
)

LOCAL, WHOLE = "sliding_attention", "full_attention"  # what config.json calls layers


def rows(
    config: ModelConfig, plain: dict[str, Param], kinds: tuple[int, ...]
) -> dict[str, Param]:
    """A `rows`: the plain ones, two more norms, and which layers have a window (1 in `kinds`)."""
    more = {f"{name}_out_norm": plain[f"{name}_norm"] for name in ("attn", "mlp")}
    return plain | more | {"local": kinds_of_layers(config, kinds)}


def gemma3(
    params,
    batch,
    mask,
    config: ModelConfig,
    window: int,
    theta: float,
    scores: float,
):
    """A `forward` (Gemma Team 2025). window, theta: of local layers.

    scores: attention scores are divided by its root, in the place of head_dim.
    """
    positions = batch["positions"]
    near = rope(positions, replace(config, rope_theta=theta, rope_scaling=()))
    far = rope(positions, config)
    attend_near = plain_attend(batch, narrowed(mask, window), config)
    attend_far = plain_attend(batch, mask, config)
    scale = (config.head_dim / scores) ** 0.5
    gelu = partial(jax.nn.gelu, approximate=True)

    def body(x, w, times):
        local = w["local"] > 0
        angles = [jnp.where(local, *both) for both in zip(near, far, strict=True)]

        def attend(q, k, v):
            return lax.cond(local, attend_near, attend_far, q * scale, k, v)

        n = rms_norm(x, w["attn_norm"], config.norm_eps)
        mixed, kept = attention_mixer(n, w, times, angles, attend, config)
        x = residual(x, rms_norm(mixed, w["attn_out_norm"], config.norm_eps))
        n = rms_norm(x, w["mlp_norm"], config.norm_eps)
        added = gated_mlp(n, w, times, gelu)
        return residual(x, rms_norm(added, w["mlp_out_norm"], config.norm_eps)), kept

    x = config.embed**0.5 * embedded(params, batch, config)
    x, _ = stream(params, x, batch, mask, config, body=body)
    return rms_norm(x, params["norm"], config.norm_eps)


def read(found: dict) -> dict[str, Any]:
    """Windows and the two thetas, as transformers 5 and 4 write them."""
    layers, every = found["num_hidden_layers"], found.get("sliding_window_pattern", 6)
    names = found.get("layer_types")
    if names:
        kinds = [int(name == LOCAL) for name in names]
    else:
        kinds = [int((i + 1) % every != 0) for i in range(layers)]
    both = found.get("rope_parameters") or {}
    theta = both.get(LOCAL, {}).get("rope_theta") or found.get("rope_local_base_freq", 1e4)
    given = dict(window=found["sliding_window"], theta=float(theta))
    scores = float(found.get("query_pre_attn_scalar", 256))
    return {
        "rows": partial(rows, kinds=period(kinds[:layers])),
        "forward": partial(gemma3, **given, scores=scores),
    }


def write(config: ModelConfig, params) -> dict[str, Any]:
    """The same, back; the layers as they stand now."""
    given = config.forward.keywords
    far = write_rope(config)["rope_parameters"]
    near = {"rope_type": "default", "rope_theta": given["theta"]}
    return {
        "layer_types": [LOCAL if kind > 0 else WHOLE for kind in params["local"]],
        "sliding_window": given["window"],
        "rope_local_base_freq": given["theta"],
        "rope_parameters": {WHOLE: far, LOCAL: near},
        "query_pre_attn_scalar": given["scores"],
    }


LAYER = "model.layers.{}."
OUT_NORMS = {
    f"{LAYER}post_attention_layernorm.weight": "attn_out_norm",
    f"{LAYER}pre_feedforward_layernorm.weight": "mlp_norm",
    f"{LAYER}post_feedforward_layernorm.weight": "mlp_out_norm",
}
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    "windows, two thetas, four norms, scaled embeddings",
    names=NAMES | QK_NORM | OUT_NORMS,
    forward=gemma3,
    rows=rows,
    qk_norm=True,
    read=read,
    write=write,
    only={
        "hidden_act": ("gelu_pytorch_tanh",),
        "sliding_window": (),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    },
    absent={
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "head_dim": 256,
    },
    also={"hidden_activation": "hidden_act"},
    heads="divide",
    gain=1.0,
)

"""Granite 3: four multipliers, of the embedding, the attention scores, the branches, the logits."""
from functools import partial
from typing import Any

from lib.families.family import Family
from lib.kernels import residual
from model import (
    ModelConfig,
    attention_mixer,
    embedded,
    gated_mlp,
    plain_attend,
    rms_norm,
    rope,
    stream,
)

# Its fields in config.json, by the arguments of `granite`.
FIELDS = {
    "embedding": "embedding_multiplier",
    "scores": "attention_multiplier",
    "branch": "residual_multiplier",
    "logits": "logits_scaling",
}


def granite(
    params,
    batch,
    mask,
    config: ModelConfig,
    embedding: float,
    scores: float,
    branch: float,
    logits: float,
):
    """A `forward`: the plain one with multipliers; `logits` divides.

    `scores` stands in the place of 1 / sqrt(head_dim).
    """
    angles = rope(batch["positions"], config)
    plain = plain_attend(batch, mask, config)
    scale = scores * config.head_dim**0.5

    def attend(q, k, v):
        return plain(q * scale, k, v)

    def body(x, w, times):
        n = rms_norm(x, w["attn_norm"], config.norm_eps)
        mixed, kept = attention_mixer(n, w, times, angles, attend, config)
        x = residual(x, branch * mixed)
        n = rms_norm(x, w["mlp_norm"], config.norm_eps)
        return residual(x, branch * gated_mlp(n, w, times)), kept

    x = embedding * embedded(params, batch, config)
    x, _ = stream(params, x, batch, mask, config, body=body)
    return rms_norm(x, params["norm"], config.norm_eps) / logits


def read(found: dict) -> dict[str, Any]:
    """The multipliers, 1 where config.json does not say."""
    given = {name: float(found.get(field, 1.0)) for name, field in FIELDS.items()}
    return {"forward": partial(granite, **given)}


def write(config: ModelConfig, params) -> dict[str, Any]:
    """The same, back."""
    return {field: config.forward.keywords[name] for name, field in FIELDS.items()}


GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    "four multipliers",
    forward=granite,
    read=read,
    write=write,
)

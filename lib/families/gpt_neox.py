"""GPT-NeoX, of which Pythia is: LayerNorm, biases, partial rotation, attention beside the MLP."""
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lib.families.family import Family, bias, biased, ungated_flops
from lib.kernels import residual
from lib.products import float32_or_wider
from model import (
    ModelConfig,
    Param,
    attention_mixer,
    embedded,
    plain_attend,
    rope,
    stream,
)

BIASED = "q", "k", "v", "o", "up", "down"
NORMS = "attn_norm", "mlp_norm", "norm"


def rows(config: ModelConfig, plain: dict[str, Param]) -> dict[str, Param]:
    """A `rows`: the plain ones without a gate, and a bias of each matrix and each norm."""
    found = dict(plain)
    del found["gate"]
    for name in BIASED:
        found[f"{name}_bias"] = bias(config, plain[name])
    for name in NORMS:
        found[f"{name}_bias"] = replace(plain[name], init=0.0, group="bias")
    return found


def layer_norm(x, w, name: str, eps: float):
    """(x - mean) / deviation · gain + bias over the last axis (Ba et al. 2016).

    w: a block's parameters, or all. Mean and deviation are in float32 or wider.
    """
    wide = x.astype(float32_or_wider(x.dtype))
    centred = wide - jnp.mean(wide, -1, keepdims=True)
    variance = jnp.mean(centred * centred, -1, keepdims=True)
    normed = (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)
    return normed * w[name].astype(x.dtype) + w[f"{name}_bias"].astype(x.dtype)


def mlp(x, times: Callable, activation: Callable):
    """An MLP without a gate."""
    return times(activation(times(x, "up")), "down")


def gpt_neox(params, batch, mask, config: ModelConfig, rotated: int, parallel: bool):
    """A `forward` (Black et al. 2022). rotated: so many of a head's first numbers.

    parallel: the MLP reads what attention reads, in place of what attention wrote.
    """
    angles = rope(batch["positions"], replace(config, head_dim=rotated))
    attend = plain_attend(batch, mask, config)
    gelu = partial(jax.nn.gelu, approximate=False)

    def body(x, w, times):
        times = biased(times, w)
        n = layer_norm(x, w, "attn_norm", config.norm_eps)
        mixed, kept = attention_mixer(n, w, times, angles, attend, config)
        after = residual(x, mixed)
        n = layer_norm(x if parallel else after, w, "mlp_norm", config.norm_eps)
        return residual(after, mlp(n, times, gelu)), kept

    x = embedded(params, batch, config)
    x, _ = stream(params, x, batch, mask, config, body=body)
    return layer_norm(x, params, "norm", config.norm_eps)


def read(found: dict) -> dict[str, Any]:
    """How much of a head rotates; transformers 4 has other names for what RoPE is."""
    rope = found.get("rope_parameters") or {}
    part = rope.get("partial_rotary_factor", found.get("rotary_pct", 0.25))
    head_dim = found["hidden_size"] // found["num_attention_heads"]
    parallel = found.get("use_parallel_residual", True)
    return {
        "rows": rows,
        "forward": partial(gpt_neox, rotated=int(part * head_dim), parallel=parallel),
        "flops": ungated_flops,
    }


def write(config: ModelConfig, params) -> dict[str, Any]:
    """The same, back."""
    part = config.forward.keywords["rotated"] / config.head_dim
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return {
        "rotary_pct": part,
        "rope_parameters": rope | {"partial_rotary_factor": part},
        "use_parallel_residual": config.forward.keywords["parallel"],
        "hidden_dropout": 0.0,
    }


def both(tensor: str, names: str) -> dict[str, str]:
    """{tensor: parameters} of a weight and of its bias."""
    biases = " ".join(f"{name}_bias" for name in names.split())
    return {f"{tensor}.weight": names, f"{tensor}.bias": biases}


LAYER = "gpt_neox.layers.{}."
GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    "LayerNorm, biases, partial rotation, attention and MLP side by side",
    names={
        "gpt_neox.embed_in.weight": "embed",
        **both("gpt_neox.final_layer_norm", "norm"),
        "embed_out.weight": "head",
        **both(f"{LAYER}input_layernorm", "attn_norm"),
        **both(f"{LAYER}attention.query_key_value", "q k v"),
        **both(f"{LAYER}attention.dense", "o"),
        **both(f"{LAYER}post_attention_layernorm", "mlp_norm"),
        **both(f"{LAYER}mlp.dense_h_to_4h", "up"),
        **both(f"{LAYER}mlp.dense_4h_to_h", "down"),
    },
    forward=gpt_neox,
    rows=rows,
    read=read,
    write=write,
    only={
        "hidden_act": ("gelu",),
        "attention_bias": (True,),
        "partial_rotary_factor": (),
    },
    absent={"rms_norm_eps": 1e-5},
    also={
        "layer_norm_eps": "rms_norm_eps",
        "rotary_emb_base": "rope_theta",
    },
    unsaid=("mlp_bias", "num_key_value_heads", "head_dim"),
    heads="fill",
    by_head=True,
)

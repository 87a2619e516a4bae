"""OLMo 2: norms after attention and MLP, queries and keys normalised over all heads."""
import jax.numpy as jnp

from lib.families.family import NAMES, QK_NORM, Family
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

AFTER = {"attn_norm": "attn_out_norm", "mlp_norm": "mlp_out_norm"}


def rows(config: ModelConfig, plain: dict[str, Param]) -> dict[str, Param]:
    """A `rows`: the plain ones with the norms behind, and gains of queries and keys, as wide."""
    found = {}
    for name, row in plain.items():
        found[AFTER.get(name, name)] = row
    for name in ("q", "k"):
        _, _, *axes = plain[name].axes
        _, _, *shape = plain[name].shape
        gains = ("layers", *axes), (config.layers, *shape)
        found[f"{name}_norm"] = Param(*gains, None, "vector")
    return found


def olmo2(params, batch, mask, config: ModelConfig):
    """A `forward`: x + norm(attention(x)), x + norm(mlp(x))."""
    angles = rope(batch["positions"], config)
    attend = plain_attend(batch, mask, config)

    def body(x, w, times):
        def normed(x, name):
            y = times(x, name)
            if f"{name}_norm" not in w:
                return y
            flat = y.reshape(*y.shape[:2], -1)
            gain = jnp.ravel(w[f"{name}_norm"])
            return rms_norm(flat, gain, config.norm_eps).reshape(y.shape)

        mixed, kept = attention_mixer(x, w, normed, angles, attend, config)
        x = residual(x, rms_norm(mixed, w["attn_out_norm"], config.norm_eps))
        added = gated_mlp(x, w, times)
        return residual(x, rms_norm(added, w["mlp_out_norm"], config.norm_eps)), kept

    x = embedded(params, batch, config)
    x, _ = stream(params, x, batch, mask, config, body=body)
    return rms_norm(x, params["norm"], config.norm_eps)


NORMS = {
    "model.layers.{}.post_attention_layernorm.weight": "attn_out_norm",
    "model.layers.{}.post_feedforward_layernorm.weight": "mlp_out_norm",
}
OTHERS = {tensor: name for tensor, name in NAMES.items() if name not in AFTER}
OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    "norms after, queries and keys normalised over all heads",
    names=OTHERS | NORMS | QK_NORM,
    forward=olmo2,
    rows=rows,
    read=lambda found: {"forward": olmo2, "rows": rows},
    absent={"rms_norm_eps": 1e-5},
)

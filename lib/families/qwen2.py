"""Qwen 2 and 2.5: a bias on queries, keys and values."""
from lib.families.family import NAMES, Family, bias, biased
from model import (
    ModelConfig,
    Param,
    attention_mixer,
    embedded,
    plain_attend,
    rms_norm,
    rope,
    stream,
)

BIASED = "q", "k", "v"


def rows(config: ModelConfig, plain: dict[str, Param]) -> dict[str, Param]:
    """A `rows`: the plain ones, and the biases."""
    more = {}
    for name in BIASED:
        more[f"{name}_bias"] = bias(config, plain[name])
    return plain | more


def qwen2(params, batch, mask, config: ModelConfig):
    """A `forward`: the plain one with these biases."""
    angles = rope(batch["positions"], config)
    attend = plain_attend(batch, mask, config)

    def mixer(x, w, times):
        return attention_mixer(x, w, biased(times, w), angles, attend, config)

    x = embedded(params, batch, config)
    x, _ = stream(params, x, batch, mask, config, mixer=mixer)
    return rms_norm(x, params["norm"], config.norm_eps)


BIASES = {f"model.layers.{{}}.self_attn.{name}_proj.bias": f"{name}_bias" for name in BIASED}
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    "a bias on queries, keys and values",
    names=NAMES | BIASES,
    forward=qwen2,
    rows=rows,
    read=lambda found: {"forward": qwen2, "rows": rows},
    only={
        "use_sliding_window": (False,),
        "sliding_window": (),
        "attention_bias": (),
    },
)

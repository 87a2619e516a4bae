"""Biases in a Llama: one vector where attention writes the stream, and one where the MLP does."""
import model
from model import ModelConfig, Param

WRITERS = "o", "down"  # the matrices that write the stream, in a block's order


def biases(config: ModelConfig, rows: dict[str, Param]) -> dict[str, Param]:
    """A `rows`: the plain ones and "o_bias" and "down_bias" [layers, embed], which begin as 0."""
    bias = Param(("layers", "embed"), (config.layers, config.embed), 0.0, "bias")
    return rows | {f"{name}_bias": bias for name in WRITERS}


def biased(params: model.Params, batch, mask, config: ModelConfig):
    """A `forward`: the plain one, with these biases added."""
    angles = model.rope(batch["positions"], config)
    attend = model.plain_attend(batch, mask, config)

    def mixer(x, w, times):
        mixed, kept = model.attention_mixer(x, w, times, angles, attend, config)
        return mixed + w["o_bias"].astype(x.dtype), kept

    def visit(x, layer, w):
        return x + w["down_bias"].astype(x.dtype), None

    first = model.embedded(params, batch, config)
    x, _ = model.stream(params, first, batch, mask, config, mixer=mixer, visit=visit)
    return model.rms_norm(x, params["norm"], config.norm_eps)

"""Biases in a Llama: one vector where attention writes the stream, and one where the MLP does."""
import model
from model import ModelConfig, Param

WRITERS = "o", "down"  # the matrices that write the stream, in a block's order


def biases(config: ModelConfig, rows: dict[str, Param]) -> dict[str, Param]:
    """A `rows`: the plain ones and "o_bias" and "down_bias" [layers, embed], which begin as 0."""
    shape = config.layers, config.embed
    bias = Param(("layers", "embed"), shape, 0.0, "bias")
    more = {f"{name}_bias": bias for name in WRITERS}
    return rows | more


def biased(params: model.Params, batch, mask, config: ModelConfig):
    """A `forward`: the plain one, with these biases added."""
    angles = model.rope(batch["positions"], config)
    attend = model.plain_attend(batch, mask, config)

    def mixer(x, w, times):
        mixed, kept = model.attention_mixer(
            x, w, times, angles, attend, config
        )
        return plus(mixed, w["o_bias"]), kept

    def visit(x, layer, w):
        return plus(x, w["down_bias"]), None

    first = model.embedded(params, batch, config)
    x, _ = model.stream(
        params, first, batch, mask, config, mixer=mixer, visit=visit
    )
    return model.rms_norm(
        x,
        params["norm"],
        config.norm_eps,
    )


def plus(x, bias):
    """x [b t d] and a bias [d], in the dtype of x."""
    return x + bias.astype(x.dtype)

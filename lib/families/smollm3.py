"""SmolLM 3: no rotation in some layers, by default every fourth."""
from functools import partial
from typing import Any

import jax.numpy as jnp

from lib.families.family import Family, kinds_of_layers, period
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


def rows(
    config: ModelConfig, plain: dict[str, Param], kinds: tuple[int, ...]
) -> dict[str, Param]:
    """A `rows`: the plain ones, and which layers rotate; 1 in `kinds` does."""
    return plain | {"rotates": kinds_of_layers(config, kinds)}


def smollm3(params, batch, mask, config: ModelConfig):
    """A `forward`: the plain one, in which a layer that does not rotate has angles of 0."""
    cos, sin = rope(batch["positions"], config)
    attend = plain_attend(batch, mask, config)

    def mixer(x, w, times):
        rotates = w["rotates"] > 0
        angles = (
            jnp.where(rotates, cos, 1),
            jnp.where(rotates, sin, 0),
        )
        return attention_mixer(x, w, times, angles, attend, config)

    x = embedded(params, batch, config)
    x, _ = stream(params, x, batch, mask, config, mixer=mixer)
    return rms_norm(x, params["norm"], config.norm_eps)


def read(found: dict) -> dict[str, Any]:
    """Which layers rotate."""
    layers = found["num_hidden_layers"]
    kinds = found.get("no_rope_layers")
    if not kinds:
        every = found.get("no_rope_layer_interval") or 4
        kinds = [int((i + 1) % every != 0) for i in range(layers)]
    kinds = period(kinds[:layers])
    return {"forward": smollm3, "rows": partial(rows, kinds=kinds)}


def write(config: ModelConfig, params) -> dict[str, Any]:
    """The same of each layer, as they stand now."""
    return {"no_rope_layers": [int(kind > 0) for kind in params["rotates"]]}


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    "no rotation in some layers",
    forward=smollm3,
    rows=rows,
    read=read,
    write=write,
    only={
        "use_sliding_window": (False,),
        "sliding_window": (),
    },
    absent={
        "tie_word_embeddings": True,
        "rope_theta": 2e6,
    },
)

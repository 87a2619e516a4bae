"""What a family of Hugging Face models is, and what most of them share with Llama."""
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp

from model import ModelConfig, Param, Params, flops_per_token, llama, plain_table

# The tensors of a Llama, {} is the layer, and the parameters of `model.plain_table` in them.
NAMES = {
    "model.embed_tokens.weight": "embed",
    "model.norm.weight": "norm",
    "lm_head.weight": "head",
    "model.layers.{}.input_layernorm.weight": "attn_norm",
    "model.layers.{}.self_attn.q_proj.weight": "q",
    "model.layers.{}.self_attn.k_proj.weight": "k",
    "model.layers.{}.self_attn.v_proj.weight": "v",
    "model.layers.{}.self_attn.o_proj.weight": "o",
    "model.layers.{}.post_attention_layernorm.weight": "mlp_norm",
    "model.layers.{}.mlp.gate_proj.weight": "gate",
    "model.layers.{}.mlp.up_proj.weight": "up",
    "model.layers.{}.mlp.down_proj.weight": "down",
}
QK_NORM = {
    "model.layers.{}.self_attn.q_norm.weight": "q_norm",
    "model.layers.{}.self_attn.k_norm.weight": "k_norm",
}
# The fields that `ModelConfig.rope_scaling` holds, by the kind of RoPE that a config.json names.
ROPE = {
    "default": [],
    "linear": ["factor"],
    "llama3": [
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ],
    "yarn": [
        "factor",
        "beta_slow",
        "beta_fast",
        "original_max_position_embeddings",
        "attention_factor",
    ],
}
# What config.json may say, the first of it by saying nothing; of () anything.
ONLY = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "partial_rotary_factor": (None, 1.0),
    "truncate": (None, True),
}


def nothing(*_) -> dict[str, Any]:
    """No further fields."""
    return {}


@dataclass(frozen=True)
class Family:
    """Models of one layout: how config.json and the tensors say what `ModelConfig` and table do."""

    kind: str  # `model_type` in config.json
    architecture: str  # the class of transformers
    own: str  # what its block has that Llama's has not, in words
    names: dict[str, str] = field(default_factory=lambda: NAMES)  # {tensor: parameters in it}
    forward: Callable = llama
    rows: Callable | None = None
    qk_norm: bool = False
    # {field: what config.json may say} besides ONLY, and what the absence of other fields means
    only: dict[str, tuple] = field(default_factory=dict)
    absent: dict[str, Any] = field(default_factory=dict)
    also: dict[str, str] = field(default_factory=dict)  # {its name of a field: Llama's}
    unsaid: tuple[str, ...] = ()  # Llama's fields that it has not
    read: Callable = nothing  # config.json -> further fields of `ModelConfig`
    write: Callable = nothing  # (ModelConfig, parameters) -> further fields of config.json
    gain: float = 0.0  # what is added to a gain in the file
    transposed: bool = True  # matrices of blocks are [outputs, inputs]
    # heads that transformers allows: any, so many that embed is a multiple, or such that fill it
    heads: Literal["free", "divide", "fill"] = "free"
    by_head: bool = False  # of several parameters in a tensor, the parts of a head stand together

    @property
    def prefix(self) -> str:
        """What the tensors of a file without a head may lack in front."""
        return next(iter(self.names)).partition(".")[0] + "."


# --------------------------------------------------------------------------------- its config.json


def usual_fields(found: dict) -> dict[str, Any]:
    """Fields of `ModelConfig` by those of a config.json that most families have."""
    heads = found["num_attention_heads"]
    embed = found["hidden_size"]
    theta, scaling = read_rope(found)
    return dict(
        layers=found["num_hidden_layers"],
        embed=embed,
        heads=heads,
        kv_heads=found.get("num_key_value_heads") or heads,
        head_dim=found.get("head_dim") or embed // heads,
        mlp=found["intermediate_size"] or 4 * embed,
        vocab=found["vocab_size"],
        tied=found.get("tie_word_embeddings", False),
        norm_eps=float(found.get("rms_norm_eps", 1e-6)),
        rope_theta=float(theta),
        rope_scaling=scaling,
    )


def rope_of(found: dict) -> tuple[str, dict]:
    """(the kind of RoPE that a config.json names, what it says of it)."""
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}  # transformers 5 and 4
    rope = rope.get("full_attention", rope)
    return rope.get("rope_type") or rope.get("type") or "default", rope


def read_rope(found: dict) -> tuple[float, tuple[float, ...]]:
    """(theta, `ModelConfig.rope_scaling`) of a config.json."""
    kind, rope = rope_of(found)
    said = {"original_max_position_embeddings": found.get("max_position_embeddings")}
    if kind == "yarn":
        said |= {"beta_slow": 1, "beta_fast": 32, "attention_factor": longer(rope)}
    said |= {name: value for name, value in rope.items() if value is not None}
    theta = rope.get("rope_theta") or found.get("rope_theta") or 1e4
    return theta, tuple(float(said[name]) for name in ROPE[kind])


def longer(rope: dict) -> float:
    """YaRN's attention factor, where a config.json has none (Peng et al. 2023, section 3.4)."""
    def scale(by):
        return 1 + 0.1 * by * math.log(max(1, rope["factor"]))

    one, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(one) / scale(all_dim) if one and all_dim else scale(1)


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Fields of a config.json for transformers 4 and 5; where RoPE is not scaled, without it."""
    number = len(config.rope_scaling)
    kind = next(kind for kind, names in ROPE.items() if len(names) == number)
    scaling: dict[str, Any] = dict(zip(ROPE[kind], config.rope_scaling, strict=True))
    if "original_max_position_embeddings" in scaling:
        scaling["original_max_position_embeddings"] = int(config.rope_scaling[3])
    scaling["rope_type"] = kind
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling if number else None,
        "rope_parameters": scaling | {"rope_theta": config.rope_theta},
    }


def written(family: Family, config: ModelConfig, params: Params) -> dict[str, Any]:
    """Those fields of a config.json that a model decides."""
    only = ONLY | family.only
    usual = {name: values[0] for name, values in only.items() if values}
    usual = {name: value for name, value in usual.items() if value is not None}
    usual |= write_rope(config) | {
        "model_type": family.kind,
        "architectures": [family.architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.embed,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "attention_dropout": 0.0,
    }
    its = {llama: name for name, llama in family.also.items()}
    fields = {}
    for name, value in usual.items():
        if name not in family.unsaid:
            fields[its.get(name, name)] = value
    return fields | family.write(config, params)


# -------------------------------------------------------------------------------- rows and products


def bias(config: ModelConfig, row: Param) -> Param:
    """The row of a bias of a block's matrix: its outputs, zeros at first."""
    axes = row.axes[1:]  # without `layers`
    inputs = 1 if axes[0] == "embed" else len(axes) - 1
    outputs = axes[inputs:]
    shape = row.shape[1 + inputs:]
    return Param(("layers", *outputs), (config.layers, *shape), 0.0, "bias")


def biased(times: Callable, w: Params) -> Callable:
    """`times` of a block, plus the bias of a matrix that has one."""

    def product(x, name):
        y = times(x, name)
        own = w.get(f"{name}_bias")
        return y if own is None else y + own.astype(y.dtype)

    return product


def periodic(key, shape, dtype, kinds: tuple[int, ...]):
    """An `init`: 1 for layers of a kind, -1 for the others, by a list that is repeated."""
    places = jnp.arange(shape[0]) % len(kinds)
    return jnp.where(jnp.array(kinds)[places] > 0, 1, -1).astype(dtype)


def kinds_of_layers(config: ModelConfig, kinds: tuple[int, ...]) -> Param:
    """The row that says of each layer which of two kinds it is, so that edits carry it along.

    Nothing trains it, since it has no gradient.
    """
    return Param(("layers",), (config.layers,), partial(periodic, kinds=tuple(kinds)), "fixed")


def period(kinds: list[int]) -> list[int]:
    """The shortest list that gives `kinds` by being repeated."""
    n = len(kinds)
    fits = (size for size in range(1, n + 1) if kinds[size:] == kinds[:n - size])
    return kinds[:next(fits)]


def ungated_flops(config: ModelConfig, seq: int) -> int:
    """A `flops`: those of the plain Llama without its gate."""
    gate = plain_table(config)["gate"]
    return flops_per_token(config, seq) - 6 * gate.size

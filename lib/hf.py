"""Hugging Face directories in Llama's layout: how they name parameters, and how they are read."""
import functools
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from lib.errors import InputError, user_errors
from lib.tokenizers import read_hf_json
from model import ModelConfig, Param, plain_table

# Parameters of `model.plain_table` by their names in a Llama checkpoint; {} is the layer.
NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
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
}
# Fields of a config.json that allow one value only, which is also what their absence means.
PLAIN = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "sliding_window": None,
}


def safetensors_package() -> ModuleType:
    """The package safetensors, which is optional."""
    said = "export and init_from hf: need the package safetensors: pip install safetensors"
    with user_errors(ImportError, sentence=said):
        import safetensors.numpy
    return safetensors


def tensors(config: ModelConfig) -> dict[str, tuple[str, int | None]]:
    """{name of a tensor in a checkpoint: (parameter, layer)}; the layer is None outside blocks."""
    found = {}
    for name, p in plain_table(config).items():
        for layer in layers_of(p):
            found[NAMES[name].format(layer)] = (name, layer)
    return found


def layers_of(p: Param) -> list[int | None]:
    """The layers that a parameter has a tensor for, or [None]."""
    if p.axes[0] == "layers":
        return list(range(p.shape[0]))
    return [None]


def sides(p: Param) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a layer's inputs and outputs, see `model.dense`.

    A lookup table and gains have no outputs: they are no factor of a product. A checkpoint holds
    factors as matrices [outputs, inputs].
    """
    shape, axes = p.shape, p.axes
    if axes[0] == "layers":
        shape, axes = shape[1:], axes[1:]
    if p.group in ("embed", "vector"):
        inputs = len(axes)
    elif axes[0] == "embed":
        inputs = 1
    else:
        inputs = len(axes) - 1
    return shape[:inputs], shape[inputs:]


def read_shape(name: str) -> ModelConfig:
    """The model of hf:DIR. Raises InputError for what Llama does not have, by its field."""
    found = read_hf_json(name, "config.json")
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}  # transformers 5 and 4
    kind = rope.get("rope_type") or rope.get("type") or "default"
    check_plain(name, found, rope, kind)
    context = {"original_max_position_embeddings": found.get("max_position_embeddings")}
    context |= rope
    sentence = f"{name}: config.json does not have all that a Llama model needs ({{reason}})"
    with user_errors((KeyError, TypeError, ValueError), InputError, sentence):
        heads = found["num_attention_heads"]
        embed = found["hidden_size"]
        theta = rope.get("rope_theta") or found.get("rope_theta") or 1e4
        scaling = [float(context[field]) for field in ROPE[kind]]
        return ModelConfig(
            layers=found["num_hidden_layers"],
            embed=embed,
            heads=heads,
            kv_heads=found.get("num_key_value_heads") or heads,
            head_dim=found.get("head_dim") or embed // heads,
            mlp=found["intermediate_size"],
            vocab=found["vocab_size"],
            tied=found.get("tie_word_embeddings", False),
            norm_eps=float(found.get("rms_norm_eps", 1e-6)),
            rope_theta=float(theta),
            rope_scaling=tuple(scaling),
        )


def check_plain(name: str, found: dict, rope: dict, kind: str):
    """Raise InputError for a field of config.json that a plain Llama does not have so."""
    rules: list[tuple[str, Any, list]] = []
    for field, plain in PLAIN.items():
        default = None if field == "model_type" else plain  # which must be there
        rules.append((field, found.get(field, default), [plain]))
    partial_rotary = (found | rope).get("partial_rotary_factor")
    rules.append(("rope_type", kind, list(ROPE)))
    rules.append(("partial_rotary_factor", partial_rotary, [None, 1.0]))
    for field, value, allowed in rules:
        if value not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise InputError(
                f"{name}: {field} in config.json is {value!r}; allowed is {choices}"
            )


def read_params(
    name: str,
    config: ModelConfig,
    like: dict[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """The plain model's parameters of hf:DIR, in the dtypes and places that `like` has for them.

    Each device reads its own part. Raises InputError for tensors that are missing, unknown, or not
    of the shape that config.json says.
    """
    views = open_tensors(name, config)
    rows = plain_table(config)
    check_shapes(name, config, views)
    params = {}
    for parameter, row in rows.items():
        x = like[parameter]
        read = functools.partial(read_part, views, parameter, row, x.dtype)
        params[parameter] = jax.make_array_from_callback(x.shape, x.sharding, read)
    return params


def open_tensors(name: str, config: ModelConfig) -> dict[str, Any]:
    """Views of a directory's tensors by name; nothing of them is read yet."""
    directory = Path(name.removeprefix("hf:")).expanduser()
    safetensors = safetensors_package()
    index = read_hf_json(name, "model.safetensors.index.json")
    sentence = f"{name} cannot be read ({{reason}})"

    @functools.cache
    def open_file(file: str):
        return safetensors.safe_open(directory / file, framework="np")

    with user_errors((OSError, safetensors.SafetensorError), InputError, sentence):
        files = index.get("weight_map")
        if not files:
            only = "model.safetensors"
            files = dict.fromkeys(open_file(only).keys(), only)
        wanted = tensors(config)
        check_names(name, set(wanted), set(files))
        return {tensor: open_file(files[tensor]).get_slice(tensor) for tensor in wanted}


def check_names(name: str, wanted: set[str], found: set[str]):
    """Raise InputError where a directory has not the tensors that its config.json asks for."""
    harmless = {NAMES["head"]}  # a tied model may have its head written out
    harmless |= {tensor for tensor in found if tensor.endswith("inv_freq")}
    odd = sorted((found - wanted - harmless) | (wanted - found))
    if odd:
        listed = ", ".join(odd[:6])
        if len(odd) > 6:
            listed += ", ..."
        raise InputError(
            f"{name}: tensors are missing, or do not belong to the Llama model that config.json "
            f"describes: {listed}"
        )


def check_shapes(name: str, config: ModelConfig, views: dict[str, Any]):
    """Raise InputError for a tensor that is not of the shape that config.json says."""
    rows = plain_table(config)
    for tensor, (parameter, _) in tensors(config).items():
        inputs, outputs = sides(rows[parameter])
        size = list(inputs)
        if outputs:
            size = [math.prod(outputs), math.prod(inputs)]
        found = views[tensor].get_shape()
        if found != size:
            raise InputError(f"{name}: tensor {tensor} is {found}; config.json asks for {size}")


def read_part(
    views: dict[str, Any],
    parameter: str,
    p: Param,
    dtype,
    index: tuple[slice, ...],
) -> np.ndarray:
    """The part of a parameter at an index, which has a slice for each axis."""
    index = [slice(*one.indices(n)[:2]) for one, n in zip(index, p.shape, strict=True)]
    layers = layers_of(p)
    inner = index
    if p.axes[0] == "layers":
        layers = layers[index[0]]
        inner = index[1:]
    inputs, outputs = sides(p)
    if outputs:
        rows = flat(outputs, inner[len(inputs)])
        columns = flat(inputs, inner[0])
        inner = [rows, columns]
    made = []
    for layer in layers:
        x = views[NAMES[parameter].format(layer)][tuple(inner)]
        made.append(x.T if outputs else x)
    shape = [one.stop - one.start for one in index]
    return np.stack(made).astype(dtype).reshape(shape)


def flat(side: tuple[int, ...], first: slice) -> slice:
    """A slice of a side's first axis as one of the whole side, flattened.

    Of each side only the first axis is ever split over devices, see lib/sharding.py.
    """
    rest = math.prod(side[1:])
    return slice(first.start * rest, first.stop * rest)

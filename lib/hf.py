"""Hugging Face directories in Llama's layout: shapes, names and parameters."""
import functools
import math
from pathlib import Path

import jax
import numpy as np

import model
from lib.errors import InputError, user_errors
from lib.tokenizers import read_hf_json
from model import ModelConfig, Param, table

# Parameters of `model.table` by their names in a Llama checkpoint.
NAMES = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
NAMES |= {name: f"model.layers.{{}}.{theirs}.weight" for name, theirs in {
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}.items()}
# What `model.ModelConfig.rope_scaling` holds, by the kind of rope that a config.json names.
ROPE = {"default": [], "linear": ["factor"], "llama3": [
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]}
PLAIN = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
         "quantization_config": None, "sliding_window": None}  # where a config.json says nothing else


def safetensors_package():
    """The package safetensors."""
    try:
        import safetensors.numpy
    except ImportError:
        raise InputError("export and init_from hf: need the package safetensors: pip install safetensors") \
            from None
    return safetensors


def tensors(shape: ModelConfig) -> dict[str, tuple[str, int | None]]:
    """{name of a tensor: (parameter, layer)} of a checkpoint."""
    return {NAMES[name].format(layer): (name, layer) for name, p in table(shape).items()
            for layer in (range(shape.layers) if p.axes[0] == "layers" else [None])}


def sides(p: Param) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a layer's inputs and outputs, see `model.dense`; no outputs where it is no factor, but a
    lookup table or gains. A checkpoint has factors as matrices [outputs, inputs].
    """
    shape, axes = ((x[1:] if p.axes[0] == "layers" else x) for x in (p.shape, p.axes))
    inputs = len(axes) if p.group in ("embed", "vector") else 1 if axes[0] == "embed" else len(axes) - 1
    return shape[:inputs], shape[inputs:]


def read_shape(name: str) -> ModelConfig:
    """The shape of hf:DIR. Raises InputError for what is not Llama's, with the field and what is allowed."""
    c = read_hf_json(name, "config.json")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}  # of transformers 5 and 4
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rules = [(f, c.get(f, plain if f != "model_type" else None), [plain]) for f, plain in PLAIN.items()]
    rules += [("rope_type", kind, list(ROPE)),
              ("partial_rotary_factor", (c | rope).get("partial_rotary_factor"), [None, 1.0])]
    for field, found, allowed in rules:
        if found not in allowed:
            raise InputError(f"{name}: {field} in config.json is {found!r}; allowed is "
                             f"{' or '.join(map(repr, allowed))}")
    context = {"original_max_position_embeddings": c.get("max_position_embeddings")} | rope
    with user_errors((KeyError, TypeError, ValueError), InputError, f"{name}: config.json does not have all "
                     "that a Llama model needs ({reason})"):
        heads, embed = c["num_attention_heads"], c["hidden_size"]
        return ModelConfig(
            layers=c["num_hidden_layers"], embed=embed, heads=heads, mlp=c["intermediate_size"],
            kv_heads=c.get("num_key_value_heads") or heads, head_dim=c.get("head_dim") or embed // heads,
            vocab=c["vocab_size"], tied=c.get("tie_word_embeddings", False),
            norm_eps=float(c.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or 1e4),
            rope_scaling=tuple(float(context[field]) for field in ROPE[kind]))


def read_params(name: str, shape: ModelConfig, like: dict[str, jax.ShapeDtypeStruct]) -> dict:
    """The parameters of hf:DIR in the dtypes and places of `like`, of which each device reads its own part.

    Raises InputError for tensors that are missing, not known, or not of the shape that config.json says.
    """
    directory, table = Path(name.removeprefix("hf:")).expanduser(), model.table(shape)
    files = read_hf_json(name, "model.safetensors.index.json").get("weight_map")
    open_file = functools.cache(lambda file: safetensors_package().safe_open(directory / file, framework="np"))
    with user_errors((OSError, safetensors_package().SafetensorError), InputError, f"{name} cannot be read ({{reason}})"):
        files = files or dict.fromkeys(open_file("model.safetensors").keys(), "model.safetensors")
        wanted = tensors(shape)
        extra = {n for n in files.keys() - wanted if not n.endswith("inv_freq") and n != NAMES["head"]}
        if odd := sorted(extra | wanted.keys() - files):
            raise InputError(f"{name}: tensors are missing, or are none of the Llama model that config.json "
                             f"describes: {', '.join(odd[:6])}{', ...' * (len(odd) > 6)}")
        views = {n: open_file(files[n]).get_slice(n) for n in wanted}
    for n, (parameter, _) in wanted.items():
        inputs, outputs = sides(table[parameter])
        size = [math.prod(outputs), math.prod(inputs)] if outputs else list(inputs)
        if views[n].get_shape() != size:
            raise InputError(f"{name}: tensor {n} is {views[n].get_shape()}; config.json asks for {size}")

    def part(parameter: str, index: tuple[slice, ...]) -> np.ndarray:
        p = table[parameter]
        index = [slice(*one.indices(n)[:2]) for one, n in zip(index, p.shape, strict=True)]
        layers = range(index[0].start, index[0].stop) if p.axes[0] == "layers" else [None]
        inner, (inputs, outputs) = index[len(index) - sum(map(len, sides(p))):], sides(p)
        if outputs:  # of each side only the first axis is ever split over devices (model.RULES)
            firsts = (outputs, inner[len(inputs)]), (inputs, inner[0])
            rest = [math.prod(side[1:]) for side, _ in firsts]
            inner = [slice(one.start * n, one.stop * n) for n, (_, one) in zip(rest, firsts, strict=True)]
        made = [views[NAMES[parameter].format(layer)][tuple(inner)] for layer in layers]
        made = np.stack([x.T if outputs else x for x in made]).astype(like[parameter].dtype)
        return made.reshape([one.stop - one.start for one in index])

    return {n: jax.make_array_from_callback(x.shape, x.sharding, functools.partial(part, n))
            for n, x in like.items()}

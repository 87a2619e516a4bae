"""Hugging Face directories: the table of families, how they are read, and what is in a tensor."""
import functools
import json
import math
import re
from dataclasses import replace
from types import ModuleType
from typing import Any

import jax
import numpy as np

from lib.config import from_json, to_json
from lib.errors import ODD, InputError, user_errors
from lib.families.family import ONLY, ROPE, Family, rope_of, usual_fields
from lib.families.gemma3 import GEMMA3
from lib.families.gpt2 import GPT2
from lib.families.gpt_neox import GPT_NEOX
from lib.families.granite import GRANITE
from lib.families.layout import is_turned, layers_of, shift, sides, size_in_file, unpack
from lib.families.llama import LLAMA, MISTRAL, QWEN3
from lib.families.olmo2 import OLMO2
from lib.families.qwen2 import QWEN2
from lib.families.smollm3 import SMOLLM3
from lib.fields import plain
from lib.hub import place
from lib.lora import rows_before
from lib.tokenizers import read_hf_json
from model import ModelConfig, Param, draw, head_logits, plain_table, table

LISTED = LLAMA, QWEN3, MISTRAL, QWEN2, GRANITE, SMOLLM3, OLMO2, GEMMA3, GPT_NEOX, GPT2
FAMILIES = {family.kind: family for family in LISTED}
# Tensors that are constants of a family, which some files hold.
CONSTANT = re.compile(r"inv_freq$|masked_bias$|\.(attn|attention)\.bias$")
# What to do about a field of config.json that is refused.
MEND = {
    "quantization_config": "load it by transformers, `.dequantize()` it, and save that",
    "rope_type": "load it by transformers with a `rope_parameters` of these, which computes the "
                 "same up to the old context, and save that",
}


def safetensors_package() -> ModuleType:
    """The package safetensors, which is optional."""
    said = "export and init_from hf: need the package safetensors: pip install safetensors"
    with user_errors(ImportError, sentence=said):
        import safetensors.numpy
    return safetensors


# ----------------------------------------------------------------------------------- which family


def family_of(config: ModelConfig) -> Family:
    """The family whose layout a model has. Raises InputError where there is none."""
    forward = plain(config.forward)
    near = []
    for family in LISTED:
        if family.forward == forward:
            near.append(family)
    if config.outputs != head_logits:
        raise InputError(no_layout("outputs", config.outputs, "model.head_logits"))
    if not near:
        raise InputError(no_layout("forward", config.forward, "model.llama and a family's"))
    for family in near:
        if family.qk_norm == config.qk_norm:
            return family
    raise InputError(
        f"model.qk_norm is {config.qk_norm}, for which the layout of {near[0].kind} has no place; "
        f"allowed is {near[0].qk_norm}"
    )


def no_layout(field: str, function, allowed: str) -> str:
    """That no family has a function of a model's config."""
    return (
        f"model.{field} is {plain(function).__name__}, for which no family of Hugging Face models "
        f"has a place; allowed is {allowed} (docs/models.md lists the families)"
    )


def rows_of(config: ModelConfig) -> dict[str, Param]:
    """The parameters that a model of a family has; rows that train besides, as `q/a`, are none."""
    if not family_of(config).rows:
        return plain_table(config)
    return table(replace(config, rows=rows_before(config)))


def stored_rows(config: ModelConfig) -> dict[str, Param]:
    """Those of them that a checkpoint has tensors for."""
    rows = rows_of(config)
    named = " ".join(family_of(config).names.values()).split()
    return {name: row for name, row in rows.items() if name in named}


def tensors(config: ModelConfig) -> dict[str, tuple[tuple[str, ...], int | None]]:
    """{tensor of a checkpoint: (parameters in it, layer)}; the layer is None outside blocks."""
    rows = stored_rows(config)
    found = {}
    for tensor, names in family_of(config).names.items():
        names = tuple(names.split())
        if names[0] not in rows:  # the head of a tied model
            continue
        for layer in layers_of(rows[names[0]]):
            found[tensor.format(layer)] = (names, layer)
    return found


# --------------------------------------------------------------------------------------- reading


def read_shape(name: str) -> ModelConfig:
    """The model of hf:DIR. Raises InputError for what its family does not have, by its field."""
    found = read_hf_json(name, "config.json")
    kind = found.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if not family:
        raise InputError(no_family(name, kind))
    found = family.absent | by_usual_names(found, family)
    sentence = (
        f"{name}: config.json does not have all that a model of type {family.kind} needs "
        "({reason})"
    )
    with user_errors(ODD, InputError, sentence):
        check_fields(name, found, family)
        fields = dict(usual_fields(found), qk_norm=family.qk_norm)
        made = ModelConfig(**fields | family.read(found))
    return from_json(ModelConfig, json.loads(json.dumps(to_json(made))))


def by_usual_names(found: dict, family: Family) -> dict:
    """A config.json by Llama's names of fields, without those that the family has not."""
    others = family.also.keys() | set(family.unsaid)
    said = {field: value for field, value in found.items() if field not in others}
    for field, usual in family.also.items():
        if field in found:
            said[usual] = found[field]
    return said


def no_family(name: str, kind: str | None) -> str:
    """That nothing here reads a kind of model, and what to do."""
    said = f"{name}: model_type in config.json is {kind!r}; allowed are {', '.join(FAMILIES)}"
    inner = FAMILIES.get(f"{kind}_text")
    if inner:
        return f"{said}: load it as a {inner.architecture} by transformers, and save that"
    return f"{said}; another family is a file of 20 to 60 lines, see docs/models.md"


def check_fields(name: str, found: dict, family: Family):
    """Raise InputError for a field of config.json that its family does not have so here."""
    kind, rope = rope_of(found)
    rules: list[tuple[str, Any, tuple]] = [("rope_type", kind, tuple(ROPE))]
    for field, allowed in (ONLY | family.only).items():
        if allowed:
            rules.append((field, (found | rope).get(field, allowed[0]), allowed))
    its = {usual: field for field, usual in family.also.items()}
    for field, value, allowed in rules:
        if value not in allowed:
            choices = " or ".join(map(repr, allowed))
            its_name = its.get(field, field)
            said = f"{name}: {its_name} in config.json is {value!r}; allowed is {choices}"
            if field in MEND:
                said += f"; {MEND[field]}"
            raise InputError(said)


def read_params(
    name: str,
    config: ModelConfig,
    like: dict[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """The parameters of hf:DIR, in the dtypes and places that `like` has for them.

    Each device reads its own part. Raises InputError for tensors that are missing, unknown, or not
    of the shape that config.json says.
    """
    views = open_tensors(name, config)
    check_shapes(name, config, views)
    inside = {}
    for tensor, names in family_of(config).names.items():
        inside |= {parameter: (tensor, names.split()) for parameter in names.split()}
    params = {}
    for parameter, row in rows_of(config).items():
        x = like[parameter]
        if parameter in inside:
            where = inside[parameter]
            read = functools.partial(read_part, views, *where, parameter, config, x.dtype)
        else:  # a fact of each layer, that config.json says
            read = np.asarray(draw(parameter, row, jax.random.key(0), x.dtype)).__getitem__
        params[parameter] = jax.make_array_from_callback(x.shape, x.sharding, read)
    return params


def open_tensors(name: str, config: ModelConfig) -> dict[str, Any]:
    """Views of a directory's tensors by name; nothing of them is read yet."""
    directory = place(name)
    safetensors = safetensors_package()
    index = read_hf_json(name, "model.safetensors.index.json")
    only = "model.safetensors"
    if not index and not (directory / only).is_file():
        raise InputError(
            f"{name} has no {only}; load it by transformers and save that, which writes one"
        )
    sentence = f"{name} cannot be read ({{reason}})"

    @functools.cache
    def open_file(file: str):
        return safetensors.safe_open(directory / file, framework="np")

    with user_errors((OSError, safetensors.SafetensorError, *ODD), InputError, sentence):
        files = index.get("weight_map") or dict.fromkeys(open_file(only).keys(), only)
        wanted = tensors(config)
        called = own_names(config, set(wanted), set(files))
        check_names(name, config, set(wanted), set(called))
        views = {}
        for tensor in wanted:
            there = called[tensor]
            views[tensor] = open_file(files[there]).get_slice(there)
        return views


def own_names(config: ModelConfig, wanted: set[str], found: set[str]) -> dict[str, str]:
    """{tensor as its family calls it: as a file does}: one without a head may lack the prefix."""
    prefix = family_of(config).prefix
    called = {}
    for tensor in found:
        longer = prefix + tensor
        known = longer if longer in wanted and tensor not in wanted else tensor
        called[known] = tensor
    return called


def check_names(name: str, config: ModelConfig, wanted: set[str], found: set[str]):
    """Raise InputError where a directory has not the tensors that its config.json asks for."""
    family = family_of(config)
    odd = wanted - found
    for tensor in found - wanted:
        written_out = config.tied and family.names.get(tensor) == "head"
        if not written_out and not CONSTANT.search(tensor):
            odd.add(tensor)
    if odd:
        listed = ", ".join(sorted(odd)[:6])
        if len(odd) > 6:
            listed += ", ..."
        raise InputError(
            f"{name}: tensors are missing, or do not belong to the {family.architecture} that "
            f"config.json describes: {listed}"
        )


def check_shapes(name: str, config: ModelConfig, views: dict[str, Any]):
    """Raise InputError for a tensor that is not of the shape that config.json says."""
    family = family_of(config)
    rows = rows_of(config)
    for tensor, (names, _) in tensors(config).items():
        size = size_in_file([rows[parameter] for parameter in names], family)
        found = views[tensor].get_shape()
        if found != size:
            raise InputError(f"{name}: tensor {tensor} is {found}; config.json asks for {size}")


def read_part(
    views: dict[str, Any],
    tensor: str,
    names: list[str],
    parameter: str,
    config: ModelConfig,
    dtype,
    index: tuple[slice, ...],
) -> np.ndarray:
    """The part of a parameter at an index, which has a slice for each axis.

    Of a tensor that several parameters share, each device reads the whole of a layer.
    """
    family, rows = family_of(config), rows_of(config)
    p = rows[parameter]
    group = [rows[name] for name in names]
    index = [slice(*one.indices(n)[:2]) for one, n in zip(index, p.shape, strict=True)]
    layers, inner = layers_of(p), index
    if p.layered:
        layers, inner = layers[index[0]], index[1:]
    made = []
    for layer in layers:
        view = views[tensor.format(layer)]
        if len(group) == 1:
            made.append(read_slice(view, p, family, inner))
        else:
            whole = unpack(view[:], group, family)
            made.append(whole[names.index(parameter)][tuple(inner)])
    shape = [one.stop - one.start for one in index]
    x = np.stack(made).astype(dtype).reshape(shape)
    return x + shift(p, family).astype(dtype)


def read_slice(view, p: Param, family: Family, inner: list[slice]) -> np.ndarray:
    """A part of a layer's parameter, flat on each side, from a tensor of its own."""
    inputs, outputs = sides(p)
    places = [flat(outputs, inner[len(inputs)])]
    if inputs:
        places.insert(0, flat(inputs, inner[0]))
    if is_turned(p, family):
        return view[tuple(reversed(places))].T
    return view[tuple(places)]


def flat(side: tuple[int, ...], first: slice) -> slice:
    """A slice of a side's first axis as one of the whole side, flattened.

    Of each side only the first axis is ever split over devices, see lib/sharding.py.
    """
    rest = math.prod(side[1:])
    return slice(first.start * rest, first.stop * rest)

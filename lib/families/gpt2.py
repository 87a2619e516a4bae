"""GPT-2: learned positions, LayerNorm, biases, matrices as [inputs, outputs]."""
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lib.errors import InputError
from lib.families import gpt_neox
from lib.families.family import Family, biased, ungated_flops
from lib.families.gpt_neox import both, layer_norm, mlp
from lib.kernels import lookup, residual
from model import ModelConfig, Param, attention_mixer, embedded, plain_attend, stream


def rows(config: ModelConfig, plain: dict[str, Param], context: int) -> dict[str, Param]:
    """A `rows`: those of GPT-NeoX, and a vector for each of the first positions."""
    shape = context, config.embed
    positions = Param(("in", "embed"), shape, plain["embed"].init, "position")
    return gpt_neox.rows(config, plain) | {"positions": positions}


def gpt2(params, batch, mask, config: ModelConfig):
    """A `forward` (Radford et al. 2019). Raises InputError for rows that are longer than it can."""
    length, most = batch["tokens"].shape[1], len(params["positions"])
    if length > most:
        raise InputError(f"rows have {length} tokens, and the model learned {most} positions; "
                         "allowed is a phase's seq of at most that")
    attend = plain_attend(batch, mask, config)
    none = jnp.zeros((*batch["tokens"].shape, 0), config.dtype)
    gelu = partial(jax.nn.gelu, approximate=True)

    def body(x, w, times):
        times = biased(times, w)
        n = layer_norm(x, w, "attn_norm", config.norm_eps)
        mixed, kept = attention_mixer(n, w, times, (none, none), attend, config)
        x = residual(x, mixed)
        n = layer_norm(x, w, "mlp_norm", config.norm_eps)
        return residual(x, mlp(n, times, gelu)), kept

    x = embedded(params, batch, config)
    x = residual(x, lookup(params["positions"], batch["positions"], config.dtype))
    x, _ = stream(params, x, batch, mask, config, body=body)
    return layer_norm(x, params, "norm", config.norm_eps)


def read(found: dict) -> dict[str, Any]:
    """How many positions it learned."""
    context = found["max_position_embeddings"]
    return {"rows": partial(rows, context=context), "forward": gpt2, "flops": ungated_flops}


def write(config: ModelConfig, params) -> dict[str, Any]:
    """The same, back, and what of dropout is the default."""
    context = len(params["positions"])
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return dropout | {"n_positions": context, "max_position_embeddings": context}


LAYER = "transformer.h.{}."
GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    "learned positions, LayerNorm, biases",
    names={
        "transformer.wte.weight": "embed",
        "transformer.wpe.weight": "positions",
        **both("transformer.ln_f", "norm"),
        "lm_head.weight": "head",
        **both(f"{LAYER}ln_1", "attn_norm"),
        **both(f"{LAYER}attn.c_attn", "q k v"),
        **both(f"{LAYER}attn.c_proj", "o"),
        **both(f"{LAYER}ln_2", "mlp_norm"),
        **both(f"{LAYER}mlp.c_fc", "up"),
        **both(f"{LAYER}mlp.c_proj", "down"),
    },
    forward=gpt2,
    rows=rows,
    read=read,
    write=write,
    only={
        "hidden_act": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    },
    absent={"intermediate_size": 0, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    also={
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "n_positions": "max_position_embeddings",
        "activation_function": "hidden_act",
        "layer_norm_epsilon": "rms_norm_eps",
    },
    unsaid=(
        "attention_bias",
        "mlp_bias",
        "num_key_value_heads",
        "head_dim",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "attention_dropout",
    ),
    heads="fill",
    transposed=False,
)

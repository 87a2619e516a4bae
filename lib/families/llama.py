"""Llama, and the families whose block is the plain one: Mistral and Qwen 3."""
from dataclasses import replace
from functools import partial
from typing import Any

from lib.families.family import NAMES, QK_NORM, Family
from lib.kernels import Mask
from model import ModelConfig, llama


def narrowed(mask: Mask, window: int) -> Mask:
    """A mask within a window; the narrower of two."""
    return replace(mask, window=min(window, mask.window or window))


def mistral(params, batch, mask: Mask, config: ModelConfig, window: int):
    """A `forward`: the plain one, in which a query sees the `window` nearest keys (Mistral 7B)."""
    return llama(params, batch, narrowed(mask, window), config)


def read_mistral(found: dict) -> dict[str, Any]:
    """Without a window it is a Llama."""
    window = found["sliding_window"]
    return {"forward": partial(mistral, window=window)} if window else {}


def write_mistral(config: ModelConfig, params) -> dict[str, Any]:
    """Its window."""
    return {"sliding_window": config.forward.keywords["window"]}


LLAMA = Family("llama", "LlamaForCausalLM", "nothing", heads="divide")
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    "a window",
    forward=mistral,
    read=read_mistral,
    write=write_mistral,
    only={"sliding_window": ()},
    absent={"sliding_window": 4096},
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    "queries and keys normalised in each head",
    names=NAMES | QK_NORM,
    qk_norm=True,
    absent={"head_dim": 128},
    only={"use_sliding_window": (False,), "sliding_window": ()},
)

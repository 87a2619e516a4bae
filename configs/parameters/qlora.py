"""QLoRA: does LoRA lose anything where the matrices beside it are stored in 4 bits?

Paper: QLoRA: Efficient Finetuning of Quantized LLMs, Dettmers et al. 2023 (arXiv 2305.14314)
Method: store the frozen matrices in 4 bits. NF4 has sixteen levels, quantiles of a normal
    distribution; 64 numbers share a scale, their largest magnitude. LoRA trains beside what these
    stand for. The paper finds no loss against 16 bits.
Here: codes are two a byte, uint8, and scales float32, not quantised again; no paged optimiser.
    The base and the text are layra's: Python, then Python in another alphabet. W is dequantised
    whole for a step, so memory falls by what is stored, not by what runs.
Cost: the runs of layra, which are made once, and three of 150 steps: two minutes on two CPU cores.
Run:
    python train.py study configs/parameters/qlora.py --jobs 2
"""
import math
from dataclasses import replace

import jax.numpy as jnp

from configs import base
from configs.parameters.layra import lora, old
from lib.lora import FROZEN, adapted, attach, lora_rows
from lib.matrices import matrices, sides
from lib.study import Claim, Paper, Study
from model import Context, Edited, Model, Param

NF4 = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105004, 0.0,
       0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1.0)
BLOCK = 64  # numbers that share a scale


def quantised(x):
    """(codes uint8 [l blocks 32], scales [l blocks]) of x [l ...]: NF4, two numbers a byte."""
    x = x.reshape(len(x), -1)
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK))).reshape(len(x), -1, BLOCK)
    scales = jnp.max(jnp.abs(x), -1)
    levels = jnp.array(NF4, x.dtype)
    middles = (levels[1:] + levels[:-1]) / 2
    nearest = jnp.searchsorted(middles, x / jnp.maximum(scales, 1e-30)[..., None])
    low, high = nearest[..., ::2], nearest[..., 1::2]
    return (low + 16 * high).astype(jnp.uint8), scales


def restored(codes, scales, shape: tuple[int, ...]):
    """The numbers [l ...], in this shape, that codes and scales stand for."""
    numbers = jnp.stack([codes % 16, codes // 16], -1).reshape(*codes.shape[:2], BLOCK)
    numbers = jnp.array(NF4, scales.dtype)[numbers] * scales[..., None]
    return numbers.reshape(len(numbers), -1)[:, :math.prod(shape[1:])].reshape(shape)


def stored(name: str, layers: int, size: int) -> dict[str, Param]:
    """The rows NAME and NAME_scale that hold `size` numbers a layer; they do not train."""
    blocks = layers, -(-size // BLOCK)
    return {name: Param(("layers", "in", "out"), (*blocks, BLOCK // 2), zeros, FROZEN, "uint8"),
            f"{name}_scale": Param(("layers", "in"), blocks, zeros, FROZEN)}


def zeros(key, shape: tuple[int, ...], dtype):
    """An `init`: nothing yet, since codes are no normal draw."""
    return jnp.zeros(shape, dtype)


def four_bit_rows(config, rows: dict[str, Param], rank: int = 8) -> dict[str, Param]:
    """A `rows`: codes and scales in place of each matrix, LoRA's factors, which alone train."""
    made = lora_rows(config, rows, rank, alone=True)
    for name, row in matrices(config).items():
        del made[name]
        made |= stored(f"{name}/q", config.layers, math.prod(sides(row)))
    return made


def four_bit(params: dict, step, batch, config, alpha: float = 16.0) -> dict:
    """A `reparam`: what codes stand for, with LoRA's product; a plain model stays as it is."""
    whole = dict(params)
    for name, row in matrices(config).items():
        if f"{name}/q" in params:
            whole[name] = restored(params[f"{name}/q"], params[f"{name}/q_scale"], row.shape)
    return adapted(whole, step, batch, config, alpha)


def quantise(model: Model, context: Context) -> Edited:
    """An edit: the matrices into 4 bits, and LoRA's factors beside them, which add nothing yet."""
    params = dict(model.params)
    for name in matrices(model.config):
        params[f"{name}/q"], params[f"{name}/q_scale"] = quantised(params.pop(name))
    edited = attach(Model(model.config, params), context, four_bit_rows)
    return edited._replace(preserves=False)


four = replace(lora, reparam=four_bit, phases=(replace(lora.phases[0], edits=(quantise,)),))
study = Study(
    question="Does LoRA lose anything where the matrices beside it are stored in 4 bits?",
    paper=Paper(title="QLoRA: Efficient Finetuning of Quantized LLMs", authors="Dettmers et al.",
                year=2023),
    needs={"old": old},
    arms={"lora": lora, "qlora": four},
    quick=base.quick(keep=("model.vocab",)),
    claims=(
        Claim(says="4 bits cost less than a fiftieth of a bit in the new alphabet", arm="qlora",
              measure="eval/new.test/bpb", below=0.02),
        Claim(says="and in the old one", arm="qlora", measure="eval/old.test/bpb", below=0.02),
    ),
    seeds=3,
)

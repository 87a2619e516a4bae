"""S4D: does it matter how a diagonal state space begins?

Paper: On the Parameterization and Initialization of Diagonal State Space Models, Gu et al. 2022
    (003:10)
Method: linear recurrences x' = A x + u with a diagonal complex A for each channel, made discrete by
    zero-order hold with a learnt step, and trained as a convolution by FFT. A begins as -1/2 + i w:
    w of the normal part of HiPPO-LegS, whose responses S4D's approach as the state grows (legs),
    formulas near it (inv, lin), or exp(normal), as in the authors' code (random).
Here: bytes of Python's library, not Long Range Arena; the MLP stays. 16 pairs. B is all ones, as C
    alone counts then. A and the step do not decay, and learn at a quarter of the rate. The peak
    is 0.008 in all arms; mixers.py finds 0.064 better. Documents' ends, 1 row in 100, stop nothing.
Cost: 12 runs, 5 minutes on two CPU cores.
Run:
    python train.py study configs/understanding/s4d.py --jobs 2
"""
import math
from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from lib.errors import InputError
from lib.study import Claim, Paper, Study
from model import ModelConfig, Param, embedded, rms_norm, stream, table
from train import Config


def normal_part(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(eigenvalues [n], unitary vectors [n n]) of HiPPO-LegS + P P^T, P = sqrt(n + 1/2)."""
    b = np.sqrt(2 * np.arange(n) + 1)
    skew = np.triu(np.outer(b, b), 1) / 2
    values, vectors = np.linalg.eigh(-1j * (skew - skew.T))
    return -0.5 + 1j * values, vectors


def imaginary(key, shape, dtype, how: str):
    """The imaginary parts of A [layers embed state] to begin with."""
    if how == "random":
        return jnp.exp(jax.random.normal(key, shape, dtype))
    i, n = np.arange(shape[-1]), 2 * shape[-1]
    parts = {"lin": math.pi * i, "inv": n / math.pi * (n / (2 * i + 1) - 1),
             "legs": np.sort(normal_part(n)[0].imag)[n // 2:]}
    return jnp.broadcast_to(jnp.asarray(parts[how], dtype), shape)


def log_uniform(key, shape, dtype, low: float, high: float):
    """Logarithms, uniform between those of two values."""
    return jax.random.uniform(key, shape, dtype, math.log(low), math.log(high))


def s4d_rows(config: ModelConfig, rows: dict, pairs: int = 16,
             how: Literal["legs", "inv", "lin", "random"] = "lin") -> dict:
    """`rows`: each channel's A, C and step, a skip, and a gated product, for those of attention."""
    axes, sizes = ("layers", "embed", "state"), (config.layers, config.embed, pairs)
    own = {
        "imag": Param(axes, sizes, partial(imaginary, how=how), "ssm"),
        "log_real": Param(axes, sizes, partial(log_uniform, low=0.5, high=0.5), "ssm"),
        "log_step": Param(axes[:2], sizes[:2], partial(log_uniform, low=1e-3, high=0.1), "ssm"),
        "c_real": Param(axes, sizes, 0.5**0.5, "vector"),
        "c_imag": Param(axes, sizes, 0.5**0.5, "vector"),
        "skip": Param(axes[:2], sizes[:2], 1.0),
        "mix": Param((*axes[:2], "out"), (*sizes[:2], 2 * config.embed), config.embed**-0.5),
    }
    return {name: row for name, row in rows.items() if name not in ("q", "k", "v", "o")} | own


def kernel(w, t: int) -> jax.Array:
    """What each channel answers to an impulse, 0 .. t-1 steps after it [t embed]."""
    a = -jnp.exp(w["log_real"]) + 1j * w["imag"]
    stepped = a * jnp.exp(w["log_step"])[:, None]
    c = (w["c_real"] + 1j * w["c_imag"]) * (jnp.exp(stepped) - 1) / a
    return 2 * jnp.einsum("dn,dnt->td", c, jnp.exp(stepped[..., None] * jnp.arange(t))).real


def s4d(x, w, times):
    """A mixer: x [b t d] convolved with the kernels; then GELU and a gated product."""
    t, wide = x.shape[1], x.astype(jnp.promote_types(x.dtype, jnp.float32))
    spectrum = jnp.fft.rfft(wide, 2 * t, 1) * jnp.fft.rfft(kernel(w, t), 2 * t, 0)
    y = jnp.fft.irfft(spectrum, 2 * t, 1)[:, :t] + w["skip"] * x
    value, gate = jnp.split(times(jax.nn.gelu(y.astype(x.dtype)), "mix"), 2, -1)
    return value * jax.nn.sigmoid(gate), None


def mixed(params, batch, mask, config: ModelConfig, mixer=s4d):
    """A `forward` with another mixer for attention; InputError for a mask that is not causal."""
    if mask.kind != "causal" or mask.window:
        raise InputError(f"a recurrence has the mask {mask}; allowed is a causal one, no window")
    x, _ = stream(params, embedded(params, batch, config), batch, mask, config, mixer=mixer)
    return rms_norm(x, params["norm"], config.norm_eps)


def flops(config: ModelConfig, seq: int, transforms: int = 3) -> int:
    """FLOPs a token: 6 of a matmul parameter, and FFTs of two rows' length there and back."""
    matmul = sum(row.size for row in table(config).values() if row.group == "matrix")
    fft = 15 * transforms * math.log2(2 * seq) * config.layers * config.embed
    return 6 * (matmul + config.vocab * config.embed) + round(fft)


def arm(how: str) -> Config:
    """A run whose state spaces begin in a way."""
    own = replace(base.shape(3, 96, 0), rows=partial(s4d_rows, how=how), forward=mixed, flops=flops)
    phase, data = base.small.phases[0], replace(base.small.data, tokenizer="bytes")
    slower = replace(phase, lr={"ssm": 0.25})
    return replace(base.small, model=own, phases=(slower,), prompts=(), data=data)


study = Study(
    question="Does it matter how a diagonal state space begins?",
    paper=Paper(title="On the Parameterization and Initialization of Diagonal State Space Models",
                authors="Gu et al.", year=2022, seeds=("003:10",)),
    arms={how: arm(how) for how in ("random", "legs", "inv", "lin")}, quick=base.quick(),
    claims=(Claim(says="lin beats random imaginary parts", arm="lin", below=0.0),
            Claim(says="inv beats them", arm="inv", below=0.0),
            Claim(says="legs beats them", arm="legs", below=0.0),
            Claim(says="lin is less than 0.01 behind legs", arm="lin", control="legs", below=0.01)),
    seeds=3)

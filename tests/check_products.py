"""Matrix products of JAX beside PyTorch's on this CPU, in turn in one process: what they allow.

    python tests/check_products.py [--rounds 30] [--dtype bfloat16]

Rows of 4,096 tokens times the matrices of models 128, 384 and 768 wide, the gradient of
such a matrix, and a head. Medians, in GFLOP/s.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from lib.hardware import tune_for_cpu

tune_for_cpu()  # before JAX is loaded
import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from lib.products import product  # noqa: E402

SHAPES = [
    (4096, 128, 344),
    (4096, 384, 1024),
    (4096, 768, 2048),
    (384, 4096, 1024),
    (4096, 384, 4096),
]


def seconds(function) -> float:
    """What one call takes."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def compared(rows: int, inputs: int, outputs: int, rounds: int, dtype: str) -> tuple[float, float]:
    """GFLOP/s of (JAX, PyTorch)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    w = rng.normal(size=(inputs, outputs)).astype(np.float32)
    compiled = jax.jit(lambda x, w: product("ni,io->no", x, w, x.dtype))
    ours = [jax.numpy.asarray(one, dtype) for one in (x, w)]
    theirs = [torch.tensor(one, dtype=getattr(torch, dtype)) for one in (x, w)]
    both = (lambda: compiled(*ours).block_until_ready()), (lambda: theirs[0] @ theirs[1])
    times = [[seconds(one) for one in both] for _ in range(rounds)][rounds // 5:]
    flops = 2e-9 * rows * inputs * outputs
    return tuple(flops / statistics.median(own) for own in zip(*times, strict=True))


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = vars(parser.parse_args())
    for shape in SHAPES:
        ours, theirs = compared(*shape, **options)
        print(f"{shape}: {ours:.0f} against {theirs:.0f} GFLOP/s, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()

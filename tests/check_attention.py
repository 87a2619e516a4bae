"""Attention of a CPU, forward and backward, of this checkout and of others, in one process in turn.

    python tests/check_attention.py [CHECKOUT ...] [--heads 6] [--width 64] [--lengths 256 1024 2048]

Rows of 4,096 tokens in all, causal, float32. For each length: seconds of the processor that compiling
took, MiB of scratch, and the median time of a call, by the clock and by the processor, with its ratio
to that of the last checkout, the median over `--rounds` rounds whose order turns round. Trust the
clock, on a quiet machine: the processor's time does not see a core that is left idle. 2e-6 is the
largest difference from the first checkout that is let pass.
"""
import argparse
import importlib
import statistics
import sys
import time
from functools import partial
from pathlib import Path

TOKENS = 4096


def module(root: str, name: str):
    """A module of a checkout, beside the one of that name that is loaded."""
    for loaded in [one for one in sys.modules if one == "lib" or one.startswith("lib.")]:
        del sys.modules[loaded]
    sys.path.insert(0, str(Path(root).resolve()))
    found = importlib.import_module(name)
    sys.path.pop(0)
    return found


def program(kernels, given):
    """(attention and its gradients compiled, seconds of the processor that this took)."""
    import jax

    *qkv, d_out, segments = given

    @jax.jit
    def both(q, k, v, d_out):
        mask = kernels.Mask("causal", 0)
        attend = partial(kernels.attention, mask=mask, segments=segments, implementation="xla")
        out, back = jax.vjp(attend, q, k, v)
        return out, *back(d_out)

    begun = time.process_time()
    made = both.lower(*qkv, d_out).compile()
    return made, time.process_time() - begun


def call(made, given) -> tuple[float, float]:
    """Seconds of a call, by the clock and by the processor."""
    import jax

    begun = time.perf_counter(), time.process_time()
    jax.block_until_ready(made(*given[:-1]))
    return time.perf_counter() - begun[0], time.process_time() - begun[1]


def given(length: int, heads: int, width: int) -> list:
    """q, k, v, a gradient of the output, and segments."""
    import jax
    import jax.numpy as jnp

    rows = TOKENS // length
    shapes = [(rows, length, heads, *group, width) for group in ((1,), (), (), (1,))]
    keys = jax.random.split(jax.random.key(0), 4)
    drawn = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    return [*drawn, jnp.ones((rows, length), jnp.int32)]


def measure(checkouts: dict, length: int, a):
    """Print a line for each checkout."""
    import jax

    x = given(length, a.heads, a.width)
    made = {name: program(kernels, x) for name, kernels in checkouts.items()}
    outs = [one(*x[:-1]) for one, _ in made.values()]
    for got in outs:
        errors = jax.tree.map(lambda one, two: abs(one - two).max() / abs(two).max(), got, outs[0])
        assert max(errors) < 2e-6, errors
    times = {name: [] for name in made}
    for number in range(a.rounds):
        for name in list(made)[:: 1 - 2 * (number % 2)]:
            times[name].append(call(made[name][0], x))
    last = times[list(made)[-1]]
    for name, (one, seconds) in made.items():
        ratios = [statistics.median(b[i] / t[i] for t, b in zip(times[name], last, strict=True))
                  for i in (0, 1)]
        clock, processor = (1e3 * statistics.median(t[i] for t in times[name]) for i in (0, 1))
        scratch = one.memory_analysis().temp_size_in_bytes / 2**20
        print(f"{length:5} {name:24} compiled in {seconds:.2f} s, scratch {scratch:.1f} MiB, "
              f"clock {clock:.1f} ms (speed {ratios[0]:.2f}), "
              f"processor {processor:.1f} ms (speed {ratios[1]:.2f})", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", nargs="*")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 2048])
    a = parser.parse_args()
    here = str(Path(__file__).parent.parent)
    module(here, "lib.hardware").tune_for_cpu()
    checkouts = {name: module(name, "lib.kernels") for name in (here, *a.checkouts)}
    for length in a.lengths:
        measure(checkouts, length, a)


if __name__ == "__main__":
    main()

"""What a run says of itself before it begins."""
import time
from datetime import timedelta

import jax
import jax.numpy as jnp
import numpy as np

from model import count


def grid(devices, mesh) -> str:
    """The devices, and how a mesh arranges them."""
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return f"{len(devices)} x {devices[0].device_kind}, mesh {sizes}"


def banner(run, step, attention: str):
    """Print what is about to run, before it runs; step, attention: the first phase's, compiled and chosen."""
    config, course = run.config, run.course
    shapes, tokens, first = course.models, int(course.tokens[-1]), course.models[0]
    multiply, square = jax.jit(jnp.matmul), np.ones((1024, 1024), first.dtype)
    for _ in range(2):
        begun = time.perf_counter()
        multiply(square, square).block_until_ready()
    speed = run.mesh.devices.size * 2 * 1024**3 / (time.perf_counter() - begun)
    memory = step.memory_analysis()
    memory = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20
    later = config.data.stream or any(p.steer for p in config.phases)
    epochs = {} if later else run.loader.epochs(int(course.ends[-1]))
    epochs = ", ".join(f"{name} {n:.2f}" for name, n in epochs.items()) or "not known yet"
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    lines = {
        "run": f"{config.runs}/{config.name}",
        "parameters": " -> ".join(f"{count(m):,} ({m.layers} layers)" for m in dict.fromkeys(shapes)),
        "tokens": f"{tokens:,}, {tokens / count(shapes[-1]):.1f} a parameter; epochs: {epochs}",
        "FLOPs": f"{course.flops[-1]:.3g}",
        "memory": f"{memory:,.0f} MiB a device in the first phase",
        "devices": grid(run.mesh.devices.ravel(), run.mesh) + processes,
        "attention": f"{attention}, {first.dtype}",
        "expected": f"{timedelta(seconds=int(course.flops[-1] / speed * 2))} at half a bare matmul's speed",
    }
    print("\n".join(f"{k:>11}  {v}" for k, v in lines.items()), flush=True)

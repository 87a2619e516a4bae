"""What a run says of itself before it begins."""

import time
from datetime import timedelta

import jax
import jax.numpy as jnp

from lib.memory import step_memory
from lib.products import product
from lib.tables import printable
from model import count


def grid(devices, mesh) -> str:
    """The devices, and how a mesh arranges them."""
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return f"{len(devices)} x {devices[0].device_kind}, mesh {sizes}"


def matmul_speed(dtype: str) -> float:
    """FLOP/s of a bare matrix product of this dtype on one device here."""
    square = jnp.ones((1024, 1024), dtype)
    multiply = jax.jit(lambda x, y: product("ni,io->no", x, y, dtype))
    for _ in range(2):  # the first one is compiled
        begun = time.perf_counter()
        multiply(square, square).block_until_ready()
    return 2 * 1024**3 / (time.perf_counter() - begun)


def epochs_of(run) -> str:
    """How often the run reads each source, where that is known before it begins."""
    if run.config.data.stream or run.plan.steers:
        return "not known yet"
    found = run.loader.epochs(run.plan.total)
    return ", ".join(f"{name} {n:.2f}" for name, n in found.items())


def banner(run, step, attention: str):
    """Print what is about to run.

    step: the first phase's, compiled. attention: the implementation chosen for it.
    """
    config, plan = run.config, run.plan
    models, tokens, flops = plan.models, int(plan.tokens[-1]), float(plan.flops[-1])
    memory = step_memory(step) / 2**20
    devices = grid(run.mesh.devices.ravel(), run.mesh)
    if jax.process_count() > 1:
        devices += f", {jax.process_count()} processes"
    seconds = 2 * flops / (run.mesh.devices.size * matmul_speed(models[0].dtype))
    sizes = (f"{count(model):,} ({model.layers} layers)" for model in dict.fromkeys(models))
    each = tokens / count(models[-1])
    lines = {
        "run": f"{config.runs}/{config.name}",
        "parameters": " -> ".join(sizes),
        "tokens": f"{tokens:,}, {each:.1f} a parameter; epochs: {epochs_of(run)}",
        "FLOPs": f"{flops:.3g}",
        "memory": f"{memory:,.0f} MiB a device in the first phase",
        "devices": devices,
        "attention": f"{attention}, {models[0].dtype}",
        "expected": f"{timedelta(seconds=int(seconds))} at half a bare matmul's speed",
    }
    print("\n".join(f"{name:>11}  {printable(said)}" for name, said in lines.items()), flush=True)

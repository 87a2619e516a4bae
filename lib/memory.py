"""Memory: whether a run fits, its state before anything is compiled, and what to do if not."""
import math
import os

import jax

from lib.errors import InputError
from lib.optim import state_like

LESS = (
    "allowed is a smaller model, more parts of a batch (--phases.N.accumulate), --model.remat "
    "all, or the same spread over more devices (--mesh.fsdp)"
)

POSITION = 24  # bytes of one in a batch, whose arrays are of 32 bits: tokens, targets, segments ...


def check_state(config, plan, mesh):
    """Raise InputError for a phase whose parameters and optimiser state alone do not fit a device.

    Activations and gradients come on top of them; those only the compiler knows.
    """
    there = memory_of(mesh.devices.flat[0]) / cpus_of(mesh)
    for phase, model in enumerate(plan.models):
        needed = 0
        for x in jax.tree.leaves(state_like(model, config.optimizer, mesh)):
            needed += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        if there and needed > there:
            raise InputError(
                f"phases.{phase}: parameters and optimiser state take {needed / 2**30:,.1f} GiB a "
                f"device, which has {there / 2**30:,.1f} GiB; {LESS}")


def check_batch_memory(config):
    """Raise InputError for a phase whose batches alone do not fit the memory of this machine."""
    there = host_memory()
    for i, phase in enumerate(config.phases):
        needed = POSITION * phase.batch * phase.seq / jax.process_count()
        if needed > there:
            raise InputError(
                f"phases.{i}: a batch takes {needed / 2**30:,.1f} GiB of this machine, which has "
                f"{there / 2**30:,.1f} GiB; allowed is a smaller batch x seq")


def check_step(step, phase: int, mesh):
    """Raise InputError for a phase whose step, compiled, takes more than a device has."""
    there, needed = memory_of(mesh.devices.flat[0]) / cpus_of(mesh), step_memory(step)
    if there and needed > there:
        raise InputError(
            f"phases.{phase}: a step takes {needed / 2**30:,.1f} GiB a device, which has "
            f"{there / 2**30:,.1f} GiB; {LESS}")


def step_memory(step) -> int:
    """Bytes of a device that a compiled step takes: state, batch, and what it works with."""
    of = step.memory_analysis()
    made = of.output_size_in_bytes - of.alias_size_in_bytes  # not in the place of what it was given
    return of.argument_size_in_bytes + of.temp_size_in_bytes + made


def cpus_of(mesh) -> int:
    """How many devices of a mesh share the memory of this machine; 1 where each has its own."""
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return len(own) if own and own[0].platform == "cpu" else 1


def memory_of(device) -> float:
    """Bytes of memory that a device has; 0 where that is not known."""
    if device.platform == "cpu":
        return host_memory()
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def host_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_out(error: BaseException) -> bool:
    """Whether an error says that memory is out; XLA says so by the first word of its message."""
    return isinstance(error, MemoryError) or str(error).startswith("RESOURCE_EXHAUSTED")

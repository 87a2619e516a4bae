"""Time steps, and what a process holds at most."""
import itertools
import resource
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lib.hardware import wait_on_cpu

WARM_UP = 3  # steps before any is timed


class Times(NamedTuple):
    """What timing the steps of a program gave."""

    steps: list[float]  # seconds of each
    busy: float  # the part of all that time in which the host was dispatching
    loss: float  # the mean over runs, at the end


def time_steps(
    step,
    state,
    batches: list[dict],
    lr: dict,
    seconds: float,
    warm_up: int = WARM_UP,
) -> tuple[Any, Times]:
    """(state, times) of steps for so many seconds, five at least.

    Each step is dispatched before the one before it has ended, but for CPUs, as the loop of a run
    does it.
    """
    for _ in range(warm_up):
        state, _ = step(state, batches[0], lr)
        wait_on_cpu(state)
    jax.block_until_ready(state)
    times = []
    last = None
    busy = 0.0
    begun = now = time.perf_counter()
    for batch in itertools.cycle(batches):
        if now - begun >= seconds and len(times) >= 5:
            break
        wait_on_cpu(state)
        called = time.perf_counter()
        state, metrics = step(state, batch, lr)
        busy += time.perf_counter() - called
        if last is not None:
            jax.block_until_ready(last)
            then, now = now, time.perf_counter()
            times.append(now - then)
        last = metrics
    loss = float(jnp.mean(last["train/loss"]))
    return state, Times(times, busy / (now - begun), loss)


def median_ms(seconds: float, function, *arguments) -> float:
    """Milliseconds that a call takes until its result is there: the median within `seconds`."""
    times = []
    jax.block_until_ready(function(*arguments))
    while len(times) < 5 or sum(times) < seconds:
        begun = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(times)


def peak_gib() -> float:
    """The most that this process has held: of an accelerator's memory, or of the machine's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return round(stats["peak_bytes_in_use"] / 2**30, 3)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)

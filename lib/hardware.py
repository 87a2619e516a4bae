"""What is known of devices: peaks, memory, and what makes XLA fast on a CPU."""
import ctypes
import gc
import os
import sys

import jax

# Of one device, from the makers' data sheets: dense bfloat16 FLOP/s, GiB of memory, its GB/s, GB/s to others.
HARDWARE = {"NVIDIA A100": (312e12, 80, 2039, 300), "NVIDIA H100": (989e12, 80, 3350, 450),
            "NVIDIA H200": (989e12, 141, 4800, 450), "NVIDIA B200": (2250e12, 180, 8000, 900),
            "TPU v4": (275e12, 32, 1228, 300), "TPU v5 lite": (197e12, 16, 819, 200),
            "TPU v5": (459e12, 95, 2765, 600), "TPU v6 lite": (918e12, 32, 1640, 448)}


def hardware(kind: str) -> tuple[float, float, float, float]:
    """HARDWARE of a kind of device, by the longest name that it begins with; zeros where it is not known."""
    return HARDWARE.get(max((n for n in HARDWARE if kind.startswith(n)), key=len, default=""), (0, 0, 0, 0))


def peak() -> float:
    """Peak FLOP/s of all devices together; 0 where their kind is not known."""
    return jax.device_count() * hardware(jax.devices()[0].device_kind)[0]


def tune_for_cpu():
    """What makes XLA faster on a CPU, and tracing anywhere: call it before JAX looks for devices.

    The GNU C library keeps what is freed, since XLA asks for a step's scratch anew at each step. With room
    beyond the heap's end, and small pieces merged as they are freed, that scratch fits where the last one
    was: otherwise a process came to hold six of them. What reads the same arrays becomes one loop of several
    outputs, so that parameters and moments are updated in one pass, in place. Tracing makes many objects,
    nearly all of which live, and jax is called back at each look for garbage: Python looks less often.
    """
    gc.set_threshold(50_000)
    if hasattr(libc := ctypes.CDLL(None) if sys.platform == "linux" else None, "mallopt"):
        for option, value in ((-4, 0), (-1, -1), (-8, 1), (-2, 2**30), (1, 0)):
            libc.mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX, M_TOP_PAD, M_MXFAST
    given = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_extra_options" not in given:
        wanted = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"
        os.environ["XLA_FLAGS"] = f"{given} {wanted}".strip()

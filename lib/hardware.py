"""What is known of devices, and what makes XLA fast on a CPU."""
import ctypes
import gc
import os
import re
import sys
import time
from typing import NamedTuple

import jax

AMPERE, HOPPER = (8, 0), (9, 0)  # compute capabilities of NVIDIA's GPUs


class Hardware(NamedTuple):
    """One device, from its maker's data sheet; zeros where it is not known."""

    peak: float = 0.0  # dense bfloat16 FLOP/s, summed up in float32
    memory_gib: float = 0.0
    memory_gb_s: float = 0.0  # to and from its memory
    network_gb_s: float = 0.0  # to other devices of its host, or of a TPU's slice
    hosts_gb_s: float = 0.0  # of a GPU, to those of other hosts, as cloud machines have it
    capability: tuple[int, int] = (0, 0)  # of a GPU by NVIDIA


HARDWARE = {
    "NVIDIA A100": Hardware(312e12, 80, 2039, 300, 25, (8, 0)),
    "NVIDIA A10": Hardware(125e12, 24, 600, 32, 12.5, (8, 6)),
    "NVIDIA A10G": Hardware(70e12, 24, 600, 32, 12.5, (8, 6)),
    "NVIDIA L4": Hardware(121e12, 24, 300, 32, 12.5, (8, 9)),
    "NVIDIA GeForce RTX 4090": Hardware(165e12, 24, 1008, 32, 12.5, (8, 9)),
    "NVIDIA H100": Hardware(989e12, 80, 3350, 450, 50, (9, 0)),
    "NVIDIA H200": Hardware(989e12, 141, 4800, 450, 50, (9, 0)),
    "NVIDIA GH200": Hardware(989e12, 96, 4000, 450, 50, (9, 0)),
    "NVIDIA B200": Hardware(2250e12, 180, 8000, 900, 50, (10, 0)),
    "Tesla T4": Hardware(65e12, 16, 320, 16, 6.25, (7, 5)),  # the peak is float16's: no bfloat16
    "TPU v4": Hardware(275e12, 32, 1228, 300),
    "TPU v5 lite": Hardware(197e12, 16, 819, 200),
    "TPU v5": Hardware(459e12, 95, 2765, 600),
    "TPU v6 lite": Hardware(918e12, 32, 1640, 448),
    "TPU7x": Hardware(1153e12, 96, 3690, 600),  # one of a chip's two
}
MALLOPT = {  # options of the GNU C library's malloc, see `tune_for_cpu`
    -4: 0,  # M_MMAP_MAX
    -1: -1,  # M_TRIM_THRESHOLD
    -8: 1,  # M_ARENA_MAX
    -2: 2**30,  # M_TOP_PAD, bytes
    1: 0,  # M_MXFAST
}
PAUSE = 1 / 500  # of a step, between its end and the next: its scratch is freed meanwhile
ALLOCATIONS = 50_000  # objects that Python makes between two looks for garbage


def hardware(kind: str) -> Hardware:
    """What is known of a kind of device, by the longest name in HARDWARE that it begins with."""
    names = [name for name in HARDWARE if re.match(rf"{name}\b", kind)]
    if not names:
        return Hardware()
    return HARDWARE[max(names, key=len)]


def capability(kind: str) -> tuple[int, int]:
    """The compute capability of a kind of NVIDIA GPU, asked of one here; (0, 0) where unknown."""
    for device in jax.local_devices():
        told = getattr(device, "compute_capability", "")
        if device.device_kind == kind and "." in told and kind.startswith(("NVIDIA", "Tesla")):
            major, minor = told.split(".")
            return int(major), int(minor)
    return hardware(kind).capability


def peak() -> float:
    """The peak FLOP/s of all devices together; 0 where their kind is not known."""
    kind = jax.devices()[0].device_kind
    return jax.device_count() * hardware(kind).peak


def tune_for_cpu():
    """Make XLA faster on a CPU, and tracing anywhere; to be called before JAX looks for devices.

    - XLA asks for a step's scratch memory anew at each step. The C library is told to keep what is
      freed, to hold room beyond the heap's end, and to merge small pieces as they are freed: then
      that memory fits where it was before. Without this a process came to hold six times as much.
    - XLA is told to make one loop with several outputs of what reads the same arrays. Then
      parameters and moments are updated in one pass, in place.
    - Tracing makes many objects, nearly all of which live on, and JAX is called back at each look
      for garbage. Python is told to look less often.
    """
    gc.set_threshold(ALLOCATIONS)
    if sys.platform == "linux" and not os.path.exists("/dev/nvidiactl"):  # scratch is the GPU's
        tune_malloc()
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_extra_options" not in flags:
        wanted = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"
        os.environ["XLA_FLAGS"] = f"{flags} {wanted}".strip()


def wait_on_cpu(state):
    """Wait on a CPU, and there alone, until arrays are made, before what uses them is dispatched.

    A step that follows at once gets its scratch memory while the one before it still has its own,
    and the heap comes to hold both, and more as small pieces fill the gaps. That memory is freed a
    moment after the results are there, and nothing tells when: so a little more time passes.
    """
    if jax.default_backend() != "cpu":
        return
    begun = time.perf_counter()
    jax.block_until_ready(state)
    waited = time.perf_counter() - begun
    time.sleep(waited * PAUSE)


def tune_malloc():
    """Set the options of MALLOPT, where the C library is GNU's."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return
    for option, value in MALLOPT.items():
        library.mallopt(option, value)
